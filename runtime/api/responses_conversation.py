"""What a response is asked with, as a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from gptoss_compile.runtime.api.errors import ApiError, bad_request, context_exceeded
from gptoss_compile.runtime.api.generation import Context
from gptoss_compile.runtime.api.render import EFFORTS, Prompt, Turn, render, shortened
from gptoss_compile.runtime.api.responses_prompt import Input, InputReader, client_tools, function_tools
from gptoss_compile.runtime.api.responses_schema import PromptBody
from gptoss_compile.runtime.api.responses_store import Record
from gptoss_compile.runtime.api.responses_tools import toolbox
from gptoss_compile.runtime.api.tokenizer import TooLongError
from gptoss_compile.runtime.api.tool_server.browser import Page
from gptoss_compile.runtime.api.tool_server.server import Toolbox


def conversation(context: Context, body: PromptBody, parent: Record | None = None) -> tuple[Prompt, Input, Toolbox]:
    """The prompt, what the input adds to the conversation, and the server's tools it may use. Raises ApiError.

    parent: what previous_response_id names, if that is known already.
    """
    turns: list[Turn] = []
    pages: Sequence[Page] = ()
    callers: dict[str, str] = {}
    if body.previous_response_id is not None:
        parent = parent or context.responses.get(body.previous_response_id)
        if parent is None:
            raise ApiError(
                404,
                f"Previous response with id '{body.previous_response_id[:100]}' not found.",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        if not parent.finished:
            raise bad_request("The previous response has not finished.", "previous_response_id")
        turns, callers, pages = list(parent.turns), parent.callers, parent.pages
    reader = InputReader(context.responses, context.memory, context.seal, callers, client_tools(body))
    given = reader.read(body.input or [])
    given.turns[:0] = turns
    instructions = [Turn("developer", body.instructions)] if body.instructions else []
    effort = EFFORTS[(body.reasoning.effort if body.reasoning else None) or "medium"]
    box = toolbox(body, context.tool_server, pages)
    tools = function_tools(body, box)
    turns = [*instructions, *given.turns]
    return Prompt(turns, tools, effort, context.options.system_date, box.namespaces()), given, box


async def render_input(context: Context, prompt: Prompt, limit: int, room: int | None = None) -> list[int]:
    """The prompt's token ids. room: instead of refusing a prompt that is too long, drop its oldest turns such that as many
    tokens are left to the answer. Raises ApiError."""
    tokenizer = context.text_tokenizer()
    try:
        try:
            return await render(tokenizer, prompt, limit)
        except TooLongError:
            if room is None:
                raise
            return await render(tokenizer, await shortened(tokenizer, prompt, limit - room), limit)
    except TooLongError as error:
        raise context_exceeded(error.tokens, limit, "input") from None
