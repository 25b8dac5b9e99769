"""Structured output and tool calls by grammar: what a model may write, and what it is shown of it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from llguidance import LLParserLimits
from openai_harmony import ToolDescription, ToolNamespaceConfig
from scripted import VOCAB, Script, ScriptedEngine
from structured import CHAT, FINAL, RESPONSES, STRING, USER, WEATHER, chat, formatted, tool

from gptoss_compile.runtime.api import grammar
from gptoss_compile.runtime.api.harmony import CHANNEL, MESSAGE, RETURN
from gptoss_compile.runtime.api.responses_prompt import function_tools
from gptoss_compile.runtime.api.responses_schema import ResponseBody
from gptoss_compile.runtime.api.schema_text import Room, tool_schema
from gptoss_compile.runtime.api.tokenizer import Tokenizer
from gptoss_compile.runtime.api.turn_rules import response_rules

pytestmark = pytest.mark.anyio


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


# The prompt ----------------------------------------------------------------------------------------------------


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
    assert tool_schema({"$ref": "#"}, Room()) is None
    tree = {"properties": {"name": STRING, "left": {"$ref": "#"}, "right": {"$ref": "#"}}}
    shown = tool_schema(tree, Room())
    assert shown and shown["properties"]["left"]["properties"]["right"] == {} and len(json.dumps(shown)) < 600
