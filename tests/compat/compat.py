"""A server on a loopback socket with scripted sampling, and the clients that other people wrote.

The clients are no dependencies of this project. Python ones are looked for in the interpreter GPTOSS_COMPAT_PYTHON (else
this one), node ones in the folder GPTOSS_COMPAT_NODE that holds node_modules; tests of those that are missing are skipped.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted import Script, ScriptedEngine

from gptoss_compile.runtime import server
from gptoss_compile.runtime.api.options import ServerOptions
from gptoss_compile.runtime.api.tokenizer import Tokenizer

PYTHON = os.environ.get("GPTOSS_COMPAT_PYTHON", sys.executable)
NODE = os.environ.get("GPTOSS_COMPAT_NODE", "")
CLIENTS = Path(__file__).parent / "clients"
KEY = "key"


class Served:
    """base: with /v1. run: a client, given `base` and further arguments, whose last line of output is JSON."""

    def __init__(self, engine: ScriptedEngine, tokenizer: Tokenizer, script: Script) -> None:
        self.engine, self.tokenizer, self.script = engine, tokenizer, script
        listener = server._listen("127.0.0.1", 0)
        self.root = server._url(listener)
        self.base = f"{self.root}/v1"
        options = ServerOptions(("gpt-oss",), (KEY,), system_date="2026-01-02")

        def run() -> None:
            with contextlib.suppress(server.EngineDiedError):  # how the engine's fixture ends it
                server.run(engine, tokenizer, options, listener)

        threading.Thread(target=run, daemon=True).start()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{self.root}/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.01)
        raise TimeoutError("the server did not start")

    def run(self, command: list[str], seconds: int = 300, **settings: Any) -> str:
        environment = {**os.environ, "OPENAI_API_KEY": KEY, "GPTOSS_KEY": KEY, **settings.pop("env", {})}
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=environment, stdin=subprocess.DEVNULL, **settings
        )
        assert done.returncode == 0, f"{command[:3]}: {done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def client(self, name: str, *arguments: str) -> Any:
        path = CLIENTS / name
        if path.suffix == ".py":
            return json.loads(self.run([PYTHON, str(path), self.base, *arguments]).splitlines()[-1])
        copy = Path(NODE) / name  # imports are resolved from where the file lies
        copy.write_text(path.read_text())
        return json.loads(self.run(["node", str(copy), self.base, *arguments], cwd=NODE).splitlines()[-1])

    def prompt(self, index: int = -1) -> str:
        return str(self.tokenizer.encoding.decode(self.engine.prompts[index]))


def need_python(module: str) -> pytest.MarkDecorator:
    """Skips where the interpreter does not have the module."""
    check = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    missing = subprocess.run([PYTHON, "-c", check], capture_output=True).returncode != 0
    return pytest.mark.skipif(missing, reason=f"{module} is not installed in {Path(PYTHON).name} (GPTOSS_COMPAT_PYTHON)")


def need_node(package: str) -> pytest.MarkDecorator:
    missing = not NODE or not shutil.which("node") or not (Path(NODE) / "node_modules" / package).is_dir()
    return pytest.mark.skipif(missing, reason=f"node or its package {package} is not there (GPTOSS_COMPAT_NODE)")
