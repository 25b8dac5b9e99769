"""Random JSON schemas with all that the grammar enforces, and an executor whose logits are noise."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
from scripted import VOCAB, HashExecutor

from gptoss_compile.config import Bucket
from gptoss_compile.runtime.api.harmony import CALL, CHANNEL, END, RETURN
from gptoss_compile.runtime.api.tokenizer import FIRST_SPECIAL, Tokenizer
from gptoss_compile.runtime.executor import Floats, Ints

Schema = dict[str, Any]
PATTERNS = ("^[a-z]{2,5}$", "^(red|green|blue)-[0-9]{3}$", "[0-9]", "^#[0-9a-f]{6}$", "^[A-Z][a-z]*( [A-Z][a-z]*)?$")
VALUES = ("a", 'q"uote', "snow ☃", 1, -2.5, 0, True, None, [1, "x"], {"k": None})


class NoiseExecutor(HashExecutor):
    """Every row is noise, other noise at every step, in which headers, ends and closing quotes and brackets are likely."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        super().__init__(max_context=4096)
        self._random = np.random.default_rng(seed)
        self._noise = self._random.normal(size=2 * VOCAB).astype(np.float32)
        self._lift = np.zeros(VOCAB, np.float32)
        closing = [i for i in range(FIRST_SPECIAL) if tokenizer.token_bytes(i) in (b'"', b'"}', b"}", b"]", b'"]', b"}}")]
        self._lift[[CHANNEL, END, RETURN, CALL, *closing]] = 11

    def run(self, bucket: Bucket, inputs: Mapping[str, Ints]) -> Floats:
        starts = self._random.integers(0, VOCAB, bucket.rows)
        return np.stack([self._noise[start : start + VOCAB] + self._lift for start in starts])


def random_schema(rng: random.Random) -> Schema:
    """An object schema, nested, with $defs, one of which may contain itself."""
    names = ["Node", "Leaf"]
    schema = _object(rng, 3, names)
    leaf = _value(rng, 1, [])
    node = {
        "type": "object",
        "properties": {"value": {"$ref": "#/$defs/Leaf"}, "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]}},
        "required": ["value", "next"],
        "additionalProperties": False,
    }
    return {**schema, "$defs": {"Node": node, "Leaf": leaf}}


def _object(rng: random.Random, depth: int, refs: list[str]) -> Schema:
    names = rng.sample(["id", "näme", "x-y", "default", "enum", "a b", "properties", "items"], rng.randint(1, 4))
    schema: Schema = {"type": "object", "properties": {name: _value(rng, depth - 1, refs) for name in names}}
    schema["required"] = [name for name in names if rng.random() < 0.7]
    if rng.random() < 0.5:
        schema["additionalProperties"] = rng.choice([False, {"type": "integer"}])
    return schema


def _value(rng: random.Random, depth: int, refs: list[str]) -> Schema:
    makers = [_string, _number, _fixed, _enum]
    if depth > 0:
        makers += [_array, _tuple, _any_of, _all_of, _one_of, _object]  # type: ignore[list-item]
    if refs and rng.random() < 0.2:
        return {"$ref": f"#/$defs/{rng.choice(refs)}", "description": "refers"}
    maker = rng.choice(makers)
    return maker(rng) if maker in makers[:4] else maker(rng, depth, refs)  # type: ignore[call-arg]


def _string(rng: random.Random) -> Schema:
    kind = rng.randrange(4)
    if kind == 0:
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    if kind == 1:
        return {"type": "string", "minLength": rng.randint(0, 3), "maxLength": rng.randint(3, 9)}
    return {"type": "string"} if kind == 2 else {"type": ["string", "null"], "title": "T"}


def _number(rng: random.Random) -> Schema:
    low = rng.randint(-50, 50)
    return rng.choice(
        [
            {"type": "integer"},
            {"type": "boolean"},
            {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 99)},
            {"type": "number", "exclusiveMinimum": low, "maximum": low + 1.5},
            {"type": "integer", "multipleOf": rng.choice([2, 7, 25]), "minimum": 0},
        ]
    )


def _fixed(rng: random.Random) -> Schema:
    return {"const": rng.choice(VALUES)}


def _enum(rng: random.Random) -> Schema:
    return {"enum": rng.sample(VALUES, rng.randint(1, 4))}


def _array(rng: random.Random, depth: int, refs: list[str]) -> Schema:
    least = rng.randint(0, 2)
    return {"type": "array", "items": _value(rng, depth - 1, refs), "minItems": least, "maxItems": least + rng.randint(0, 3)}


def _tuple(rng: random.Random, depth: int, refs: list[str]) -> Schema:
    return {"type": "array", "prefixItems": [_value(rng, depth - 1, refs) for _ in range(2)], "minItems": 2, "items": False}


def _any_of(rng: random.Random, depth: int, refs: list[str]) -> Schema:
    return {"anyOf": [_value(rng, depth - 1, refs) for _ in range(rng.randint(2, 3))]}


def _all_of(rng: random.Random, depth: int, refs: list[str]) -> Schema:
    first = {"type": "object", "properties": {"left": _value(rng, 0, [])}, "required": ["left"]}
    return {"allOf": [first, {"type": "object", "properties": {"right": _value(rng, 0, [])}, "required": ["right"]}]}


def _one_of(rng: random.Random, depth: int, refs: list[str]) -> Schema:
    """Told apart by a constant, as pydantic's discriminated unions are."""
    return {
        "oneOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": kind}, "value": _value(rng, depth - 1, refs)},
                "required": ["kind", "value"],
                "additionalProperties": False,
            }
            for kind in ("cat", "dog")
        ]
    }
