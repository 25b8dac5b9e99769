"""/openapi.json and /docs: every route, with every status that it can answer, in OpenAPI 3.1."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from gptoss_compile.runtime.api.options import ServerOptions
from gptoss_compile.runtime.api.responses_schema import CompactBody, PromptBody, ResponseBody
from gptoss_compile.runtime.api.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

JSON, EVENTS, TEXT, HTML = "application/json", "text/event-stream", "text/plain", "text/html"
REASONS = {
    200: "The answer.",
    400: "The request is malformed, or asks for what this server does not have.",
    401: "The API key is missing or wrong.",
    404: "There is no such model, response or item.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    500: "The server failed to answer.",
    503: "The engine is gone, or the server is shutting down. Try again after Retry-After.",
}
_BODY = (400, 401, 404, 408, 413, 500)
_REF = "#/components/schemas/{model}"


@dataclass(frozen=True)
class Operation:
    """One method of one path. keys: always in its JSON answer. errors: statuses beside 200."""

    method: str
    path: str
    summary: str
    errors: tuple[int, ...] = (401, 500)
    body: type[BaseModel] | None = None
    contents: tuple[str, ...] = (JSON,)
    keys: tuple[str, ...] = ()
    query: tuple[tuple[str, dict[str, Any]], ...] = ()


_PAGE = (
    ("limit", {"type": "integer", "minimum": 1, "maximum": 100, "default": 20}),
    ("order", {"enum": ["asc", "desc"], "default": "desc"}),
    ("after", {"type": "string"}),
)
_REPLAY = (
    ("stream", {"type": "boolean", "default": False}),
    ("starting_after", {"type": "integer", "minimum": -1, "maximum": 10**9}),
)
_RESPONSE = ("id", "object", "status", "output")

OPERATIONS = (
    Operation("post", "/v1/chat/completions", "Answer a conversation.", (*_BODY, 503), ChatBody, (JSON, EVENTS),
              ("id", "object", "created", "model", "choices", "usage")),
    Operation("post", "/v1/completions", "Continue a text, or score it.", (*_BODY, 503), CompletionBody, (JSON, EVENTS),
              ("id", "object", "created", "model", "choices", "usage")),
    Operation("post", "/v1/responses", "Create a response. A WebSocket here does the same, turn after turn.",
              (*_BODY, 503), ResponseBody, (JSON, EVENTS), _RESPONSE),
    Operation("post", "/v1/responses/input_tokens", "Count the tokens of what would be the prompt.", _BODY, PromptBody,
              keys=("object", "input_tokens")),
    Operation("post", "/v1/responses/compact", "Replace a conversation by the model's summary of it.", (*_BODY, 503),
              CompactBody, keys=("id", "object", "created_at", "output", "usage")),
    Operation("get", "/v1/responses/{response_id}", "Retrieve a response, or its events once more.",
              (400, 401, 404, 500), None, (JSON, EVENTS), _RESPONSE, _REPLAY),
    Operation("delete", "/v1/responses/{response_id}", "Forget a response.", (401, 404, 500),
              keys=("id", "object", "deleted")),
    Operation("post", "/v1/responses/{response_id}/cancel", "Cancel a background response.", (400, 401, 404, 500),
              keys=_RESPONSE),
    Operation("get", "/v1/responses/{response_id}/input_items", "What a response was asked with.", (400, 401, 404, 500),
              keys=("object", "data", "has_more"), query=_PAGE),
    Operation("get", "/v1/models", "The served names.", keys=("object", "data")),
    Operation("get", "/v1/models/{model}", "One served name.", (401, 404, 500), keys=("id", "object", "created")),
    Operation("get", "/health", "Whether the engine makes progress. Needs no key.", (500, 503), keys=("status",)),
    Operation("get", "/ready", "The same, behind the key.", (401, 500, 503), keys=("status",)),
    Operation("get", "/metrics", "Prometheus metrics.", contents=(TEXT,)),
    Operation("head", "/metrics", "Whether there are metrics.", contents=(TEXT,)),
    Operation("post", "/tokenize", "Token ids of a text.", _BODY, TokenizeBody, keys=("tokens", "count", "max_model_len")),
    Operation("post", "/detokenize", "The text of token ids.", _BODY, DetokenizeBody, keys=("prompt",)),
    Operation("get", "/tokenizer_info", "The tokenizer.", (400, 401, 500), keys=("eos_token", "bos_token", "pad_token")),
    Operation("get", "/openapi.json", "This document.", keys=("openapi", "paths")),
    Operation("get", "/docs", "This document, for people.", contents=(HTML,)),
)

_ERROR = {
    "type": "object",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


# One event of a stream, as its fields. The last one of a stream in chat and completions has the data [DONE].
_EVENT = {"type": "object", "required": ["data"], "properties": {"event": {"type": "string"}, "data": {"type": "string"}}}


def document(options: ServerOptions) -> dict[str, Any]:
    """Of a server with these names and keys."""
    bodies = [operation.body for operation in OPERATIONS if operation.body]
    _, schemas = models_json_schema([(body, "validation") for body in bodies], ref_template=_REF)
    for schema in schemas["$defs"].values():
        if "model" in schema.get("properties", {}):
            required = "model" in schema.get("required", ())
            schema["properties"]["model"] = {"enum": [*options.served_model_names, *([] if required else [None])]}
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation)
    components: dict[str, Any] = {"schemas": {**schemas["$defs"], "Error": _ERROR}}
    whole: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "gptoss-serve", "version": "1", "description": "OpenAI's API for GPT-OSS."},
        "paths": paths,
        "components": components,
    }
    if options.api_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        whole["security"] = [{"key": []}]
        paths["/health"]["get"]["security"] = []
    return whole


def _operation(operation: Operation) -> dict[str, Any]:
    parameters: list[dict[str, Any]] = [
        {"name": part[1:-1], "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for part in operation.path.split("/")
        if part.startswith("{")
    ]
    parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in operation.query]
    described: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": f"{operation.method} {operation.path}",
        "parameters": parameters,
        "responses": {"200": {"description": REASONS[200], "content": _contents(operation)}},
    }
    for status in operation.errors:
        of_health = status == 503 and operation.keys == ("status",)
        schema = _object(operation.keys) if of_health else {"$ref": _REF.format(model="Error")}
        described["responses"][str(status)] = {"description": REASONS[status], "content": {JSON: {"schema": schema}}}
    if operation.body:
        schema = {"$ref": _REF.format(model=operation.body.__name__)}
        described["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
    return described


def _contents(operation: Operation) -> dict[str, Any]:
    schemas = {JSON: _object(operation.keys), EVENTS: _EVENT}
    return {kind: {"schema": schemas.get(kind, {"type": "string"})} for kind in operation.contents}


def _object(keys: tuple[str, ...]) -> dict[str, Any]:
    return {"type": "object", "required": list(keys)}


async def openapi(request: Request) -> Response:
    return JSONResponse(document(request.app.state.context.options))


async def docs(request: Request) -> Response:
    """A table of the routes. Everything is in the page: it loads nothing from elsewhere."""
    rows = "".join(
        f"<tr><td>{operation.method.upper()}<td><code>{html.escape(operation.path)}</code>"
        f"<td>{html.escape(operation.summary)}<td>{', '.join(map(str, (200, *operation.errors)))}"
        f"<td>{'<br>'.join(operation.contents)}"
        for operation in OPERATIONS
    )
    model = html.escape(request.app.state.context.options.model)
    return HTMLResponse(
        "<!doctype html><html lang=en><meta charset=utf-8><title>gptoss-serve</title>"
        "<style>body{font:16px sans-serif;margin:2em}td,th{text-align:left;padding:.2em 1em .2em 0}</style>"
        f"<h1>gptoss-serve: {model}</h1><p>Schemas: <a href=openapi.json>openapi.json</a>"
        f"<table><tr><th>Method<th>Path<th><th>Statuses<th>Answers{rows}</table></html>"
    )
