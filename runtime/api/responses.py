"""/v1/responses: create, retrieve, cancel, delete, input_items, input_tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gptoss_compile.runtime.api.errors import ApiError, bad_request, unavailable
from gptoss_compile.runtime.api.generation import Context
from gptoss_compile.runtime.api.http import EventStream, event, read_json, until_disconnect
from gptoss_compile.runtime.api.responses_conversation import conversation, render_input
from gptoss_compile.runtime.api.responses_run import ResponseRun
from gptoss_compile.runtime.api.responses_schema import PromptBody, ResponseBody
from gptoss_compile.runtime.api.responses_store import Record


async def create(request: Request) -> Response:
    context: Context = request.app.state.context
    run = ResponseRun(context, await read_json(request, ResponseBody, context.options))
    record = await run.start()
    if run.body.background and not run.body.stream:
        return JSONResponse(record.response)
    if run.body.stream:
        return EventStream(_events(record, cancel=not run.body.background))
    assert record.task is not None
    try:
        await until_disconnect(request, record.task)
    finally:
        record.task.cancel()
    if record.response["status"] == "failed":
        raise unavailable(record.response["error"]["message"])
    return JSONResponse(record.response)


async def retrieve(request: Request) -> Response:
    record = _record(request)
    if request.query_params.get("stream", "false").lower() not in ("true", "1"):
        return JSONResponse(record.response)
    after = request.query_params.get("starting_after", "-1")
    if not (after.removeprefix("-").isascii() and after.removeprefix("-").isdigit() and len(after) < 12):
        raise bad_request("starting_after must be an integer.", "starting_after")
    return EventStream(_events(record, start=max(int(after) + 1, 0)))


async def cancel(request: Request) -> Response:
    record = _record(request)
    if record.response["status"] == "cancelled":
        return JSONResponse(record.response)
    if not record.response["background"]:
        raise bad_request("Only responses with background: true can be cancelled.", "response_id")
    if record.finished or record.task is None:
        raise bad_request(f"The response is {record.response['status']} and cannot be cancelled.", "response_id")
    record.task.cancel()
    await asyncio.wait([record.task])
    return JSONResponse(record.response)


async def delete(request: Request) -> Response:
    context: Context = request.app.state.context
    record = _record(request)
    context.responses.remove(record.id)
    if record.task is not None:
        record.task.cancel()
    return JSONResponse({"id": record.id, "object": "response", "deleted": True})


async def input_items(request: Request) -> Response:
    """A page of the items a response was asked with. Newest first unless order=asc."""
    items = list(_record(request).input_items)
    query = request.query_params
    if query.get("order", "desc") not in ("asc", "desc"):
        raise bad_request("order must be asc or desc.", "order")
    limit = query.get("limit", "20")
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= 100):
        raise bad_request("limit must be an integer from 1 to 100.", "limit")
    if query.get("order", "desc") == "desc":
        items.reverse()
    if after := query.get("after"):
        ids = [item["id"] for item in items]
        if after not in ids:
            raise bad_request(f"after names no item of this response: {after[:100]!r}.", "after")
        items = items[ids.index(after) + 1 :]
    page = items[: int(limit)]
    return JSONResponse(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else "",
            "last_id": page[-1]["id"] if page else "",
            "has_more": len(items) > len(page),
        }
    )


async def input_tokens(request: Request) -> Response:
    context: Context = request.app.state.context
    body = await read_json(request, PromptBody, context.options)
    context.served(body.model)
    prompt, _, _ = conversation(context, body)
    ids = await render_input(context, prompt, 1 << 24)
    return JSONResponse({"object": "response.input_tokens", "input_tokens": len(ids)})


def _record(request: Request) -> Record:
    context: Context = request.app.state.context
    response_id = request.path_params["response_id"]
    record = context.responses.get(response_id)
    if record is None:
        raise ApiError(404, f"Response with id '{response_id[:100]}' not found.", param="response_id", code="not_found")
    return record


async def _events(record: Record, *, start: int = 0, cancel: bool = False) -> AsyncGenerator[bytes, None]:
    """The record's events as server-sent ones. cancel: the response ends with the stream, if that is closed early."""
    try:
        async for each in record.follow(start):
            yield event(each, each["type"])
    finally:
        if cancel and record.task is not None:
            record.task.cancel()
