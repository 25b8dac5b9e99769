"""Tools that the client runs, as a response's request declares them, and how the model's calls of them are told.

The model knows functions only. A `custom` tool, whose input is free text, is shown to it as a function of one string; with
a grammar, which cannot hold inside of JSON, the whole message is the text. A function of a `namespace` is shown under the
name namespace.function.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gptoss_compile.runtime.api.render import FunctionTool
from gptoss_compile.runtime.api.responses_schema import CustomDefinition, CustomFormat, NamespaceDefinition, ResponseTool

_INPUT: dict[str, Any] = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}


CALLS = ("function_call", "custom_tool_call")


@dataclass(frozen=True)
class Declared:
    """function: as the model sees the tool. name: as the client does, in its namespace if it has one.

    format: the grammar of a custom tool whose messages are not JSON.
    """

    function: FunctionTool
    name: str
    namespace: str | None = None
    custom: bool = False
    format: CustomFormat | None = None

    def item(self, call_id: str) -> dict[str, Any]:
        """A call of it, as the output item whose text is still to come."""
        kind, prefix, field = ("custom_tool_call", "ctc", "input") if self.custom else ("function_call", "fc", "arguments")
        item = {
            "type": kind,
            "id": f"{prefix}_{secrets.token_hex(16)}",
            "call_id": call_id,
            "name": self.name,
            field: "",
            "status": "in_progress",
        }
        return item | ({"namespace": self.namespace} if self.namespace else {})


def declared(tool: ResponseTool) -> Iterator[Declared]:
    """The client's tools that one entry of `tools` declares; none for one of the server's."""
    definition = tool.definition
    if isinstance(definition, NamespaceDefinition):
        for member in definition.tools:
            for each in declared(member):
                yield _inside(each, definition)
    elif isinstance(definition, CustomDefinition):
        given = definition.format
        format_ = given if given is not None and given.type == "grammar" else None
        function = FunctionTool(definition.name, _describe(definition, format_), None if format_ else _INPUT)
        yield Declared(function, definition.name, custom=True, format=format_)
    elif definition is not None:
        name, description = definition.name, definition.description or ""
        yield Declared(FunctionTool(name, description, definition.parameters, definition.strict), name)


def _inside(tool: Declared, namespace: NamespaceDefinition) -> Declared:
    """A member without a description of its own has its namespace's."""
    description = tool.function.description or namespace.description or ""
    function = replace(tool.function, name=qualified(tool.name, namespace.name), description=description)
    return replace(tool, function=function, namespace=namespace.name)


def _describe(tool: CustomDefinition, format_: CustomFormat | None) -> str:
    text = tool.description or ""
    if format_ is not None:
        text += (
            f"\nThe message to this function is its input itself, not JSON. It follows this {format_.syntax} grammar:\n"
            f"{format_.definition}"
        )
    return text.strip()


def qualified(name: str, namespace: str | None) -> str:
    """The name that the model knows a tool by."""
    return f"{namespace}.{name}" if namespace else name


def callers(items: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The tool that each call among these items calls, by call_id."""
    return {item["call_id"]: qualified(item["name"], item.get("namespace")) for item in items if item["type"] in CALLS}


def memory_key(kind: str | None, item_id: str | None, call_id: str | None) -> str:
    """What an item is remembered by. Clients keep a call's call_id, while they may drop its id."""
    return (call_id if kind in CALLS else item_id) or ""


def as_arguments(text: str) -> str:
    return json.dumps({"input": text}, ensure_ascii=False)


def as_input(arguments: str) -> str:
    """The free text in what the model wrote as a custom tool's arguments; all of it if that is no such object."""
    try:
        return str(json.loads(arguments, strict=False)["input"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return arguments
