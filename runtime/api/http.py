"""What every route needs of HTTP: bounded bodies, keys, server-sent events, and noticing that the client has gone."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from gptoss_compile.runtime.api.errors import ApiError, bad_request
from gptoss_compile.runtime.api.options import ServerOptions

COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # made once: json.dumps would make one a token
T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


async def read_json(request: Request, model: type[M], options: ServerOptions) -> M:
    """The request's body as `model`. Raises ApiError 400, 408 or 413."""
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise bad_request(f"Content-Type must be application/json, found {content_type[:100]!r}.")
    try:
        async with asyncio.timeout(options.body_timeout):
            body = await _read(request, options.max_body_bytes)
    except TimeoutError:
        raise ApiError(
            408, "The request body did not arrive in time.", code="request_timeout", headers={"Connection": "close"}
        ) from None
    return parse(body, model)


def parse(body: bytes, model: type[M]) -> M:
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:  # bad JSON, bad UTF-8, lone surrogates, NaN, too deep
        raise bad_request(f"The body is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(data, dict):
        raise bad_request("The body must be a JSON object.")
    return validated(data, model)


def validated(data: dict[str, Any], model: type[M]) -> M:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        worst = max(errors, key=lambda each: len(each["loc"]))  # of a union's alternatives the one that got furthest
        param = _path(worst["loc"])
        where = f"{param}: " if param else ""
        raise bad_request(f"{where}{worst['msg'].removeprefix('Value error, ')}.", param or None) from None
    except RecursionError:
        raise bad_request("The body is nested too deeply.") from None


def _path(location: Sequence[int | str]) -> str:
    """`messages[0].content`; the names pydantic adds for the alternatives of a union are left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.replace("_", "").isalnum() and part.islower() and part not in ("str", "int", "float", "bool", "dict"):
            path += f".{part}" if path else part
    return path


async def _read(request: Request, limit: int) -> bytes:
    too_large = ApiError(
        413, f"The request body exceeds {limit} bytes.", code="request_too_large", headers={"Connection": "close"}
    )
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced[:20]) > limit:
        raise too_large
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)


async def until_disconnect(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the client goes away first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(data: dict[str, Any] | str, name: str | None = None) -> bytes:
    """One server-sent event. Lines end in a bare newline: some clients fail silently on anything else."""
    text = data if isinstance(data, str) else COMPACT.encode(data)
    return (f"event: {name}\ndata: {text}\n\n" if name else f"data: {text}\n\n").encode()


class EventStream(Response):
    """Sends events as they come, each in one write, and closes their source when the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = asyncio.create_task(self._send(send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait((sender, gone), return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                with suppress(OSError):  # the connection broke while we wrote to it
                    sender.result()
        finally:
            for each in (sender, gone):
                each.cancel()
            await asyncio.gather(sender, gone, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._events) as events:
            async for data in events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class KeyMiddleware:
    """401 on every route but /health for requests without one of the keys (`Authorization: Bearer KEY`)."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] == "/health" or self._allowed(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401, "Incorrect API key provided.", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
        )
        await error.response()(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]  # all, whatever the first says
        return scheme.lower() == b"bearer" and any(matches)
