"""JSON schemas from clients: bounded in what they cost, and in the form that the grammar enforces."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

Schema = dict[str, Any]

BITS = 1024  # of an integer
DEPTH = 100  # levels of JSON; about half as many of objects in objects
NODES = 20_000  # JSON values
CHARACTERS = 250_000  # in names and strings
SUBSCHEMAS = 2_000
SQUARES = 300_000  # sum of (properties of an object, or alternatives of a choice)², which is what they cost to compile
ENUM = 5_000  # values in all enums and constants, those inside of others counted as well
MULTIPLES = 10_000  # sum of all multipleOf: each compiles to an automaton with that many states
DIGITS = 5_000  # in all bounds: each digit of a range is a part of a pattern
CHOICES = 500  # ways to choose among the alternatives that allOf brings together, all of which are written out
MERGED = 8  # patterns, formats and lengths of one string, over allOf and $ref: compiling takes 2 to that power
_PAIR = 30  # what two patternProperties cost to tell apart, in pairs of properties

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SINGLES = (
    "items", "additionalProperties", "additionalItems", "contains", "not", "if", "then", "else", "propertyNames",
    "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
_ANNOTATIONS = {"$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default", "examples"}
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength", "minItems", "maxItems",
           "minProperties", "maxProperties")  # fmt: skip
_COMBINING = {"$ref", "allOf", "anyOf", "oneOf"}


class SchemaError(ValueError):
    """A schema that is refused. `path` is the field of the request, down to the part at fault."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


@dataclass
class Budget:
    """What is left for all schemas of one request."""

    left: dict[str, int] = field(
        default_factory=lambda: {
            "values": NODES,
            "characters": CHARACTERS,
            "subschemas": SUBSCHEMAS,
            "properties and alternatives": SQUARES,
            "enum values": ENUM,
            "the sum of multipleOf": MULTIPLES,
            "digits of bounds": DIGITS,
        }
    )

    def spend(self, what: str, amount: int, path: str) -> None:
        self.left[what] -= amount
        if self.left[what] < 0:
            raise SchemaError(path, f"the schema is too large ({what})")


def enforceable(schema: Any, path: str, budget: Budget) -> Schema:
    """A copy for the grammar, once it is known to be small enough. Raises SchemaError.

    Objects that list their properties and do not say whether there may be others get no others, unless that could
    contradict what they are merged with.
    """
    _measure(schema, path, budget, 0)
    if not isinstance(schema, dict):
        raise SchemaError(path, "a schema must be an object")
    copy: Schema = deepcopy(schema)
    nodes = list(_walk(copy, path))
    merge = _Merge(copy)
    for where, node in nodes:
        _check(node, where, budget)
        merge.check(node, where)
    if not any(_COMBINING & node.keys() and node.keys() - _ANNOTATIONS - {"$ref", "anyOf", "oneOf"} for _, node in nodes):
        for _, node in nodes:
            _close(node)
    copy.pop("$schema", None)
    return copy


def children(schema: Schema) -> Iterator[tuple[str, Any]]:
    """(path from here, subschema) of everything in a schema that is one itself."""
    for key in _MAPS:
        if isinstance(members := schema.get(key), dict):
            yield from ((f".{key}.{name}", child) for name, child in members.items())
    for key in _LISTS:
        if isinstance(members := schema.get(key), list):
            yield from ((f".{key}[{i}]", child) for i, child in enumerate(members))
    for key in _SINGLES:
        if isinstance(child := schema.get(key), dict):
            yield f".{key}", child


def locate(schema: Schema, path: str, fails: Callable[[Schema], bool]) -> str:
    """The path of a smallest part that fails by itself, given a schema that does."""
    shared: Schema = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    attempts = 100

    def descend(node: Schema, path: str) -> str:
        nonlocal attempts
        for step, child in children(node):
            attempts -= 1
            if attempts < 0:
                break
            if isinstance(child, dict) and fails({**child, **shared}):
                return descend(child, path + step)
        return path

    return descend(schema, path)


