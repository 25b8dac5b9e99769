"""Clients that leave while a tool of the server runs: the tool ends, and so does all that was held for it, within 2 s."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted import Script, ScriptedEngine
from served import asgi_client
from server_tools import MCP, PY, SANDBOX, URL, WEB, Station, call, children, needs_sandbox
from test_stress import idle, scope_of

from gptoss_compile.runtime.api.app import build_app
from gptoss_compile.runtime.api.options import ServerOptions
from gptoss_compile.runtime.api.tokenizer import Tokenizer
from gptoss_compile.runtime.api.tool_server import mcp_tools
from gptoss_compile.runtime.api.tool_server.browser import Document
from gptoss_compile.runtime.api.tool_server.server import ToolServer

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Endless(Station):
    """A search backend and an MCP server that answer nothing. `running` calls wait."""

    source = "nowhere"

    def __init__(self) -> None:
        super().__init__()
        self.running = 0

    async def search(self, query: str, count: int) -> list[Document]:
        self.running += 1
        try:
            await asyncio.sleep(3600)
        finally:
            self.running -= 1
        return []

    async def fetch(self, url: str) -> Document:
        raise AssertionError

    async def call_tool(self, name: str, arguments: dict[str, Any], read_timeout_seconds: float) -> Any:
        return await self.search(name, 0)


async def leave_in_a_call(app: Any, body: dict[str, Any], called: Callable[[], bool]) -> float:
    """Ask, go away once the tool runs, and return how long the server then took to let go of the request."""
    inbox: asyncio.Queue[Any] = asyncio.Queue()
    inbox.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})

    async def send(message: Any) -> None:
        assert message.get("status", 200) in (200, 499)

    task = asyncio.create_task(app(scope_of(URL), inbox.get, send))
    async with asyncio.timeout(20):
        while not called():
            assert not task.done()
            await asyncio.sleep(0.01)
    start = time.monotonic()
    inbox.put_nowait({"type": "http.disconnect"})
    await asyncio.wait_for(task, 10)
    await asyncio.wait([record.task for record in app.state.context.responses._records.values()], timeout=10)
    while called():
        assert time.monotonic() - start < 10
        await asyncio.sleep(0.01)
    return time.monotonic() - start


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["browser", "python", "mcp"])
async def test_leaving(
    engine: ScriptedEngine,
    tokenizer: Tokenizer,
    options: ServerOptions,
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    stream: bool,
) -> None:
    if kind == "python" and (reason := SANDBOX.unavailable()):
        pytest.skip(f"no sandbox here: {reason}")
    endless = Endless()
    monkeypatch.setattr(mcp_tools, "_client", lambda address: endless)
    app = build_app(engine, tokenizer, options, ToolServer(endless, SANDBOX, {"station": endless.server}))
    before = engine.stats()
    script.add(
        {
            "browser": call("browser.search", '{"query": "owl"}'),
            "python": call("python", "import time\nwhile True: time.sleep(1)"),
            "mcp": call("station.forecast", '{"city": "Bonn"}'),
        }[kind]
    )
    body = {"input": "hi", "tools": [WEB, PY, MCP], "stream": stream}
    running = (lambda: bool(children(os.getpid()))) if kind == "python" else lambda: endless.running > 0
    assert await leave_in_a_call(app, body, running) < 2
    await idle(engine)
    after = engine.stats()
    assert after.kv_pages_free + after.kv_pages_cached == before.kv_pages_free + before.kv_pages_cached
    assert endless.sessions == 0 and len(engine.prompts) == 1
    (record,) = app.state.context.responses._records.values()
    assert record.response["status"] == "cancelled" and record.task.done()


SLEEPER = '''
import anyio, os
from mcp.server import MCPServer
server = MCPServer("sleeper")
@server.tool()
async def sleep(file: str) -> str:
    """Sleeps."""
    open(file, "w").write(str(os.getpid()))
    await anyio.sleep(3600)
    return ""
server.run()
'''


@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_a_real_mcp_server(
    engine: ScriptedEngine, tokenizer: Tokenizer, options: ServerOptions, script: Script, tmp_path: Path, stream: bool
) -> None:
    """Its process ends with the response."""
    pytest.importorskip("mcp", reason="the package mcp is not installed")
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    address = f"stdio:{shlex.join([sys.executable, str(tmp_path / 'sleeper.py')])}"
    app = build_app(engine, tokenizer, options, await asyncio.to_thread(ToolServer.load, address))
    pid = tmp_path / "pid"
    script.add(call("sleeper.sleep", json.dumps({"file": str(pid)})))
    tool = {"type": "mcp", "server_label": "sleeper"}

    def running() -> bool:
        return pid.exists() and Path(f"/proc/{pid.read_text() or 'none'}/stat").exists()

    assert await leave_in_a_call(app, {"input": "hi", "tools": [tool], "stream": stream}, running) < 2
    await idle(engine)


@needs_sandbox
async def test_cancelling(
    engine: ScriptedEngine, tokenizer: Tokenizer, options: ServerOptions, script: Script
) -> None:
    """A response in the background outlives its client, and ends its tool when it is cancelled."""
    client: httpx.AsyncClient = asgi_client(build_app(engine, tokenizer, options, ToolServer(python=SANDBOX)))
    script.add(call("python", "import time\ntime.sleep(60)"))
    body = (await client.post(URL, json={"input": "hi", "tools": [PY], "background": True})).json()
    async with asyncio.timeout(20):
        while not children(os.getpid()):
            await asyncio.sleep(0.01)
    start = time.monotonic()
    assert (await client.post(f"{URL}/{body['id']}/cancel")).json()["status"] == "cancelled"
    assert time.monotonic() - start < 2 and not children(os.getpid())
