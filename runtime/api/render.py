"""Conversations to prompts: harmony's text layout, spelled in tokens.

System and developer messages, which hold settings and tool signatures, are laid out by openai-harmony. The others are
assembled here, because a message may come as the very tokens the model wrote (so that the prefix cache hits), and
because the recipient of a tool call goes after the channel, where the model puts it, and not where the library does.
"""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from openai_harmony import (
    Author,
    DeveloperContent,
    HarmonyError,
    ReasoningEffort,
    RenderOptions,
    Role,
    SystemContent,
    ToolDescription,
    ToolNamespaceConfig,
)
from openai_harmony import Message as LibraryMessage

from gptoss_compile.runtime.api.errors import bad_request
from gptoss_compile.runtime.api.harmony import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, START
from gptoss_compile.runtime.api.json_schema import SchemaError
from gptoss_compile.runtime.api.schema_text import Room, tool_schema
from gptoss_compile.runtime.api.tokenizer import Tokenizer, TooLongError

Effort = Literal["low", "medium", "high"]
# What clients may send, and what the model knows of it.
EFFORTS: dict[str, Effort] = {
    "none": "low",
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "high",
    "max": "high",
}
_LEVELS = {"low": ReasoningEffort.LOW, "medium": ReasoningEffort.MEDIUM, "high": ReasoningEffort.HIGH}
_PLACE = "\x00"  # stands for the instructions while the library lays out a developer message


