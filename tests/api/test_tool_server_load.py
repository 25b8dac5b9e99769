"""What --tool-server names: the demo's tools, web search by key, and real MCP servers over every transport."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted import Script, ScriptedEngine
from served import asgi_client
from server_tools import ask, call, final

from gptoss_compile.runtime import server
from gptoss_compile.runtime.api.app import build_app
from gptoss_compile.runtime.api.options import ServerOptions
from gptoss_compile.runtime.api.tokenizer import Tokenizer
from gptoss_compile.runtime.api.tool_server.base import ToolError
from gptoss_compile.runtime.api.tool_server.search import Exa
from gptoss_compile.runtime.api.tool_server.server import ToolServer

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_load(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    monkeypatch.delenv("EXA_API_KEY", raising=False)
    assert ToolServer.load(None) == ToolServer()
    assert ToolServer.load("demo").browser is None and "set EXA_API_KEY" in caplog.text
    for names, corpus, message in (
        ("demo", str(tmp_path), "holds no text files"),
        (None, str(tmp_path), "--search-corpus is for --tool-server demo"),
        ("127.0.0.1:1", None, "no MCP server answers at 127.0.0.1:1|need the package mcp"),
    ):
        with pytest.raises(ValueError, match=message):
            ToolServer.load(names, corpus)


async def test_exa(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append((request.url.path, request.headers["x-api-key"], json.loads(request.content)))
        if "down" in request.content.decode():
            return httpx.Response(503, text="secret details")
        return httpx.Response(200, json={"results": [{"url": "http://a.b/c", "title": None, "text": "T"}]})

    exa = Exa("key", httpx.MockTransport(answer))
    (found,) = await exa.search("owls", 3)
    assert (found.url, found.title, found.text) == ("http://a.b/c", "http://a.b/c", "T")
    assert (await exa.fetch("http://a.b/c")).text == "T"
    assert seen[0][:2] == ("/search", "key") and seen[0][2]["numResults"] == 3 and seen[1][0] == "/contents"
    with pytest.raises(ToolError, match="answered 503"):
        await exa.search("down", 1)


SERVER = '''
import sys
from mcp.server import MCPServer
server = MCPServer("weather station")
@server.tool()
def forecast(city: str) -> str:
    """Forecast of a city."""
    if city == "Atlantis":
        raise ValueError("sunk")
    return f"{city}: sunny"
if __name__ == "__main__":
    server.run()
'''


@pytest.fixture
def http_server(request: pytest.FixtureRequest) -> Iterator[str]:
    pytest.importorskip("mcp", reason="the package mcp is not installed")
    import uvicorn

    names: dict[str, Any] = {"__name__": "station"}
    exec(SERVER, names)
    listener = server._listen("127.0.0.1", 0)
    sse = request.node.callspec.params["transport"] == "sse"
    app = names["server"].sse_app() if sse else names["server"].streamable_http_app()
    web = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield "{}:{}".format(*listener.getsockname()[:2]) + "/sse" * sse
    web.should_exit = True
    thread.join(10)


@pytest.mark.parametrize("transport", ["http", "sse", "stdio"])
async def test_real_mcp(
    transport: str,
    request: pytest.FixtureRequest,
    engine: ScriptedEngine,
    tokenizer: Tokenizer,
    options: ServerOptions,
    script: Script,
    tmp_path: Path,
) -> None:
    pytest.importorskip("mcp", reason="the package mcp is not installed")
    address = request.getfixturevalue("http_server") if transport != "stdio" else ""
    if transport == "stdio":
        (tmp_path / "station.py").write_text(SERVER)
        address = f"stdio:{shlex.join([sys.executable, str(tmp_path / 'station.py')])}"
    tools = await asyncio.to_thread(ToolServer.load, address)
    client = asgi_client(build_app(engine, tokenizer, options, tools))
    script.add(
        call("weather_station.forecast", '{"city": "Bonn"}'),
        call("weather_station.forecast", '{"city": "Atlantis"}'),
        final("sunny"),
    )
    body = await ask(client, True, tools=[{"type": "mcp", "server_label": "weather_station"}])
    calls = [item for item in body["output"] if item["type"] == "mcp_call"]
    assert [item["status"] for item in calls] == ["completed", "failed"] and calls[0]["output"] == "Bonn: sunny"
