"""Stop strings in streamed text: nothing that could still turn out to be part of one is let through."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Feed text; get what is safe to show. `matched` is the stop string that ended the text, once one did."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = stops
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        if not self._stops or self.matched is not None:
            return text if self.matched is None else ""
        self._held += text
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.matched = min(found)
            shown, self._held = self._held[: at + len(self.matched) * self._include], ""
            return shown
        keep = max(self._overlap(stop) for stop in self._stops)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def finish(self) -> str:
        """The text held back at the end, which became no stop string."""
        rest, self._held = self._held, ""
        return rest

    def _overlap(self, stop: str) -> int:
        """Length of the longest proper beginning of `stop` that the held text ends with."""
        return next((n for n in range(min(len(stop) - 1, len(self._held)), 0, -1) if self._held.endswith(stop[:n])), 0)
