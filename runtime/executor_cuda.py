"""The sm targets: replays an artifact's plans as CUDA graphs, through cuda.bindings and numpy alone.

Everything has its place before the first step: one arena (of the largest plan), one zeroed workspace, weights, caches,
and inputs a bucket. So a step is one copy of its inputs, one graph launch and one copy of its logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from gptoss_compile.artifact import Artifact
from gptoss_compile.config import Bucket
from gptoss_compile.launch_plan import ALIGNMENT, LaunchPlan, Operand, Step
from gptoss_compile.runtime.cuda_driver import Bytes, CudaError, Device, Kernel
from gptoss_compile.runtime.executor import Floats, Ints
from gptoss_compile.runtime.graphs import Graph, Launch, prepare
from gptoss_compile.runtime.pools import pool_sizes
from gptoss_compile.runtime.staging import Progress, upload_weights

Array = np.ndarray[Any, Any]
Watch = Callable[[int, Step], None]

RESERVE = 1 << 30  # bytes left free for graphs, the driver, and whoever else uses the GPU
NUMPY = {"bf16": np.uint16, "fp32": np.float32, "i32": np.int32, "u8": np.uint8}  # of operands; bf16 as its bits
POISON = 0xFF  # NaN in every float format used


def _align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class CudaExecutor:
    """One artifact on one GPU. See `executor.Executor`; `run_steps`, `read` and `write` are for checking kernels."""

    def __init__(self, artifact: Artifact, device: Device, num_pages: int | None, max_num_seqs: int,
                 progress: Progress | None = None) -> None:
        self.config, self.buckets = artifact.config, artifact.buckets
        self.page_size, self.max_context = artifact.page_size, artifact.max_context
        self.window_ring = artifact.window_ring
        self._device = device
        self.plans = {b: LaunchPlan.loads(artifact.file(f"plans/{b.name}.json").read_text()) for b in self.buckets}
        plans = self.plans.values()
        self._arena = device.allocate(max(p.arena_bytes for p in plans), "intermediate results")
        self._workspace = device.allocate(max(p.workspace_bytes for p in plans), "kernels' counters")
        self._places: dict[str, int] = {}
        self._allocate_weights()
        self._inputs = {b: _InputBuffer(device, plan) for b, plan in self.plans.items()}
        self._allocate_caches(num_pages, max_num_seqs)
        self._host_logits = device.allocate_pinned(max(p.logits.bytes for p in plans), "logits")
        kernels = _load_kernels(artifact, device, plans)
        self._launches: dict[Bucket, list[list[Launch]]] = {
            b: prepare(device, plan, kernels, lambda operand, b=b: self._address(b, operand))  # type: ignore[misc]
            for b, plan in self.plans.items()}
        dtypes = {w.name: w.dtype for plan in plans for w in plan.weights}
        upload_weights(device, artifact.open_weights(), self._places, dtypes, self._weight_bytes, progress)
        self.graphs = {b: Graph(device, b.name, [launch for step in steps for launch in step])
                       for b, steps in self._launches.items()}
        device.synchronize("loading the artifact")

    @classmethod
    def load(cls, artifact: Artifact, *, num_pages: int | None, max_num_seqs: int,
             progress: Progress | None = None) -> CudaExecutor:
        """The executor with its weights on the GPU and a graph for every bucket. progress: (bytes of weights, of all).

        Raises CudaError for whatever this machine lacks.
        """
        device = Device.open(artifact.target)
        try:
            return cls(artifact, device, num_pages, max_num_seqs, progress)
        except BaseException:
            device.close()
            raise

    def run(self, bucket: Bucket, inputs: Mapping[str, Ints]) -> Floats:
        """The step's logits [R, V] fp32, valid until the next call; keys and values go to the caches."""
        device, logits = self._device, self.plans[bucket].logits
        device.use()
        self._inputs[bucket].upload(inputs)
        self.graphs[bucket].replay()
        host = self._host_logits[: logits.bytes]
        device.download(host, self._arena + int(logits.key), device.stream)
        device.synchronize(f"running {bucket.name}")
        result: Floats = host.view(np.float32).reshape(logits.shape)
        return result

    @property
    def device_name(self) -> str:
        return self._device.name

    def close(self) -> None:
        if self.graphs:
            self._device.use()
            for graph in self.graphs.values():
                graph.close()
            self.graphs.clear()
            self._device.close()

    # Checking kernels ---------------------------------------------------------------------------------------

    def run_steps(self, bucket: Bucket, inputs: Mapping[str, Ints], watch: Watch | None = None) -> Floats:
        """`run` without a graph: the launches of each step alone, then watch(number, step), which may read and write.

        The arena is poisoned first, and its freed ranges behind each step, as the plan interpreter does.
        """
        device, plan = self._device, self.plans[bucket]
        self.poison(bucket)
        self._inputs[bucket].upload(inputs)
        for number, (step, launches) in enumerate(zip(plan.steps, self._launches[bucket], strict=True)):
            for launch in launches:
                launch.enqueue(device)
                device.synchronize(f"running {launch.label}")
            if watch:
                watch(number, step)
            for start, end in step.frees:
                device.fill(self._arena + start, end - start, POISON)
        result: Floats = self.read(bucket, plan.logits)
        return result

    def poison(self, bucket: Bucket) -> None:
        """Fill the bucket's intermediate results with NaN."""
        self._device.use()
        self._device.fill(self._arena, self.plans[bucket].arena_bytes, POISON)

    def read(self, bucket: Bucket, operand: Operand) -> Array:
        """A copy of what is at an operand's place now; bf16 as uint16. A cache comes with all of its pages."""
        self._device.use()
        operand = self._true_shape(operand)
        with self._pinned(operand.bytes) as raw:
            self._device.download(raw, self._address(bucket, operand), self._device.stream)
            self._device.synchronize(f"reading {operand.key}")
            return raw.view(NUMPY[operand.dtype]).reshape(operand.shape).copy()

    def write(self, bucket: Bucket, operand: Operand, values: Array) -> None:
        """Put values where an operand lives."""
        self._device.use()
        operand = self._true_shape(operand)
        assert (values.shape, values.dtype) == (operand.shape, NUMPY[operand.dtype]), (operand, values.shape)
        with self._pinned(operand.bytes) as raw:
            raw[:] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
            self._device.upload(self._address(bucket, operand), raw, self._device.stream)
            self._device.synchronize(f"writing {operand.key}")

    def workspace(self) -> Bytes:
        """The kernels' counters, all zeros between steps."""
        size = max(plan.workspace_bytes for plan in self.plans.values())
        return self.read(self.buckets[0], Operand("workspace", 0, "u8", (size,)))

    def _true_shape(self, operand: Operand) -> Operand:
        if operand.place != "cache":
            return operand
        windowed = self.config.windowed[int(str(operand.key).rpartition(".")[2])]
        return replace(operand, shape=(self.num_window_pages if windowed else self.num_pages, *operand.shape[1:]))

    @contextmanager
    def _pinned(self, size: int) -> Iterator[Bytes]:
        raw = self._device.allocate_pinned(size, "a check")
        try:
            yield raw
        finally:
            self._device.release_pinned(raw)

    # Places -------------------------------------------------------------------------------------------------

    def _address(self, bucket: Bucket, operand: Operand) -> int:
        if operand.place == "arena":
            return self._arena + int(operand.key)
        if operand.place == "workspace":
            return self._workspace + int(operand.key)
        if operand.place == "input":
            return self._inputs[bucket].places[str(operand.key)]
        return self._places[str(operand.key)]

    def _allocate_weights(self) -> None:
        sizes = {w.name: Operand("weight", w.name, w.dtype, w.shape).bytes
                 for plan in self.plans.values() for w in plan.weights}
        self._weight_bytes = sum(sizes.values())
        at = self._device.allocate(sum(map(_align, sizes.values())), "weights")
        for name, size in sizes.items():
            self._places[name] = at
            at += _align(size)

    def _allocate_caches(self, num_pages: int | None, max_num_seqs: int) -> None:
        caches = self.plans[self.buckets[0]].caches
        self.num_pages, self.num_window_pages = pool_sizes(
            self.config, page_size=self.page_size, window_ring=self.window_ring, max_context=self.max_context,
            item_bytes=caches[0].item_bytes, num_pages=num_pages, max_num_seqs=max_num_seqs,
            memory=max(self._device.free_bytes() - RESERVE, 0))
        sizes = {str(cache.key): self._true_shape(cache).bytes for cache in caches}
        purpose = f"the KV cache ({self.num_pages} pages, {self.num_window_pages} in window layers)"
        at = self._device.allocate(sum(map(_align, sizes.values())), purpose)
        for name, size in sizes.items():
            self._places[name] = at
            at += _align(size)


