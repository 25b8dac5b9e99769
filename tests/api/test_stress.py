"""Aborts, disconnects and cancellations in every state. Small here; the environment sets the real counts:

    ABORTS=1000 RACES=10000 CONNECTIONS=1600 pytest tests/api/test_stress.py
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import Counter
from typing import Any

import httpx
import pytest
from scripted import Script, ScriptedEngine
from served import Running

from gptoss_compile.runtime.api.app import build_app
from gptoss_compile.runtime.api.options import ServerOptions
from gptoss_compile.runtime.api.tokenizer import Tokenizer

ABORTS = int(os.environ.get("ABORTS", "50"))
RACES = int(os.environ.get("RACES", "200"))
CONNECTIONS = int(os.environ.get("CONNECTIONS", "100"))
USER = [{"role": "user", "content": "hi"}]
CALL = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>'
FINAL = "<|channel|>final<|message|>done<|return|>"
LOOP = [
    *USER,
    {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
    {"role": "tool", "tool_call_id": "c", "content": "1"},
]
pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def some_request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    long = "The quick brown fox. " * rng.choice((1, 1, 300))  # several chunks of prompt now and then
    common = {"stream": rng.random() < 0.5}
    return rng.choice(
        (
            ("/v1/chat/completions", {**common, "messages": [{"role": "user", "content": long}], "n": rng.choice((1, 4))}),
            ("/v1/chat/completions", {**common, "messages": LOOP, "ignore_eos": True}),
            ("/v1/completions", {**common, "prompt": [long, "x"], "n": 2, "max_tokens": 100, "ignore_eos": True}),
            ("/v1/responses", {**common, "input": long}),
            ("/v1/responses", {"input": long, "background": True, "stream": True, "max_output_tokens": 8}),  # goes on alone
        )
    )


def scope_of(path: str) -> dict[str, Any]:
    names = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": []}
    return {**names, "http_version": "1.1", "scheme": "http", "server": ("t", 80), "client": ("c", 1), "root_path": ""}


async def idle(engine: ScriptedEngine) -> None:
    """Waits until nothing runs; a page that never comes back runs into the limit."""
    async with asyncio.timeout(10):
        while (stats := engine.stats()).requests_running or stats.requests_waiting or stats.kv_pages_held:
            await asyncio.sleep(0.005)


async def test_disconnects_in_every_state(
    engine: ScriptedEngine, tokenizer: Tokenizer, options: ServerOptions, seed: int
) -> None:
    rng = random.Random(seed)
    app = build_app(engine, tokenizer, options)
    before = engine.stats()
    room = asyncio.Semaphore(12)

    async def one() -> None:
        path, body = some_request(rng)
        inbox: asyncio.Queue[Any] = asyncio.Queue()
        inbox.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})

        async def send(message: Any) -> None:
            assert message.get("status", 200) in (200, 499)

        async with room:
            task = asyncio.create_task(app(scope_of(path), inbox.get, send))
            await asyncio.sleep(rng.expovariate(1 / rng.choice((0.003, 0.03, 0.5))))
            inbox.put_nowait({"type": "http.disconnect"})
            await asyncio.wait_for(task, 10)

    await asyncio.gather(*(one() for _ in range(ABORTS)))
    for record in list(app.state.context.responses._records.values()):  # those that outlive their clients
        record.task.cancel()
    await idle(engine)
    after = engine.stats()
    assert after.kv_pages_free + after.kv_pages_cached == before.kv_pages_free + before.kv_pages_cached


async def test_cancel_races_with_the_end(
    client: httpx.AsyncClient, engine: ScriptedEngine, script: Script, seed: int
) -> None:
    """The delay before a cancellation is steered such that it comes too late about every second time."""
    rng = random.Random(seed)
    seen: Counter[str] = Counter()
    delay = 0.03

    async def one() -> None:
        nonlocal delay
        script.add(FINAL)
        made = (await client.post("/v1/responses", json={"input": "hi", "background": True})).json()
        await asyncio.sleep(delay * rng.uniform(0.7, 1.3))
        answer = await client.post(f"/v1/responses/{made['id']}/cancel")
        assert answer.status_code in (200, 400), answer.text
        now = (await client.get(f"/v1/responses/{made['id']}")).json()
        assert now["status"] == "cancelled" if answer.status_code == 200 else now["status"] == "completed"
        seen[now["status"]] += 1
        delay *= 1.1 if now["status"] == "cancelled" else 1 / 1.1

    room = asyncio.Semaphore(4)

    async def bounded() -> None:
        async with room:
            await one()

    await asyncio.gather(*(bounded() for _ in range(RACES)))
    await idle(engine)
    print(seen)
    assert min(seen["cancelled"], seen["completed"]) > RACES // 5


async def test_many_open_connections(running: Running, script: Script) -> None:
    """All are held open at once, and all are then answered."""
    port = int(running.url.rpartition(":")[2])
    body = json.dumps({"prompt": [1, 2], "max_tokens": 1}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: t\r\nauthorization: Bearer key\r\ncontent-length: {len(body)}\r\n\r\n"
    opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(CONNECTIONS)]
    for _, writer in opened:
        writer.write(b"GET /health HTTP/1.1\r\nhost: t\r\n\r\n")
    statuses = [await read_answer(reader) for reader, _ in opened]
    for _, writer in opened:
        writer.write(head.encode() + body)
    statuses += [await read_answer(reader) for reader, _ in opened]
    assert statuses == [200] * 2 * CONNECTIONS
    for _, writer in opened:
        writer.close()


async def read_answer(reader: asyncio.StreamReader) -> int:
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 120)
    length = next(int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
    await reader.readexactly(length)
    return int(head.split()[1])
