"""What holds on every route: error shapes, keys, limits, disconnects, health."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import httpx
import pytest
from scripted import Script, ScriptedEngine
from served import asgi_client

from gptoss_compile.runtime.api import operations
from gptoss_compile.runtime.api.app import build_app
from gptoss_compile.runtime.api.options import ServerOptions
from gptoss_compile.runtime.api.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]
pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(response.json()) == {"error"} and set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "/root" not in response.text and "Traceback" not in response.text
    return error


async def test_models(client: httpx.AsyncClient) -> None:
    body = (await client.get("/v1/models")).json()
    assert [m["id"] for m in body["data"]] == ["gpt-oss", "alias"] and body["object"] == "list"
    assert (await client.get("/v1/models/alias")).json()["max_model_len"] == 4096
    response = await client.get("/v1/models/openai/gpt-4")
    assert response.status_code == 404 and error_of(response)["code"] == "model_not_found"


async def test_unknown_things(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/nothing")
    assert response.status_code == 404 and error_of(response)["code"] == "unknown_url"
    response = await client.get(CHAT)
    assert response.status_code == 405 and error_of(response)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"
    assert (await client.post(CHAT + "/", json={})).status_code == 404
    for url, body in ((CHAT, {"messages": USER}), ("/v1/completions", {"prompt": "x"}), ("/tokenize", {"prompt": "x"})):
        response = await client.post(url, json={**body, "model": "gpt-4"})
        assert response.status_code == 404 and error_of(response)["code"] == "model_not_found"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "\\udc00 x"}]}',
        b"[" * 10_000 + b"]" * 10_000,
        b'{"messages": ' + b'[{"a":' * 10_000 + b"1" + b"}]" * 10_000 + b"}",
        b'{"temperature": NaN, "messages": [{"role": "user"}]}',
        b'{"temperature": Infinity, "messages": [{"role": "user"}]}',
        b'{"temperature": 1e999, "messages": [{"role": "user"}]}',
        b'{"seed": 1' + b"0" * 10_000 + b', "messages": []}',
        b'{"n": -1, "messages": [{"role": "user"}]}',
        b"{}",
    ],
)
async def test_bad_bodies(client: httpx.AsyncClient, body: bytes) -> None:
    for url in (CHAT, "/v1/completions", "/tokenize"):
        response = await client.post(url, content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400, response.text
        assert error_of(response)["type"] == "invalid_request_error" and len(response.content) < 1000


async def test_content_types(client: httpx.AsyncClient, script: Script) -> None:
    content = json.dumps({"messages": USER}).encode()
    response = await client.post(CHAT, content=content, headers={"content-type": "text/plain"})
    assert response.status_code == 400 and "application/json" in error_of(response)["message"]
    script.add("<|channel|>final<|message|>x<|return|>")
    response = await client.post(CHAT, content=content, headers={"content-type": "Application/JSON; charset=utf-8"})
    assert response.status_code == 200


async def test_deep_schema_is_no_crash(client: httpx.AsyncClient, script: Script) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(60):
        schema = {"type": "object", "properties": {"a": schema}}
    loop = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/A"}},
        "$defs": {"A": {"type": "object", "properties": {"b": {"$ref": "#/$defs/A"}, "c": {"$ref": "#/$defs/A"}}}},
    }
    for parameters in (schema, loop):
        script.add("<|channel|>final<|message|>x<|return|>")
        tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        start = time.monotonic()
        response = await client.post(CHAT, json={"messages": USER, "tools": [tool]})
        assert response.status_code in (200, 400) and time.monotonic() - start < 2


async def test_too_large(client: httpx.AsyncClient) -> None:
    async def chunks() -> Any:
        for _ in range(20):
            yield b" " * 100_000

    for content in (b" " * (2 << 20), chunks()):
        response = await client.post(CHAT, content=content, headers={"content-type": "application/json"})
        assert response.status_code == 413 and error_of(response)["code"] == "request_too_large"


async def test_slow_body_is_cut_off(engine: ScriptedEngine, tokenizer: Tokenizer) -> None:
    app = build_app(engine, tokenizer, ServerOptions(body_timeout=0.05))
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.sleep(1)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": CHAT,
        "raw_path": CHAT.encode(),
        "query_string": b"",
        "headers": [],
        "http_version": "1.1",
        "scheme": "http",
        "server": ("test", 80),
        "client": ("c", 1),
        "root_path": "",
    }
    await app(scope, receive, send)
    assert sent[0]["status"] == 408


async def test_keys(engine: ScriptedEngine, tokenizer: Tokenizer, script: Script) -> None:
    client = asgi_client(build_app(engine, tokenizer, ServerOptions(api_keys=("one", "zwei·"))))
    assert (await client.get("/health")).status_code == 200
    wrong: list[dict[str, Any]] = [
        {},
        {"Authorization": "Bearer two"},
        {"Authorization": "Bearer "},
        {"Authorization": "one"},
        {"Authorization": b"Bearer \xff\xfe"},
        {"Authorization": "Basic one"},
    ]
    for headers in wrong:
        for method, url in (
            ("GET", "/v1/models"),
            ("POST", CHAT),
            ("GET", "/metrics"),
            ("POST", "/tokenize"),
            ("GET", "/ready"),
            ("GET", "/nothing"),
            ("GET", "//health"),
        ):
            response = await client.request(method, url, headers=headers)
            assert response.status_code == 401 and error_of(response)["code"] == "invalid_api_key"
    for key in ("one", "zwei·"):
        assert (await client.get("/v1/models", headers={"Authorization": f"Bearer {key}".encode()})).status_code == 200


async def test_cors(engine: ScriptedEngine, tokenizer: Tokenizer) -> None:
    client = asgi_client(
        build_app(engine, tokenizer, ServerOptions(api_keys=("k",), allowed_origins=("https://a.example",)))
    )
    for origin, allowed in (("https://a.example", True), ("https://b.example", False)):
        headers = {
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization",
        }
        preflight = await client.options(CHAT, headers=headers)
        assert (preflight.headers.get("access-control-allow-origin") == origin) is allowed
        assert (preflight.status_code == 200) is allowed
    refused = await client.post(CHAT, json={"messages": USER}, headers={"Origin": "https://a.example"})
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://a.example"


async def test_metrics(client: httpx.AsyncClient, script: Script) -> None:
    script.add("<|channel|>final<|message|>one two<|return|>")
    await client.post(CHAT, json={"messages": USER})
    text = (await client.get("/metrics")).text
    for name in (
        "requests_running 0",
        "requests_waiting 0",
        "kv_pages_held 0",
        "kv_pages_cached",
        "kv_pages_free",
        "harmony_repairs_total 0",
        "generation_tokens_total 6",
        "time_to_first_token_seconds_count 1",
        "inter_token_seconds_count",
        "request_generation_tokens_sum 6",
        "request_seconds_count 1",
        "preemptions_total 0",
        "cached_tokens_total 0",
    ):
        assert f"\ngptoss_{name}" in text, name
    head = await client.head("/metrics")
    assert head.status_code == 200 and not head.content


async def test_tokenizer_routes(client: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    body = (await client.post("/tokenize", json={"prompt": "hello <|end|> é", "add_special_tokens": True})).json()
    assert body["tokens"] == tokenizer.encode("hello <|end|> é") and body["count"] == len(body["tokens"])
    assert body["max_model_len"] == 4096
    assert (await client.post("/detokenize", json={"tokens": body["tokens"]})).json() == {"prompt": "hello <|end|> é"}
    assert (await client.get("/tokenizer_info")).json()["eos_token"] == "<|return|>"


async def test_engine_death(client: httpx.AsyncClient, engine: ScriptedEngine, script: Script) -> None:
    engine.executor.fail = True
    response = await client.post(CHAT, json={"messages": USER})
    assert (
        response.status_code == 503
        and error_of(response)["type"] == "server_error"
        and "retry-after" in response.headers
    )
    for url in ("/health", "/ready"):
        assert (await client.get(url)).status_code == 503
    assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 503


async def test_a_hung_step_is_unhealthy(
    client: httpx.AsyncClient, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine lives, but what it waits for does not answer."""
    monkeypatch.setattr(operations, "STALLED", 0.1)
    running, release = threading.Event(), threading.Event()
    original = engine.executor.run

    def hang(*arguments: Any) -> Any:
        running.set()
        release.wait(10)
        return original(*arguments)

    monkeypatch.setattr(engine.executor, "run", hang)
    asked = asyncio.create_task(client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}))
    await asyncio.to_thread(running.wait, 10)
    async with asyncio.timeout(10):
        while (await client.get("/health")).status_code == 200:
            await asyncio.sleep(0.01)
    release.set()
    assert (await asked).status_code == 200 and (await client.get("/health")).status_code == 200  # idle is healthy


