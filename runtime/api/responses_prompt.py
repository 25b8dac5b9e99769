"""The input items of a response as the turns of a harmony conversation."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptoss_compile.runtime.api.errors import ApiError, bad_request
from gptoss_compile.runtime.api.http import validated
from gptoss_compile.runtime.api.render import FunctionTool, Turn
from gptoss_compile.runtime.api.responses_declared import (
    CALLS,
    Declared,
    as_arguments,
    callers,
    declared,
    memory_key,
    qualified,
)
from gptoss_compile.runtime.api.responses_schema import InputItem, PromptBody, ToolChoice
from gptoss_compile.runtime.api.responses_store import ResponseStore
from gptoss_compile.runtime.api.responses_tools import kind_of
from gptoss_compile.runtime.api.schemas import text_of
from gptoss_compile.runtime.api.seal import Seal
from gptoss_compile.runtime.api.tool_server.server import Toolbox
from gptoss_compile.runtime.api.tools import NAMESPACE
from gptoss_compile.runtime.api.turn_memory import TurnMemory, same

PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
    "compaction": "cmp",
}


@dataclass(frozen=True)
class Input:
    """items: as input_items lists them. callers: the function of each call_id, those of earlier responses included."""

    turns: list[Turn]
    items: list[dict[str, Any]]
    callers: dict[str, str]


class InputReader:
    """Reads `input`, on top of an earlier response's callers. Raises ApiError, which names the item.

    What the model wrote and the client left out, because it keeps no reasoning, comes back in its place. tools: the
    client's, by the names that the model knows.
    """

    def __init__(
        self,
        store: ResponseStore,
        memory: TurnMemory,
        seal: Seal,
        callers: Mapping[str, str],
        tools: Mapping[str, Declared],
    ) -> None:
        self._store, self._memory, self._seal, self._tools = store, memory, seal, tools
        self._callers = dict(callers)

    def read(self, given: str | Sequence[dict[str, Any]]) -> Input:
        raw = [{"type": "message", "role": "user", "content": given}] if isinstance(given, str) else given
        items = [_item(each, f"input[{number}]") for number, each in enumerate(raw)]
        turns: list[Turn] = []
        for number, item in enumerate(items):
            before_call = number + 1 < len(items) and items[number + 1].kind in CALLS
            new = list(self._turns(item, f"input[{number}]", before_call))
            self._add(turns, new, self._key(item))
        return Input(turns, [self._listed(each, item) for each, item in zip(raw, items, strict=True)], self._callers)

    def _key(self, item: InputItem) -> str:
        """What the item is remembered by, or an empty string."""
        found = self._store.item(item.id or "") if item.kind == "item_reference" else None
        if found is not None:
            return memory_key(found[0]["type"], item.id, found[0].get("call_id"))
        return memory_key(item.kind, item.id, item.call_id)

    def _add(self, turns: list[Turn], new: list[Turn], key: str) -> None:
        """Append an item's turns, in the model's own tokens and behind its own reasoning if they are remembered.

        Reasoning that the client did send stays, unless it is the same.
        """
        written = self._memory.recall(key) if new else None
        if written is None or not same(written[-len(new) :], new):
            turns += new
            return
        thoughts, own = written[: -len(new)], written[-len(new) :]
        given = len(turns)
        while given and turns[given - 1].thought:
            given -= 1
        if same(thoughts, turns[given:]) or given == len(turns):
            turns[given:] = thoughts
        turns += own

    def _listed(self, raw: dict[str, Any], item: InputItem) -> dict[str, Any]:
        found = self._store.item(item.id or "") if item.kind == "item_reference" else None
        return found[0] if found else _listed(raw, item)

    def _turns(self, item: InputItem, where: str, before_call: bool) -> Iterator[Turn]:
        match item.kind:
            case "message":
                yield self._message(item, where, before_call)
            case "reasoning":
                if (thought := self._reasoning(item, where)).text or thought.tokens:
                    yield thought
            case "function_call" | "custom_tool_call":
                yield self._call(item, where)
            case "compaction":
                yield self._compaction(item, where)
            case "function_call_output" | "custom_tool_call_output":
                yield self._output(item, where)
            case "item_reference":
                yield from self._reference(item, where)
            case "web_search_call" | "code_interpreter_call" | "mcp_call" | "mcp_list_tools":
                yield from self._server_call(item)
            case _:
                raise bad_request(f"{where}: items of type {(item.type or 'unknown')[:40]!r} are not supported.", where)

    def _message(self, item: InputItem, where: str, before_call: bool) -> Turn:
        text = text_of(item.content)
        match item.role:
            case "assistant":
                commentary = item.phase == "commentary" or (item.phase is None and before_call)
                return Turn("assistant", text, channel="commentary" if commentary else "final")
            case "user":
                return Turn("user", text)
            case "system" | "developer":
                return Turn("developer", text)
        raise bad_request(f"{where}.role is missing.", f"{where}.role")

    def _reasoning(self, item: InputItem, where: str) -> Turn:
        """Sealed tokens are the model's own; without them the text, or at least its summary, does."""
        tokens = self._seal.open(item.encrypted_content) if item.encrypted_content else None
        text = text_of(item.content) or text_of(item.summary)
        if item.encrypted_content and tokens is None and not text:
            raise bad_request(
                f"{where}.encrypted_content is not this server's.",
                f"{where}.encrypted_content",
                "invalid_encrypted_content",
            )
        return Turn("assistant", text, channel="analysis", tokens=tokens)

    def _call(self, item: InputItem, where: str) -> Turn:
        if not item.call_id or not item.name:
            raise bad_request(f"{where}: a {item.kind} needs call_id and name.", where)
        name = self._callers[item.call_id] = qualified(item.name, item.namespace)
        arguments = item.arguments or "{}"
        if item.kind == "custom_tool_call":
            in_json = name not in self._tools or self._tools[name].format is None
            arguments = as_arguments(item.input or "") if in_json else item.input or ""
        return Turn("assistant", arguments, recipient=NAMESPACE + name)

    def _compaction(self, item: InputItem, where: str) -> Turn:
        """What /v1/responses/compact sealed: a whole message with the summary."""
        tokens = self._seal.open(item.encrypted_content or "")
        if tokens is None:
            where = f"{where}.encrypted_content"
            raise bad_request(f"{where} is not this server's.", where, "invalid_encrypted_content")
        return Turn("user", tokens=tokens)

    def _output(self, item: InputItem, where: str) -> Turn:
        name = self._callers.get(item.call_id or "")
        if name is None:
            raise bad_request(
                f"No tool call found for function call output with call_id {(item.call_id or '')[:100]!r}.",
                f"{where}.call_id",
            )
        return Turn("tool", text_of(item.output), name=NAMESPACE + name)

    def _server_call(self, item: InputItem) -> list[Turn]:
        """A call of one of the server's tools with its result, as far as either is still known."""
        found = self._store.item(item.id or "")
        if found is not None and found[1] is not None:
            return found[1]
        if written := self._memory.recall(item.id or ""):
            return list(written[-2:])
        if item.kind != "mcp_call" or (item.output is None and item.error is None):
            return []
        name = f"{item.server_label}.{item.name}"
        call = Turn("assistant", item.arguments or "{}", "analysis", recipient=name)
        result = text_of(item.output) if item.output is not None else _error_text(item.error)
        return [call, Turn("tool", result, "analysis", name=name)]

    def _reference(self, item: InputItem, where: str) -> Sequence[Turn]:
        found = self._store.item(item.id or "")
        if found is None:
            raise ApiError(
                404, f"Item with id '{(item.id or '')[:100]}' not found.", param=where, code="item_not_found"
            )
        original, turns = found
        self._callers |= callers([original])
        return list(self._turns(validated(original, InputItem), where, False)) if turns is None else turns


