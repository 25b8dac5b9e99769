"""Schemas that are wrong, that cannot be enforced, or that would cost too much."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest
from scripted import Script
from structured import CHAT, RESPONSES, STRING, USER, chat, formatted, tool

from gptoss_compile.runtime.api import grammar
from gptoss_compile.runtime.api.tokenizer import Tokenizer

pytestmark = pytest.mark.anyio


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = STRING
    for _ in range(levels):
        schema = {"type": "object", "properties": {"x": schema}}
    return schema


@pytest.mark.parametrize(
    ("schema", "path", "reason"),
    [
        ({"type": "strin"}, "", "strin"),
        ({"properties": {"a": {"items": {"not": STRING}}}}, ".properties.a.items", "not"),
        ({"properties": {"a": {"type": "string", "pattern": "(?=a)"}}}, ".properties.a", "look-around"),
        ({"properties": {"a": {"pattern": "("}}}, ".properties.a", "unclosed group"),
        ({"anyOf": [STRING, {"type": "array", "uniqueItems": True}]}, ".anyOf[1]", "uniqueItems"),
        ({"properties": {"a": {"$ref": "#/$defs/b"}}}, ".properties.a.$ref", "leads nowhere"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#"}}}, None, "refers to itself"),
        ({"$ref": "https://example.com/schema"}, "", "not present"),
        ({"properties": {"a": 5}}, ".properties.a", "object or a boolean"),
        ({"properties": {"a": {"x-guidance": {"lenient": True}}}}, ".properties.a.x-guidance", "JSON Schema"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "", "Unsatisfiable"),
        ({"oneOf": [STRING, {"enum": ["a"]}]}, "", "oneOf"),
        (nested(60), None, "nested"),
        ({"enum": list(range(10_000))}, ".enum", "too large"),
        ({"enum": [{"k": [i]} for i in range(4000)]}, ".enum", "too large"),
        ({"minimum": 10**2000}, "", "bits"),
        ({"items": {"allOf": [{"multipleOf": 991}, {"multipleOf": 997}]}}, ".items", "multiples"),
        ({"patternProperties": {f"^a{i}$": STRING for i in range(200)}}, ".patternProperties", "too large"),
        ({"prefixItems": [{"minimum": -(10**17), "maximum": 10**17 + i} for i in range(300)]}, None, "bounds"),
        ({"type": "object", "properties": {f"p{i}": STRING for i in range(3000)}}, ".properties", "too large"),
        ({"anyOf": [{"const": i} for i in range(3000)]}, ".anyOf", "too large"),
        ({"allOf": [{"type": "string", "pattern": f"a{i}"} for i in range(20)]}, "", "patterns"),
        ({"type": "array", "prefixItems": [{"multipleOf": 997 + i} for i in range(99)]}, None, "multipleOf"),
        ({"type": "integer", "multipleOf": 1e300}, ".multipleOf", "multipleOf"),
        ({"type": "string", "pattern": "(a|b)*a(a|b){20}", "minLength": 100}, "", "regex"),
        ({"allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
          "$defs": {k: {"type": "object", "properties": {"n": {"$ref": f"#/$defs/{k}"}}} for k in "ab"}}, "", "level"),
        ({"description": "x" * 300_000}, "", "too large"),
    ],
)  # fmt: skip
async def test_refused(client: httpx.AsyncClient, tokenizer: Tokenizer, schema: Any, path: str | None, reason: str) -> None:
    """Schemas that are wrong, that cannot be enforced, or that would cost too much: 400 with the path, in no time."""
    grammar.llguidance_tokenizer(tokenizer)
    spent = []
    for _ in range(3):  # other threads' time counts as well, now and then
        start = time.process_time()
        response = await client.post(CHAT, json={"messages": USER, "response_format": formatted(schema)})
        spent.append(time.process_time() - start)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert reason in error["message"] and len(error["message"]) < 600 and error["code"] == "invalid_json_schema"
    base = "response_format.json_schema.schema"
    assert error["param"].startswith(base) if path is None else error["param"] == base + path, error
    assert min(spent) < 0.2


def test_large_schemas_compile_in_time(tokenizer: Tokenizer) -> None:
    """What is just within the limits."""
    grammar.llguidance_tokenizer(tokenizer)
    grammars = grammar.Grammars(tokenizer)
    wide = {"type": "object", "properties": {f"p{i}": STRING for i in range(500)}}
    chain = {"properties": {f"p{j}": {"$ref": "#/$defs/l0"} for j in range(10)}} | {
        "$defs": {
            f"l{i}": {"type": "object", "properties": {f"p{j}": {"$ref": f"#/$defs/l{i + 1}"} for j in range(10)}}
            for i in range(20)
        }
        | {"l20": STRING}
    }
    for schema in (wide, chain, {"enum": [f"value {i}" for i in range(4999)]}, nested(40)):
        start = time.process_time()
        grammars.compile(grammar.TurnRules(answer=schema), 1)
        assert time.process_time() - start < 0.5


async def test_tools_are_refused_when_strict(client: httpx.AsyncClient, script: Script) -> None:
    """What cannot be enforced of a tool's schema is left out unless the tool is strict, and then refused."""
    schema = {"type": "object", "properties": {"tags": {"type": "array", "items": STRING, "uniqueItems": True}}}
    body = {"messages": USER, "tools": [tool("ok"), tool("f", schema, strict=True)]}
    response = await client.post(CHAT, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tools[1].function.parameters.properties.tags"
    flat = [{"type": "function", "name": "f", "parameters": schema, "strict": True}]
    response = await client.post(RESPONSES, json={"input": "Go.", "tools": flat})
    assert response.status_code == 400 and response.json()["error"]["param"] == "tools[0].parameters.properties.tags"
    script.add('<|channel|>commentary to=functions.f<|message|>{"tags":["a"]}<|call|>')
    choice = (await chat(client, tools=[tool("f", schema)]))["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"tags":["a"]}'
