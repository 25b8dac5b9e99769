"""The tools that run on the server: what --tool-server names, and what one response may use of it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from openai_harmony import ToolDescription, ToolNamespaceConfig

from gptoss_compile.runtime.api.json_schema import SchemaError
from gptoss_compile.runtime.api.schema_text import Room, tool_schema
from gptoss_compile.runtime.api.tool_server.browser import Browser, Page, RemoteBrowser, SearchBackend
from gptoss_compile.runtime.api.tool_server.mcp_tools import McpServer, McpSessions
from gptoss_compile.runtime.api.tool_server.sandbox import Sandbox
from gptoss_compile.runtime.api.tool_server.search import Corpus, Exa

logger = logging.getLogger(__name__)
DEMO = "demo"
DESCRIPTION = 1000  # characters of a tool's description that the model is shown
PYTHON = (
    "Runs Python code in your chain of thought. The code is not shown to the user, so do not use it for code that the user "
    "should see.\n\n"
    "A message to python is a whole program: it runs in a fresh process without network access, nothing is kept between "
    "calls, and you get what it printed. Use print() to see a value."
)


@dataclass(frozen=True)
class ToolServer:
    """browser, python: None where off; from an MCP server of that name, or built in. mcp: the other servers, by label."""

    browser: SearchBackend | McpServer | None = None
    python: Sandbox | McpServer | None = None
    mcp: Mapping[str, McpServer] = field(default_factory=dict)

    @classmethod
    def load(cls, names: str | None, search_corpus: str | None = None) -> ToolServer:
        """What a comma-separated list names: `demo`, MCP servers as host:port, URL or `stdio:COMMAND`.

        Raises ValueError for a server that does not answer and settings that make no sense. A tool of the demo that this
        system cannot run is left out with a warning.
        """
        entries = [entry.strip() for entry in (names or "").split(",") if entry.strip()]
        if search_corpus is not None and DEMO not in entries:
            raise ValueError("--search-corpus is for --tool-server demo, which is not on")
        servers: dict[str, McpServer] = {}
        for server in asyncio.run(_ask([entry for entry in entries if entry != DEMO])):
            if server.label in servers or server.label == "functions":
                raise ValueError(f"the MCP server at {server.address} calls itself {server.label!r}, and that name is taken")
            servers[server.label] = server
        browser, python = servers.pop("browser", None), servers.pop("python", None)
        if DEMO not in entries:
            return cls(browser, python, servers)
        return cls(browser or _backend(search_corpus), python or _sandbox(), servers)


async def _ask(addresses: Sequence[str]) -> list[McpServer]:
    return [await McpServer.ask(address) for address in addresses]


def _sandbox() -> Sandbox | None:
    sandbox = Sandbox()
    if reason := sandbox.unavailable():
        logger.warning("the python tool is off: %s", reason)
    return None if reason else sandbox


def _backend(search_corpus: str | None) -> SearchBackend | None:
    if search_corpus is not None:
        return Corpus(search_corpus)
    if key := os.environ.get("EXA_API_KEY"):
        try:
            return Exa(key)
        except ImportError:
            raise ValueError("web search needs the package httpx: pip install 'gptoss-compile[tools]'") from None
    logger.warning("the browser tool is off: set EXA_API_KEY, or give --search-corpus FOLDER")
    return None


def _shown(schema: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of an MCP server's tool. The model gets to know the tool by its description if they are too much."""
    try:
        return tool_schema(schema, Room())
    except SchemaError:
        return None


@dataclass(frozen=True)
class Target:
    """Whom a call is for. function: within the namespace; empty for python."""

    namespace: str
    function: str


class Toolbox:
    """The server's tools that one response uses, and their state. A context manager, which ends MCP sessions.

    allowed: by the label of an MCP server, the names of its tools that may be used.
    """

    def __init__(
        self,
        server: ToolServer,
        *,
        browser: bool = False,
        python: bool = False,
        allowed: Mapping[str, Sequence[str]] | None = None,
        pages: Sequence[Page] = (),
    ) -> None:
        self.browser = self._browser(server.browser, pages) if browser and server.browser else None
        self._python = server.python if python else None
        self._servers = {label: server.mcp[label] for label in allowed or {}}
        self._allowed = dict(allowed or {})
        self._sessions = McpSessions()

    def _browser(self, source: SearchBackend | McpServer, pages: Sequence[Page]) -> Browser:
        if isinstance(source, McpServer):
            return RemoteBrowser(lambda function, arguments: self._sessions.call(source, function, arguments))
        return Browser(source, pages)

    async def __aenter__(self) -> Toolbox:
        await self._sessions.__aenter__()
        return self

    async def __aexit__(self, *failure: Any) -> None:
        await self._sessions.__aexit__(*failure)

    @property
    def pages(self) -> Sequence[Page]:
        return self.browser.pages if self.browser else ()

    @property
    def kinds(self) -> list[str]:
        """Types of the Responses API's tools that are on."""
        on = {"web_search": self.browser, "code_interpreter": self._python, "mcp": self._servers}
        return [kind for kind, tool in on.items() if tool]

    @property
    def recipients(self) -> list[str]:
        """Everything that can be called."""
        found = ["browser.search"] if self.browser else []
        found += ["python"] if self._python else []
        return found + [f"{label}.{name}" for label, names in self._allowed.items() for name in names]

    def namespaces(self) -> list[ToolNamespaceConfig]:
        """For the system message: harmony's own for browser and python, one for each MCP server."""
        found = []
        if self.browser:
            found.append(ToolNamespaceConfig.browser())
        if self._python:
            about = {"description": PYTHON} if isinstance(self._python, Sandbox) else {}
            found.append(ToolNamespaceConfig.python().model_copy(update=about))
        for label in self._servers:
            tools = [
                ToolDescription.new(each["name"], each["description"][:DESCRIPTION], _shown(each["input_schema"]))
                for each in self.listing(label)
            ]
            found.append(ToolNamespaceConfig(name=label, description=None, tools=tools))
        return found

    def listing(self, label: str) -> list[dict[str, Any]]:
        """The tools of an MCP server as an mcp_list_tools item lists them."""
        return [
            {"name": tool.name, "description": tool.description, "input_schema": tool.schema}
            for tool in self._servers[label].tools
            if tool.name in self._allowed[label]
        ]

    @property
    def labels(self) -> Sequence[str]:
        return list(self._servers)

    def target(self, recipient: str | None) -> Target | None:
        """Whom a message is for, if that is one of these tools."""
        bare = (recipient or "").removeprefix("functions.")
        name, _, function = bare.partition(".")
        if name == "python" and self._python:
            return Target("python", "")
        if (name == "browser" and self.browser) or name in self._servers:
            return Target(name, function)
        return None

    async def call(self, target: Target, text: str) -> str:
        """The result, for the model. Raises ToolError."""
        if target.namespace == "browser":
            assert self.browser is not None
            return await self.browser.call(target.function, text)
        if target.namespace == "python":
            assert self._python is not None
            if isinstance(self._python, McpServer):
                return await self._sessions.send(self._python, "python", {"code": text})
            return await self._python.run(text) or "(no output: use print() to see a value)"
        return await self._sessions.call(self._servers[target.namespace], target.function, text)