def _error_text(error: Any) -> str:
    """What an mcp_call's `error` says: text, or an object with parts of text."""
    parts = error.get("content") if isinstance(error, dict) else None
    if isinstance(parts, list):
        return "\n".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))
    return str(error.get("message", "The tool failed.")) if isinstance(error, dict) else str(error)


def _item(raw: dict[str, Any], where: str) -> InputItem:
    try:
        return validated(raw, InputItem)
    except ApiError as error:
        param = f"{where}.{error.param}" if error.param else where
        raise bad_request(f"{where}: {error.message}", param) from None


def _listed(raw: dict[str, Any], item: InputItem) -> dict[str, Any]:
    """An input item as input_items gives it back: with id, type and status, a message's content as parts."""
    kind = item.kind or "message"
    listed = {key: value for key, value in raw.items() if value is not None}
    listed |= {"type": kind, "id": item.id or f"{PREFIXES.get(kind, 'item')}_{secrets.token_hex(12)}"}
    if kind != "reasoning":
        listed.setdefault("status", "completed")
    if kind == "message":
        content = listed.get("content", "")
        parts = content if isinstance(content, list) else [{"text": content}]
        shape = {"type": "output_text", "annotations": []} if item.role == "assistant" else {"type": "input_text"}
        listed["content"] = [{**shape, **part} for part in parts]
    return listed


