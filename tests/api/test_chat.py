"""/v1/chat/completions over the real engine with scripted sampling."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from scripted import Script, ScriptedEngine

from gptoss_compile.runtime.api.tokenizer import Tokenizer

URL = "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]
ANSWER = "<|channel|>analysis<|message|>Think.<|end|><|start|>assistant<|channel|>final<|message|>Hello 👍🏽!<|return|>"
CALL = (
    "<|channel|>analysis<|message|>Look.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
    '<|constrain|>json<|message|>{"city": "Paris"}<|call|>'
)
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather\nof a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def events(response: httpx.Response) -> list[Any]:
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    assert "\r" not in response.text and response.text.endswith("\n\n")
    data = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert data[-1] == "[DONE]"
    return [json.loads(each) for each in data[:-1]]


def joined(chunks: list[Any], index: int = 0) -> dict[str, Any]:
    """What a client makes of a stream."""
    whole: dict[str, Any] = {"content": "", "reasoning": "", "calls": {}, "finish": None}
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            delta = choice["delta"]
            assert delta.get("reasoning") == delta.get("reasoning_content")
            whole["content"] += delta.get("content") or ""
            whole["reasoning"] += delta.get("reasoning") or ""
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    whole["calls"][call["index"]] = {
                        "id": call["id"],
                        "name": call["function"]["name"],
                        "arguments": "",
                    }
                whole["calls"][call["index"]]["arguments"] += call["function"]["arguments"]
            whole["finish"] = choice["finish_reason"] or whole["finish"]
    return whole


async def test_answer(client: httpx.AsyncClient, script: Script) -> None:
    script.add(ANSWER)
    body = (await client.post(URL, json={"messages": USER})).json()
    message = body["choices"][0]["message"]
    assert message["content"] == "Hello 👍🏽!" and message["reasoning"] == message["reasoning_content"] == "Think."
    assert body["choices"][0]["finish_reason"] == "stop" and body["model"] == "gpt-oss"
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert (
        usage["completion_tokens"] == len(script.ids(ANSWER))
        and usage["completion_tokens_details"]["reasoning_tokens"] == 2
    )


async def test_stream_equals_the_whole(client: httpx.AsyncClient, script: Script) -> None:
    script.add(ANSWER)
    chunks = events(
        await client.post(
            URL, json={"messages": USER, "stream": True, "stream_options": {"include_usage": True}, "model": "alias"}
        )
    )
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert joined(chunks) == {"content": "Hello 👍🏽!", "reasoning": "Think.", "calls": {}, "finish": "stop"}
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == len(script.ids(ANSWER))
    assert all(chunk["usage"] is None for chunk in chunks[:-1]) and {c["model"] for c in chunks} == {"alias"}
    assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize(
    "text",
    [
        CALL,
        CALL.replace("commentary to", "analysis to"),
        CALL.replace("functions.get", "get"),
        CALL.replace(
            "<|channel|>commentary to=functions.get_weather", " to=functions.get_weather<|channel|>commentary"
        ),
    ],
)
async def test_tool_call(client: httpx.AsyncClient, script: Script, text: str) -> None:
    script.add(text, text)
    request = {"messages": USER, "tools": [TOOL]}
    choice = (await client.post(URL, json=request)).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    [call] = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'} and call["id"]
    whole = joined(events(await client.post(URL, json={**request, "stream": True})))
    assert whole["finish"] == "tool_calls" and whole["content"] == "" and whole["reasoning"] == "Look."
    assert whole["calls"][0]["arguments"] == '{"city": "Paris"}' and whole["calls"][0]["name"] == "get_weather"


async def test_unknown_tool_is_reasoning(client: httpx.AsyncClient, script: Script) -> None:
    script.add(CALL)
    choice = (await client.post(URL, json={"messages": USER})).json()["choices"][0]
    assert "tool_calls" not in choice["message"] and choice["finish_reason"] == "stop"
    assert choice["message"]["reasoning"] == 'Look.\n\n{"city": "Paris"}'


@pytest.mark.parametrize("tool_choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
async def test_forced_call(client: httpx.AsyncClient, script: Script, tool_choice: Any) -> None:
    """Whatever the model would rather write, the turn ends in a call; one without a script included."""
    header = "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
    script.add(ANSWER, header + '{"city": "Oslo"}<|call|>', CALL)
    request = {"messages": USER, "tools": [TOOL], "tool_choice": tool_choice, "temperature": 0, "max_tokens": 60}
    first = (await client.post(URL, json=request)).json()["choices"][0]
    assert first["message"]["content"] in (None, "") and first["finish_reason"] in ("length", "tool_calls")
    for expected in ("Oslo", "Paris"):
        choice = (await client.post(URL, json=request)).json()["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert expected in choice["message"]["tool_calls"][0]["function"]["arguments"]


async def test_tool_loop_prompt(
    client: httpx.AsyncClient, script: Script, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    """Reasoning stays within a tool loop and goes after the final answer it led to."""
    loop = [
        *USER,
        {
            "role": "assistant",
            "content": None,
            "reasoning": "Look.",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "sunny"}]},
    ]
    script.add(ANSWER, ANSWER)
    assert (await client.post(URL, json={"messages": loop, "tools": [TOOL]})).status_code == 200
    text = tokenizer.encoding.decode(engine.prompts[-1])
    assert text.endswith(
        "<|start|>assistant<|channel|>analysis<|message|>Look.<|end|><|start|>assistant<|channel|>commentary "
        "to=functions.get_weather <|constrain|>json<|message|>{}<|call|><|start|>functions.get_weather to=assistant"
        "<|channel|>commentary<|message|>sunny<|end|><|start|>assistant"
    )
    more = [*loop, {"role": "assistant", "content": "Sunny.", "reasoning_content": "So."}, *USER]
    assert (await client.post(URL, json={"messages": more, "tools": [TOOL]})).status_code == 200
    text = tokenizer.encoding.decode(engine.prompts[-1])
    assert "Look." not in text and "So." not in text and "<|channel|>final<|message|>Sunny.<|end|>" in text


async def test_tool_loop_keeps_the_models_tokens(
    client: httpx.AsyncClient, script: Script, engine: ScriptedEngine
) -> None:
    """A client that drops the reasoning and respells the arguments still gets a prefix hit."""
    script.add(CALL, ANSWER)
    first = (await client.post(URL, json={"messages": USER, "tools": [TOOL]})).json()["choices"][0]["message"]
    prompt = engine.prompts[-1]
    [call] = first["tool_calls"]
    call["function"]["arguments"] = '{ "city":"Paris" }'
    loop = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "sunny"},
    ]
    body = (await client.post(URL, json={"messages": loop, "tools": [TOOL]})).json()
    raw = prompt + script.ids(CALL)
    assert engine.prompts[-1][: len(raw)] == raw and body["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    call["function"]["arguments"] = '{"city": "Rome"}'  # not what the model wrote: the client's word counts
    await client.post(URL, json={"messages": loop, "tools": [TOOL]})
    assert engine.prompts[-1][: len(raw)] != raw


async def test_cut_off_call(client: httpx.AsyncClient, script: Script) -> None:
    script.add(CALL)
    request = {"messages": USER, "tools": [TOOL], "max_tokens": len(script.ids(CALL)) - 2}
    choice = (await client.post(URL, json=request)).json()["choices"][0]
    assert choice["finish_reason"] == "length" and choice["message"]["tool_calls"]


async def test_n_stop_and_length(client: httpx.AsyncClient, script: Script) -> None:
    script.add(ANSWER, "<|channel|>final<|message|>one two three<|return|>", ANSWER)
    request = {"messages": USER, "n": 3, "stop": ["!", " thr"], "max_completion_tokens": 12}
    choices = (await client.post(URL, json=request)).json()["choices"]
    assert [c["index"] for c in choices] == [0, 1, 2]
    assert choices[1]["message"]["content"] == "one two" and choices[1]["finish_reason"] == "stop"
    assert choices[0]["finish_reason"] == "length"
    script.add(*["<|channel|>final<|message|>one two three<|return|>"] * 2)
    chunks = events(await client.post(URL, json={**request, "n": 2, "stream": True}))
    assert [joined(chunks, i)["content"] for i in range(2)] == ["one two"] * 2


async def test_logprobs(client: httpx.AsyncClient, script: Script) -> None:
    script.add(ANSWER, ANSWER)
    request = {"messages": USER, "logprobs": True, "top_logprobs": 3, "return_token_ids": True}
    body = (await client.post(URL, json=request)).json()
    entries = body["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(e["bytes"]) for e in entries).decode() == "Hello 👍🏽!"
    assert all(len(e["top_logprobs"]) == 3 for e in entries)
    assert body["choices"][0]["token_ids"] == script.ids(ANSWER) and body["prompt_token_ids"]
    chunks = events(await client.post(URL, json={**request, "stream": True}))
    streamed = [e for c in chunks for choice in c["choices"] for e in (choice["logprobs"] or {}).get("content", [])]
    assert streamed == entries
    assert [i for c in chunks for choice in c["choices"] for i in choice.get("token_ids", [])] == script.ids(ANSWER)


async def test_malformed_output_is_no_error(client: httpx.AsyncClient, script: Script) -> None:
    script.add(
        "<|channel|>final<|message|>a<|end|><|message|>b<|start|><|start|>assistant<|channel|>final<|message|>c<|return|>"
    )
    body = (await client.post(URL, json={"messages": USER})).json()
    assert body["choices"][0]["message"]["content"] == "a\n\nb\n\nc"
    assert "gptoss_harmony_repairs_total 3.0" in (await client.get("/metrics")).text


async def test_effort_and_hidden_reasoning(
    client: httpx.AsyncClient, script: Script, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    for given, used in (
        ("none", "low"),
        ("minimal", "low"),
        ("low", "low"),
        ("medium", "medium"),
        ("high", "high"),
        ("xhigh", "high"),
        ("max", "high"),
        (None, "medium"),
    ):
        script.add(ANSWER)
        body = (
            await client.post(URL, json={"messages": USER, "reasoning_effort": given, "include_reasoning": False})
        ).json()
        assert f"Reasoning: {used}\n" in tokenizer.encoding.decode(engine.prompts[-1])
        assert "reasoning" not in body["choices"][0]["message"]
        assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == 2


async def test_tolerated(client: httpx.AsyncClient, script: Script) -> None:
    for extra in (
        {"tools": None},
        {"tools": []},
        {"tool_choice": None},
        {"user": "u"},
        {"metadata": {"a": 1}},
        {"parallel_tool_calls": False},
        {"response_format": {"type": "text"}},
        {"stop": None},
        {"seed": 7},
        {"unknown_field": [1, {}]},
        {"max_tokens": 10**6},
        {"temperature": None},
        {"top_p": 1},
        {"n": 1},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": ""}]},
        {"messages": [{"role": "user", "name": "bob", "content": [{"type": "text", "text": "hi"}]}]},
        {
            "tools": [
                {"type": "function", "function": {"name": "f", "description": None, "parameters": {}, "strict": None}}
            ]
        },
        {"logit_bias": {"100": -100, "5": 1.5}},
        {"messages": [{"role": "developer", "content": "x"}, *USER]},
    ):
        script.add(ANSWER)
        response = await client.post(URL, json={"messages": USER, **extra})
        assert response.status_code == 200, (extra, response.text)


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "x"}]}, "messages[0].role"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": "required"}, None),
        ({"top_logprobs": 3}, None),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "other"}]}, "tools[0].type"),
        ({"stop": ""}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, None),
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": 10**30}, "seed"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None),
        ({"messages": [{"role": "tool", "tool_call_id": "c", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"min_tokens": 10, "max_tokens": 5}, "min_tokens"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ],
)
async def test_refused(client: httpx.AsyncClient, extra: dict[str, Any], param: str | None) -> None:
    response = await client.post(URL, json={"messages": USER, **extra})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param, error


async def test_too_long(client: httpx.AsyncClient) -> None:
    for text in ("word " * 5000, "👍🏽" * 100_000):
        response = await client.post(URL, json={"messages": [{"role": "user", "content": text}]})
        assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"