async def test_engine_death_in_a_stream(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    async def die() -> None:
        await asyncio.sleep(0.05)
        engine.executor.fail = True

    task = asyncio.create_task(die())
    response = await client.post(CHAT, json={"messages": USER, "stream": True, "ignore_eos": True})
    await task
    last = response.text.strip().split("\n\n")[-1]
    assert response.status_code == 200 and "error" in json.loads(last.removeprefix("data: "))


@pytest.mark.parametrize("stream", [False, True])
async def test_disconnect_frees_pages(
    engine: ScriptedEngine, tokenizer: Tokenizer, options: ServerOptions, stream: bool
) -> None:
    app = build_app(engine, tokenizer, options)
    body = json.dumps({"messages": USER, "stream": stream, "ignore_eos": True, "n": 4}).encode()
    inbox: asyncio.Queue[Any] = asyncio.Queue()
    inbox.put_nowait({"type": "http.request", "body": body, "more_body": False})

    async def send(message: Any) -> None:
        pass

    scope = {
        "type": "http",
        "method": "POST",
        "path": CHAT,
        "raw_path": CHAT.encode(),
        "query_string": b"",
        "headers": [],
        "http_version": "1.1",
        "scheme": "http",
        "server": ("test", 80),
        "client": ("c", 1),
        "root_path": "",
    }
    task = asyncio.create_task(app(scope, inbox.get, send))
    while engine.stats().requests_running < 4:
        await asyncio.sleep(0.005)
    assert engine.stats().kv_pages_held > 0
    inbox.put_nowait({"type": "http.disconnect"})
    await asyncio.wait_for(task, 2)
    deadline = time.monotonic() + 2
    while engine.stats().kv_pages_held and time.monotonic() < deadline:
        await asyncio.sleep(0.005)
    assert engine.stats().kv_pages_held == engine.stats().requests_running == 0


async def test_large_prompts_leave_the_loop_free(client: httpx.AsyncClient) -> None:
    turns = 0

    async def tick() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.001)
            turns += 1

    ticking = asyncio.create_task(tick())
    response = await client.post("/tokenize", json={"prompt": "The quick brown fox. " * 45_000})
    ticking.cancel()
    assert response.json()["count"] > 200_000
    assert turns > 10, "encoded in one go, it leaves the loop hardly any"