def client_tools(body: PromptBody) -> dict[str, Declared]:
    """The tools that the client runs, by the names that the model knows."""
    return {each.function.name: each for tool in body.tools or () for each in declared(tool)}


def function_tools(body: PromptBody, box: Toolbox) -> list[FunctionTool]:
    """The functions to show. box: the tools that run on the server, which a tool_choice may name as well."""
    tools = [each.function for tool in body.tools or () for each in declared(tool)]
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        raise bad_request("The names of tools must differ.", "tools")
    choice = body.tool_choice
    if choice == "none":
        return []
    if choice == "required" and not tools and not box.recipients:
        raise bad_request("tool_choice: required needs tools.", "tool_choice")
    if isinstance(choice, ToolChoice):
        allowed = _allowed(choice, box)
        if missing := [name for name in allowed if name not in names]:
            raise bad_request(
                f"tool_choice names {missing[0][:100]!r}, which is not among the function tools.", "tool_choice"
            )
        if choice.type == "allowed_tools":
            tools = [tool for tool in tools if tool.name in allowed]
    return tools


def forced_recipients(body: PromptBody, recipients: Sequence[str]) -> list[str] | None:
    """Which of everything that can be called one must be called; None if none must."""
    choice = body.tool_choice
    if choice == "required" or (isinstance(choice, ToolChoice) and choice.mode == "required"):
        return list(recipients)
    if not isinstance(choice, ToolChoice) or choice.type == "allowed_tools":
        return None
    if choice.type in ("function", "custom"):
        return [NAMESPACE + str(choice.name)]
    return _of_server(choice, recipients)


def _of_server(choice: ToolChoice, recipients: Sequence[str]) -> list[str]:
    """The recipients of the server's tool that a tool_choice names."""
    kind = kind_of(choice.type)
    if kind == "mcp" and choice.name is None:
        return [each for each in recipients if each.startswith(f"{choice.server_label}.")]
    known = {"web_search": "browser.search", "code_interpreter": "python", "mcp": f"{choice.server_label}.{choice.name}"}
    return [each for each in recipients if each == known.get(kind)]


def _allowed(choice: ToolChoice, box: Toolbox) -> list[str]:
    if choice.type in ("function", "custom") and choice.name:
        return [choice.name]
    if choice.type == "allowed_tools" and choice.tools:
        return [str(tool.get("name")) for tool in choice.tools if tool.get("type") in ("function", "custom", None)]
    if kind_of(choice.type) in box.kinds and _of_server(choice, box.recipients):
        return []
    raise bad_request(f"tool_choice of type {choice.type[:40]!r} is not available here.", "tool_choice")
