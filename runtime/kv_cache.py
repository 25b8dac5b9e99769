"""Pages of keys and values: two pools with reference counts, and the pages one sequence holds.

A page stores the keys and values of `page_size` consecutive tokens, for all full-attention layers (the full
pool) or for all sliding-window layers (the window pool). A sequence's logical page g covers positions [g·B,
(g+1)·B), B being the page size. It holds every full page from 0 on, but only the window pages that its next
token can still see; these sit in a ring of W table entries, page g in entry g mod W.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from gptoss_compile.runtime.executor import Executor, Ints


class PagePool:
    """Pages 1 … num_pages-1, each in exactly one place.

    *held*: referenced by at least one sequence. *cached*: referenced by none, but its content has a key under
    which `find` gives it; the least recently released is taken when the free ones run out. *free*: neither.
    """

    def __init__(self, num_pages: int) -> None:
        self.references = [0] * num_pages
        self._free = list(range(num_pages - 1, 0, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}

    @property
    def capacity(self) -> int:
        return len(self.references) - 1

    @property
    def available(self) -> int:
        """Pages that `allocate` could give one after the other."""
        return len(self._free) + len(self._cached)

    @property
    def held(self) -> int:
        return self.capacity - self.available

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def free(self) -> int:
        return len(self._free)

    def allocate(self) -> int:
        """A page with one reference and no content worth keeping. The caller has checked `available`."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
        self.references[page] = 1
        return page

    def hold(self, page: int) -> None:
        """One more reference to a held or cached page."""
        if self.references[page] == 0:
            del self._cached[page]
        self.references[page] += 1

    def release(self, page: int) -> None:
        """One reference less; without any left the page is cached if it has a key, else free."""
        assert self.references[page] > 0, f"page {page} released more often than held"
        self.references[page] -= 1
        if self.references[page]:
            return
        if page in self._key_of:
            self._cached[page] = None
        else:
            self._free.append(page)

    def find(self, key: bytes) -> int | None:
        return self._page_of.get(key)

    def name(self, page: int, key: bytes) -> None:
        """Give a held page's content a key, unless either is already taken."""
        assert self.references[page] > 0
        if key not in self._page_of and page not in self._key_of:
            self._key_of[page] = key
            self._page_of[key] = page


@dataclass
class SequencePages:
    """What one running sequence holds, in logical pages: full [0, end) and window [window_start, end).

    serial: no other sequence's is the same. version: changes whenever a row does.
    """

    full_row: Ints  # [P] page ids; entries from `end` on mean nothing
    window_row: Ints  # [W] page ids, a ring
    window_start: int = 0
    end: int = 0
    named: int = 0  # full pages [0, named) have been offered to the prefix cache
    version: int = 0
    serial: int = field(default_factory=itertools.count().__next__)


class KVCache:
    """Both pools and the arithmetic between positions and pages."""

    def __init__(self, executor: Executor) -> None:
        """Raises ValueError where not even one short sequence would fit."""
        self.page_size = executor.page_size
        self.window_tokens = executor.config.sliding_window
        self.ring = executor.window_ring
        self.table = self.pages(executor.max_context)
        self.full = PagePool(executor.num_pages)
        self.window = PagePool(executor.num_window_pages)
        # The most pages that one token's window touches: its own, and those of the window-1 keys before it.
        self.window_span = self.pages(self.window_tokens - 1) + 1
        if self.ring < self.window_span:
            raise ValueError(
                f"the artifact's window ring of {self.ring} pages is smaller than the {self.window_span} "
                f"that a window of {self.window_tokens} tokens touches; compile with an extend bucket of at "
                f"least {self.page_size} tokens"
            )
        if self.full.capacity < 1 or self.window.capacity < min(self.window_span, self.table):
            raise ValueError(
                f"{executor.num_pages} pages and {executor.num_window_pages} window pages (one of each is "
                f"reserved) cannot hold one sequence; give at least 2 and {self.window_span + 1}")

    def pages(self, length: int) -> int:
        """Pages that hold `length` tokens from position 0 on."""
        return -(-length // self.page_size)

    def first_window_page(self, position: int) -> int:
        """The first window page to keep while `position` is the next token.

        It is the first that a token at the start of the same page can see, so that a prefix cached up to that
        page boundary stays usable. That costs no page more unless the window is no multiple of the page size.
        """
        boundary = position // self.page_size * self.page_size
        return max(0, boundary - self.window_tokens + 1) // self.page_size

    def empty(self) -> SequencePages:
        return SequencePages(np.zeros(self.table, np.int32), np.zeros(self.ring, np.int32))

    def grow(self, held: SequencePages, start: int, end: int) -> int:
        """Make room for the tokens at [start, end), or for as many of them as the pools and the ring allow.

        Window pages that `start` no longer needs are released first. Returns the end reached; `start` means
        that not one token fits.
        """
        first = self.first_window_page(start)
        if first <= held.window_start and end <= held.end * self.page_size:
            return end
        held.version += 1
        for page in range(held.window_start, min(first, held.end)):
            self._release_window(held, page)
        held.window_start = max(held.window_start, first)
        last = min(held.end + self.full.available, held.end + self.window.available, first + self.ring)
        end = max(start, min(end, last * self.page_size))
        while held.end < self.pages(end):
            held.full_row[held.end] = self.full.allocate()
            held.window_row[held.end % self.ring] = self.window.allocate()
            held.end += 1
        return end

    def release(self, held: SequencePages) -> None:
        """Give everything back. The last pages go first, so that a cached prefix is evicted from its end."""
        for page in reversed(range(held.end)):
            self.full.release(int(held.full_row[page]))
            if page >= held.window_start:
                self._release_window(held, page)
        held.window_start = held.end = held.named = 0

    def _release_window(self, held: SequencePages, page: int) -> None:
        self.window.release(int(held.window_row[page % self.ring]))
        held.window_row[page % self.ring] = 0

    def shortage(self, held: SequencePages, length: int) -> tuple[int, int]:
        """Full and window pages that a sequence lacks to bring `length` tokens into the cache."""
        total = self.pages(length)
        window = min(total, self.window_span) - (held.end - held.window_start)
        return max(0, total - held.end), max(0, window)
