"""The ASGI application: routes, keys, and one shape for every error."""

from __future__ import annotations

import logging

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ExceptionHandler

from gptoss_compile.runtime.api import openapi, operations, responses, responses_compact, responses_socket
from gptoss_compile.runtime.api.chat import chat_completions
from gptoss_compile.runtime.api.completions import completions
from gptoss_compile.runtime.api.errors import ApiError, bad_request
from gptoss_compile.runtime.api.generation import Context
from gptoss_compile.runtime.api.http import KeyMiddleware
from gptoss_compile.runtime.api.logs import RequestIdMiddleware, request_id
from gptoss_compile.runtime.api.metrics import Metrics
from gptoss_compile.runtime.api.options import ServerOptions
from gptoss_compile.runtime.api.tokenizer import Tokenizer
from gptoss_compile.runtime.api.tool_server.server import ToolServer
from gptoss_compile.runtime.engine import Engine
from gptoss_compile.runtime.sampling_params import RequestError

logger = logging.getLogger(__name__)


def build_app(
    engine: Engine, tokenizer: Tokenizer | None, options: ServerOptions, tool_server: ToolServer | None = None
) -> Starlette:
    """The application that serves a running engine. Without a tokenizer it takes and gives token ids only."""
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/responses", responses.create, methods=["POST"]),
            WebSocketRoute("/v1/responses", responses_socket.socket),
            Route("/v1/responses/compact", responses_compact.compact, methods=["POST"]),
            Route("/v1/responses/input_tokens", responses.input_tokens, methods=["POST"]),
            Route("/v1/responses/{response_id}", _one_response, methods=["GET", "DELETE"]),
            Route("/v1/responses/{response_id}/cancel", responses.cancel, methods=["POST"]),
            Route("/v1/responses/{response_id}/input_items", responses.input_items, methods=["GET"]),
            Route("/v1/models", operations.models, methods=["GET"]),
            Route("/v1/models/{model:path}", operations.model, methods=["GET"]),
            Route("/health", operations.health, methods=["GET"]),
            Route("/ready", operations.health, methods=["GET"]),
            Route("/metrics", operations.metrics, methods=["GET"]),  # and HEAD, which starlette adds
            Route("/tokenize", operations.tokenize, methods=["POST"]),
            Route("/detokenize", operations.detokenize, methods=["POST"]),
            Route("/tokenizer_info", operations.tokenizer_info, methods=["GET"]),
            Route("/openapi.json", openapi.openapi, methods=["GET"]),
            Route("/docs", openapi.docs, methods=["GET"]),
        ],
        middleware=_middleware(options),
        exception_handlers=_HANDLERS,
    )
    app.router.redirect_slashes = False  # a redirect would be the one answer that is not in OpenAI's shape
    app.state.context = Context(engine, tokenizer, options, Metrics(engine), tool_server or ToolServer())
    return app


def _middleware(options: ServerOptions) -> list[Middleware]:
    """CORS comes before the keys: a browser's preflight request carries none."""
    layers = [Middleware(RequestIdMiddleware)]
    if options.allowed_origins:
        layers.append(
            Middleware(CORSMiddleware, allow_origins=options.allowed_origins, allow_methods=["*"], allow_headers=["*"])
        )
    if options.api_keys:
        layers.append(Middleware(KeyMiddleware, keys=options.api_keys))
    return layers


async def _one_response(request: Request) -> Response:
    """One route for both, so that a 405 names both in Allow."""
    return await (responses.delete if request.method == "DELETE" else responses.retrieve)(request)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return bad_request(f"{error}.", error.field).response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path[:200]}"
    messages = {
        404: (f"Unknown route: {where}", "unknown_url"),
        405: (f"Method not allowed: {where}", "method_not_allowed"),
    }
    message, code = messages.get(error.status_code, (error.detail, None))
    headers = dict(error.headers) if error.headers else None
    return ApiError(error.status_code, message, code=code, headers=headers).response()


async def _disconnected(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _internal_error(request: Request, error: Exception) -> Response:
    """The one answer that starlette gives outside of all middleware."""
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    headers = {"Retry-After": "5", "x-request-id": request_id() or ""}
    return ApiError(
        500, "The server failed to answer this request.", code="internal_error", headers=headers
    ).response()


_HANDLERS: dict[type[Exception] | int, ExceptionHandler] = {
    ApiError: _api_error,
    RequestError: _request_error,
    HTTPException: _http_error,
    ClientDisconnect: _disconnected,
    Exception: _internal_error,
}
