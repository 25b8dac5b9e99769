"""The sm targets: replays an artifact's plans as CUDA graphs, through cuda.bindings and numpy alone.

Everything has its place before the first step: one arena (of the largest plan), one zeroed workspace, weights, caches,
and inputs a bucket. So a step is one copy of its inputs, one graph launch and one copy of its logits. A greedy decode
needs neither copy: its graph ends with a kernel that writes the next token where the step reads its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter
from typing import Any

import numpy as np

from gptoss_compile.artifact import Artifact
from gptoss_compile.config import Bucket
from gptoss_compile.launch_plan import LaunchPlan, Operand, Step
from gptoss_compile.runtime.cuda_driver import Bytes, Device, load_kernel
from gptoss_compile.runtime.executor import Floats, Ints
from gptoss_compile.runtime.graphs import Graph, Launch, prepare
from gptoss_compile.runtime.pools import pool_sizes
from gptoss_compile.runtime.staging import Progress
from gptoss_compile.runtime.weights_cuda import DeviceWeights, align

Array = np.ndarray[Any, Any]
Watch = Callable[[int, Step], None]

RESERVE = 1 << 30  # bytes left free for graphs, the driver, and whoever else uses the GPU
NUMPY = {"bf16": np.uint16, "fp32": np.float32, "i32": np.int32, "u8": np.uint8}  # of operands; bf16 as its bits
POISON = 0xFF  # NaN in every float format used


class CudaExecutor:
    """One artifact on one GPU. See `executor.Executor`; `run_steps`, `read` and `write` are for checking kernels."""

    def __init__(self, artifact: Artifact, device: Device, num_pages: int | None, max_num_seqs: int,
                 progress: Progress | None = None) -> None:
        self.config, self.buckets = artifact.config, artifact.buckets
        self.page_size, self.max_context = artifact.page_size, artifact.max_context
        self.window_ring = artifact.window_ring
        self._device = device
        self.seconds: dict[str, float] = {}
        self.plans = {b: LaunchPlan.loads(artifact.file(f"plans/{b.name}.json").read_text()) for b in self.buckets}
        plans = self.plans.values()
        with self._phase("memory"):
            self._arena = device.allocate(max(p.arena_bytes for p in plans), "intermediate results")
            self._workspace = device.allocate(max(p.workspace_bytes for p in plans), "kernels' counters")
            self._weights = DeviceWeights(device, plans)
            self._places: dict[str, int] = dict(self._weights.places)
            self._inputs = {b: _InputBuffer(device, plan) for b, plan in self.plans.items()}
            self._allocate_caches(num_pages, max_num_seqs)
            self._host_logits = device.allocate_pinned(max(p.logits.bytes for p in plans), "logits")
        with self._phase("kernels"):
            self._kernels = {name: load_kernel(artifact, device, name) for name in _binaries(plans)}
        self._launches = {b: self.prepare(b, plan.steps) for b, plan in self.plans.items()}
        self._advance = {b: self.prepare(b, [plan.advance]) for b, plan in self.plans.items() if plan.advance}
        with self._phase("weights"):
            self._weights.load(artifact, progress)
        self.graphs: dict[Bucket, Graph] = {}
        self._loops: dict[Bucket, Graph] = {}
        for bucket, steps in self._launches.items():
            with self._phase(f"capture {bucket}"):
                self.graphs[bucket] = self.capture(bucket.name, steps)
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
        self.submit(bucket, inputs)
        return self.result(bucket)

    def submit(self, bucket: Bucket, inputs: Mapping[str, Ints]) -> None:
        """Start a step; `inputs` may be overwritten as soon as this returns. `result` comes before the next step."""
        self._device.use()
        self.upload(bucket, inputs)
        self.graphs[bucket].replay()
        logits = self.plans[bucket].logits
        self._device.download(self._host_logits[: logits.bytes], self._arena + int(logits.key), self._device.stream)

    def result(self, bucket: Bucket) -> Floats:
        """Wait for the step that was submitted: its logits, valid until the next one."""
        self._device.synchronize(f"running {bucket.name}")
        logits = self.plans[bucket].logits
        result: Floats = self._host_logits[: logits.bytes].view(np.float32).reshape(logits.shape)
        return result

    def upload(self, bucket: Bucket, inputs: Mapping[str, Ints]) -> None:
        """Put the inputs of a step in their places, in the stream's order."""
        self._inputs[bucket].upload(inputs)

    def greedy(self, bucket: Bucket) -> Graph:
        """A decode bucket's step with `advance` behind it: every replay decodes one more token of each sequence.

        It reads the inputs that were uploaded last and leaves the next step's in their place: the likeliest token, and
        positions + 1. Whoever replays it sees to it that the page tables reach so far.
        """
        if bucket not in self._loops:
            self._device.use()
            steps = [*self._launches[bucket], *self._advance[bucket]]
            self._loops[bucket] = self.capture(f"{bucket} with advance", steps)
        return self._loops[bucket]

    def prepare(self, bucket: Bucket, steps: Sequence[Step]) -> list[list[Launch]]:
        """The launches of steps of a bucket's plan."""
        return prepare(self._device, bucket.name, steps, self._kernels, lambda operand: self.address(bucket, operand))

    def capture(self, name: str, steps: Iterable[Iterable[Launch]]) -> Graph:
        return Graph(self._device, name, [launch for step in steps for launch in step])

    @property
    def weights_range(self) -> tuple[int, int]:
        """(address, bytes) of all weights together."""
        return self._weights.first, self._weights.bytes

    @property
    def device(self) -> Device:
        return self._device

    @property
    def device_name(self) -> str:
        return self._device.name

    def close(self) -> None:
        if self.graphs:
            self._device.use()
            for graph in (*self.graphs.values(), *self._loops.values()):
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
        operand = self.true_shape(operand)
        with self._pinned(operand.bytes) as raw:
            self._device.download(raw, self.address(bucket, operand), self._device.stream)
            self._device.synchronize(f"reading {operand.key}")
            return raw.view(NUMPY[operand.dtype]).reshape(operand.shape).copy()

    def write(self, bucket: Bucket, operand: Operand, values: Array) -> None:
        """Put values where an operand lives."""
        self._device.use()
        operand = self.true_shape(operand)
        assert (values.shape, values.dtype) == (operand.shape, NUMPY[operand.dtype]), (operand, values.shape)
        with self._pinned(operand.bytes) as raw:
            raw[:] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
            self._device.upload(self.address(bucket, operand), raw, self._device.stream)
            self._device.synchronize(f"writing {operand.key}")

    def workspace(self) -> Bytes:
        """The kernels' counters, all zeros between steps."""
        size = max(plan.workspace_bytes for plan in self.plans.values())
        return self.read(self.buckets[0], Operand("workspace", 0, "u8", (size,)))

    def true_shape(self, operand: Operand) -> Operand:
        """A cache with as many pages as this executor gave it; any other operand as it is."""
        if operand.place != "cache":
            return operand
        windowed = self.config.windowed[int(str(operand.key).rpartition(".")[2])]
        return replace(operand, shape=(self.num_window_pages if windowed else self.num_pages, *operand.shape[1:]))

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Notes the seconds that a part of loading takes, the device's work included."""
        start = perf_counter()
        yield
        self._device.synchronize(name)
        self.seconds[name] = perf_counter() - start

    @contextmanager
    def _pinned(self, size: int) -> Iterator[Bytes]:
        raw = self._device.allocate_pinned(size, "a check")
        try:
            yield raw
        finally:
            self._device.release_pinned(raw)

    # Places -------------------------------------------------------------------------------------------------

    def address(self, bucket: Bucket, operand: Operand) -> int:
        """Where an operand of the bucket's plan lives on the device."""
        if operand.place == "arena":
            return self._arena + int(operand.key)
        if operand.place == "workspace":
            return self._workspace + int(operand.key)
        if operand.place == "input":
            return self._inputs[bucket].places[str(operand.key)]
        return self._places[str(operand.key)]

    def _allocate_caches(self, num_pages: int | None, max_num_seqs: int) -> None:
        caches = self.plans[self.buckets[0]].caches
        self.num_pages, self.num_window_pages = pool_sizes(
            self.config, page_size=self.page_size, window_ring=self.window_ring, max_context=self.max_context,
            item_bytes=caches[0].item_bytes, num_pages=num_pages, max_num_seqs=max_num_seqs,
            memory=max(self._device.free_bytes() - RESERVE, 0))
        sizes = {str(cache.key): self.true_shape(cache).bytes for cache in caches}
        purpose = f"the KV cache ({self.num_pages} pages, {self.num_window_pages} in window layers)"
        at = self._device.allocate(sum(map(align, sizes.values())), purpose)
        for name, size in sizes.items():
            self._places[name] = at
            at += align(size)


