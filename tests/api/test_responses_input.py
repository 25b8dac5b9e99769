"""What comes back as input: items whose reasoning the client has dropped, histories that are too long."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from scripted import Script, ScriptedEngine
from served import asgi_client
from server_tools import MCP, WEB, Station, final, prompt
from server_tools import call as server_call
from test_http import error_of
from test_responses import TOOL, URL

from gptoss_compile.runtime.api.app import build_app
from gptoss_compile.runtime.api.options import ServerOptions
from gptoss_compile.runtime.api.render import Turn
from gptoss_compile.runtime.api.tokenizer import Tokenizer
from gptoss_compile.runtime.api.tool_server import mcp_tools
from gptoss_compile.runtime.api.tool_server.search import Corpus
from gptoss_compile.runtime.api.tool_server.server import ToolServer
from gptoss_compile.runtime.api.turn_memory import TurnMemory

pytestmark = pytest.mark.anyio

USER = {"role": "user", "content": "weather?"}
HEADER = "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
THOUGHT = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant"
NEXT = "<|end|><|start|>assistant"
LOOP = THOUGHT.format("Both.") + HEADER + '{"city":"Oslo"}' + NEXT + HEADER + '{"city": "Rome"}<|call|>'


async def ask(client: httpx.AsyncClient, given: Any, **more: Any) -> Any:
    answer = await client.post(URL, json={"input": given, "tools": [TOOL], **more})
    assert answer.status_code == 200, answer.text
    return answer.json()["output"]


def without_reasoning(items: list[dict[str, Any]], *dropped: str) -> list[dict[str, Any]]:
    kept = (item for item in items if item["type"] != "reasoning")
    return [{key: value for key, value in item.items() if key not in dropped} for item in kept]


def results(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    calls = [item["call_id"] for item in items if item["type"] == "function_call"]
    return [{"type": "function_call_output", "call_id": call_id, "output": "sunny"} for call_id in calls]


@pytest.mark.parametrize("store", [True, False])
@pytest.mark.parametrize("dropped", [(), ("id",), ("id", "status")])
async def test_reasoning_comes_back(
    client: httpx.AsyncClient, script: Script, engine: ScriptedEngine, tokenizer: Tokenizer, store: bool, dropped: Any
) -> None:
    """In a tool loop of several rounds, in the model's own tokens, so that the prompt grows at its end alone."""
    more = THOUGHT.format("Once more.") + HEADER + '{"city": "Bonn"}<|call|>'
    script.add(LOOP, more, final("Sunny."), final("Yes."))
    history: list[Any] = [USER]
    for _ in range(2):
        output = await ask(client, history, store=store)
        history += [*without_reasoning(output, *dropped), *results(output)]
    answer = await ask(client, history, store=store)
    first, second, third = engine.prompts[-3:]
    assert second[: len(first) - 2] == first[:-2] and third[: len(second) - 2] == second[:-2]
    assert third[len(first) :][: len(script.ids(LOOP))] == script.ids(LOOP)
    text = prompt(engine, tokenizer)
    assert text.count("Both.") == text.count("Once more.") == 1 and '{"city":"Oslo"}' in text
    await ask(client, [*history, *without_reasoning(answer, *dropped), {"role": "user", "content": "Sure?"}], store=store)
    assert "Both." not in prompt(engine, tokenizer) and "Sunny." in prompt(engine, tokenizer)  # behind a final it goes


