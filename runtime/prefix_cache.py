"""Reuse of computed prompts: which pages of earlier requests hold the beginning of a new one.

A block is `page_size` tokens at a page boundary. Its key is a hash of the salt and of all tokens up to its
end, so equal keys mean equal keys and values. A prefix of n blocks can be reused if the full pages of all its
blocks are there *and* the window pages that the token after it sees. Window pages are plentiful while a
prompt is read and most are soon dead, so only those before an end (of a prompt, a chunk, or a turn) are
named; the others return to the pool at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from gptoss_compile.runtime.kv_cache import KVCache, SequencePages


class PrefixCache:
    """Names and finds pages; the pools keep what is named until they need the room."""

    def __init__(self, cache: KVCache, *, enabled: bool = True) -> None:
        self._cache = cache
        self._enabled = enabled

    def match(
        self, tokens: Sequence[int], keys: list[bytes], salt: str, limit: int
    ) -> tuple[SequencePages, int]:
        """The pages, now held, of the longest reusable prefix of at most `limit` tokens, and its length.

        `keys` are the sequence's block keys so far; missing ones are added.
        """
        held = self._cache.empty()
        if not self._enabled:
            return held, 0
        full, window = self._cache.full, self._cache.window
        limit //= self._cache.page_size
        self._extend(keys, tokens, salt, limit)
        blocks = run = 0  # run: consecutive blocks, up to the current one, whose window page is there
        for block, key in enumerate(keys[:limit]):
            if full.find(key) is None:
                break
            run = run + 1 if window.find(key) is not None else 0
            if block + 1 - run <= self._first_window_block(block + 1):
                blocks = block + 1
        held.end = held.named = blocks
        held.window_start = self._first_window_block(blocks)
        for block, key in enumerate(keys[:blocks]):
            page = full.find(key)
            assert page is not None
            full.hold(page)
            held.full_row[block] = page
            if block >= held.window_start:
                page = window.find(key)
                assert page is not None
                window.hold(page)
                held.window_row[block % self._cache.ring] = page
        return held, blocks * self._cache.page_size

    def keep(
        self, held: SequencePages, tokens: Sequence[int], keys: list[bytes], salt: str, end: int
    ) -> None:
        """Name the pages of a sequence whose tokens [0, end) are computed, so that `match` finds them.

        Where `end` is a page boundary, the boundary before it stays reusable too: the very same prompt asked
        again must recompute its last token, so that is the one it can use.
        """
        if not self._enabled or end == 0:
            return
        blocks = end // self._cache.page_size
        self._extend(keys, tokens, salt, blocks)
        for block in range(held.named, blocks):
            self._cache.full.name(int(held.full_row[block]), keys[block])
        held.named = max(held.named, blocks)
        for block in range(max(held.window_start, self._cache.first_window_page(end - 1)), blocks):
            self._cache.window.name(int(held.window_row[block % self._cache.ring]), keys[block])

    def _first_window_block(self, blocks: int) -> int:
        return self._cache.first_window_page(blocks * self._cache.page_size)

    def _extend(self, keys: list[bytes], tokens: Sequence[int], salt: str, blocks: int) -> None:
        """Bring the chain to `blocks` keys: key_i = hash(key_{i-1}, tokens of block i), from the salt on."""
        size = self._cache.page_size
        data = np.asarray(tokens[len(keys) * size : blocks * size], "<i4").tobytes()
        last = keys[-1] if keys else hashlib.blake2b(salt.encode(), digest_size=16).digest()
        for offset in range(0, len(data), 4 * size):
            last = hashlib.blake2b(last + data[offset : offset + 4 * size], digest_size=16).digest()
            keys.append(last)
