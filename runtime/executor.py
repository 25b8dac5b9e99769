"""What the engine needs of a machine: run one step of fixed shape, give back logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from gptoss_compile.config import Bucket, ModelConfig

if TYPE_CHECKING:
    from gptoss_compile.artifact import Artifact

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


class Executor(Protocol):
    """One loaded model with its page pools.

    page_size is in tokens; max_context is the longest sequence, in tokens. Page 0 of both pools belongs to
    nobody: padding is written there. window_ring is W, the entries of a sequence's window table.
    """

    config: ModelConfig
    buckets: tuple[Bucket, ...]
    page_size: int
    max_context: int
    num_pages: int
    num_window_pages: int
    window_ring: int

    def run(self, bucket: Bucket, inputs: Mapping[str, Ints]) -> Floats:
        """Logits [R, V] of one step. `inputs` are described in `runtime/batch.py`; they are free to be
        overwritten once this returns."""
        ...

    def close(self) -> None: ...


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
