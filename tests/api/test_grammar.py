"""Structured output and tool calls by grammar: what a model may write, and that it writes nothing else."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Literal

import httpx
import numpy as np
import pytest
from conftest import asgi_client
from jsonschema import Draft202012Validator
from llguidance import LLParserLimits
from openai import AsyncOpenAI, LengthFinishReasonError
from openai_harmony import ToolDescription, ToolNamespaceConfig
from pydantic import BaseModel, ValidationError
from random_schemas import NoiseExecutor, random_schema
from scripted import VOCAB, Script, ScriptedEngine

from gptoss_compile.runtime.api import grammar
from gptoss_compile.runtime.api.app import build_app
from gptoss_compile.runtime.api.harmony import CHANNEL, MESSAGE, RETURN
from gptoss_compile.runtime.api.options import ServerOptions
from gptoss_compile.runtime.api.responses_prompt import function_tools
from gptoss_compile.runtime.api.responses_schema import ResponseBody
from gptoss_compile.runtime.api.schema_text import tool_schema
from gptoss_compile.runtime.api.tokenizer import Tokenizer
from gptoss_compile.runtime.api.turn_rules import response_rules
from gptoss_compile.runtime.engine import Engine

pytestmark = pytest.mark.anyio

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
USER = [{"role": "user", "content": "Go."}]
SCHEMAS = int(os.environ.get("GPTOSS_SCHEMAS", "20"))
STRING = {"type": "string"}
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["city"],
}


@pytest.fixture
def noise(tokenizer: Tokenizer, options: ServerOptions, seed: int) -> Iterator[httpx.AsyncClient]:
    """A client of a model that writes at random."""
    engine = Engine(NoiseExecutor(tokenizer, seed), max_num_seqs=8, max_num_batched_tokens=512, vocab_limit=VOCAB)
    engine.start()
    yield asgi_client(build_app(engine, tokenizer, options))
    engine.shutdown(drain=False)


def formatted(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def tool(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


def valid(text: str, schema: Any) -> bool:
    return Draft202012Validator(schema).is_valid(json.loads(text))


async def chat(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post(CHAT, json={"messages": USER, "max_tokens": 600, **body}, timeout=600)
    assert response.status_code == 200, response.text
    return response.json()  # type: ignore[no-any-return]


# Random schemas, random logits ------------------------------------------------------------------------------------------


async def test_random_schemas(noise: httpx.AsyncClient, seed: int) -> None:
    """As answers in chat and in Responses, and as arguments of a call: what is finished is valid, the rest says so."""
    rng = random.Random(seed)
    schemas = [random_schema(rng) for _ in range(SCHEMAS)]
    ways: list[Callable[..., Any]] = [_answer, _response, _call]
    results = await asyncio.gather(*(ways[i % 3](noise, schema) for i, schema in enumerate(schemas)))
    for schema, text in zip(schemas, results, strict=True):
        assert text is None or valid(text, schema), (schema, text)
    finished = sum(text is not None for text in results)
    print(f"{finished} of {SCHEMAS} answers finished")
    assert finished > SCHEMAS / 2


async def _answer(client: httpx.AsyncClient, schema: Any) -> str | None:
    choice = (await chat(client, response_format=formatted(schema)))["choices"][0]
    assert choice["finish_reason"] in ("stop", "length")
    return choice["message"]["content"] if choice["finish_reason"] == "stop" else None


async def _response(client: httpx.AsyncClient, schema: Any) -> str | None:
    text = {"format": {"type": "json_schema", "name": "answer", "schema": schema}}
    response = await client.post(RESPONSES, json={"input": "Go.", "text": text, "max_output_tokens": 600}, timeout=600)
    assert response.status_code == 200, response.text
    body = response.json()
    if body["status"] == "incomplete":
        assert body["incomplete_details"] == {"reason": "max_output_tokens"}
        return None
    assert body["status"] == "completed" and body["text"]["format"] == text["format"]
    assert body["output"][-1]["type"] == "message" and body["output"][-1]["phase"] == "final_answer"
    return str(body["output"][-1]["content"][0]["text"])


async def _call(client: httpx.AsyncClient, schema: Any) -> str | None:
    body = {"tools": [tool("f", schema, strict=True)], "tool_choice": "required", "parallel_tool_calls": False}
    choice = (await chat(client, **body))["choices"][0]
    if choice["finish_reason"] == "length":
        return None
    [call] = choice["message"]["tool_calls"]
    return str(call["function"]["arguments"])


@pytest.mark.parametrize("named", [False, True])
async def test_forced_calls(noise: httpx.AsyncClient, named: bool) -> None:
    """100 of 100 call what they must, with arguments that fit, several at once where that is allowed."""
    tools = [tool("get", WEATHER), tool("get_more", WEATHER, strict=False), tool("nothing"), tool("empty", {})]
    choice: Any = {"type": "function", "function": {"name": "get"}} if named else "required"
    body = await chat(noise, tools=tools, tool_choice=choice, n=100)
    counts = []
    for each in body["choices"]:
        assert each["finish_reason"] == "tool_calls" and each["message"]["content"] is None, each
        calls = [call["function"] for call in each["message"]["tool_calls"]]
        for call in calls:
            assert call["name"] == "get" if named else call["name"] in ("get", "get_more", "nothing", "empty")
            fits = valid(call["arguments"], WEATHER) if "get" in call["name"] else call["arguments"] == "{}"
            assert fits, call
        counts.append(len(calls))
    assert max(counts) > 1
    body = await chat(noise, tools=tools, tool_choice=choice, n=20, parallel_tool_calls=False)
    assert [len(each["message"]["tool_calls"]) for each in body["choices"]] == [1] * 20


async def test_auto_and_none(noise: httpx.AsyncClient) -> None:
    """Under auto a turn answers or calls, and the arguments fit all the same; JSON answers stay possible beside tools."""
    body = await chat(noise, tools=[tool("get", WEATHER)], response_format=formatted(WEATHER), n=40)
    for each in body["choices"]:
        message = each["message"]
        if each["finish_reason"] == "tool_calls":
            assert message["content"] is None
            assert all(valid(call["function"]["arguments"], WEATHER) for call in message["tool_calls"])
        else:
            assert each["finish_reason"] == "stop" and valid(message["content"], WEATHER) and "tool_calls" not in message
    assert {each["finish_reason"] for each in body["choices"]} == {"stop", "tool_calls"}
    body = await chat(noise, tools=[tool("get", WEATHER)], tool_choice="none", n=20)
    assert all(each["finish_reason"] in ("stop", "length") for each in body["choices"])


async def test_json_object(noise: httpx.AsyncClient) -> None:
    body = await chat(noise, response_format={"type": "json_object"}, n=20)
    for each in body["choices"]:
        assert each["finish_reason"] in ("stop", "length")
        assert each["finish_reason"] == "length" or isinstance(json.loads(each["message"]["content"]), dict)


async def test_streamed_arguments(noise: httpx.AsyncClient, seed: int) -> None:
    schema = random_schema(random.Random(seed))
    request = {"tools": [tool("f", schema)], "tool_choice": "required", "seed": 5, "messages": USER, "max_tokens": 600}
    response = await noise.post(CHAT, json={**request, "stream": True})
    arguments: dict[int, str] = {}
    finish = None
    for line in response.text.splitlines():
        if line.startswith("data: {"):
            choice = json.loads(line[6:])["choices"][0]
            finish = choice["finish_reason"] or finish
            for call in choice["delta"].get("tool_calls", ()):
                arguments[call["index"]] = arguments.get(call["index"], "") + call["function"]["arguments"]
    assert finish in ("tool_calls", "length") and arguments
    done = list(arguments.values())[: None if finish == "tool_calls" else -1]
    assert all(valid(text, schema) for text in done), (schema, arguments)
    response = await noise.post(
        RESPONSES,
        json={"input": "Go.", "tools": [{"type": "function", "name": "f", "parameters": schema}], "stream": True,
              "tool_choice": "required", "max_output_tokens": 600},
    )  # fmt: skip
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    items = [item for item in events[-1]["response"]["output"] if item["type"] == "function_call"]
    for item in items:
        deltas = [e["delta"] for e in events if e["type"].endswith("arguments.delta") and e["item_id"] == item["id"]]
        assert "".join(deltas) == item["arguments"]
        assert item["status"] == "incomplete" or valid(item["arguments"], schema)


async def test_official_client(noise: httpx.AsyncClient) -> None:
    """Its own way to ask for a pydantic model, in chat and in Responses."""
    client = AsyncOpenAI(base_url="http://test/v1", api_key="x", http_client=noise, _strict_response_validation=True)
    for _ in range(5):
        with suppress(LengthFinishReasonError):
            chat_answer = await client.chat.completions.parse(
                model="gpt-oss", messages=[{"role": "user", "content": "Go."}], response_format=Trip, max_tokens=600
            )
            assert isinstance(chat_answer.choices[0].message.parsed, Trip)
            break
    else:
        raise AssertionError("no answer was finished")
    with suppress(ValidationError):  # of an unfinished one
        answer = await client.responses.parse(model="gpt-oss", input="Go.", text_format=Trip, max_output_tokens=600)
        assert answer.status == "completed" and isinstance(answer.output_parsed, Trip)


class Stop(BaseModel):
    city: Literal["Oslo", "Rome"]
    nights: int
    notes: list[str] | None


class Trip(BaseModel):
    stops: list[Stop]
    back: Stop | None


# What a model would write, forced or not --------------------------------------------------------------------------------


FINAL = "<|channel|>analysis<|message|>{not json}<|end|><|start|>assistant<|channel|>final<|message|>"


async def test_the_mask_arms_in_the_final_message_alone(client: httpx.AsyncClient, script: Script) -> None:
    script.add(FINAL + '{"a": "b"}<|return|>', '<|channel|>final <|constrain|>json<|message|>{"a":"b"}<|return|>')
    schema = {"type": "object", "properties": {"a": STRING}, "required": ["a"]}
    for reasoning in ("{not json}", None):
        choice = (await chat(client, response_format=formatted(schema)))["choices"][0]
        assert choice["message"].get("reasoning") == reasoning
        assert json.loads(choice["message"]["content"]) == {"a": "b"} and choice["finish_reason"] == "stop"


async def test_what_the_schema_forbids_cannot_be_written(client: httpx.AsyncClient, script: Script) -> None:
    script.add(FINAL + "Sure! Here you are: 5<|return|>", FINAL + '{"n": 5, "more": 1}<|return|>')
    schema = {"type": "object", "properties": {"n": {"const": 5}}, "required": ["n"]}
    for _ in range(2):
        choice = (await chat(client, response_format=formatted(schema), max_tokens=60))["choices"][0]
        assert choice["finish_reason"] == "stop" and json.loads(choice["message"]["content"]) == {"n": 5}


async def test_unfinished_json_says_so(client: httpx.AsyncClient, script: Script) -> None:
    script.add(FINAL + '{"a": "' + "x " * 50, FINAL + '{"a": "stop here"}')
    answer = formatted({"type": "object", "properties": {"a": STRING}, "required": ["a"]})
    cut = (await chat(client, response_format=answer, max_tokens=30))["choices"][0]
    assert cut["finish_reason"] == "length" and cut["message"]["content"].startswith('{"a": "x x')
    stopped = (await chat(client, response_format=answer, stop="here"))["choices"][0]
    assert stopped["finish_reason"] == "stop" and stopped["stop_reason"] == "here"
    assert stopped["message"]["content"] == '{"a": "stop '


async def test_the_end_comes_before_min_tokens(client: httpx.AsyncClient, script: Script) -> None:
    """Where nothing but the end may follow, the turn ends; a thought before it goes on until then."""
    script.add(FINAL + "true<|return|>")
    body = await chat(client, response_format=formatted({"type": "boolean"}), min_tokens=100)
    assert body["choices"][0]["message"]["content"] == "true" and body["choices"][0]["finish_reason"] == "stop"


async def test_a_grammar_that_fails_on_the_way(client: httpx.AsyncClient, script: Script, monkeypatch: Any) -> None:
    """Nothing unconstrained is ever shown: an error takes the answer's place, and the server goes on."""
    monkeypatch.setattr(grammar, "_LIMITS", LLParserLimits(step_max_items=60))
    script.add(FINAL + '{"a": "b"}<|return|>')
    schema = {"type": "object", "properties": {f"p{i}": STRING for i in range(100)}}
    response = await client.post(CHAT, json={"messages": USER, "response_format": formatted(schema), "max_tokens": 60})
    assert response.status_code == 400 and response.json()["error"]["code"] == "invalid_json_schema"
    assert "too complex to enforce: parser error: Too many items" in response.text and "Tokens" not in response.text
    monkeypatch.undo()
    schema["properties"]["q"] = STRING
    script.add(FINAL + "{}<|return|>")
    assert (await chat(client, response_format=formatted(schema)))["choices"][0]["message"]["content"] == "{}"


