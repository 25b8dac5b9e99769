"""The scripts of bench/ as modules, for tests."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[2] / "bench"


def bench(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module of its own: one is called like a folder of the repository."""
    monkeypatch.syspath_prepend(str(BENCH))
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def learn_kernels(codes: dict[bytes, str], folder: Path) -> None:
    """Add a folder's kernels to those that a driver knows, as symbol and name."""
    for path in folder.glob("*.cubin"):
        symbol = json.loads(path.with_suffix(".json").read_text())["symbol"]
        codes[path.read_bytes()] = f"{symbol} {path.stem}"
