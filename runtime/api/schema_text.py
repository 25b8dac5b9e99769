"""JSON schemas as the model is shown them.

openai-harmony writes the signatures of tools, but knows only part of JSON Schema: `$ref`, `anyOf`, `allOf`, `const`, null
and enums of anything but strings become `any`. So they are rewritten in what it knows. This is for reading only: what a
signature cannot say, the grammar enforces all the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gptoss_compile.runtime.api.json_schema import Schema, resolve

_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object", type(None): "null"}
_ENUM_SHOWN = 100  # values


def tool_schema(parameters: Schema | None) -> Schema | None:
    """The parameters of a function as the library can show them, bounded in size; None if there are none."""
    if not parameters:
        return None
    shown = _Rewriter(parameters).rewrite(parameters, 0)
    return shown if shown.get("properties") or shown.get("oneOf") else None


def format_text(name: str, description: str | None, schema: Schema) -> str:
    """The section of a developer message that asks for an answer in a schema, as harmony words it."""
    comment = f"// {_one_line(description)}\n" if description else ""
    return f"# Response Formats\n\n## {name}\n\n{comment}{json.dumps(schema, ensure_ascii=False, separators=(',', ':'))}"


class _Rewriter:
    DEPTH = 40
    NODES = 5000

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._nodes = 0

    def rewrite(self, node: Any, depth: int) -> Schema:
        """Beyond DEPTH or NODES (recursion, bombs) everything is shown as any."""
        self._nodes += 1
        if not isinstance(node, dict) or depth > self.DEPTH or self._nodes > self.NODES:
            return {}
        node = self._merged(node, depth)
        values = node["enum"] if isinstance(node.get("enum"), list) else [node["const"]] if "const" in node else None
        if values is not None:
            return _of_values(node, values)
        if isinstance(alternatives := node.get("anyOf") or node.get("oneOf"), list):
            return self._choice(node, alternatives, depth)
        shown = _described(node, "type", "title", "default", "examples", "nullable")
        if isinstance(properties := node.get("properties"), dict):
            shown["properties"] = {name: self.rewrite(child, depth + 1) for name, child in properties.items()}
            shown |= {"type": shown.get("type", "object"), "required": _strings(node.get("required"))}
        if "items" in node:
            shown |= {"type": shown.get("type", "array"), "items": self.rewrite(node["items"], depth + 1)}
        return _without_null(shown)

    def _merged(self, node: Schema, depth: int) -> Schema:
        """The node with what $ref and allOf add to it; of two statements on the same thing the node's own counts."""
        parts = [node]
        if isinstance(reference := node.get("$ref"), str) and reference.startswith("#"):
            parts.append(resolve(self._root, reference) if reference != "#" else self._root)
        parts += node["allOf"] if isinstance(node.get("allOf"), list) else []
        if len(parts) == 1:
            return node
        own = {key: value for key, value in node.items() if key not in ("$ref", "allOf")}
        for part in parts[1:]:
            self._nodes += 1
            if isinstance(part, dict) and depth < self.DEPTH and self._nodes < self.NODES:
                own = _union(own, self._merged(part, depth + 8))
        return own

    def _choice(self, node: Schema, alternatives: Sequence[Any], depth: int) -> Schema:
        shown = [self.rewrite(each, depth + 1) for each in alternatives if each != {"type": "null"}]
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