class _InputBuffer:
    """A bucket's inputs, side by side: on the device, and twice in pinned memory, so that one copy takes all and the host
    writes the next step's while this step's are not yet copied."""

    def __init__(self, device: Device, plan: LaunchPlan) -> None:
        self._device, self._bucket = device, plan.bucket
        size = sum(align(operand.bytes) for operand in plan.inputs)
        self._address = device.allocate(size, f"inputs of {plan.bucket}")
        self._sides = [_Side(device, plan, size) for _ in range(2)]
        at = self._address
        self.places: dict[str, int] = {}
        for operand in plan.inputs:
            self.places[str(operand.key)] = at
            at += align(operand.bytes)

    def upload(self, inputs: Mapping[str, Ints]) -> None:
        self._sides.reverse()
        side, device = self._sides[0], self._device
        device.wait_for(side.copied, f"copying inputs of {self._bucket}")
        for name, view in side.views.items():
            assert inputs[name].shape == view.shape, (self._bucket, name, inputs[name].shape, view.shape)
            view[...] = inputs[name]
        device.upload(self._address, side.memory, device.stream)
        device.record(side.copied)


class _Side:
    """Pinned memory for a plan's inputs, its views by name, and the event behind the last copy from it."""

    def __init__(self, device: Device, plan: LaunchPlan, size: int) -> None:
        self.memory = device.allocate_pinned(size, f"inputs of {plan.bucket}")
        self.copied = device.new_event()
        self.views: dict[str, Array] = {}
        at = 0
        for operand in plan.inputs:
            raw = self.memory[at : at + operand.bytes]
            self.views[str(operand.key)] = raw.view(NUMPY[operand.dtype]).reshape(operand.shape)
            at += align(operand.bytes)


def _binaries(plans: Iterable[LaunchPlan]) -> list[str]:
    """The names of all that the plans launch."""
    steps = [step for plan in plans for step in (*plan.steps, *filter(None, (plan.advance,)))]
    return sorted({launch.binary for step in steps for launch in step.launches})
