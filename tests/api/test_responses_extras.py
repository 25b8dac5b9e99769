"""/v1/responses beyond the common: a WebSocket, compaction, custom tools and namespaces."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from scripted import Script, ScriptedEngine
from served import Running
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus

RESPONSES = "/v1/responses"
FINAL = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>"
CUSTOM: Any = {"type": "custom", "name": "patch", "description": "Apply it.", "format": {"type": "text"}}
_ANY: Any = {"type": "object", "properties": {"a": {"type": "integer"}}}
LOOKUP: Any = {"type": "function", "name": "lookup", "parameters": _ANY}
CRM: Any = {"type": "namespace", "name": "crm", "description": "Customers.", "tools": [LOOKUP, CUSTOM]}
pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def socket(running: Running) -> AsyncIterator[ClientConnection]:
    url = running.url.replace("http", "ws") + RESPONSES
    async with connect(url, additional_headers={"Authorization": "Bearer key"}) as connection:
        yield connection


async def turn(socket: ClientConnection, **body: Any) -> list[dict[str, Any]]:
    """The events of one turn."""
    await socket.send(json.dumps({"type": "response.create", "model": "gpt-oss", **body}))
    events = [json.loads(await socket.recv())]
    while events[-1]["type"] not in ("response.completed", "response.incomplete", "response.failed", "error"):
        events.append(json.loads(await socket.recv()))
    return events


async def test_turns_on_a_socket(socket: ClientConnection, script: Script, engine: ScriptedEngine, tokenizer: Any) -> None:
    script.add(FINAL.format("one"), FINAL.format("two"))
    first = await turn(socket, input="first question", store=False)
    assert [event["sequence_number"] for event in first] == list(range(len(first)))
    assert first[0]["type"] == "response.created" and first[-1]["response"]["output"][-1]["content"][0]["text"] == "one"
    second = await turn(socket, input="second question", store=False, previous_response_id=first[-1]["response"]["id"])
    assert second[-1]["response"]["output"][-1]["content"][0]["text"] == "two"
    assert "first question" in (text := tokenizer.decode(engine.prompts[-1])) and "second question" in text


async def test_a_failed_continuation_forgets(socket: ClientConnection, script: Script, running: Running) -> None:
    script.add(FINAL.format("one"), FINAL.format("x"), FINAL.format("elsewhere"))
    first = (await turn(socket, input="a", store=False))[-1]["response"]["id"]
    url = running.url.replace("http", "ws") + RESPONSES
    async with connect(url, additional_headers={"Authorization": "Bearer key"}) as other:
        refused = await turn(other, input="b", store=False, previous_response_id=first)
    bad = await turn(socket, input=[{"type": "nonsense"}], store=False, previous_response_id=first)
    gone = await turn(socket, input="b", store=False, previous_response_id=first)
    for events, status, code in ((refused, 404, "previous_response_not_found"), (bad, 400, None),
                                 (gone, 404, "previous_response_not_found")):
        assert len(events) == 1 and events[0]["type"] == "error"
        assert (events[0]["status"], events[0]["error"]["code"]) == (status, code)
    assert (await turn(socket, input="c"))[-1]["type"] == "response.completed"  # the connection goes on


async def test_bad_messages(socket: ClientConnection) -> None:
    for message in ("", "{", "[]", '{"type": "x"}', '{"type": "response.create"}', "\ud83d", b"\xff\xfe",
                    '{"type": "response.create", "input": "x", "background": true}'):
        data = message.encode("utf-8", "replace") if isinstance(message, str) else message
        await socket.send(data)
        answer = json.loads(await socket.recv())
        assert answer["type"] == "error" and answer["status"] == 400 and answer["error"]["message"]


async def test_prepared_turns(socket: ClientConnection, script: Script, engine: ScriptedEngine, tokenizer: Any) -> None:
    prepared = await turn(socket, input="context", store=False, generate=False)
    assert prepared[-1]["response"]["output"] == [] and not engine.prompts
    script.add(FINAL.format("x"))
    await turn(socket, input="question", store=False, previous_response_id=prepared[-1]["response"]["id"])
    assert "context" in tokenizer.decode(engine.prompts[-1])


async def test_leaving_a_socket_aborts(running: Running, engine: ScriptedEngine) -> None:
    url = running.url.replace("http", "ws") + RESPONSES
    with pytest.raises(InvalidStatus) as refused:
        async with connect(url):
            pass
    assert refused.value.response.status_code == 401
    async with connect(url, additional_headers={"Authorization": "Bearer key"}) as connection:
        await connection.send(json.dumps({"type": "response.create", "input": "hi"}))
        await connection.recv()
        assert engine.stats().requests_running + engine.stats().requests_waiting <= 1
    async with asyncio.timeout(5):
        while engine.stats().kv_pages_held:
            await asyncio.sleep(0.01)


def test_official_client_on_a_socket(strict: openai.OpenAI, script: Script) -> None:
    script.add(FINAL.format("Hello"))
    with strict.responses.connect() as connection:
        connection.response.create(model="gpt-oss", input="hi")
        for event in connection:
            if event.type == "response.completed":
                assert event.response.output_text == "Hello"
                break


async def test_compaction(client: httpx.AsyncClient, script: Script, engine: ScriptedEngine, tokenizer: Any) -> None:
    script.add(FINAL.format("They want apples."), FINAL.format("ok"))
    answer = (await client.post(RESPONSES + "/compact", json={"model": "gpt-oss", "input": "I want apples"})).json()
    assert answer["object"] == "response.compaction" and answer["usage"]["output_tokens"] > 0
    [item] = answer["output"]
    assert item["type"] == "compaction" and "apples" not in item["encrypted_content"]
    again = await client.post(RESPONSES, json={"input": [item, {"role": "user", "content": "Go on"}]})
    assert again.status_code == 200
    prompt = tokenizer.decode(engine.prompts[-1])
    assert "They want apples." in prompt and prompt.index("They want") < prompt.index("Go on")
    for bad in ({"input": "x"}, {"model": "gpt-oss"}, {"model": "gpt-oss", "input": []}):
        assert (await client.post(RESPONSES + "/compact", json=bad)).status_code == 400
    forged = {"input": [{**item, "encrypted_content": "AAAA"}]}
    assert (await client.post(RESPONSES, json=forged)).json()["error"]["code"] == "invalid_encrypted_content"


def test_official_client_compacts(strict: openai.OpenAI, script: Script) -> None:
    script.add(FINAL.format("summary"))
    compacted = strict.responses.compact(model="gpt-oss", input="hi")
    assert compacted.output[0].type == "compaction"


def call(name: str, arguments: str) -> str:
    return f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}<|call|>"


def test_custom_tools(strict: openai.OpenAI, script: Script, engine: ScriptedEngine, tokenizer: Any) -> None:
    text = 'line "1"\nline 2'
    script.add(call("patch", json.dumps({"input": text})), FINAL.format("done"))
    events: list[Any] = list(strict.responses.create(model="gpt-oss", input="go", tools=[CUSTOM], stream=True))
    made = events[-1].response.output[-1]
    assert (made.type, made.name, made.input) == ("custom_tool_call", "patch", text)
    deltas = [event.delta for event in events if event.type == "response.custom_tool_call_input.delta"]
    [done] = [event for event in events if event.type == "response.custom_tool_call_input.done"]
    assert "".join(deltas) == done.input == text and done.item_id == made.id
    output: Any = {"type": "custom_tool_call_output", "call_id": made.call_id, "output": "applied"}
    history: Any = [{"role": "user", "content": "go"}, made.model_dump(exclude_none=True), output]
    assert strict.responses.create(model="gpt-oss", input=history, tools=[CUSTOM]).output_text == "done"
    prompt = tokenizer.decode(engine.prompts[-1])
    assert "functions.patch to=assistant" in prompt and "applied" in prompt and json.dumps({"input": text}) in prompt


def test_namespaces(strict: openai.OpenAI, script: Script, engine: ScriptedEngine, tokenizer: Any) -> None:
    script.add(call("crm.lookup", '{"a": 1}'), FINAL.format("done"))
    first = strict.responses.create(model="gpt-oss", input="go", tools=[CRM])
    made: Any = first.output[-1]
    assert (made.type, made.name, made.namespace, made.arguments) == ("function_call", "lookup", "crm", '{"a": 1}')
    assert "Customers." in tokenizer.decode(engine.prompts[-1])
    output: Any = [{"type": "function_call_output", "call_id": made.call_id, "output": "42"}]
    second = strict.responses.create(model="gpt-oss", input=output, tools=[CRM], previous_response_id=first.id)
    assert second.output_text == "done" and "functions.crm.lookup to=assistant" in tokenizer.decode(engine.prompts[-1])


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "custom"},
        {"type": "custom", "name": "a b"},
        {"type": "custom", "name": "a", "format": {"type": "x"}},
        {"type": "namespace", "name": "n"},
        {"type": "namespace", "name": "n", "tools": []},
        {"type": "namespace", "name": "n", "tools": [{"type": "mcp"}]},
        {"type": "namespace", "name": "n", "tools": [{"type": "function"}]},
        {"type": "namespace", "name": "n", "tools": [LOOKUP, LOOKUP]},
    ],
)
async def test_incomplete_tools(client: httpx.AsyncClient, tool: dict[str, Any]) -> None:
    answer = await client.post(RESPONSES, json={"input": "hi", "tools": [tool]})
    assert answer.status_code == 400 and answer.json()["error"]["param"].startswith("tools")
