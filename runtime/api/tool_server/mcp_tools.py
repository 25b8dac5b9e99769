"""Tools of MCP servers, over streamable HTTP or standard input and output.

What a server offers is asked once, at the start. A response that calls it gets a session of its own, which ends with the
response: nothing one user's call left behind is there for the next.
"""

from __future__ import annotations

import asyncio
import json
import re
import shlex
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from gptoss_compile.runtime.api.tool_server.base import ToolError

SECONDS = 60.0  # for one call, and for listing the tools
RESULT = 32_000  # characters of a result
STDIO = "stdio:"
_NO_NAME = re.compile(r"[^a-zA-Z0-9_-]+")


@dataclass(frozen=True)
class McpTool:
    name: str
    description: str
    schema: dict[str, Any]


@dataclass(frozen=True)
class McpServer:
    """address: host:port[/path], a URL, or `stdio:` and a command line. label: the server's name for itself."""

    address: str
    label: str
    tools: tuple[McpTool, ...]

    @classmethod
    async def ask(cls, address: str) -> McpServer:
        """Raises ValueError if there is no MCP server, or no mcp package."""
        try:
            async with asyncio.timeout(SECONDS), _client(address) as client:
                tools, cursor = [], None
                while True:
                    page = await client.list_tools(cursor=cursor)
                    tools += [McpTool(t.name, t.description or "", t.input_schema) for t in page.tools]
                    if not (cursor := page.next_cursor):
                        break
                label = _NO_NAME.sub("_", client.server_info.name) or "mcp"
        except ImportError:
            raise ValueError("MCP servers need the package mcp: pip install 'gptoss-compile[tools]'") from None
        except Exception as error:
            raise ValueError(f"no MCP server answers at {address}: {_cause(error)}") from None
        return cls(address, label, tuple(tools))


class McpSessions:
    """The sessions of one response, opened at the first call. A context manager, entered and left in one task."""

    def __init__(self) -> None:
        self._stack = AsyncExitStack()
        self._clients: dict[str, Any] = {}

    async def __aenter__(self) -> McpSessions:
        return self

    async def __aexit__(self, *failure: Any) -> None:
        try:
            await self._stack.aclose()
        except Exception:  # the server went first: nothing is left to close
            self._clients.clear()

    async def call(self, server: McpServer, tool: str, arguments: str) -> str:
        """The text of the result. Raises ToolError."""
        try:
            parsed = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(parsed, dict):
            raise ToolError("The arguments must be a JSON object.")
        return await self.send(server, tool, parsed)

    async def send(self, server: McpServer, tool: str, arguments: dict[str, Any]) -> str:
        try:
            if server.label not in self._clients:
                self._clients[server.label] = await self._stack.enter_async_context(_client(server.address))
            result = await self._clients[server.label].call_tool(tool, arguments, read_timeout_seconds=SECONDS)
        except Exception as error:
            raise ToolError(f"The tool failed: {_cause(error)}") from None
        text = "\n".join(getattr(part, "text", f"[{part.type}]") for part in result.content)
        if len(text) > RESULT:
            text = f"{text[:RESULT]}\n[cut at {RESULT} characters]"
        if result.is_error:
            raise ToolError(text or "The tool failed.")
        return text


def _client(address: str) -> Any:
    from mcp import Client, StdioServerParameters  # an extra
    from mcp.client.sse import sse_client

    if address.startswith(STDIO):
        command, *arguments = shlex.split(address.removeprefix(STDIO))
        return Client(StdioServerParameters(command=command, args=arguments), read_timeout_seconds=SECONDS)
    url = address if "://" in address else f"http://{address}"
    if not urlsplit(url).path.strip("/"):
        url = f"{url.rstrip('/')}/mcp"
    return Client(sse_client(url) if url.endswith("/sse") else url, read_timeout_seconds=SECONDS)


def _cause(error: BaseException) -> str:
    """The message of what lies at the bottom of a group of exceptions."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error)[:300] or type(error).__name__
