"""/v1/responses over the real engine with scripted sampling: objects, events, state."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from scripted import Script, ScriptedEngine
from served import asgi_client
from test_chat import ANSWER, CALL
from test_http import error_of

from gptoss_compile.runtime.api.app import build_app
from gptoss_compile.runtime.api.options import ServerOptions
from gptoss_compile.runtime.api.tokenizer import Tokenizer

URL = "/v1/responses"
TOOL = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
KEYS = {
    "id", "object", "created_at", "completed_at", "status", "incomplete_details", "model", "previous_response_id",
    "instructions", "output", "error", "tools", "tool_choice", "truncation", "parallel_tool_calls", "text", "top_p",
    "presence_penalty", "frequency_penalty", "top_logprobs", "temperature", "reasoning", "usage", "max_output_tokens",
    "max_tool_calls", "store", "background", "service_tier", "metadata", "safety_identifier", "prompt_cache_key",
}  # fmt: skip
pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, after checking what holds for every stream."""
    assert response.status_code == 200 and "\r" not in response.text
    found = []
    for block in response.text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert [e["sequence_number"] for e in found] == list(
        range(found[0]["sequence_number"], found[-1]["sequence_number"] + 1)
    )
    return found


def check_events(found: list[dict[str, Any]]) -> None:
    """Order and nesting: one item open at a time, deltas add up to what is done, and that to the final object."""
    kinds = [e["type"] for e in found]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds.count("response.created") == 1
    assert kinds[-1] in ("response.completed", "response.incomplete", "response.failed")
    for e in (found[0], found[1]):
        assert set(e["response"]) >= KEYS and e["response"]["usage"] is None and e["response"]["output"] == []
    items, current, delta = [], None, ""
    for e in found[2:-1]:
        kind = e["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert current is None and e["output_index"] == len(items)
            assert e["item"].get("status", "in_progress") == "in_progress"
            current, delta = e["item"], ""
            continue
        assert current is not None and e["output_index"] == len(items)
        if kind == "output_item.done":
            assert e["item"]["id"] == current["id"]
            items.append(e["item"])
            current = None
            continue
        assert e["item_id"] == current["id"]
        if kind.endswith(".delta") and "summary" not in kind:
            delta += e["delta"]
        elif kind in ("output_text.done", "reasoning_text.done"):
            assert e["text"] == delta
        elif kind == "function_call_arguments.done":
            assert e["arguments"] == delta and e["name"] == current["name"]
    assert current is None and items == found[-1]["response"]["output"]


def no_nulls(node: Any) -> bool:
    if isinstance(node, dict):
        return all(value is not None and no_nulls(value) for value in node.values())
    return all(map(no_nulls, node)) if isinstance(node, list) else True


async def test_object(client: httpx.AsyncClient, script: Script) -> None:
    script.add(ANSWER)
    body = (await client.post(URL, json={"input": "hi", "tools": [TOOL], "metadata": {"a": "b"}})).json()
    assert set(body) >= KEYS and body["status"] == "completed" and isinstance(body["completed_at"], int)
    assert [item["type"] for item in body["output"]] == ["reasoning", "message"] and no_nulls(body["output"])
    reasoning, message = body["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Think."}] and reasoning["summary"] == []
    assert message["content"] == [{"type": "output_text", "text": "Hello 👍🏽!", "annotations": []}]
    assert message["phase"] == "final_answer" and message["status"] == "completed" and body["metadata"] == {"a": "b"}
    usage = body["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["output_tokens_details"]["reasoning_tokens"] == 2
    assert body["tools"] == [{**TOOL, "description": None, "strict": None}]
    for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty", "top_logprobs"):
        assert isinstance(body[name], (int, float))
    got = await client.get(f"{URL}/{body['id']}")
    assert got.json() == body


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"reasoning": {"summary": "auto", "effort": "max"}},
        {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
        {"include": ["reasoning.encrypted_content"], "store": False},
    ],
)
async def test_stream(client: httpx.AsyncClient, script: Script, extra: dict[str, Any]) -> None:
    script.add("<|channel|>commentary<|message|>I look.<|end|><|start|>assistant" + CALL, ANSWER)
    request = {"input": "hi", "tools": [TOOL], "stream": True, **extra}
    for types in (["message", "reasoning", "function_call"], ["reasoning", "message"]):
        found = events(await client.post(URL, json=request))
        check_events(found)
        final = found[-1]["response"]
        assert [item["type"] for item in final["output"]] == types and no_nulls(final["output"])
        assert found[-1]["type"] == "response.completed"
        got = await client.get(f"{URL}/{final['id']}")
        if extra.get("store") is False:
            assert got.status_code == 404 and error_of(got)["message"] == f"Response with id '{final['id']}' not found."
            assert all(item["encrypted_content"] for item in final["output"] if item["type"] == "reasoning")
            continue
        assert got.json() == final
        replay = events(await client.get(f"{URL}/{final['id']}?stream=true&starting_after=3"))
        assert replay == found[4:]
    if "reasoning" in extra:
        assert final["output"][0]["summary"] == [{"type": "summary_text", "text": "Think."}]
        assert final["reasoning"] == {"effort": "high", "summary": "auto"}
    if "top_logprobs" in extra:
        entries = final["output"][1]["content"][0]["logprobs"]
        assert b"".join(bytes(e["bytes"]) for e in entries).decode() == "Hello 👍🏽!"
        assert entries == [x for e in found if e["type"] == "response.output_text.delta" for x in e["logprobs"]]


