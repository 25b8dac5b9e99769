"""A WebSocket on /v1/responses: one response after the other, each as the events that a stream would have."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from gptoss_compile.runtime.api.errors import ApiError, bad_request
from gptoss_compile.runtime.api.generation import Context
from gptoss_compile.runtime.api.http import COMPACT, parse
from gptoss_compile.runtime.api.responses_run import ResponseRun
from gptoss_compile.runtime.api.responses_schema import ResponseBody
from gptoss_compile.runtime.api.responses_store import Record

WAITING = 16  # messages that may wait for the turn before them
POLICY_VIOLATION = 1008


class SocketBody(ResponseBody):
    """`{"type": "response.create", …}`. generate: false only prepares a conversation to go on from."""

    type: str | None = None
    generate: bool | None = None


async def socket(websocket: WebSocket) -> None:
    await websocket.accept()
    conversation = _Conversation(websocket)
    inbox: asyncio.Queue[bytes] = asyncio.Queue(WAITING)
    turns = asyncio.create_task(conversation.run(inbox))
    try:
        while True:
            message = await websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            try:
                inbox.put_nowait(message.get("bytes") or (message.get("text") or "").encode("utf-8", "replace"))
            except asyncio.QueueFull:
                await websocket.close(POLICY_VIOLATION, "too many messages are waiting")
                return
    finally:
        turns.cancel()
        await asyncio.gather(turns, return_exceptions=True)


class _Conversation:
    """The turns of one connection. The last one is kept, so that store: false turns can be continued, here only."""

    def __init__(self, websocket: WebSocket) -> None:
        self._websocket = websocket
        self._context: Context = websocket.app.state.context
        self._last: Record | None = None

    async def run(self, inbox: asyncio.Queue[bytes]) -> None:
        while True:
            data = await inbox.get()
            try:
                await self._turn(data)
            except ApiError as error:
                await self._send({"type": "error", "status": error.status, **error.body})
            except WebSocketDisconnect:
                return

    async def _turn(self, data: bytes) -> None:
        body = parse(data, SocketBody)
        if body.type != "response.create":
            raise bad_request("type must be response.create.", "type")
        if body.background:
            raise bad_request("background is not available over a WebSocket.", "background")
        parent = self._last if self._last and self._last.id == body.previous_response_id else None
        if parent:
            self._last = None  # comes back as the new turn's history, or is forgotten if that fails
        run = ResponseRun(self._context, body, parent)
        record = run.prepare() if body.generate is False else await run.start()
        try:
            async for event in record.follow():
                await self._send(event)
        finally:
            if record.task is not None:
                record.task.cancel()
        if record.response["status"] in ("completed", "incomplete"):
            self._last = record

    async def _send(self, message: dict[str, Any]) -> None:
        await self._websocket.send_text(COMPACT.encode(message))