def resolve(root: Schema, reference: str) -> Any:
    """What a local JSON pointer (`#/$defs/Point`) names; None if there is nothing."""
    node: Any = root
    for key in re.split("/", reference.removeprefix("#"))[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        if isinstance(node, list) and key.isdecimal() and int(key[:9]) < len(node):
            node = node[int(key)]
        else:
            node = node.get(key) if isinstance(node, dict) else None
    return node


def _measure(node: Any, path: str, budget: Budget, depth: int) -> None:
    if depth > DEPTH:
        raise SchemaError(path, f"the schema is nested more than {DEPTH} levels deep")
    budget.spend("values", 1, path)
    if isinstance(node, str):
        budget.spend("characters", len(node), path)
    elif isinstance(node, int) and node.bit_length() > BITS:
        raise SchemaError(path, f"the schema has an integer of more than {BITS} bits")
    elif isinstance(node, list):
        for item in node:
            _measure(item, path, budget, depth + 1)
    elif isinstance(node, dict):
        for key, value in node.items():
            budget.spend("characters", len(key), path)
            _measure(value, path, budget, depth + 1)


def _walk(schema: Schema, path: str) -> Iterator[tuple[str, Schema]]:
    yield path, schema
    for step, child in children(schema):
        if isinstance(child, dict):
            yield from _walk(child, path + step)
        elif not isinstance(child, bool):
            raise SchemaError(path + step, "a schema must be an object or a boolean")


def _check(node: Schema, path: str, budget: Budget) -> None:
    """One subschema: its share of the budget, and that its references lead somewhere."""
    budget.spend("subschemas", 1, path)
    for key in ("properties", "anyOf", "oneOf", "allOf"):
        if isinstance(members := node.get(key), (dict, list)):
            budget.spend("properties and alternatives", len(members) ** 2, f"{path}.{key}")
    if isinstance(members := node.get("patternProperties"), dict):
        budget.spend("properties and alternatives", _PAIR * len(members) ** 2, f"{path}.patternProperties")
    for key in ("enum", "const"):
        budget.spend("enum values", _size(node[key]) if key in node else 0, f"{path}.{key}")
    if isinstance(multiple := node.get("multipleOf"), (int, float)):
        digits = re.sub(r"[^0-9]", "", f"{float(min(abs(multiple), 1e300)):.15g}".partition("e")[0]).strip("0") or "0"
        budget.spend("the sum of multipleOf", int(min(max(abs(multiple), int(digits)), MULTIPLES + 1)), f"{path}.multipleOf")
    for key in _BOUNDS:
        if isinstance(bound := node.get(key), (int, float)):
            budget.spend("digits of bounds", len(str(bound)), f"{path}.{key}")
    if "x-guidance" in node:
        raise SchemaError(f"{path}.x-guidance", "is not part of JSON Schema")


def _size(value: Any) -> int:
    members = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
    return 1 + sum(map(_size, members))


@dataclass(frozen=True)
class _Merged:
    """constraints: on a string or number. choices: ways to choose among alternatives."""

    constraints: int = 0
    choices: int = 1

    def both(self, other: _Merged) -> _Merged:
        constraints = min(self.constraints + other.constraints, MERGED + 1)
        return _Merged(constraints, min(self.choices * other.choices, CHOICES + 1))

    def either(self, other: _Merged) -> _Merged:
        return _Merged(max(self.constraints, other.constraints), min(self.choices + other.choices, CHOICES + 1))


class _Merge:
    """Schemas that hold of one and the same value: how many constraints and choices they bring together.

    Multiples count as more than half of what is allowed: two of them make an automaton of their product's size.
    """

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._known: dict[int, _Merged | None] = {}  # None: being counted

    def check(self, node: Schema, path: str) -> None:
        found = self._count(node, path)
        if found.constraints > MERGED:
            raise SchemaError(path, "allOf and $ref bring together too many patterns, lengths or multiples")
        if found.choices > CHOICES and isinstance(node.get("allOf"), list):
            raise SchemaError(path, f"allOf brings together alternatives that can be chosen in more than {CHOICES} ways")

    def _count(self, node: Any, path: str) -> _Merged:
        if not isinstance(node, dict):
            return _Merged()
        if id(node) not in self._known:
            self._known[id(node)] = None
            count = sum(key in node for key in ("pattern", "format", "minLength", "maxLength"))
            found = _Merged(count + (MERGED // 2 + 1) * ("multipleOf" in node))
            for key, combine in (("allOf", _Merged.both), ("anyOf", _Merged.either), ("oneOf", _Merged.either)):
                members = node.get(key)
                if isinstance(members, list) and members:
                    counts = [self._count(member, f"{path}.{key}") for member in members]
                    found = found.both(functools.reduce(combine, counts))
            self._known[id(node)] = found.both(self._reference(node.get("$ref"), path))
        known = self._known[id(node)]
        if known is None:
            raise SchemaError(path, "the schema refers to itself with nothing in between")
        return known

    def _reference(self, reference: Any, path: str) -> _Merged:
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            return _Merged()
        target = resolve(self._root, reference)
        if target is None:
            raise SchemaError(f"{path}.$ref", f"{reference[:100]!r} leads nowhere")
        return self._count(target, f"{path}.$ref")


def _close(node: Schema) -> None:
    """Allow no properties but the listed ones, where nothing is said about others."""
    properties, required = node.get("properties"), node.get("required", [])
    said = {"additionalProperties", "patternProperties", "unevaluatedProperties", "minProperties"} & node.keys()
    if not (isinstance(properties, dict) and isinstance(required, list)) or said:
        return
    if all(isinstance(name, str) and name in properties for name in required):
        node["additionalProperties"] = False
