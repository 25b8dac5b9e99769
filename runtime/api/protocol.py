"""HTTP/1.1 connections with limits on a request's head: its size, and how long it may take to come."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from gptoss_compile.runtime.api.errors import ApiError

HEAD_BYTES = 64 << 10
HEAD_SECONDS = 20.0


class LimitedProtocol(H11Protocol):
    """uvicorn's protocol, which waits for ever for a head to be complete; this one ends the connection.

    HEAD_SECONDS count from the connection on, and for the later requests of one from their first byte on; between
    requests uvicorn's timeout_keep_alive holds. Answers 400 and 408 in OpenAI's shape.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        if self._timer is None and self.conn.their_state is h11.IDLE:
            self._wait()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """h11 calls for this where a head is no HTTP or too long."""
        self._end(ApiError(400, f"Not a valid HTTP request, or its head exceeds {HEAD_BYTES} bytes.", code="invalid_http"))

    def _wait(self) -> None:
        self._timer = self.loop.call_later(HEAD_SECONDS, self._late)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._end(ApiError(408, "The request's head did not arrive in time.", code="request_timeout"))

    def _end(self, error: ApiError) -> None:
        self._stop()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = error.response()
            head = h11.Response(status_code=error.status, headers=[*answer.raw_headers, (b"connection", b"close")])
            for event in (head, h11.Data(bytes(answer.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
