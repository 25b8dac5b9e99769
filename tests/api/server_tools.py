"""Tools that run on the server, for tests: files to search, an MCP server in process, a sandbox with little in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from scripted import ScriptedEngine
from test_responses import check_events, events, no_nulls

from gptoss_compile.runtime.api.tokenizer import Tokenizer
from gptoss_compile.runtime.api.tool_server import mcp_tools
from gptoss_compile.runtime.api.tool_server.sandbox import Limits, Sandbox

URL = "/v1/responses"
WEB, PY = {"type": "web_search_preview"}, {"type": "code_interpreter", "container": {"type": "auto"}}
MCP = {"type": "mcp", "server_label": "station", "server_url": "http://nobody.invalid", "require_approval": "never"}
THOUGHT = "<|channel|>analysis<|message|>Look.<|end|><|start|>assistant"
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
SANDBOX = Sandbox(Limits(memory=512 << 20, files=4 << 20, cpu_seconds=5, wall_seconds=5.0))
NO_SANDBOX = SANDBOX.unavailable()
needs_sandbox = pytest.mark.skipif(bool(NO_SANDBOX), reason=f"no sandbox here: {NO_SANDBOX}")


def call(recipient: str, text: str, channel: str = "analysis", kind: str = "code") -> str:
    return f"{THOUGHT}<|channel|>{channel} to={recipient} {kind}<|message|>{text}<|call|>"


def final(text: str) -> str:
    return f"<|channel|>final<|message|>{text}<|return|>"


class Station:
    """An MCP server's tools, in process."""

    def __init__(self) -> None:
        self.sessions = 0
        tools = (mcp_tools.McpTool("forecast", "Forecast of a city.", {"type": "object", "properties": {"city": {}}}),)
        self.server = mcp_tools.McpServer("station.invalid:1", "station", tools)

    async def __aenter__(self) -> Station:
        self.sessions += 1
        return self

    async def __aexit__(self, *failure: Any) -> None:
        self.sessions -= 1

    async def call_tool(self, name: str, arguments: dict[str, Any], read_timeout_seconds: float) -> Any:
        if arguments.get("city") == "Atlantis":
            raise ConnectionError("the line went dead")

        class Result:
            content = (type("Text", (), {"type": "text", "text": f"{arguments['city']}: sunny"}),)
            is_error = False

        return Result


async def ask(client: httpx.AsyncClient, stream: bool, **fields: Any) -> dict[str, Any]:
    """The final response, checked against the official types, and its events too if streamed."""
    answer = await client.post(URL, json={"input": "hi", "stream": stream, **fields})
    assert answer.status_code == 200, answer.text
    if stream:
        found = events(answer)
        check_events(found)
        for each in found:
            EVENTS.validate_python(each)
        body: dict[str, Any] = found[-1]["response"]
    else:
        body = answer.json()
    Response.model_validate(body)
    assert no_nulls(body["output"])
    return body | {"kinds": [each["type"] for each in found] if stream else []}


def prompt(engine: ScriptedEngine, tokenizer: Tokenizer) -> str:
    return str(tokenizer.encoding.decode(engine.prompts[-1]))


def children(pid: int) -> list[str]:
    """Jails that this process has started and that still run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, parent = (folder / "cmdline").read_text(), (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
        except OSError:
            continue
        if "jail.py" in command and int(parent) == pid:
            found.append(command)
    return found
