"""Structured output and tool calls by grammar, from a model that writes at random: whatever it writes is what was asked for.

GPTOSS_SCHEMAS=200 tries as many schemas. GPTOSS_SCHEMAS_ARTIFACT=PATH takes an artifact's model for them instead of noise.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Literal

import httpx
import pytest
from openai import AsyncOpenAI, LengthFinishReasonError
from pydantic import BaseModel, ValidationError
from random_schemas import NoiseExecutor, random_schema
from scripted import VOCAB
from served import asgi_client
from structured import CHAT, RESPONSES, USER, WEATHER, chat, formatted, tool, valid

from gptoss_compile.artifact import Artifact
from gptoss_compile.runtime.api.app import build_app
from gptoss_compile.runtime.api.options import ServerOptions
from gptoss_compile.runtime.api.tokenizer import Tokenizer
from gptoss_compile.runtime.engine import Engine
from gptoss_compile.runtime.executor import Executor, load_executor

SCHEMAS = int(os.environ.get("GPTOSS_SCHEMAS", "20"))
ARTIFACT = os.environ.get("GPTOSS_SCHEMAS_ARTIFACT")

pytestmark = pytest.mark.anyio


@pytest.fixture
def noise(tokenizer: Tokenizer, options: ServerOptions, seed: int) -> Iterator[httpx.AsyncClient]:
    """A client of a model that writes at random."""
    yield from serve(NoiseExecutor(tokenizer, seed), tokenizer, options)


@pytest.fixture
def model(tokenizer: Tokenizer, options: ServerOptions, seed: int) -> Iterator[httpx.AsyncClient]:
    """The same, or a client of the artifact's model."""
    if ARTIFACT:
        yield from serve(load_executor(Artifact.open(ARTIFACT), num_pages=None, max_num_seqs=8), tokenizer, options)
    else:
        yield from serve(NoiseExecutor(tokenizer, seed), tokenizer, options)


def serve(executor: Executor, tokenizer: Tokenizer, options: ServerOptions) -> Iterator[httpx.AsyncClient]:
    tokens = max(bucket.tokens for bucket in executor.buckets)
    engine = Engine(executor, max_num_seqs=8, max_num_batched_tokens=tokens, vocab_limit=VOCAB)
    engine.start()
    yield asgi_client(build_app(engine, tokenizer, options))
    engine.shutdown(drain=False)


async def test_random_schemas(model: httpx.AsyncClient, seed: int) -> None:
    """As answers in chat and in Responses, and as arguments of a call: what is finished is valid, the rest says so."""
    rng = random.Random(seed)
    schemas = [random_schema(rng) for _ in range(SCHEMAS)]
    ways: list[Callable[..., Any]] = [_answer, _response, _call]
    results = await asyncio.gather(*(ways[i % 3](model, schema) for i, schema in enumerate(schemas)))
    for schema, text in zip(schemas, results, strict=True):
        assert text is None or valid(text, schema), (schema, text)
    finished = [sum(text is not None for text in results[i::3]) for i in range(3)]
    print(f"{sum(finished)} of {SCHEMAS} finished: {finished} of chat, Responses and calls")
    assert sum(finished) > SCHEMAS / (10 if ARTIFACT else 2)


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