def test_a_panic_fails_closed() -> None:
    class Panic(BaseException):
        """As a panic in Rust arrives."""

    class Matcher:
        def compute_bitmask(self) -> bytes:
            raise Panic

    broken: Any = Matcher()
    with ThreadPoolExecutor(1) as workers:
        turn = grammar.TurnGrammar(broken, workers)
        scores = np.zeros(VOCAB, np.float32)
        scores[RETURN] = -np.inf  # as min_tokens does it
        turn([], scores)
    assert turn.error == "Panic" and np.flatnonzero(np.isfinite(scores)).tolist() == [RETURN]


# Refused ----------------------------------------------------------------------------------------------------------------


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
    start = time.process_time()
    response = await client.post(CHAT, json={"messages": USER, "response_format": formatted(schema)})
    spent = time.process_time() - start
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert reason in error["message"] and len(error["message"]) < 600 and error["code"] == "invalid_json_schema"
    base = "response_format.json_schema.schema"
    assert error["param"].startswith(base) if path is None else error["param"] == base + path, error
    assert spent < 0.2


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


class Box:
    """A toolbox as far as the rules look at it."""

    kinds = ("web_search", "code_interpreter", "mcp")
    recipients = ("browser.search", "python", "wiki.read")

    def namespaces(self) -> list[ToolNamespaceConfig]:
        wiki = ToolNamespaceConfig(name="wiki", description=None, tools=[ToolDescription.new("read", "Read.", None)])
        return [ToolNamespaceConfig.browser(), ToolNamespaceConfig.python(), wiki]


