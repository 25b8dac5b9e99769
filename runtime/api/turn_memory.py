"""What the model wrote up to each of its recent calls and messages.

Clients send a call back in their own spelling, and many drop the reasoning before it. With this the next prompt of the tool
loop holds the model's own tokens: nothing is lost, and the prefix cache hits.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from gptoss_compile.runtime.api.render import Turn


class TurnMemory:
    """Turns by a key that no one else can guess: the ids of calls, or of an item. The oldest are forgotten first."""

    SIZE = 4096
    BYTES = 64 << 20
    SECONDS = 3600.0

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[float, int, Sequence[Turn]]] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def remember(self, key: str, turns: Sequence[Turn]) -> None:
        """turns: the one that the key names, with those before it that only the server has for certain."""
        self._forget(key)
        size = sum(turn.size for turn in turns)
        self._kept[key] = time.monotonic(), size, turns
        self._bytes += size
        self._expire()

    def recall(self, key: str) -> Sequence[Turn] | None:
        self._expire()
        return self._kept[key][2] if key in self._kept else None

    def _expire(self) -> None:
        oldest = time.monotonic() - self.SECONDS
        while self._kept:
            key, (since, _, _) = next(iter(self._kept.items()))
            if since >= oldest and len(self._kept) <= self.SIZE and self._bytes <= self.BYTES:
                return
            self._forget(key)

    def _forget(self, key: str) -> None:
        if found := self._kept.pop(key, None):
            self._bytes -= found[1]


def same(written: Sequence[Turn], given: Sequence[Turn]) -> bool:
    """Whether turns that a client sends back are what the model wrote: the same text, or the same call."""

    def content(turn: Turn) -> tuple[str, str | None, Any]:
        return turn.role, turn.recipient, _parsed(turn.text) if turn.recipient else turn.text

    return [content(turn) for turn in written] == [content(turn) for turn in given]


def _parsed(arguments: str) -> Any:
    """Arguments such that two spellings of the same JSON are equal."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
