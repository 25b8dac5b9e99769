"""From a scheduled step to the arrays an executor runs on. All int32, shapes fixed by the bucket.

    tokens [T]           ids; padding 0
    positions [T]        padding -1
    sequences [T]        row of the page tables; one sequence's tokens are contiguous, in order; padding: any
    full_table [S, P]    page ids of the full-attention layers
    window_table [S, W]  page ids of the window layers, a ring: position p is in entry (p // page_size) mod W
    rows [R]             the token of each row of the logits, padding 0; decode buckets: row i is token i

Table entries that no live key needs hold any valid page.
"""

from __future__ import annotations

import numpy as np

from gptoss_compile.config import Bucket
from gptoss_compile.runtime.executor import Ints
from gptoss_compile.runtime.kv_cache import KVCache
from gptoss_compile.runtime.scheduler import Step


class StepInputs:
    """Builds a step's arrays, in buffers that are reused from step to step of the same bucket."""

    def __init__(self, cache: KVCache) -> None:
        self._table, self._ring = cache.table, cache.ring
        self._buffers: dict[Bucket, dict[str, Ints]] = {}

    def build(self, step: Step) -> dict[str, Ints]:
        arrays = self._buffers.get(step.bucket)
        if arrays is None:
            arrays = self._buffers[step.bucket] = self._allocate(step.bucket)
        rows: list[int] = []
        at = 0
        for row, chunk in enumerate(step.chunks):
            request, pages, size = chunk.sequence.request, chunk.sequence.pages, chunk.tokens
            arrays["tokens"][at : at + size] = request.tokens[chunk.start : chunk.end]
            arrays["positions"][at : at + size] = np.arange(chunk.start, chunk.end)
            arrays["sequences"][at : at + size] = row
            arrays["full_table"][row, : pages.end] = pages.full_row[: pages.end]
            arrays["window_table"][row] = pages.window_row
            rows.extend(at + position - chunk.start for position in chunk.scored)
            at += size
            if chunk.samples:
                rows.append(at - 1)
        arrays["tokens"][at:] = 0
        arrays["positions"][at:] = -1
        arrays["sequences"][at:] = len(step.chunks) - 1
        if step.bucket.kind == "extend":
            arrays["rows"][: len(rows)] = rows
            arrays["rows"][len(rows) :] = 0
        return arrays

    def _allocate(self, bucket: Bucket) -> dict[str, Ints]:
        shapes: dict[str, tuple[int, ...]] = {
            **dict.fromkeys(("tokens", "positions", "sequences"), (bucket.tokens,)),
            "full_table": (bucket.sequences, self._table),
            "window_table": (bucket.sequences, self._ring),
        }
        if bucket.kind == "extend":
            shapes["rows"] = (bucket.rows,)
        return {name: np.zeros(shape, np.int32) for name, shape in shapes.items()}
