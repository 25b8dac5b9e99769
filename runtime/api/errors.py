"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}, whatever went wrong and wherever."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """Ends a request with an HTTP status and OpenAI's error object.

    param is the request's field at fault (`messages[0].content`), code a stable name for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str) -> ApiError:
    """503 with Retry-After, since the official clients retry at once otherwise and multiply the load."""
    return ApiError(503, message, code="engine_unavailable", headers={"Retry-After": "5"})


def context_exceeded(tokens: int, limit: int, param: str) -> ApiError:
    """tokens is a lower bound: reading a prompt stops where it is certain not to fit."""
    return bad_request(
        f"This model's maximum context length leaves room for prompts of {limit} tokens, but {param} has at "
        f"least {tokens}. Shorten it or serve with a larger context.",
        param,
        "context_length_exceeded",
    )
