"""What the engine needs of a machine: it runs steps of fixed shapes, one after the other, and chooses tokens.

A step's inputs, all int32 (see `input_shapes`):

    tokens [T]           ids; padding 0
    positions [T]        padding -1
    sequences [T]        row of the page tables; one sequence's tokens are contiguous, in order; padding: any
    rows [R]             the token of each row of the logits, padding 0; decode buckets have none: row i is token i
    source [T]           -1, or the row of the step before whose chosen token stands here in place of `tokens`
    words [R, 5]         how the token of each row of the logits is chosen, see gumbel.py
    window_table [S, W]  page ids of the window layers, a ring: position p is in entry (p // page_size) mod W
    full_table [S, P]    page ids of the full-attention layers

Table entries that no live key needs hold any valid page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from gptoss_compile.config import Bucket, ModelConfig
from gptoss_compile.gumbel import FIELDS, NOTHING, choose

if TYPE_CHECKING:
    from gptoss_compile.artifact import Artifact

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


class Executor(Protocol):
    """One loaded model with its page pools.

    page_size is in tokens; max_context is the longest sequence, in tokens. Page 0 of both pools belongs to nobody: padding
    is written there. window_ring is W, the entries of a sequence's window table. runs_ahead: whether it gains anything if a
    step is submitted before the result of the one before is taken; no more than two are ever in flight.
    """

    config: ModelConfig
    buckets: tuple[Bucket, ...]
    page_size: int
    max_context: int
    num_pages: int
    num_window_pages: int
    window_ring: int
    runs_ahead: bool

    def inputs(self, bucket: Bucket) -> Mapping[str, Ints]:
        """The arrays that the bucket's next step reads, to be changed in place. They are as its last step left them; before
        the first, zeros, but for `source` (-1) and `words` (which ask for no token)."""
        ...

    def submit(self, bucket: Bucket, rows: int, columns: int) -> None:
        """Start a step on the bucket's inputs. Steps run in the order of their submission.

        rows: if any page table has changed since the bucket's last step, how many are in use, from the first on; else 0.
        columns: how many entries of full_table are in use in them.
        """
        ...

    def result(self) -> Ints:
        """Wait for the oldest step whose result was not taken. The token chosen in each row of its logits; NO_TOKEN where
        none was asked for, or where the logits allow none."""
        ...

    def logits(self, rows: Sequence[int]) -> Floats:
        """These rows of the logits, [len(rows), V], of the step whose result was taken last; none may have been submitted
        since. Valid until the next call."""
        ...

    def close(self) -> None: ...


def input_shapes(bucket: Bucket, table: int, ring: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a step's inputs, by name. table and ring: entries of a sequence's tables."""
    tokens = (bucket.tokens,)
    rows = {"rows": (bucket.rows,)} if bucket.kind == "extend" else {}
    return {
        "tokens": tokens, "positions": tokens, "sequences": tokens, **rows, "source": tokens,
        "words": (bucket.rows, FIELDS), "window_table": (bucket.sequences, ring), "full_table": (bucket.sequences, table)}


class HostSteps:
    """The steps of an executor whose `run` gives all logits at once: tokens are chosen here."""

    page_size: int
    max_context: int
    window_ring: int
    runs_ahead = False

    def __init__(self) -> None:
        self._inputs: dict[Bucket, dict[str, Ints]] = {}
        self._logits = np.empty((0, 0), np.float32)
        self._chosen = np.empty(0, np.int32)

    def run(self, bucket: Bucket, inputs: Mapping[str, Ints]) -> Floats:
        """The logits [R, V] of one step on the model's own inputs; keys and values go to the caches."""
        raise NotImplementedError

    def inputs(self, bucket: Bucket) -> Mapping[str, Ints]:
        if bucket not in self._inputs:
            shapes = input_shapes(bucket, -(-self.max_context // self.page_size), self.window_ring)
            arrays = self._inputs[bucket] = {name: np.zeros(shape, np.int32) for name, shape in shapes.items()}
            arrays["source"][:], arrays["words"][:] = -1, NOTHING
        return self._inputs[bucket]

    def submit(self, bucket: Bucket, rows: int, columns: int) -> None:
        inputs = dict(self.inputs(bucket))
        words = inputs.pop("words")
        del inputs["source"]
        self._logits = self.run(bucket, inputs)
        self._chosen = choose(self._logits, words)

    def result(self) -> Ints:
        return self._chosen

    def logits(self, rows: Sequence[int]) -> Floats:
        return self._logits[list(rows)]


def load_executor(artifact: Artifact, *, num_pages: int | None, max_num_seqs: int) -> Executor:
    """The executor of the artifact's target, its weights loaded. num_pages None: as many as the memory holds.

    Raises ValueError for a target that nothing here can run.
    """
    if artifact.target == "cpu":
        from gptoss_compile.runtime.executor_cpu import CpuExecutor

        return CpuExecutor.load(artifact, num_pages=num_pages, max_num_seqs=max_num_seqs)
    if artifact.target.startswith("sm"):
        from gptoss_compile.runtime.executor_cuda import CudaExecutor

        return CudaExecutor.load(artifact, num_pages=num_pages, max_num_seqs=max_num_seqs)
    raise ValueError(
        f"this artifact is for target {artifact.target!r}, which this version compiles for but cannot serve; "
        "compile for cpu or one of the sm targets instead")
