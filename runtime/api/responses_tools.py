"""Tools that run on the server, in /v1/responses: which ones a request turns on, and their calls as output items."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from gptoss_compile.runtime.api.errors import bad_request
from gptoss_compile.runtime.api.responses_schema import CLIENT_TOOLS, PromptBody, ResponseTool, ToolChoice
from gptoss_compile.runtime.api.tool_server.base import ToolError
from gptoss_compile.runtime.api.tool_server.browser import Page
from gptoss_compile.runtime.api.tool_server.server import Target, Toolbox, ToolServer

logger = logging.getLogger(__name__)
MAX_CALLS = 50  # of one response, unless it asks for fewer
MAX_REFUSALS = 3  # further calls that are answered with a refusal before the response ends
REFUSAL = "No tool calls are left in this answer. Reply to the user with what is known."

OutputEvent = tuple[str, dict[str, Any]]  # its type, and its other fields


def kind_of(tool_type: str) -> str:
    """`web_search`, `code_interpreter`, `mcp`, …: the type without its version and `_preview`."""
    return tool_type.partition("_2025")[0].removesuffix("_preview")


def toolbox(body: PromptBody, server: ToolServer, pages: Sequence[Page] = ()) -> Toolbox:
    """What the request turns on of what the server has. What it has not is left out with a warning. Raises ApiError."""
    choice = body.tool_choice
    chosen = None  # all
    if isinstance(choice, ToolChoice) and choice.type == "allowed_tools":
        chosen = {kind_of(str(each.get("type"))) for each in choice.tools or ()}
    on: set[str] = set()
    allowed: dict[str, list[str]] = {}
    for number, tool in enumerate(body.tools or () if choice != "none" else ()):
        kind = kind_of(tool.type)
        if tool.type in CLIENT_TOOLS or (chosen is not None and kind not in chosen):
            continue
        if kind == "mcp":
            allowed |= _mcp(tool, server, f"tools[{number}]")
        elif {"web_search": server.browser, "code_interpreter": server.python}.get(kind):
            on.add(kind)
        else:
            logger.warning("the built-in tool %s is off and was left out", tool.type)
    return Toolbox(server, browser="web_search" in on, python="code_interpreter" in on, allowed=allowed, pages=pages)


def _mcp(tool: ResponseTool, server: ToolServer, where: str) -> dict[str, list[str]]:
    """Only servers that the operator named are called, whatever address the request gives."""
    fields = tool.model_extra or {}
    label = fields.get("server_label")
    if not isinstance(label, str):
        raise bad_request(f"{where}.server_label is missing.", f"{where}.server_label")
    if label not in server.mcp:
        logger.warning("the MCP server %r is not among those of --tool-server and was left out", label[:100])
        return {}
    if fields.get("require_approval") not in (None, "never"):
        raise bad_request(f"{where}.require_approval can only be 'never' here.", f"{where}.require_approval")
    names = fields.get("allowed_tools")
    names = names.get("tool_names") if isinstance(names, dict) else names
    if names is not None and not isinstance(names, list):
        raise bad_request(f"{where}.allowed_tools must be a list of names.", f"{where}.allowed_tools")
    return {label: [each.name for each in server.mcp[label].tools if names is None or each.name in names]}


def list_tools(items: list[dict[str, Any]], box: Toolbox, label: str) -> Iterator[OutputEvent]:
    """Add an item that lists what an MCP server offers."""
    item: dict[str, Any] = {"type": "mcp_list_tools", "id": f"mcpl_{secrets.token_hex(16)}"}
    item |= {"server_label": label, "tools": []}
    items.append(item)
    where = {"output_index": len(items) - 1}
    yield "response.output_item.added", {**where, "item": dict(item)}
    for state in ("in_progress", "completed"):
        yield f"response.mcp_list_tools.{state}", {**where, "item_id": item["id"]}
    item["tools"] = box.listing(label)
    yield "response.output_item.done", {**where, "item": deepcopy(item)}


@dataclass
class CallItem:
    """A call of a server's tool as it becomes an item of the output. index: the item's place there.

    The item of a web search appears once its arguments are known, the others with the first word of the call. Calls that
    make no sense, and those beyond the limit, have no item.
    """

    box: Toolbox
    target: Target
    index: int
    container: str
    refused: bool = False
    show_outputs: bool = False
    show_sources: bool = False
    item: dict[str, Any] | None = None
    text: str = ""
    failed: bool = False
    _id: str = field(default_factory=lambda: secrets.token_hex(16))

    def open(self) -> Iterator[OutputEvent]:
        if self.refused or self.target.namespace == "browser":
            return
        if self.target.namespace == "python":
            kind = "code_interpreter_call"
            fields: dict[str, Any] = {"id": f"ci_{self._id}", "code": "", "container_id": self.container}
        else:
            kind = "mcp_call"
            fields = {"id": f"mcp_{self._id}", "arguments": "", "name": self.target.function}
            fields["server_label"] = self.target.namespace
        yield from self._added({"type": kind, "status": "in_progress", **fields})

    def write(self, text: str) -> Iterator[OutputEvent]:
        if self.item and text:
            yield f"response.{self._writing}.delta", self._where(delta=text)

    def close(self, text: str, *, cut: bool) -> Iterator[OutputEvent]:
        """The call is written. cut: not to its end, so that it will not be made."""
        self.text = text
        if self.target.namespace == "browser" and not cut and not self.refused:
            yield from self._open_search()
        elif self.item is not None:
            name = "code" if self.target.namespace == "python" else "arguments"
            self.item[name] = text
            yield f"response.{self._writing}.done", self._where(**{name: text})
            if cut:
                yield from self._done("incomplete")
            elif self.target.namespace == "python":
                yield "response.code_interpreter_call.interpreting", self._where()

    async def run(self) -> str:
        """What the model is told."""
        try:
            if self.refused:
                raise ToolError(REFUSAL)
            result = await self.box.call(self.target, self.text)
        except ToolError as error:
            result, self.failed = str(error), True
        if self.item is not None:
            self._attach(self.item, result)
        return result

    def finish(self) -> Iterator[OutputEvent]:
        if self.item is None:
            return
        if not self.failed:
            yield f"response.{self.item['type']}.completed", self._where()
        elif self.item["type"] == "mcp_call":
            yield "response.mcp_call.failed", self._where()
        yield from self._done("failed" if self.failed else "completed")

    @property
    def _writing(self) -> str:
        return "code_interpreter_call_code" if self.target.namespace == "python" else "mcp_call_arguments"

    def _open_search(self) -> Iterator[OutputEvent]:
        assert self.box.browser is not None
        try:
            action = self.box.browser.action(self.target.function, self.text)
        except ToolError:
            return
        fields = {"id": f"ws_{self._id}", "status": "in_progress", "action": action}
        yield from self._added({"type": "web_search_call", **fields})
        yield "response.web_search_call.searching", self._where()

    def _attach(self, item: dict[str, Any], result: str) -> None:
        """Put into the item what became of the call."""
        if item["type"] == "code_interpreter_call":
            if self.show_outputs:
                item["outputs"] = [{"type": "logs", "logs": result}]
        elif item["type"] == "mcp_call":
            error = {"type": "mcp_tool_execution_error", "content": [{"type": "text", "text": result}]}
            item |= {"error": error} if self.failed else {"output": result}
        elif self.show_sources and not self.failed and item["action"]["type"] == "search":
            assert self.box.browser is not None
            item["action"]["sources"] = [{"type": "url", "url": url} for url in self.box.browser.sources()]

    def _added(self, item: dict[str, Any]) -> Iterator[OutputEvent]:
        self.item = item
        yield "response.output_item.added", {"output_index": self.index, "item": deepcopy(item)}
        yield f"response.{item['type']}.in_progress", self._where()

    def _done(self, status: str) -> Iterator[OutputEvent]:
        assert self.item is not None
        self.item["status"] = status
        yield "response.output_item.done", {"output_index": self.index, "item": deepcopy(self.item)}

    def _where(self, **fields: Any) -> dict[str, Any]:
        assert self.item is not None
        return {"item_id": self.item["id"], "output_index": self.index, **fields}