async def test_length_is_incomplete(client: httpx.AsyncClient, script: Script) -> None:
    script.add(ANSWER, CALL, ANSWER)
    for limit, types in ((8, ["reasoning", "message"]), (18, ["reasoning", "function_call"]), (4, ["reasoning"])):
        request = {"input": "hi", "tools": [TOOL], "max_output_tokens": limit, "stream": True}
        found = events(await client.post(URL, json=request))
        check_events(found)
        final = found[-1]["response"]
        if final["status"] == "completed":
            continue
        assert found[-1]["type"] == "response.incomplete"
        assert final["incomplete_details"] == {"reason": "max_output_tokens"} and final["completed_at"] is None
        assert [item["type"] for item in final["output"]] == types[: len(final["output"])]
        assert final["usage"]["output_tokens"] == limit


async def test_conversation(
    client: httpx.AsyncClient, script: Script, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    """A tool loop through previous_response_id: the model's own tokens come back, so that only the new is computed."""
    script.add(CALL, ANSWER, ANSWER, ANSWER)
    first = (await client.post(URL, json={"input": "weather?", "tools": [TOOL], "instructions": "Be brief."})).json()
    call = first["output"][1]
    prompt = engine.prompts[-1]
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}
    second = (
        await client.post(
            URL,
            json={"input": [output], "previous_response_id": first["id"], "tools": [TOOL], "instructions": "Be brief."},
        )
    ).json()
    assert engine.prompts[-1][: len(prompt)] == prompt
    assert engine.prompts[-1][len(prompt) : len(prompt) + len(script.ids(CALL))] == script.ids(CALL)
    assert second["usage"]["input_tokens_details"]["cached_tokens"] > 0
    text = tokenizer.encoding.decode(engine.prompts[-1])
    assert text.endswith(
        "<|call|><|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>sunny<|end|>"
        "<|start|>assistant"
    )
    for _ in range(2):  # two children of one parent do not see each other
        third = (await client.post(URL, json={"input": "more", "previous_response_id": second["id"]})).json()
        text = tokenizer.encoding.decode(engine.prompts[-1])
        assert (
            "Look." not in text and "Think." not in text and text.count("Hello 👍🏽!") == 1 and "Be brief" not in text
        )
        assert third["previous_response_id"] == second["id"]
    listed = (await client.get(f"{URL}/{second['id']}/input_items")).json()
    assert [item["call_id"] for item in listed["data"]] == [call["call_id"]] and not listed["has_more"]


