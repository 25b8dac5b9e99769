"""The messages of a chat request as the turns of a harmony conversation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from gptoss_compile.runtime.api.errors import bad_request
from gptoss_compile.runtime.api.options import ServerOptions
from gptoss_compile.runtime.api.render import EFFORTS, FunctionTool, Prompt, Turn
from gptoss_compile.runtime.api.schemas import ChatBody, ChatMessage, text_of
from gptoss_compile.runtime.api.tools import NAMESPACE
from gptoss_compile.runtime.api.turn_memory import TurnMemory, same


def chat_prompt(body: ChatBody, options: ServerOptions, memory: TurnMemory) -> Prompt:
    """Raises ApiError for messages that cannot follow each other. memory: what was written before recent calls."""
    tools = (
        ()
        if body.tool_choice == "none"
        else tuple(
            FunctionTool(t.function.name, t.function.description or "", t.function.parameters, t.function.strict)
            for t in body.tools or ()
        )
    )
    callers: dict[str, str] = {}
    turns: list[Turn] = []
    for number, message in enumerate(body.messages):
        turns += _turns(message, callers, number, memory)
    return Prompt(turns, tools, EFFORTS[body.reasoning_effort or "medium"], options.system_date)


def _turns(message: ChatMessage, callers: dict[str, str], number: int, memory: TurnMemory) -> Iterator[Turn]:
    text = text_of(message.content)
    if message.role in ("system", "developer"):
        yield Turn("developer", text)
    elif message.role == "user":
        yield Turn("user", text)
    elif message.role == "assistant":
        calls = message.tool_calls or ()
        callers.update({call.id: call.function.name for call in calls})
        given = list(_assistant(message, text))
        written = memory.recall(calls_key(call.id for call in calls)) if calls else None
        known = written and same([turn for turn in written if turn.recipient], [turn for turn in given if turn.recipient])
        yield from written if written and known else given
    else:
        name = callers.get(message.tool_call_id or "") or message.name
        if name is None:
            raise bad_request(
                f"tool_call_id {(message.tool_call_id or '')[:100]!r} answers no tool call of an earlier message.",
                f"messages[{number}].tool_call_id",
            )
        yield Turn("tool", text, name=NAMESPACE + name.removeprefix(NAMESPACE))


def calls_key(ids: Iterable[str]) -> str:
    """What an answer with these calls is remembered by."""
    return "\n".join(ids)


def _assistant(message: ChatMessage, text: str) -> Iterator[Turn]:
    """Reasoning, then what was said, then the calls: beside a call the text is a preamble, not the final answer."""
    if reasoning := message.reasoning or message.reasoning_content:
        yield Turn("assistant", reasoning, channel="analysis")
    calls = message.tool_calls or ()
    if text or not (calls or reasoning):
        yield Turn("assistant", text, channel="commentary" if calls else "final")
    for call in calls:
        yield Turn(
            "assistant", call.function.arguments, recipient=NAMESPACE + call.function.name.removeprefix(NAMESPACE)
        )
