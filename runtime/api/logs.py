"""Structured logs: one JSON object a line, each with the id of the request it belongs to."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from contextvars import ContextVar
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = b"x-request-id"
_USABLE = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
_current: ContextVar[str | None] = ContextVar("request_id", default=None)
_access = logging.getLogger("gptoss_compile.access")


def request_id() -> str | None:
    """The id of the HTTP request that the running task serves."""
    return _current.get()


class JsonFormatter(logging.Formatter):
    """{"time", "level", "logger", "message"[, "request_id"][, "error"][, what `extra={"fields": …}` names]}."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (current := _current.get()) is not None:
            line["request_id"] = current
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure(level: str) -> None:
    """Send this process's logs to stderr. level: debug, info, warning or error; requests are told of at info."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class RequestIdMiddleware:
    """Gives every request an id, the client's x-request-id if that is a plain word, and logs how it was answered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == HEADER), b"")
        identity = given if _USABLE.fullmatch(given) else f"req_{secrets.token_hex(16)}".encode()
        _current.set(identity.decode())  # for the rest of this request's task, and those it starts
        started, status = time.monotonic(), 0

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] in ("http.response.start", "websocket.accept", "websocket.http.response.start"):
                status = message.get("status", 101)
                message["headers"] = [*message.get("headers", ()), (HEADER, identity)]
            await send(message)

        unanswered = 500  # what raised is answered further out
        try:
            await self._app(scope, receive, tell)
            unanswered = 499  # the client left first
        finally:
            fields = {
                "method": scope.get("method", "WEBSOCKET"),
                "path": scope["path"][:200],
                "status": status or unanswered,
                "seconds": round(time.monotonic() - started, 4),
            }
            _access.info("answered", extra={"fields": fields})
