"""The sm targets: replays an artifact's plans as CUDA graphs, through cuda.bindings and numpy alone.

Everything has its place before the first step: one arena (of the largest plan), one zeroed workspace, weights, caches,
the tokens that the last step chose, and inputs a bucket. So a step is one copy of its inputs (two where page tables have
changed), one graph launch and one copy of a few chosen tokens. Its graph begins with a kernel that puts tokens of the step
before in their places and ends with one that chooses; logits stay on the device unless they are asked for.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from time import perf_counter
from typing import Any

import numpy as np

from gptoss_compile.artifact import Artifact
from gptoss_compile.config import Bucket
from gptoss_compile.gumbel import NOTHING
from gptoss_compile.launch_plan import LaunchPlan, Operand, Step
from gptoss_compile.runtime.cuda_driver import Bytes, Device, load_kernel
from gptoss_compile.runtime.executor import Floats, Ints, input_shapes
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
    """One artifact on one GPU. See `executor.Executor`; the rest is for checking and timing kernels."""

    runs_ahead = True

    def __init__(self, artifact: Artifact, device: Device, num_pages: int | None, max_num_seqs: int,
                 progress: Progress | None = None) -> None:
        self.config, self.buckets = artifact.config, artifact.buckets
        self.page_size, self.max_context = artifact.page_size, artifact.max_context
        self.window_ring = artifact.window_ring
        self._device = device
        self.seconds: dict[str, float] = {}
        self.plans = {b: LaunchPlan.loads(artifact.file(f"plans/{b.name}.json").read_text()) for b in self.buckets}
        plans = self.plans.values()
        self._places: dict[str, int] = {}
        with self._phase("memory"):
            self._sizes = max(p.arena_bytes for p in plans), max(p.workspace_bytes for p in plans)
            self._arena = device.allocate(self._sizes[0], "intermediate results")
            self._workspace = device.allocate(self._sizes[1], "kernels' counters")
            table = -(-self.max_context // self.page_size)
            self._inputs = {b: _InputBuffer(device, b, input_shapes(b, table, self.window_ring)) for b in self.buckets}
            self._rows = max(bucket.rows for bucket in self.buckets)
            self._places["sampled"] = device.allocate(4 * self._rows, "chosen tokens")
            self._landings = [_Landing(device, self._rows) for _ in range(2)]
            self._flights: deque[tuple[Bucket, _Landing]] = deque()  # submitted, oldest first
            self._landed = self.buckets[0]  # of the result that was taken last
            self._host_logits = device.allocate_pinned(max(p.logits.bytes for p in plans), "logits")
        with self._phase("weights"):  # before the caches take what memory is left: laying them out takes some for a while
            self._weights = DeviceWeights(device, plans)
            self._weights.load(artifact, progress)
        self._places |= self._weights.places
        with self._phase("KV cache"):
            self._allocate_caches(num_pages, max_num_seqs)
        with self._phase("kernels"):
            wanted = sorted({kernel for plan in plans for kernel in _kernels(plan)})
            self._kernels = {kernel: load_kernel(artifact, device, *kernel) for kernel in wanted}
        self._launches: dict[Bucket, list[list[Launch]]] = {}
        self.graphs: dict[Bucket, Graph] = {}
        for bucket, plan in self.plans.items():
            with self._phase(f"capture {bucket}"):
                self.install(bucket, plan, {})
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

    def inputs(self, bucket: Bucket) -> Mapping[str, Ints]:
        self._device.use()
        return self._inputs[bucket].arrays()

    def submit(self, bucket: Bucket, rows: int, columns: int) -> None:
        self._inputs[bucket].send(rows, columns)
        self.graphs[bucket].replay()
        landing = self._landings[0]
        self._landings.reverse()
        self._device.download(landing.memory[: 4 * bucket.rows], self._places["sampled"], self._device.stream)
        self._device.record(landing.landed)
        self._flights.append((bucket, landing))

    def result(self) -> Ints:
        bucket, landing = self._flights.popleft()
        self._device.wait_for(landing.landed, f"running {bucket.name}")
        self._landed = bucket
        return landing.tokens[: bucket.rows]

    def logits(self, rows: Sequence[int]) -> Floats:
        assert not self._flights, "a later step has overwritten them"
        logits = self.plans[self._landed].logits
        size = logits.bytes // logits.shape[0]
        first = self._arena + int(logits.key)
        at = 0
        for start, count in _runs(rows):
            part = self._host_logits[at : at + count * size]
            self._device.download(part, first + start * size, self._device.stream)
            at += count * size
        self._device.synchronize("copying logits")
        result: Floats = self._host_logits[:at].view(np.float32).reshape(len(rows), -1)
        return result

    # Checking and timing ------------------------------------------------------------------------------------

    def run(self, bucket: Bucket, inputs: Mapping[str, Ints]) -> Floats:
        """The step's logits [R, V] fp32, valid until the next call; keys and values go to the caches."""
        self.upload(bucket, inputs)
        self.graphs[bucket].replay()
        logits = self.plans[bucket].logits
        self._device.download(self._host_logits[: logits.bytes], self._arena + int(logits.key), self._device.stream)
        self._device.synchronize(f"running {bucket.name}")
        result: Floats = self._host_logits[: logits.bytes].view(np.float32).reshape(logits.shape)
        return result

    def upload(self, bucket: Bucket, inputs: Mapping[str, Ints]) -> None:
        """Put all inputs of a step in their places, in the stream's order; without `source` and `words` none is chosen."""
        arrays = self.inputs(bucket)
        arrays["source"][:], arrays["words"][:] = -1, NOTHING
        for name, values in inputs.items():
            assert values.shape == arrays[name].shape, (bucket, name, values.shape, arrays[name].shape)
            arrays[name][...] = values
        self._inputs[bucket].send(bucket.sequences, self._inputs[bucket].columns)

    def prepare(self, bucket: Bucket, steps: Sequence[Step]) -> list[list[Launch]]:
        """The launches of steps of a bucket's plan."""
        return prepare(self._device, bucket.name, steps, self._kernels, lambda operand: self.address(bucket, operand))

    def install(self, bucket: Bucket, plan: LaunchPlan, files: Mapping[str, bytes]) -> Graph:
        """Put another plan in a bucket's place; files: its machine code, as in an artifact's kernels/.

        Returns the graph, which is the caller's to close, as is the one before, which still replays: where the plan needs
        more memory for its intermediate results, what there was is left to that one.
        """
        device, wanted = self._device, (plan.arena_bytes, plan.workspace_bytes)
        device.use()
        if any(size > here for size, here in zip(wanted, self._sizes, strict=True)):
            self._sizes = max(wanted[0], self._sizes[0]), max(wanted[1], self._sizes[1])
            self._arena = device.allocate(self._sizes[0], "intermediate results")
            self._workspace = device.allocate(self._sizes[1], "kernels' counters")
        for name, carveout in set(_kernels(plan)) - self._kernels.keys():
            meta = json.loads(files[f"{name}.json"])
            self._kernels[name, carveout] = device.load_kernel(name, files[f"{name}.cubin"], meta, carveout)
        steps, (before, behind) = self.prepare(bucket, plan.steps), self.prepare(bucket, _around(plan))
        graph = self.capture(bucket.name, [before, *steps, behind])
        self.plans[bucket], self._launches[bucket], self.graphs[bucket] = plan, steps, graph
        return graph

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
            for graph in self.graphs.values():
                graph.close()
            self.graphs.clear()
            self._device.close()

    def run_steps(self, bucket: Bucket, inputs: Mapping[str, Ints], watch: Watch | None = None) -> Floats:
        """`run` without a graph: the launches of each step alone, then watch(number, step), which may read and write.

        The arena is poisoned first, and its freed ranges behind each step, as the plan interpreter does.
        """
        device, plan = self._device, self.plans[bucket]
        self.poison(bucket)
        self.upload(bucket, inputs)
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
        """A cache with as many pages, and chosen tokens with as many rows, as there are here; any other operand as it is."""
        if operand.place == "state":
            return replace(operand, shape=(self._rows,))
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
    """A bucket's inputs, side by side, on the device and in pinned memory, the page tables last: most steps leave them as
    they are, and then they are not sent."""

    def __init__(self, device: Device, bucket: Bucket, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._device, self._bucket = device, bucket
        sizes = {name: 4 * int(np.prod(shape)) for name, shape in shapes.items()}
        starts = dict(zip(sizes, accumulate(map(align, sizes.values()), initial=0), strict=False))
        total = sum(map(align, sizes.values()))
        self._address = device.allocate(total, f"inputs of {bucket}")
        self.places = {name: self._address + start for name, start in starts.items()}
        self._memory = device.allocate_pinned(total, f"inputs of {bucket}")
        self._memory[:] = 0
        self._arrays = {name: self._memory[starts[name] : starts[name] + size].view(np.int32).reshape(shapes[name])
                        for name, size in sizes.items()}
        self._arrays["source"][:], self._arrays["words"][:] = -1, NOTHING
        self._copied = device.new_event()
        self._fixed, self._table = starts["window_table"], starts["full_table"]
        self._ring, self.columns = shapes["window_table"][1], shapes["full_table"][1]

    def arrays(self) -> Mapping[str, Ints]:
        """The arrays in pinned memory, once nothing is copied from them any more."""
        self._device.wait_for(self._copied, f"copying inputs of {self._bucket}")
        return self._arrays

    def send(self, rows: int, columns: int) -> None:
        """Copy all but the page tables, and so many rows of these and columns of full_table."""
        device = self._device
        device.upload(self._address, self._memory[: self._fixed + 4 * rows * self._ring], device.stream)
        if rows:
            source, target = self._memory.ctypes.data + self._table, self._address + self._table
            device.upload_rows(target, source, rows, 4 * columns, 4 * self.columns)
        device.record(self._copied)


class _Landing:
    """Pinned memory for the tokens that a step chose, and the event behind their copy."""

    def __init__(self, device: Device, rows: int) -> None:
        self.memory = device.allocate_pinned(4 * rows, "chosen tokens")
        self.tokens: Ints = self.memory.view(np.int32)
        self.landed = device.new_event()


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers as runs: (first, how many)."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and sum(runs[-1]) == row:
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((row, 1))
    return runs


def _around(plan: LaunchPlan) -> tuple[Step, Step]:
    assert plan.feed and plan.sample, "plans for a GPU choose their tokens there"
    return plan.feed, plan.sample


def _kernels(plan: LaunchPlan) -> list[tuple[str, int]]:
    """(binary, carve-out) of all that a plan launches."""
    steps = (*plan.steps, *_around(plan))
    return sorted({(launch.binary, launch.carveout) for step in steps for launch in step.launches})
