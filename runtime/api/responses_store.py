"""Responses that can be asked for again: bounded in number, bytes and age."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gptoss_compile.runtime.api.render import Turn
from gptoss_compile.runtime.api.tool_server.browser import Page

MAX_RESPONSES = 10_000
MAX_BYTES = 256 << 20
MAX_AGE = 24 * 3600.0  # seconds

FINISHED = ("completed", "incomplete", "failed", "cancelled")


@dataclass(eq=False)
class Record:
    """One response, from its creation on.

    response is the object as it stands. events are all events so far, numbered without gaps. turns is the conversation
    up to and including the answer, without instructions; item_turns has the turns of each output item. pages is what the
    browser tool showed.
    """

    response: dict[str, Any]
    input_items: list[dict[str, Any]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    callers: dict[str, str] = field(default_factory=dict)
    item_turns: dict[str, list[Turn]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    pages: Sequence[Page] = ()
    task: asyncio.Task[None] | None = None
    created: float = field(default_factory=time.monotonic)
    size: int = 0  # bytes, roughly
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def id(self) -> str:
        return str(self.response["id"])

    @property
    def finished(self) -> bool:
        return self.response["status"] in FINISHED

    def emit(self, kind: str, **fields: Any) -> None:
        self.events.append({"type": kind, "sequence_number": len(self.events), **fields})
        self.size += 300 + 2 * len(fields.get("delta", ""))
        self.wake()

    def emit_all(self, events: Iterable[tuple[str, dict[str, Any]]]) -> None:
        for kind, fields in events:
            self.emit(kind, **fields)

    def wake(self) -> None:
        """Let those who follow look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def follow(self, start: int = 0) -> AsyncIterator[dict[str, Any]]:
        """Events from number `start` on, as they come, to the terminal one."""
        while True:
            while start < len(self.events):
                yield self.events[start]
                start += 1
            if self.finished:
                return
            await self._changed.wait()


class ResponseStore:
    """Forgets the oldest responses first. Their sizes are counted once they have finished."""

    def __init__(self) -> None:
        self._records: OrderedDict[str, Record] = OrderedDict()
        self._items: dict[str, tuple[dict[str, Any], Record]] = {}
        self._bytes = 0

    def add(self, record: Record) -> None:
        self._records[record.id] = record
        self._index(record, record.input_items)
        self._evict()

    def finish(self, record: Record) -> None:
        """Count a finished record and make its output items known."""
        if record.id in self._records:
            self._index(record, record.response["output"])
            record.size += sum(turn.size for turn in record.turns)
            record.size += sum(80 * len(page.lines) for page in record.pages)
            self._bytes += record.size
            self._evict()

    def get(self, response_id: str) -> Record | None:
        self._evict()
        return self._records.get(response_id)

    def item(self, item_id: str) -> tuple[dict[str, Any], list[Turn] | None] | None:
        """An item of any stored response, and the turns it became if the model wrote it."""
        found = self._items.get(item_id)
        return None if found is None else (found[0], found[1].item_turns.get(item_id))

    def remove(self, response_id: str) -> Record | None:
        record = self._records.pop(response_id, None)
        if record is not None:
            self._bytes -= record.size if record.finished else 0
            for item in (*record.input_items, *record.response["output"]):
                self._items.pop(item["id"], None)
        return record

    def _index(self, record: Record, items: list[dict[str, Any]]) -> None:
        for item in items:
            self._items[item["id"]] = item, record

    def _evict(self) -> None:
        oldest = time.monotonic() - MAX_AGE
        while self._records:
            response_id, record = next(iter(self._records.items()))
            crowded = len(self._records) > MAX_RESPONSES or self._bytes > MAX_BYTES
            if not record.finished or not (crowded or record.created < oldest):
                return
            self.remove(response_id)
