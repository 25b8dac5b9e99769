"""Custom tools with a grammar: their input follows it, or the request is refused."""

from __future__ import annotations

import re
from typing import Any

import httpx
import openai
import pytest
from scripted import Script, ScriptedEngine
from structured import RESPONSES

from gptoss_compile.runtime.api.custom_grammar import CHARACTERS, RULES
from gptoss_compile.runtime.api.tokenizer import Tokenizer

pytestmark = pytest.mark.anyio

SUMS = """// sums
start: number ("+" number)* ";"
number: DIGIT+
DIGIT: /[0-9]/
%ignore / /"""
FINAL = "<|channel|>final<|message|>done<|return|>"


def custom(definition: str, syntax: str = "lark", **more: Any) -> dict[str, Any]:
    format_ = {"type": "grammar", "syntax": syntax, "definition": definition}
    return {"type": "custom", "name": "sum", "description": "Adds up.", "format": format_, **more}


def call(text: str) -> str:
    return f"<|channel|>commentary to=functions.sum<|message|>{text}<|call|>"


async def ask(client: httpx.AsyncClient, tool: dict[str, Any], **more: Any) -> dict[str, Any]:
    body = {"input": "Go.", "tools": [tool], "max_output_tokens": 60, **more}
    answer = await client.post(RESPONSES, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["output"][-1]  # type: ignore[no-any-return]


async def test_what_fits_is_written(
    client: httpx.AsyncClient, script: Script, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    script.add(call("1 + 23;"), call("a/b"))
    made = await ask(client, custom(SUMS))
    assert (made["type"], made["name"], made["input"]) == ("custom_tool_call", "sum", "1 + 23;")
    shown = tokenizer.decode(engine.prompts[-1])
    assert "// Adds up." in shown and 'number ("+" number)* ";"' in shown and "type sum = () => any;" in shown
    assert (await ask(client, custom("^[a-z]/(b|c)$", "regex")))["input"] == "a/b"


@pytest.mark.parametrize(
    ("definition", "syntax", "pattern"),
    [
        (SUMS, "lark", r"[0-9 ]+(\+[0-9 ]+)*; *"),
        ("[A-F]{3}-[0-9]{2}", "regex", r"[A-F]{3}-[0-9]{2}"),
        ('start: "yes"i | "no"', "lark", "(?i:yes)|no"),
        ("(say )?\\$1|[/]", "regex", r"(say )?\$1|/"),
    ],
)
async def test_nothing_else_is_written(
    client: httpx.AsyncClient, script: Script, definition: str, syntax: str, pattern: str
) -> None:
    """The script wants to write something else, under tool_choice required, a name, and auto."""
    for choice in ("required", {"type": "custom", "name": "sum"}, "auto"):
        script.add(call('{"input": "words"}'))
        made = await ask(client, custom(definition, syntax), tool_choice=choice)
        assert made["type"] == "custom_tool_call"
        assert made["status"] == "incomplete" or re.fullmatch(pattern, made["input"]), made
        script._queue.clear()


@pytest.mark.parametrize("header", ["<|channel|>comment", " to", "<|channel|>commentary to"])
async def test_a_second_call_cut_in_its_header_is_not_shown(
    client: httpx.AsyncClient, script: Script, header: str
) -> None:
    written = script.ids(call("1;").replace("<|call|>", "<|end|><|start|>assistant" + header))
    script.add(written)
    made = await ask(client, custom(SUMS), tool_choice="required", max_output_tokens=len(written))
    assert (made["type"], made["input"]) == ("custom_tool_call", "1;")


def test_official_client(strict: openai.OpenAI, script: Script, engine: ScriptedEngine, tokenizer: Tokenizer) -> None:
    """Deltas come as the input is written, and the call goes back into the prompt as the model wrote it."""
    tool: Any = custom(SUMS)
    script.add(call("1 + 2 + 33;"), FINAL)
    events: list[Any] = list(strict.responses.create(model="gpt-oss", input="go", tools=[tool], stream=True))
    made = events[-1].response.output[-1]
    deltas = [event.delta for event in events if event.type == "response.custom_tool_call_input.delta"]
    [done] = [event for event in events if event.type == "response.custom_tool_call_input.done"]
    assert len(deltas) > 3 and "".join(deltas) == done.input == made.input == "1 + 2 + 33;"
    output: Any = {"type": "custom_tool_call_output", "call_id": made.call_id, "output": "36"}
    history: Any = [{"role": "user", "content": "go"}, {**made.model_dump(exclude_none=True), "id": "ctc_other"}, output]
    assert strict.responses.create(model="gpt-oss", input=history, tools=[tool]).output_text == "done"
    assert "1 + 2 + 33;" in tokenizer.decode(engine.prompts[-1]) and '{"input"' not in tokenizer.decode(engine.prompts[-1])


@pytest.mark.parametrize(
    ("definition", "syntax", "reason"),
    [
        ("start: number", "lark", "unknown name"),
        ("start: (", "lark", "Expected token"),
        ("begin: /a/", "lark", "no start rule"),
        ("", "lark", "Empty grammar"),
        ("start: /(?=a)b/", "lark", "look-around"),
        ("start: A\nA: B\nB: A", "lark", "circular"),
        ("start: <[200012]>", "lark", "'<[200012]>' is not supported"),
        ('start: "a" // x\n  <|call|>', "lark", "'<|call|>' is not supported"),
        ("start: @other", "lark", "'@other' is not supported"),
        ("start: %json {}", "lark", "'%json' is not supported"),
        ('%llguidance {"no_forcing": true}\nstart: "a"', "lark", "'%llguidance' is not supported"),
        ("start: 'a'", "lark", "is not supported"),
        ("start: /[^\\x00-\\u{10FFFF}]/", "lark", "nothing can satisfy it"),
        ("(", "regex", "unclosed group"),
        ("a(?!b)", "regex", "look-around"),
        ("x" * (CHARACTERS + 1), "regex", "characters"),
        ("start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(RULES)) + f'\nr{RULES}: "a"', "lark", "rules"),
        ("start: R0\n" + "\n".join(f"R{i}: R{i + 1} R{i + 1}" for i in range(40)) + "\nR40: /a/", "lark", "written out"),
        ("start: " + "(" * 300 + '"a"' + ")" * 300, "lark", "nested"),
        ("(" * 4000 + "a" + ")" * 4000, "regex", "nest"),
    ],
)
async def test_refused(client: httpx.AsyncClient, definition: str, syntax: str, reason: str) -> None:
    answer = await client.post(RESPONSES, json={"input": "Go.", "tools": [custom(definition, syntax)]})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == "tools[0].format.definition" and error["code"] == "invalid_grammar"
    assert reason in error["message"] and len(error["message"]) < 600


async def test_limits_are_for_all_together(client: httpx.AsyncClient) -> None:
    tools = [custom(f"a{{{i}}}" + "b" * (CHARACTERS // 3), "regex", name=f"t{i}") for i in range(3)]
    answer = await client.post(RESPONSES, json={"input": "Go.", "tools": tools})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "tools[2].format.definition"


@pytest.mark.parametrize("format_", [{}, {"syntax": "lark"}, {"definition": "a"}, {"syntax": "ebnf", "definition": "a"}])
async def test_incomplete(client: httpx.AsyncClient, format_: dict[str, str]) -> None:
    tool = {"type": "custom", "name": "sum", "format": {"type": "grammar", **format_}}
    answer = await client.post(RESPONSES, json={"input": "Go.", "tools": [tool]})
    assert answer.status_code == 400 and answer.json()["error"]["param"].startswith("tools")


async def test_a_dead_end_fails_closed(client: httpx.AsyncClient, script: Script) -> None:
    """A grammar that cannot go on ends the turn as a failure, and nothing else is shown as a call."""
    script.add(call("ab"))
    definition = 'start: "a" NEVER\nNEVER: /[^\\x00-\\u{10FFFF}]/'
    body = {"input": "Go.", "tools": [custom(definition)], "tool_choice": "required"}
    answer = await client.post(RESPONSES, json=body)
    assert answer.status_code in (400, 503) and "error" in answer.json(), answer.text
