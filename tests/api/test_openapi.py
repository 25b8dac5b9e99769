"""/openapi.json tells the truth: its routes are the server's, and every status that it lists for one can be had."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from typing import Any

import httpx
import pytest
from scripted import Script, ScriptedEngine
from served import asgi_client

from gptoss_compile.runtime.api import logs
from gptoss_compile.runtime.api.app import build_app
from gptoss_compile.runtime.api.openapi import OPERATIONS, Operation, document
from gptoss_compile.runtime.api.options import ServerOptions
from gptoss_compile.runtime.api.tokenizer import Tokenizer

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi", "max_tokens": 1},
    "/v1/responses": {"input": "hi"},
    "/v1/responses/input_tokens": {"input": "hi"},
    "/v1/responses/compact": {"input": "hi", "model": "gpt-oss"},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1]},
}
FINAL = "<|channel|>final<|message|>x<|return|>"
HEAD = {"content-type": "application/json"}
pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_routes_are_the_servers(engine: ScriptedEngine, tokenizer: Tokenizer, options: ServerOptions) -> None:
    app = build_app(engine, tokenizer, options)
    served = {
        (method.lower(), route.path.replace(":path", ""))  # type: ignore[attr-defined]
        for route in app.routes
        for method in getattr(route, "methods", None) or ()
        if method != "HEAD" or route.path == "/metrics"  # type: ignore[attr-defined]
    }
    assert served == {(operation.method, operation.path) for operation in OPERATIONS}
    for keyed in (False, True):
        options = ServerOptions(api_keys=("k",) * keyed)
        async with asgi_client(build_app(engine, tokenizer, options)) as client:
            answer = (await client.get("/openapi.json", headers={"authorization": "Bearer k"})).json()
            assert answer == document(options) and ("security" in answer) is keyed
            page = await client.get("/docs", headers={"authorization": "Bearer k"})
            assert all(operation.path in page.text for operation in OPERATIONS)


async def test_every_status_can_be_had(tokenizer: Tokenizer, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, dead = ScriptedEngine(script), ScriptedEngine(script)  # the second is never started, and shut down
    engine.start()
    dead.shutdown()
    options = ServerOptions(api_keys=("k",), max_body_bytes=100_000, body_timeout=0.05)
    try:
        for operation in OPERATIONS:
            for status in (200, *operation.errors):
                tokenless = status == 400 and operation.path == "/tokenizer_info"
                app = build_app(dead if status == 503 else engine, None if tokenless else tokenizer, options)
                if status == 500:
                    app.state.context = None
                script.add(FINAL)
                async with asgi_client(app) as client:
                    client.headers["authorization"] = "Bearer wrong" if status == 401 else "Bearer k"
                    answer = await _provoke(client, operation, status)
                where = f"{operation.method} {operation.path} {status}: {answer.status_code} {answer.text[:200]}"
                assert answer.status_code == status, where
                _check_shape(operation, status, answer, where)
                while script.next():
                    pass
    finally:
        engine.shutdown(drain=False)


async def _provoke(client: httpx.AsyncClient, operation: Operation, status: int) -> httpx.Response:
    path = operation.path.replace("{model}", "nothing" if status == 404 else "gpt-oss")
    if "{response_id}" in path:
        path = path.replace("{response_id}", await _stored(client, path, status))
        query = {"limit": "0"} if path.endswith("input_items") else {"stream": "true", "starting_after": "x"}
        return await client.request(operation.method, path, params=query if status == 400 else None)
    if operation.body is None:
        return await client.request(operation.method, path)
    body: dict[str, Any] = BODIES[path]
    if status == 404:
        body = {**body, "model": "nothing"}
    content = {400: b"{", 413: b" " * 200_000}.get(status, json.dumps(body).encode())
    if status == 408:

        async def never() -> Any:
            yield b"{"
            await asyncio.sleep(5)

        return await client.request(operation.method, path, content=never(), headers=HEAD)
    return await client.request(operation.method, path, content=content, headers=HEAD)


async def _stored(client: httpx.AsyncClient, path: str, status: int) -> str:
    """The id of a response for which `path` answers with `status`."""
    if status not in (200, 400):
        return "nothing"
    cancellable = path.endswith("cancel") and status == 200
    made = await client.post("/v1/responses", json={"input": "hi", "background": cancellable})
    identity: str = made.json()["id"]
    return identity


def _check_shape(operation: Operation, status: int, answer: httpx.Response, where: str) -> None:
    kind = answer.headers["content-type"].partition(";")[0]
    if status == 200:
        assert kind in operation.contents, where
        if kind == "application/json":
            assert set(operation.keys) <= set(answer.json()), where
    elif operation.method != "head":
        assert kind == "application/json" and set(answer.json()) in ({"error"}, {"status"}), where
    assert answer.headers["x-request-id"], where


async def test_streams_are_events(client: httpx.AsyncClient, script: Script) -> None:
    for operation in OPERATIONS:
        if operation.body and "text/event-stream" in operation.contents:
            script.add(FINAL)
            answer = await client.post(operation.path, json={**BODIES[operation.path], "stream": True})
            assert answer.headers["content-type"].startswith("text/event-stream")


async def test_request_ids_and_logs(client: httpx.AsyncClient) -> None:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(logs.JsonFormatter())
    logger = logging.getLogger("gptoss_compile.access")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        given = await client.get("/health", headers={"x-request-id": "mine-1"})
        made = [await client.get("/nothing", headers={"x-request-id": bad}) for bad in ("", "two words", "x" * 200, 'a"b')]
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    ids = [answer.headers["x-request-id"] for answer in (given, *made)]
    assert ids[0] == "mine-1" and all(each.startswith("req_") for each in ids[1:]) and len(set(ids)) == 5
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    assert [line["request_id"] for line in lines] == ids
    assert [line["status"] for line in lines] == [200, 404, 404, 404, 404]
    assert lines[0]["path"] == "/health" and lines[0]["method"] == "GET" and lines[0]["seconds"] >= 0
