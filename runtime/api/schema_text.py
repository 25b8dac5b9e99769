"""JSON schemas as the model is shown them.

openai-harmony writes the signatures of tools, but knows only part of JSON Schema: `$ref`, `anyOf`, `allOf`, `const`, null
and enums of anything but strings become `any`. So they are rewritten in what it knows. This is for reading only: what a
signature cannot say, the grammar enforces all the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gptoss_compile.runtime.api.json_schema import Schema, SchemaError, resolve

_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object", type(None): "null"}
_ENUM_SHOWN = 100  # values
SHOWN = 2000  # parts of the schemas of all tools together


class Room:
    """How much may still be shown in one prompt. With everything in its place a few $refs can stand for any number."""

    def __init__(self) -> None:
        self._left = SHOWN

    def take(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise SchemaError("tools", f"with every $ref in its place the schemas come to more than {SHOWN} parts")


def tool_schema(parameters: Schema | None, room: Room) -> Schema | None:
    """The parameters of a function as the library can show them; None if there are none. Raises SchemaError."""
    if not parameters:
        return None
    shown = _Rewriter(parameters, room).rewrite(parameters, 0, frozenset())
    return shown if shown.get("properties") or shown.get("oneOf") else None


def format_text(name: str, description: str | None, schema: Schema) -> str:
    """The section of a developer message that asks for an answer in a schema, as harmony words it."""
    comment = f"// {_one_line(description)}\n" if description else ""
    return f"# Response Formats\n\n## {name}\n\n{comment}{json.dumps(schema, ensure_ascii=False, separators=(',', ':'))}"


class _Rewriter:
    """What contains itself is shown once, and as any inside of that; so is what is deeper than DEPTH.

    inside: the references that led here.
    """

    DEPTH = 40

    def __init__(self, root: Schema, room: Room) -> None:
        self._root, self._room = root, room

    def rewrite(self, node: Any, depth: int, inside: frozenset[str]) -> Schema:
        self._room.take()
        if not isinstance(node, dict) or depth > self.DEPTH:
            return {}
        node, inside = self._merged(node, depth, inside)
        values = node["enum"] if isinstance(node.get("enum"), list) else [node["const"]] if "const" in node else None
        if values is not None:
            return _of_values(node, values)
        if isinstance(alternatives := node.get("anyOf") or node.get("oneOf"), list):
            return self._choice(node, alternatives, depth, inside)
        shown = _described(node, "type", "title", "default", "examples", "nullable")
        if isinstance(properties := node.get("properties"), dict):
            shown["properties"] = {name: self.rewrite(child, depth + 1, inside) for name, child in properties.items()}
            shown |= {"type": shown.get("type", "object"), "required": _strings(node.get("required"))}
        if "items" in node:
            shown |= {"type": shown.get("type", "array"), "items": self.rewrite(node["items"], depth + 1, inside)}
        return _without_null(shown)

    def _merged(self, node: Schema, depth: int, inside: frozenset[str]) -> tuple[Schema, frozenset[str]]:
        """The node with what $ref and allOf add to it; of two statements on the same thing the node's own counts."""
        parts = [node]
        if isinstance(reference := node.get("$ref"), str) and reference.startswith("#") and reference not in inside:
            inside |= {reference}
            parts.append(resolve(self._root, reference) if reference != "#" else self._root)
        parts += node["allOf"] if isinstance(node.get("allOf"), list) else []
        own = {key: value for key, value in node.items() if key not in ("$ref", "allOf")}
        for part in parts[1:]:
            self._room.take()
            if isinstance(part, dict) and depth < self.DEPTH:
                more, inside = self._merged(part, depth + 1, inside)
                own = _union(own, more)
        return own, inside

    def _choice(self, node: Schema, alternatives: Sequence[Any], depth: int, inside: frozenset[str]) -> Schema:
        shown = [self.rewrite(each, depth + 1, inside) for each in alternatives if each != {"type": "null"}]
        if len(shown) < len(alternatives):
            shown = [{**each, "nullable": True} for each in shown]
        described = _described(node, "title", "default", "examples")
        return {**shown[0], **described} if len(shown) == 1 else {"oneOf": shown, **described} if shown else described


def _union(own: Schema, other: Schema) -> Schema:
    merged = {**other, **own}
    if isinstance(own.get("properties"), dict) and isinstance(other.get("properties"), dict):
        merged["properties"] = {**own["properties"], **other["properties"], **own["properties"]}  # in this order, too
    if "required" in own or "required" in other:
        merged["required"] = [*_strings(own.get("required")), *_strings(other.get("required"))]
    return merged


def _of_values(node: Schema, values: Sequence[Any]) -> Schema:
    """An enum. The library shows the values of strings only, so others are listed in the description."""
    types = list(dict.fromkeys(_TYPES[type(value)] for value in values))
    shown: Schema = {"type": types[0] if len(types) == 1 else types, **_described(node, "title", "default", "examples")}
    if types in (["string"], ["string", "null"]):
        return {**shown, "enum": [value for value in values if value is not None]}
    spelled = ", ".join(json.dumps(value, ensure_ascii=False) for value in values[:_ENUM_SHOWN])
    shown["description"] = " ".join([shown.get("description", ""), f"One of: {spelled}"]).strip()
    return _without_null(shown)


def _without_null(shown: Schema) -> Schema:
    """Lists of types lose what is inside them, `nullable` does not."""
    types = shown.get("type")
    if isinstance(types, list) and len(types) == 2 and "null" in types:
        return {**shown, "type": next((each for each in types if each != "null"), "null"), "nullable": True}
    return shown


def _described(node: Schema, *keys: str) -> Schema:
    kept = {key: node[key] for key in keys if key in node}
    if isinstance(text := node.get("description"), str):
        kept["description"] = _one_line(text)
    if isinstance(text := node.get("title"), str):
        kept["title"] = _one_line(text)
    return kept


def _one_line(text: str) -> str:
    """A newline would end the comment that a description becomes."""
    return " ".join(text.split())


def _strings(values: Any) -> list[str]:
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []
