"""Drives any runner of steps (a graph, an interpreted plan, an executor) as the engine would, with the plainest of page
bookkeeping: every sequence owns its pages for good, and its window ring."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from gptoss_compile.config import Bucket
from gptoss_compile.trace import Geometry

Runner = Callable[[Bucket, Mapping[str, np.ndarray]], np.ndarray]
Work = tuple[int, Sequence[int]]  # (sequence, its next tokens)


class Stepper:
    """State of `count` sequences. `step` runs one bucket and returns the logits of every real token, by sequence."""

    def __init__(self, run: Runner, geometry: Geometry, count: int) -> None:
        self.run, self.geometry, self.lengths = run, geometry, [0] * count
        shuffle = np.random.default_rng(7).permutation
        width, ring = geometry.table_width, geometry.window_ring
        self.full = (shuffle(count * width) + 1).astype(np.int32).reshape(count, width)
        self.window = (shuffle(count * ring) + 1).astype(np.int32).reshape(count, ring)

    @staticmethod
    def pages(geometry: Geometry, count: int) -> tuple[int, int]:
        """Sizes of the pools that `count` sequences need."""
        return count * geometry.table_width + 1, count * geometry.window_ring + 1

    def step(self, bucket: Bucket, work: Sequence[Work]) -> dict[int, np.ndarray]:
        inputs = {name: np.zeros(bucket.tokens, np.int32) for name in ("tokens", "positions", "sequences")}
        inputs["positions"][:] = -1
        inputs["full_table"] = np.zeros((bucket.sequences, self.geometry.table_width), np.int32)
        inputs["window_table"] = np.zeros((bucket.sequences, self.geometry.window_ring), np.int32)
        spans, at = {}, 0
        for row, (sequence, tokens) in enumerate(work):
            here = slice(at, at + len(tokens))
            inputs["tokens"][here], inputs["sequences"][at:] = tokens, row
            inputs["positions"][here] = np.arange(len(tokens)) + self.lengths[sequence]
            inputs["full_table"][row], inputs["window_table"][row] = self.full[sequence], self.window[sequence]
            self.lengths[sequence] += len(tokens)
            spans[sequence] = here
            at += len(tokens)
        if bucket.kind == "extend":
            assert bucket.rows >= at, "the tests ask for the logits of every token"
            inputs["rows"] = np.minimum(np.arange(bucket.rows), bucket.tokens - 1).astype(np.int32)
        logits = self.run(bucket, inputs)
        return {sequence: np.array(logits[here]) for sequence, here in spans.items()}