@pytest.mark.parametrize(
    ("choice", "recipients"),
    [
        ("required", None),
        ({"type": "function", "name": "f"}, ["functions.f"]),
        ({"type": "web_search"}, ["browser.search"]),
        ({"type": "code_interpreter"}, ["python"]),
        ({"type": "mcp", "server_label": "wiki"}, ["wiki.read"]),
        ("auto", None),
        (None, None),
    ],
)
def test_rules_with_the_servers_tools(tokenizer: Tokenizer, choice: Any, recipients: list[str] | None) -> None:
    body = ResponseBody.model_validate(
        {"input": "Go.", "tools": [{"type": "function", "name": "f", "parameters": WEATHER}], "tool_choice": choice}
    )
    box: Any = Box()
    rules = response_rules(body, function_tools(body, box), box, None)
    assert rules is not None and rules.must_call == (choice not in ("auto", None))
    every = ["functions.f", "browser.search", "browser.open", "browser.find", "python", "wiki.read"]
    assert [callee.recipient for callee in rules.callees] == (recipients or every)
    for callee in rules.callees:
        header = f" to={callee.recipient}"
        written = [CHANNEL, *tokenizer.encode(f"analysis{header} code"), MESSAGE]
        [turn] = grammar.Grammars(tokenizer).compile(rules, 1)
        scores = np.zeros(VOCAB, np.float32)
        turn(written, scores)
        assert turn.error is None and np.isfinite(scores[tokenizer.encode("print(")[0]]) == (callee.recipient == "python")


