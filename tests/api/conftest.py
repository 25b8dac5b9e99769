"""The tokenizer from the bpe-openai package; an application, and a server, over the real engine with scripted sampling."""

from __future__ import annotations

import gzip
import importlib.util
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from scripted import Script, ScriptedEngine
from served import Running, asgi_client

from gptoss_compile.runtime import server
from gptoss_compile.runtime.api.app import build_app
from gptoss_compile.runtime.api.options import ServerOptions
from gptoss_compile.runtime.api.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = importlib.util.find_spec("bpe_openai")
    assert spec is not None and spec.origin is not None
    folder = tmp_path_factory.mktemp("tokenizer")
    packed = Path(spec.origin).parent / "data" / "o200k_base.tiktoken.gz"
    (folder / "o200k_base.tiktoken").write_bytes(gzip.decompress(packed.read_bytes()))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture
def seed() -> int:
    """A fresh seed a run, printed with a failure."""
    value = random.SystemRandom().getrandbits(32)
    print(f"seed = {value}")
    return value


@pytest.fixture
def script(tokenizer: Tokenizer) -> Script:
    return Script(tokenizer)


@pytest.fixture
def engine(script: Script) -> Iterator[ScriptedEngine]:
    engine = ScriptedEngine(script)
    engine.start()
    yield engine
    engine.shutdown(drain=False)


@pytest.fixture
def options() -> ServerOptions:
    return ServerOptions(served_model_names=("gpt-oss", "alias"), system_date="2026-01-02", max_body_bytes=1 << 20)


@pytest.fixture
def client(engine: ScriptedEngine, tokenizer: Tokenizer, options: ServerOptions) -> httpx.AsyncClient:
    return asgi_client(build_app(engine, tokenizer, options))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    (tmp_path / "kestrel.md").write_text("# Kestrels\n\nA kestrel hovers.\n\nSee [owls](deep/owl.md).\n" + "line\n" * 900)
    (tmp_path / "deep" / "owl.md").write_text("# Owls\n\nAn owl hunts at night, silently.\n")
    (tmp_path / "skipped.bin").write_bytes(b"owl")
    return tmp_path


@pytest.fixture
def running(engine: ScriptedEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    made: list[server._Server] = []
    original = server._Server.__init__

    def remember(self: server._Server, *arguments: Any) -> None:
        original(self, *arguments)
        made.append(self)

    monkeypatch.setattr(server._Server, "__init__", remember)
    running = Running(engine, tokenizer)
    running.servers = made
    yield running
    made[0].should_exit = True
    running.thread.join(10)
    assert not running.thread.is_alive()


@pytest.fixture
def strict(running: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=running.url + "/v1", api_key="key", max_retries=0, _strict_response_validation=True
    ) as client:
        yield client
