"""The `cpu` target: runs what AOTInductor compiled for each bucket. The one file of the runtime that knows PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gptoss_compile.artifact import Artifact, ArtifactError, plan_file
from gptoss_compile.config import Bucket
from gptoss_compile.launch_plan import LaunchPlan
from gptoss_compile.runtime.executor import HostSteps
from gptoss_compile.runtime.pools import pool_sizes

Step = Callable[..., Any]
CACHE_BYTES = 4 << 30  # of memory for keys and values, unless --kv-pages says otherwise


class CpuExecutor(HostSteps):
    """Weights, caches and one compiled step a bucket, all in this process: of several ranks too, whose steps are compiled
    into one. See `executor.Executor`."""

    def __init__(self, artifact: Artifact, num_pages: int, num_window_pages: int) -> None:
        import torch

        super().__init__()
        self.config, self.buckets = artifact.config, artifact.buckets
        self.page_size, self.max_context, self.window_ring = artifact.page_size, artifact.max_context, artifact.window_ring
        self.num_pages, self.num_window_pages = num_pages, num_window_pages
        dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32, "u8": torch.uint8, "i32": torch.int32}
        fixed: dict[Bucket, list[Any]] = {b: [] for b in self.buckets}  # rank by rank: caches, then weights
        for rank in range(artifact.ranks):
            plans = {b: LaunchPlan.loads(artifact.file(plan_file(b, rank)).read_text()) for b in self.buckets}
            wanted = {w.name: dtypes[w.dtype] for plan in plans.values() for w in plan.weights}
            weights = {name: _tensor(array).to(wanted[name]) for name, array in artifact.open_weights(rank)}
            caches = [torch.zeros(num_window_pages if windowed else num_pages, *cache.shape[1:], dtype=dtypes[cache.dtype])
                      for windowed, cache in zip(self.config.windowed, plans[self.buckets[0]].caches, strict=True)]
            for bucket, plan in plans.items():
                fixed[bucket] += [*caches, *(weights[w.name] for w in plan.weights)]
        self._steps: dict[Bucket, tuple[Step, tuple[str, ...], list[Any]]] = {}
        for bucket, plan in plans.items():
            step = torch._inductor.aoti_load_package(str(artifact.file(f"kernels/{bucket.name}.pt2")))
            self._steps[bucket] = step, tuple(str(operand.key) for operand in plan.inputs), fixed[bucket]

    @classmethod
    def load(cls, artifact: Artifact, *, num_pages: int | None, max_num_seqs: int) -> CpuExecutor:
        """Raises ArtifactError if PyTorch is not installed."""
        try:
            import torch._inductor  # noqa: F401
        except ImportError:
            raise ArtifactError("an artifact for the cpu target runs on PyTorch, which is not installed: "
                                "pip install 'gptoss-compile[cpu]'") from None
        plan = LaunchPlan.loads(artifact.file(f"plans/{artifact.buckets[0].name}.json").read_text())
        return cls(artifact, *pool_sizes(
            artifact.config, page_size=artifact.page_size, window_ring=artifact.window_ring,
            max_context=artifact.max_context, item_bytes=plan.caches[0].item_bytes, num_pages=num_pages,
            max_num_seqs=max_num_seqs, memory=CACHE_BYTES))

    def run(self, bucket: Bucket, inputs: Mapping[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        """The step's logits [R, V] fp32; keys and values go to the caches."""
        import torch

        step, names, fixed = self._steps[bucket]
        logits = step(*(torch.from_numpy(inputs[name]) for name in names), *fixed)
        result: np.ndarray[Any, Any] = logits.numpy()
        return result

    def close(self) -> None:
        self._steps.clear()


def _tensor(array: np.ndarray[Any, Any]) -> Any:
    """The array as a tensor that owns its memory; uint16 holds the bits of bf16."""
    import torch

    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array, copy=True))
