"""Function tools: whom a message's recipient means."""

from __future__ import annotations

import secrets
from collections.abc import Collection
from dataclasses import dataclass, field

from gptoss_compile.runtime.api.harmony import Message
from gptoss_compile.runtime.api.render import Turn

NAMESPACE = "functions."


def called_tool(message: Message, declared: Collection[str]) -> str | None:
    """The declared tool that a message calls, by its recipient, with or without the namespace, on any channel but final."""
    if message.channel == "final" or message.recipient is None:
        return None
    bare = message.recipient.removeprefix(NAMESPACE)
    return next((name for name in (bare, message.recipient) if name in declared), None)


def is_thought(message: Message) -> bool:
    """Whether a message that calls no declared tool is not for people: reasoning, or a call of a tool there is not."""
    return message.channel == "analysis" or message.recipient is not None


def as_turn(message: Message, declared: Collection[str]) -> Turn:
    """What the model wrote, as a turn of later prompts."""
    if name := called_tool(message, declared):
        return Turn("assistant", message.text, recipient=NAMESPACE + name, tokens=message.tokens)
    channel = "analysis" if is_thought(message) else message.channel
    return Turn("assistant", message.text, channel, tokens=message.tokens)


def call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


@dataclass
class Call:
    """A tool call as it grows. `complete`: its message was closed, so the arguments are all there."""

    message: Message
    name: str
    index: int
    id: str = field(default_factory=call_id)

    @property
    def arguments(self) -> str:
        return self.message.text

    @property
    def complete(self) -> bool:
        return self.message.closed