# The prompt -------------------------------------------------------------------------------------------------------------


async def test_the_prompt_shows_the_format(
    client: httpx.AsyncClient, script: Script, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    script.add(FINAL + "{}<|return|>", FINAL + "{}<|return|>")
    format_ = {"name": "point", "description": "Where\nto go.", "schema": {"type": "object", "properties": {}}}
    section = '# Response Formats\n\n## point\n\n// Where to go.\n{"type":"object","properties":{}}<|end|>'
    messages = [{"role": "developer", "content": "Be brief."}, *USER]
    await chat(client, messages=messages, response_format={"type": "json_schema", "json_schema": format_})
    assert f"<|start|>developer<|message|># Instructions\n\nBe brief.\n\n{section}" in tokenizer.encoding.decode(
        engine.prompts[-1]
    )
    response = await client.post(RESPONSES, json={"input": "Go.", "text": {"format": {"type": "json_schema", **format_}}})
    assert response.json()["output"][-1]["content"][0]["text"] == "{}"
    assert f"<|start|>developer<|message|>{section}" in tokenizer.encoding.decode(engine.prompts[-1])


async def test_the_prompt_shows_what_the_library_cannot(
    client: httpx.AsyncClient, engine: ScriptedEngine, script: Script, tokenizer: Tokenizer
) -> None:
    properties = {
        "a": {"anyOf": [STRING, {"type": "null"}]},
        "b": {"$ref": "#/$defs/P", "description": "where\n// to"},
        "c": {"enum": [1, 2, None], "description": "how many"},
        "d": {"const": "x"},
        "e": {"allOf": [{"$ref": "#/$defs/P"}, {"properties": {"z": {"type": "integer"}}}]},
        "f": {"anyOf": [{"type": "array", "items": {"enum": ["u", "v"]}}, {"type": "boolean"}]},
    }
    point = {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}
    script.add(FINAL + "hi<|return|>")
    await chat(client, tools=[tool("f", {"type": "object", "properties": properties, "$defs": {"P": point}})])
    prompt = tokenizer.encoding.decode(engine.prompts[-1])
    for line in (
        "a?: string | null,",
        "// where // to\n{\n    x: number,\n    },",
        "// how many One of: 1, 2, null\nc?: number | null,",
        'd?: "x",',
        "x: number,\n    z?: number,\n    },",
        '| "u" | "v"[]\n | boolean',
    ):
        assert line in prompt, prompt
    assert tool_schema({"$ref": "#"}) is None and tool_schema({"properties": {"a": {"$ref": "#"}}}) is not None
