"""Routes beside generation: models, health, metrics, tokenizer."""

from __future__ import annotations

from typing import Any

from prometheus_client import generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gptoss_compile.runtime.api.generation import Context
from gptoss_compile.runtime.api.http import read_json
from gptoss_compile.runtime.api.schemas import DetokenizeBody, TokenizeBody

STALLED = 60.0  # seconds without a finished step, while there is work, after which the device counts as hung


def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


def _model(context: Context, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": context.options.started,
        "owned_by": "gptoss-compile",
        "max_model_len": context.engine.max_model_len,
    }


async def models(request: Request) -> Response:
    context = _context(request)
    names = context.options.served_model_names
    return JSONResponse({"object": "list", "data": [_model(context, name) for name in names]})


async def model(request: Request) -> Response:
    context = _context(request)
    return JSONResponse(_model(context, context.served(request.path_params["model"])))


async def health(request: Request) -> Response:
    """200 while the engine lives and its steps end; tells nothing else. /health needs no key, /ready does."""
    engine = _context(request).engine
    healthy = engine.healthy and engine.seconds_since_step < STALLED
    return JSONResponse({"status": "ok" if healthy else "unhealthy"}, 200 if healthy else 503)


async def metrics(request: Request) -> Response:
    return Response(generate_latest(_context(request).metrics.registry), media_type="text/plain; version=0.0.4")


async def tokenize(request: Request) -> Response:
    """Ids of a text. Harmony has no special tokens to add around one."""
    context = _context(request)
    body = await read_json(request, TokenizeBody, context.options)
    context.served(body.model)
    ids = await context.text_tokenizer().encode_async(body.prompt)
    return JSONResponse({"count": len(ids), "max_model_len": context.engine.max_model_len, "tokens": ids})


async def detokenize(request: Request) -> Response:
    context = _context(request)
    body = await read_json(request, DetokenizeBody, context.options)
    context.served(body.model)
    tokenizer = context.text_tokenizer()
    return JSONResponse({"prompt": tokenizer.decode(body.tokens)})


async def tokenizer_info(request: Request) -> Response:
    context = _context(request)
    context.text_tokenizer()
    return JSONResponse(
        {
            "tokenizer": "o200k_harmony",
            "bos_token": "<|startoftext|>",
            "eos_token": "<|return|>",
            "pad_token": "<|endoftext|>",
            "chat_template": None,
            "max_model_len": context.engine.max_model_len,
        }
    )
