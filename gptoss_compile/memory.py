"""From lifetimes to one arena: where each intermediate lives, so that buffers not alive together may share bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gptoss_compile.launch_plan import ALIGNMENT


@dataclass(frozen=True)
class Lifetime:
    """A buffer of `size` bytes, written in step `first` and last read in step `last` (both inclusive)."""

    size: int
    first: int
    last: int


def align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def assign(buffers: Sequence[Lifetime]) -> tuple[list[int], int]:
    """(offset of each buffer, arena size in bytes). Largest first, each at the lowest aligned offset that is free for
    its whole life; within a step a buffer read never shares bytes with one written."""
    order = sorted(range(len(buffers)), key=lambda i: (-buffers[i].size, buffers[i].first, i))
    offsets, placed, top = [0] * len(buffers), list[int](), 0
    for i in order:
        mine, offset = buffers[i], 0
        alive = sorted((offsets[j], align(buffers[j].size)) for j in placed
                       if buffers[j].first <= mine.last and mine.first <= buffers[j].last)
        for start, size in alive:
            if offset + align(mine.size) <= start:
                break
            offset = max(offset, start + size)
        offsets[i] = offset
        placed.append(i)
        top = max(top, offset + align(mine.size))
    return offsets, top