class _InputBuffer:
    """A bucket's inputs, side by side: on the device, and pinned on the host, so that one copy takes all."""

    def __init__(self, device: Device, plan: LaunchPlan) -> None:
        self._device, self._bucket = device, plan.bucket
        size = sum(_align(operand.bytes) for operand in plan.inputs)
        self._address = device.allocate(size, f"inputs of {plan.bucket}")
        self._host = device.allocate_pinned(size, f"inputs of {plan.bucket}")
        self.places: dict[str, int] = {}
        self._views: dict[str, Array] = {}
        at = 0
        for operand in plan.inputs:
            view = self._host[at : at + operand.bytes].view(NUMPY[operand.dtype]).reshape(operand.shape)
            self.places[str(operand.key)], self._views[str(operand.key)] = self._address + at, view
            at += _align(operand.bytes)

    def upload(self, inputs: Mapping[str, Ints]) -> None:
        for name, view in self._views.items():
            assert inputs[name].shape == view.shape, (self._bucket, name, inputs[name].shape, view.shape)
            view[...] = inputs[name]
        self._device.upload(self._address, self._host, self._device.stream)


def _load_kernels(artifact: Artifact, device: Device, plans: Any) -> dict[str, Kernel]:
    """Each of the plans' binaries, loaded once."""
    names = sorted({launch.binary for plan in plans for step in plan.steps for launch in step.launches})
    kernels = {}
    for name in names:
        meta = json.loads(artifact.file(f"kernels/{name}.json").read_bytes())
        if meta["target"] != artifact.target:
            raise CudaError(f"kernel {name} was compiled for {meta['target']}, the artifact for {artifact.target}")
        kernels[name] = device.load_kernel(name, artifact.file(f"kernels/{name}.cubin").read_bytes(), meta)
    return kernels