@dataclass(frozen=True)
class FunctionTool:
    """A function the model may call. parameters is a JSON schema, or None for a function without arguments."""

    name: str
    description: str = ""
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    recipient: on an assistant's message the tool it calls. name: on a tool's message the tool that answers; its channel is
    that of the call, commentary unless given. tokens: the message exactly as the model wrote it, from its <|start|> to its
    end, instead of `text`.
    """

    role: Literal["developer", "user", "assistant", "tool"]
    text: str = ""
    channel: str | None = None
    recipient: str | None = None
    name: str | None = None
    tokens: tuple[int, ...] | None = None

    @property
    def reasoning(self) -> bool:
        """Thoughts, and the calls and results of built-in tools among them."""
        return self.channel == "analysis"

    @property
    def thought(self) -> bool:
        return self.role == "assistant" and self.reasoning and self.recipient is None

    @property
    def final(self) -> bool:
        return self.role == "assistant" and self.channel == "final"

    @property
    def size(self) -> int:
        """Bytes, roughly."""
        return 200 + 2 * len(self.text) + 36 * len(self.tokens or ())


@dataclass(frozen=True)
class Prompt:
    """Everything a prompt is made of.

    date: `Current date`, today's if None. namespaces: the server's own tools. answer_format: what the final message must
    be, as `schema_text.format_text` puts it.
    """

    turns: Sequence[Turn]
    tools: Sequence[FunctionTool] = ()
    effort: Effort = "medium"
    date: str | None = None
    namespaces: Sequence[ToolNamespaceConfig] = ()
    answer_format: str = ""


async def render(tokenizer: Tokenizer, prompt: Prompt, limit: int) -> list[int]:
    """Token ids of the prompt, ending where the assistant begins to write. Raises TooLongError beyond `limit`."""
    ids = await asyncio.to_thread(_system, tokenizer, prompt) if prompt.namespaces else _system(tokenizer, prompt)
    turns = drop_old_reasoning(prompt.turns)
    if (prompt.tools or prompt.answer_format) and not any(turn.role == "developer" for turn in turns):
        turns = [Turn("developer"), *turns]
    tools, answer_format = prompt.tools, prompt.answer_format  # shown once, in the first developer message
    for turn in turns:
        if turn.role == "developer":
            text = (
                await asyncio.to_thread(_developer_text, tokenizer, turn.text, tools)
                if tools
                else _developer_text(tokenizer, turn.text, ())
            )
            text = "\n\n".join(part for part in (text, answer_format) if part)
            tools, answer_format = (), ""
            ids += [START, *tokenizer.encode("developer"), MESSAGE, *await tokenizer.encode_async(text, limit), END]
        else:
            ids += await message_tokens(tokenizer, turn, limit)
        if len(ids) > limit:
            raise TooLongError(len(ids))
    return [*ids, START, *tokenizer.encode("assistant")]


async def shortened(tokenizer: Tokenizer, prompt: Prompt, limit: int) -> Prompt:
    """The prompt without its oldest turns, so that it has at most `limit` tokens. Settings stay, and no result of a tool
    stays without its call. Raises TooLongError if not even the newest turn fits."""
    turns = drop_old_reasoning(prompt.turns)
    settings = [turn for turn in turns if turn.role == "developer"]
    left = limit - len(await render(tokenizer, replace(prompt, turns=settings), limit))
    first = len(turns)
    while first and left >= 0:
        if turns[first - 1].role != "developer":
            left -= await _size(tokenizer, turns[first - 1], left)
        first -= left >= 0
    while first < len(turns) and _orphan(turns, first):
        first += 1
    if first == len(turns):
        raise TooLongError(limit - left)
    kept = [turn for i, turn in enumerate(turns) if i >= first or turn.role == "developer"]
    return replace(prompt, turns=kept)


def _orphan(turns: Sequence[Turn], first: int) -> bool:
    """Whether a conversation cannot begin here: with a result, or in the middle of parallel calls."""
    turn = turns[first]
    return turn.role in ("tool", "developer") or bool(first and turn.recipient and turns[first - 1].recipient)


async def _size(tokenizer: Tokenizer, turn: Turn, limit: int) -> int:
    """Tokens of a turn; more than `limit` if it does not fit."""
    try:
        return len(await message_tokens(tokenizer, turn, limit))
    except TooLongError as error:
        return max(error.tokens, limit + 1)


async def extend(tokenizer: Tokenizer, prompt: Sequence[int], turns: Sequence[Turn], limit: int) -> list[int]:
    """A rendered prompt with further turns before the assistant writes again. Raises TooLongError beyond `limit`."""
    beginning = [START, *tokenizer.encode("assistant")]
    ids = list(prompt[: len(prompt) - len(beginning)])
    for turn in turns:
        ids += await message_tokens(tokenizer, turn, limit)
    if len(ids) + len(beginning) > limit:
        raise TooLongError(len(ids) + len(beginning))
    return ids + beginning


def drop_old_reasoning(turns: Sequence[Turn]) -> list[Turn]:
    """Reasoning lives until the final answer it led to: within a tool loop it stays, before the last final it goes."""
    last_final = max((i for i, turn in enumerate(turns) if turn.final), default=-1)
    return [turn for i, turn in enumerate(turns) if i > last_final or not turn.reasoning]


async def message_tokens(tokenizer: Tokenizer, turn: Turn, limit: int) -> list[int]:
    """One message, from its <|start|> to its end."""
    if turn.tokens is not None:
        return list(turn.tokens)
    body = await tokenizer.encode_async(turn.text, limit)
    encode = tokenizer.encode
    if turn.role == "user":
        return [START, *encode("user"), MESSAGE, *body, END]
    if turn.role == "tool":
        channel = encode(turn.channel or "commentary")
        return [START, *encode(f"{turn.name} to=assistant"), CHANNEL, *channel, MESSAGE, *body, END]
    header = [START, *encode("assistant"), CHANNEL]
    if turn.recipient is not None and turn.channel == "analysis":
        return [*header, *encode(f"analysis to={turn.recipient} code"), MESSAGE, *body, CALL]
    if turn.recipient is not None:
        return [*header, *call_header(tokenizer, turn.recipient), *body, CALL]
    return [*header, *encode(turn.channel or "final"), MESSAGE, *body, END]


def call_header(tokenizer: Tokenizer, recipient: str) -> list[int]:
    """What follows <|channel|> in the header of a call."""
    return [*tokenizer.encode(f"commentary to={recipient} "), CONSTRAIN, *tokenizer.encode("json"), MESSAGE]


def _system(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    content = SystemContent.new().with_reasoning_effort(_LEVELS[prompt.effort])
    content = content.with_conversation_start_date(prompt.date or datetime.date.today().isoformat())
    for namespace in prompt.namespaces:
        content = content.with_tools(namespace)
    message = LibraryMessage(author=Author(role=Role.SYSTEM), content=[content])
    options = RenderOptions(conversation_has_function_tools=bool(prompt.tools))
    ids: list[int] = tokenizer.encoding.render(message, options)
    return ids


def _described(tool: FunctionTool, room: Room) -> ToolDescription:
    try:
        return ToolDescription.new(tool.name, tool.description, tool_schema(tool.parameters, room))
    except SchemaError as error:
        message = f"The tools cannot be shown to the model: {error.reason}."
        raise bad_request(message, error.path, "invalid_json_schema") from None


def _developer_text(tokenizer: Tokenizer, instructions: str, tools: Sequence[FunctionTool]) -> str:
    """The body of a developer message. The library sees a stand-in for the instructions: it cannot encode long ones."""
    content = DeveloperContent.new()
    if instructions:
        content = content.with_instructions(_PLACE)
    room = Room()
    if tools:
        content = content.with_function_tools([_described(tool, room) for tool in tools])
    message = LibraryMessage(author=Author(role=Role.DEVELOPER), content=[content])
    try:
        ids = tokenizer.encoding.render(message)
    except (HarmonyError, ValueError) as error:
        raise bad_request(f"The tools cannot be shown to the model: {str(error)[:200]}", "tools") from None
    return tokenizer.decode(ids[ids.index(MESSAGE) + 1 :]).replace(_PLACE, instructions, 1)