async def test_references_and_stateless_loops(
    client: httpx.AsyncClient, script: Script, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    script.add(CALL, ANSWER, ANSWER)
    request = {"input": "weather?", "tools": [TOOL], "include": ["reasoning.encrypted_content"]}
    first = (await client.post(URL, json=request)).json()
    reasoning, call = first["output"]
    output = {
        "type": "function_call_output",
        "call_id": call["call_id"],
        "output": [{"type": "input_text", "text": "sunny"}],
    }
    user = {"role": "user", "content": [{"type": "input_text", "text": "weather?"}]}
    prompts = []
    sealed = {**reasoning, "content": None, "summary": []}
    for history in ([{"type": "item_reference", "id": reasoning["id"]}, {"id": call["id"]}], [sealed, call]):
        response = await client.post(URL, json={**request, "input": [user, *history, output]})
        assert response.status_code == 200, response.text
        prompts.append(engine.prompts[-1])
    assert prompts[0] == prompts[1] and "Look." in tokenizer.encoding.decode(prompts[0])


async def test_background(client: httpx.AsyncClient, script: Script, engine: ScriptedEngine) -> None:
    script.add(ANSWER)
    queued = (await client.post(URL, json={"input": "hi", "background": True})).json()
    assert queued["status"] in ("queued", "in_progress") and queued["background"] is True
    found = events(await client.get(f"{URL}/{queued['id']}?stream=true"))
    check_events(found)
    done = (await client.get(f"{URL}/{queued['id']}")).json()
    assert done["status"] == "completed" and done == found[-1]["response"]
    assert error_of(await client.post(f"{URL}/{queued['id']}/cancel"))["type"] == "invalid_request_error"
    running = (await client.post(URL, json={"input": "hi", "background": True, "temperature": 0})).json()
    cancelled = await client.post(f"{URL}/{running['id']}/cancel")
    assert cancelled.json()["status"] == "cancelled"
    assert (await client.post(f"{URL}/{running['id']}/cancel")).json()["status"] == "cancelled"
    assert (await client.get(f"{URL}/{running['id']}")).json()["status"] == "cancelled"
    for _ in range(400):
        await asyncio.sleep(0.005)
        if not engine.stats().kv_pages_held:
            break
    assert engine.stats().kv_pages_held == 0
    assert (await client.delete(f"{URL}/{queued['id']}")).json() == {
        "id": queued["id"],
        "object": "response",
        "deleted": True,
    }
    assert (await client.get(f"{URL}/{queued['id']}")).status_code == 404
    assert (await client.delete(f"{URL}/{queued['id']}")).status_code == 404


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "name": "get_weather"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_weather"}]},
    ],
)
async def test_forced_call(client: httpx.AsyncClient, script: Script, choice: Any) -> None:
    script.add(CALL)
    body = (await client.post(URL, json={"input": "hi", "tools": [TOOL], "tool_choice": choice})).json()
    assert [item["type"] for item in body["output"]] == ["reasoning", "function_call"] and body["tool_choice"] == choice


async def test_input_pages(client: httpx.AsyncClient, script: Script) -> None:
    script.add(ANSWER)
    items = [{"role": "user", "content": str(i)} for i in range(5)]
    first = (await client.post(URL, json={"input": items})).json()
    where = f"{URL}/{first['id']}/input_items"
    page = (await client.get(f"{where}?order=asc&limit=2")).json()
    assert [i["content"][0]["text"] for i in page["data"]] == ["0", "1"] and page["has_more"]
    rest = (await client.get(f"{where}?order=asc&after={page['last_id']}")).json()
    assert [i["content"][0]["text"] for i in rest["data"]] == ["2", "3", "4"] and not rest["has_more"]
    assert (
        (await client.get(f"{where}?limit=0")).status_code == (await client.get(f"{where}?after=x")).status_code == 400
    )


async def test_input_tokens(client: httpx.AsyncClient, script: Script) -> None:
    script.add(ANSWER)
    request = {"input": "hi", "tools": [TOOL], "instructions": "x"}
    count = (await client.post(f"{URL}/input_tokens", json=request)).json()
    body = (await client.post(URL, json=request)).json()
    assert count == {"object": "response.input_tokens", "input_tokens": body["usage"]["input_tokens"]}


