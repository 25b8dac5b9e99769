"""The fixtures of tests/api, and a server on a socket."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "api"))

from compat import Served
from conftest import script, seed, tokenizer, tokenizer_folder
from scripted import Script, ScriptedEngine

from gptoss_compile.runtime.api.tokenizer import Tokenizer

__all__ = ["script", "seed", "tokenizer", "tokenizer_folder"]


@pytest.fixture
def engine(script: Script) -> Iterator[ScriptedEngine]:
    """With room for the prompts of coding agents."""
    engine = ScriptedEngine(script, max_context=65536, num_pages=8192)
    engine.start()
    yield engine
    engine.shutdown(drain=False)


@pytest.fixture
def served(engine: ScriptedEngine, tokenizer: Tokenizer, script: Script) -> Iterator[Served]:
    yield Served(engine, tokenizer, script)