async def test_reasoning_that_is_sent_is_not_doubled(
    client: httpx.AsyncClient, script: Script, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    script.add(LOOP, *[final("Sunny.")] * 4)
    output = await ask(client, [USER])
    whole = [USER, *output, *results(output)]
    for history in (whole, [*whole[:1], {**output[0], "content": None}, *whole[2:]]):
        await ask(client, history)
        assert prompt(engine, tokenizer).count("Both.") == 1
    other = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Quite another."}], "summary": []}
    await ask(client, [USER, other, *whole[2:]])
    assert "Both." not in prompt(engine, tokenizer) and "Quite another." in prompt(engine, tokenizer)
    changed = [{**item, "arguments": '{"city": "Paris"}'} if "arguments" in item else item for item in whole[2:]]
    await ask(client, [USER, *changed])
    assert "Both." not in prompt(engine, tokenizer) and "Paris" in prompt(engine, tokenizer)


async def test_calls_of_the_servers_tools_come_back(
    engine: ScriptedEngine,
    tokenizer: Tokenizer,
    options: ServerOptions,
    script: Script,
    corpus: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the store does not hold is remembered; of an MCP server's calls the items say enough."""
    station = Station()
    monkeypatch.setattr(mcp_tools, "_client", lambda address: station)
    tools = ToolServer(Corpus(corpus), mcp={"station": station.server})
    client = asgi_client(build_app(engine, tokenizer, options, tools))
    script.add(server_call("browser.search", '{"query": "owl"}'), server_call("station.forecast", '{"city": "Bonn"}'))
    script.add(server_call("station.forecast", '{"city": "Atlantis"}'), HEADER + "{}<|call|>", *[final("ok")] * 2)
    fields: dict[str, Any] = {"tools": [WEB, MCP, TOOL], "store": False}
    output = await ask(client, [USER], **fields)
    kept = without_reasoning(output)
    assert [item["type"] for item in kept] == ["mcp_list_tools", "web_search_call", "mcp_call", "mcp_call", "function_call"]
    await ask(client, [USER, *kept, *results(output)], **fields)
    text = prompt(engine, tokenizer)
    assert text.count("Look.") == 3 and "[0] Search results" in text and "Bonn: sunny" in text
    assert engine.prompts[-1][: len(engine.prompts[-2]) - 2] == engine.prompts[-2][:-2]
    unknown = [{**item, "id": f"x{i}"} if item["type"] == "mcp_call" else item for i, item in enumerate(kept)]
    await ask(client, [USER, *unknown[2:4]], **fields)
    text = prompt(engine, tokenizer)
    assert "Bonn: sunny" in text and "The tool failed: the line went dead" in text


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    memory = TurnMemory()
    for number in range(TurnMemory.SIZE + 5):
        memory.remember(str(number), [Turn("assistant", "x")])
    assert len(memory) == TurnMemory.SIZE and memory.recall("4") is None and memory.recall("5") is not None
    memory.remember("large", [Turn("assistant", "x", tokens=(1,) * (TurnMemory.BYTES // 36 - 10_000))])
    assert memory.recall("large") is not None and len(memory) < TurnMemory.SIZE
    now = TurnMemory.SECONDS + 1
    assert memory.recall("large") is None and len(memory) == 0


def conversation(turns: int) -> list[dict[str, Any]]:
    """About 100 tokens a turn, numbered."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": f"turn {i} " + "word " * 90} for i in range(turns)]


async def test_truncation(
    client: httpx.AsyncClient, script: Script, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    script.add(*[final("ok")] * 4)
    long = [{"role": "developer", "content": "Keep this."}, *conversation(99)]
    for fields in ({}, {"truncation": "disabled"}):
        answer = await client.post(URL, json={"input": long, **fields})
        assert answer.status_code == 400 and error_of(answer)["code"] == "context_length_exceeded"
    for room in (None, 1000):
        answer = await client.post(URL, json={"input": long, "truncation": "auto", "max_output_tokens": room})
        assert answer.status_code == 200 and answer.json()["truncation"] == "auto"
        text = prompt(engine, tokenizer)
        assert "Keep this." in text and "turn 98 " in text and "turn 2 " not in text
        limit = 4095 - (room or 4095 // 8)
        assert limit - 110 < len(engine.prompts[-1]) <= limit
    whole = await client.post(URL, json={"input": long[:20], "truncation": "auto"})
    assert whole.status_code == 200 and "turn 0 " in prompt(engine, tokenizer)
    follow = {"input": "And now?", "previous_response_id": answer.json()["id"], "truncation": "auto"}
    assert (await client.post(URL, json=follow)).status_code == 200 and "And now?" in prompt(engine, tokenizer)
    huge = [*conversation(3), {"role": "user", "content": "word " * 5000}]
    answer = await client.post(URL, json={"input": huge, "truncation": "auto"})
    assert answer.status_code == 400 and error_of(answer)["code"] == "context_length_exceeded"


async def test_truncation_keeps_calls_together(
    client: httpx.AsyncClient, script: Script, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    """A result never stands without its call, wherever the cut would fall."""
    for extra in range(0, 700, 70):
        script.add(final("ok"))
        calls = [{"type": "function_call", "call_id": f"c{i}", "name": "get_weather", "arguments": "{}"} for i in "ab"]
        outputs = [{"type": "function_call_output", "call_id": f"c{i}", "output": i + " word" * 300} for i in "ab"]
        history = [*conversation(4), *calls, *outputs, {"role": "user", "content": "word " * (2350 + extra) + "end"}]
        await ask(client, history, truncation="auto")
        text = prompt(engine, tokenizer)
        assert text.count("to=assistant") == text.count("to=functions.get_weather") and "end<|end|>" in text