async def test_dialect(engine: ScriptedEngine, tokenizer: Tokenizer, script: Script) -> None:
    client = asgi_client(build_app(engine, tokenizer, ServerOptions(responses_dialect="open-responses")))
    script.add(ANSWER)
    kinds = {e["type"] for e in events(await client.post(URL, json={"input": "hi", "stream": True}))}
    assert {
        "response.reasoning.delta",
        "response.reasoning.done",
    } <= kinds and "response.reasoning_text.delta" not in kinds


async def test_engine_death(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    async def die() -> None:
        await asyncio.sleep(0.05)
        engine.executor.fail = True

    task = asyncio.create_task(die())
    found = events(await client.post(URL, json={"input": "hi", "stream": True}))
    await task
    assert found[-1]["type"] == "response.failed" and found[-1]["response"]["error"]["code"] == "server_error"
    assert (await client.post(URL, json={"input": "hi"})).status_code == 503


async def test_tolerated(client: httpx.AsyncClient, script: Script) -> None:
    user = {"role": "user", "content": "hi"}
    inputs: list[Any] = [
        [{"type": "message", "role": "assistant", "content": "a", "phase": "commentary", "status": "completed"}, user],
        [
            {
                "role": "developer",
                "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}],
            },
            user,
        ],
        [
            user,
            {
                "type": "reasoning",
                "id": "rs_1",
                "summary": [{"type": "summary_text", "text": "s"}],
                "encrypted_content": None,
                "content": None,
                "status": None,
            },
            user,
        ],
        [
            user,
            {"type": "function_call", "call_id": "c", "name": "get_weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "x", "id": None, "status": None},
        ],
    ]
    extras: list[dict[str, Any]] = [{"input": each} for each in inputs] + [
        {"tools": [{"type": "web_search", "external_web_access": True}, TOOL]},
        {"tool_choice": None},
        {"tools": None},
        {"client_metadata": {"a": 1}, "response_id": "x", "reasoning_effort": "low"},
        {"text": {"format": {"type": "text"}}},
        {"prompt_cache_key": "k", "safety_identifier": "s", "service_tier": "auto", "truncation": "auto", "user": "u"},
        {"conversation": None, "prompt": None},
        {"text": {"verbosity": "low"}},
        {"model": "alias"},
    ]
    for extra in extras:
        script.add(ANSWER)
        response = await client.post(URL, json={"input": "hi", **extra})
        assert response.status_code == 200, (extra, response.text)


@pytest.mark.parametrize(
    ("extra", "status", "param"),
    [
        ({"input": None}, 400, None),
        ({"input": []}, 400, None),
        ({"input": 5}, 400, "input"),
        ({"input": [{}]}, 400, "input[0]"),
        ({"input": [{"role": "robot", "content": "x"}]}, 400, "input[0].role"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            400,
            "input[0].content[0]",
        ),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, 400, "input[0].call_id"),
        ({"input": [{"type": "item_reference", "id": "rs_x"}]}, 404, "input[0]"),
        (
            {"input": [{"type": "reasoning", "summary": [], "encrypted_content": "AAAA"}]},
            400,
            "input[0].encrypted_content",
        ),
        ({"previous_response_id": "resp_x"}, 404, "previous_response_id"),
        ({"model": "x"}, 404, "model"),
        ({"background": True, "store": False}, 400, None),
        ({"include": ["everything"]}, 400, "include"),
        ({"tools": [{"type": "teleport"}]}, 400, "tools[0]"),
        ({"tools": [{"type": "function"}]}, 400, None),
        ({"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}}, 400, "tool_choice"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"temperature": 3}, 400, "temperature"),
        ({"max_output_tokens": 0}, 400, "max_output_tokens"),
        ({"reasoning": {"effort": "x"}}, 400, "reasoning.effort"),
        ({"conversation": "c"}, 400, None),
        ({"text": {"format": {"type": "json_schema"}}}, 400, "text.format.schema"),
        ({"top_logprobs": 21}, 400, "top_logprobs"),
        ({"input": "word " * 5000}, 400, "input"),
    ],
)
async def test_refused(client: httpx.AsyncClient, extra: dict[str, Any], status: int, param: str | None) -> None:
    response = await client.post(URL, json={"input": "hi", **extra})
    assert response.status_code == status, response.text
    assert param is None or error_of(response)["param"] == param, response.text
