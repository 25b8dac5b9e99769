"""Function tools: whom a message's recipient means, and what was written before a call."""

from __future__ import annotations

import json
import secrets
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

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


class CallMemory:
    """What the model wrote up to each of its recent calls, by the call's id.

    Chat clients send a call back in their own spelling, and many drop the reasoning before it. With this the next prompt
    of the tool loop holds the model's own tokens: nothing is lost, and the prefix cache hits.
    """

    SIZE = 4096
    SECONDS = 3600.0

    def __init__(self) -> None:
        self._turns: OrderedDict[str, tuple[float, list[Turn]]] = OrderedDict()

    def remember(self, calls: Sequence[Call], turns: list[Turn]) -> None:
        """calls: all of one answer; turns: that answer."""
        self._turns[_key(call.id for call in calls)] = time.monotonic(), turns
        while len(self._turns) > self.SIZE or next(iter(self._turns.values()))[0] < time.monotonic() - self.SECONDS:
            self._turns.popitem(last=False)

    def recall(self, calls: Sequence[tuple[str, str, str]]) -> list[Turn] | None:
        """The answer that made exactly these calls (id, name, arguments), if it is remembered."""
        _, turns = self._turns.get(_key(call_id for call_id, _, _ in calls), (0.0, None))
        made = [(turn.recipient, _parsed(turn.text)) for turn in turns or () if turn.recipient]
        return turns if made == [(NAMESPACE + name, _parsed(arguments)) for _, name, arguments in calls] else None


def _key(ids: Iterable[str]) -> str:
    return "\n".join(ids)


def _parsed(arguments: str) -> Any:
    """Arguments such that two spellings of the same JSON are equal."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
