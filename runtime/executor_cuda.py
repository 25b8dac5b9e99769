"""The sm targets: replays an artifact's plans as CUDA graphs, through cuda.bindings and numpy alone.

Everything has its place before the first step: one arena (of the largest plan), one zeroed workspace, weights, caches,
the tokens that the last step chose, and inputs a bucket. So a step is one copy of its inputs (two where page tables have
changed), one graph launch and one copy of a few chosen tokens. Its graph begins with a kernel that puts tokens of the step
before in their places and ends with one that chooses; logits stay on the device unless they are asked for.

A model of several ranks has all that on as many GPUs (see `rank_cuda`). Ranks share the inputs on the host, exchange inside
their kernels and choose the same tokens, of which the first one's are copied back: the host synchronises nothing within a
step.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np

from gptoss_compile.artifact import Artifact
from gptoss_compile.config import Bucket
from gptoss_compile.gumbel import NOTHING
from gptoss_compile.launch_plan import LaunchPlan, Operand, Step
from gptoss_compile.runtime.cuda_driver import Bytes, Device
from gptoss_compile.runtime.exchange_cuda import Exchange
from gptoss_compile.runtime.executor import Floats, Ints, input_shapes
from gptoss_compile.runtime.graphs import AnyPrepared, RankGraphs
from gptoss_compile.runtime.inputs_cuda import InputBuffer, Landing
from gptoss_compile.runtime.rank_cuda import Rank
from gptoss_compile.runtime.staging import Progress

Array = np.ndarray[Any, Any]
Watch = Callable[[int, int, Step], None]


class CudaExecutor:
    """One artifact on as many GPUs as it has ranks. See `executor.Executor`; the rest is for checking and timing kernels.

    plans and graphs: each bucket's; plans are those of the first rank. seconds: of each phase of loading.
    """

    runs_ahead = True

    def __init__(self, artifact: Artifact, devices: Sequence[Device], num_pages: int | None, max_num_seqs: int,
                 progress: Progress | None = None) -> None:
        assert len(devices) == artifact.ranks
        self.config, self.buckets = artifact.config, artifact.buckets
        self.page_size, self.max_context = artifact.page_size, artifact.max_context
        self.window_ring = artifact.window_ring
        self._devices, self.device = devices, devices[0]
        self.seconds: dict[str, float] = {}
        with self._phase("memory"):
            self.ranks = [Rank(artifact, device, number) for number, device in enumerate(devices)]
            self.plans = dict(self.ranks[0].plans)
            self._exchange = self._connect() if len(devices) > 1 else None
            table = -(-self.max_context // self.page_size)
            self._inputs = {b: InputBuffer(devices, b, input_shapes(b, table, self.window_ring)) for b in self.buckets}
            for number, rank in enumerate(self.ranks):
                rank.inputs = {bucket: buffer.places[number] for bucket, buffer in self._inputs.items()}
            self._landings = [Landing(self.device, self.ranks[0].rows) for _ in range(2)]
            self._flights: deque[tuple[Bucket, Landing]] = deque()  # submitted, oldest first
            self._landed = self.buckets[0]  # of the result that was taken last
            self._host_logits = self.device.allocate_pinned(max(p.logits.bytes for p in self.plans.values()), "logits")
        with self._phase("weights"):
            for number, rank in enumerate(self.ranks):
                rank.load_weights(artifact, progress and _share(progress, number, len(devices)))
        with self._phase("KV cache"):
            pools = [rank.pool_sizes(artifact, num_pages, max_num_seqs) for rank in self.ranks]
            self.num_pages, self.num_window_pages = (min(sizes) for sizes in zip(*pools, strict=True))
            for rank in self.ranks:
                rank.allocate_caches(self.num_pages, self.num_window_pages)
        with self._phase("kernels"):
            for rank in self.ranks:
                rank.load_kernels(artifact)
        self.graphs: dict[Bucket, RankGraphs] = {}
        gc.freeze()  # plans, and below launches, are many objects that stay: to look them through would take a step's time
        for bucket in self.buckets:
            with self._phase(f"capture {bucket}"):
                self.install(bucket, [rank.plans[bucket] for rank in self.ranks], {})
        gc.freeze()
        self.device.use()

    @classmethod
    def load(cls, artifact: Artifact, *, num_pages: int | None, max_num_seqs: int,
             progress: Progress | None = None) -> CudaExecutor:
        """The executor with its weights on the GPUs and a graph for every bucket. progress: (bytes of weights, of all).

        Raises CudaError for whatever this machine lacks.
        """
        devices = Device.open_all(artifact.target, artifact.ranks)
        try:
            return cls(artifact, devices, num_pages, max_num_seqs, progress)
        except BaseException:
            for device in devices:
                device.close()
            raise

    def inputs(self, bucket: Bucket) -> Mapping[str, Ints]:
        self.device.use()
        buffer = self._inputs[bucket]
        for rank, event in enumerate(buffer.copied):
            self._wait_for(rank, event, f"copying inputs of {bucket}")
        return buffer.arrays

    def submit(self, bucket: Bucket, rows: int, columns: int) -> None:
        self._start(bucket, rows, columns)
        landing = self._landings[0]
        self._landings.reverse()
        self.device.download(landing.memory[: 4 * bucket.rows], self.ranks[0].sampled, self.device.stream)
        self.device.record(landing.landed)
        self._flights.append((bucket, landing))

    def result(self) -> Ints:
        bucket, landing = self._flights.popleft()
        self._wait_for(0, landing.landed, f"running {bucket.name}")
        self._landed = bucket
        return landing.tokens[: bucket.rows]

    def logits(self, rows: Sequence[int]) -> Floats:
        assert not self._flights, "a later step has overwritten them"
        logits = self.plans[self._landed].logits
        size = logits.bytes // logits.shape[0]
        first = self.ranks[0].address(self._landed, logits)
        at = 0
        for start, count in _runs(rows):
            part = self._host_logits[at : at + count * size]
            self.device.download(part, first + start * size, self.device.stream)
            at += count * size
        self.synchronize("copying logits")
        result: Floats = self._host_logits[:at].view(np.float32).reshape(len(rows), -1)
        return result

    def close(self) -> None:
        """Give everything back; where a rank has failed, that is left to the end of the process, which nothing can hang."""
        if self.graphs and not (self._exchange and self._exchange.failed):
            for graphs in self.graphs.values():
                graphs.close()
            for device in self._devices:
                device.close()
        self.graphs.clear()

    # Checking and timing ------------------------------------------------------------------------------------

    def run(self, bucket: Bucket, inputs: Mapping[str, Ints]) -> Floats:
        """The step's logits [R, V] fp32, valid until the next call; keys and values go to the caches."""
        self.upload(bucket, inputs)
        self.graphs[bucket].replay()
        logits = self.plans[bucket].logits
        self.device.use()
        self.device.download(self._host_logits[: logits.bytes], self.ranks[0].address(bucket, logits), self.device.stream)
        self.synchronize(f"running {bucket.name}")
        result: Floats = self._host_logits[: logits.bytes].view(np.float32).reshape(logits.shape)
        return result

    def upload(self, bucket: Bucket, inputs: Mapping[str, Ints]) -> None:
        """Put all inputs of a step in their places, in the streams' order; without `source` and `words` none is chosen."""
        arrays, buffer = self.inputs(bucket), self._inputs[bucket]
        arrays["source"][:], arrays["words"][:] = -1, NOTHING
        for name, values in inputs.items():
            assert values.shape == arrays[name].shape, (bucket, name, values.shape, arrays[name].shape)
            arrays[name][...] = values
        for rank, device in enumerate(self._devices):
            device.use()
            buffer.send(rank, bucket.sequences, buffer.columns)

    def synchronize(self, doing: str) -> None:
        """Wait for everything that the ranks were given. Raises CudaError if anything in it has failed."""
        if self._exchange:
            self._exchange.settle(doing)
        else:
            self.device.synchronize(doing)

    def prepare(self, bucket: Bucket, steps: Sequence[Step], rank: int = 0) -> list[list[AnyPrepared]]:
        """The launches of steps of a rank's plan of a bucket."""
        return self.ranks[rank].prepare(bucket, steps)

    def install(self, bucket: Bucket, plans: Sequence[LaunchPlan], files: Mapping[str, bytes]) -> RankGraphs:
        """Put other plans, one a rank, in a bucket's place; files: their machine code, as in an artifact's kernels/.

        Returns the graphs, which are the caller's to close, as are the ones before, which still replay: where a plan needs
        more memory for its intermediate results, what there was is left to them.
        """
        graphs = RankGraphs([rank.install(bucket, plan, files) for rank, plan in zip(self.ranks, plans, strict=True)])
        self.plans[bucket], self.graphs[bucket] = plans[0], graphs
        return graphs

    def capture(self, name: str, steps: Sequence[Iterable[Iterable[AnyPrepared]]]) -> RankGraphs:
        """Graphs of launches, given step by step for each rank."""
        return RankGraphs([rank.capture(name, own) for rank, own in zip(self.ranks, steps, strict=True)])

    @property
    def device_name(self) -> str:
        return self.device.name if len(self.ranks) == 1 else f"{len(self.ranks)} x {self.device.name}"

    def run_steps(self, bucket: Bucket, inputs: Mapping[str, Ints], watch: Watch | None = None) -> Floats:
        """`run` without a graph: the launches of each step alone, on all ranks at once, then watch(rank, number, step) for
        each rank, which may read and write.

        The arena is poisoned first, and freed ranges behind each step, as the plan interpreter does.
        """
        self.poison(bucket)
        self.upload(bucket, inputs)
        for number in range(len(self.plans[bucket].steps)):
            for rank in self.ranks:
                rank.device.use()
                for launch in rank.launches[bucket][number]:
                    launch.enqueue(rank.device)
                    if not self._exchange:
                        self.synchronize(f"running {launch.label}")
            if self._exchange:
                self.synchronize(f"running {self.ranks[0].launches[bucket][number][0].label}")
            if watch:
                for rank in self.ranks:
                    watch(rank.number, number, rank.plans[bucket].steps[number])
            for rank in self.ranks:
                rank.free(rank.plans[bucket].steps[number])
        result: Floats = self.read(bucket, self.plans[bucket].logits)
        return result

    def poison(self, bucket: Bucket) -> None:
        """Fill the bucket's intermediate results with NaN."""
        for rank in self.ranks:
            rank.poison(bucket)

    def read(self, bucket: Bucket, operand: Operand, rank: int = 0) -> Array:
        """A copy of what is at an operand's place now; bf16 as uint16. A cache comes with all of its pages."""
        return self.ranks[rank].read(bucket, operand)

    def write(self, bucket: Bucket, operand: Operand, values: Array, rank: int = 0) -> None:
        """Put values where an operand lives; what a rank puts into others' memory, there."""
        self.ranks[rank].write(bucket, operand, values)

    def workspace(self, rank: int = 0) -> Bytes:
        """The kernels' counters, all zeros between steps."""
        size = max(plan.workspace_bytes for plan in self.ranks[rank].plans.values())
        return self.read(self.buckets[0], Operand("workspace", 0, "u8", (size,)), rank)

    def true_shape(self, operand: Operand) -> Operand:
        """A cache with as many pages, and chosen tokens with as many rows, as there are here; any other operand as it is."""
        return self.ranks[0].true_shape(operand)

    def address(self, bucket: Bucket, operand: Operand, rank: int = 0) -> int:
        """Where an operand of the bucket's plan lives on a rank's device."""
        return self.ranks[rank].address(bucket, operand)

    # Inside -------------------------------------------------------------------------------------------------

    def _connect(self) -> Exchange:
        sizes = [max(plan.exchange_bytes for plan in rank.plans.values()) for rank in self.ranks]
        assert len(set(sizes)) == 1, f"ranks want exchange areas of different sizes: {sizes}"
        exchange = Exchange(self._devices, sizes[0])
        for rank in self.ranks:
            rank.areas = exchange.areas
        return exchange

    def _start(self, bucket: Bucket, rows: int, columns: int) -> None:
        buffer, graphs = self._inputs[bucket], self.graphs[bucket]
        if not self._exchange:
            buffer.send(0, rows, columns)
            graphs.replay()
            return
        for number in range(len(self._devices) - 1, -1, -1):  # the first one's context stays in use
            self._devices[number].use()
            buffer.send(number, rows, columns)
            graphs.parts[number].replay()

    def _wait_for(self, rank: int, event: Any, doing: str) -> None:
        if self._exchange:
            self._exchange.wait_for(rank, event, doing)
        else:
            self.device.wait_for(event, doing)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Notes the seconds that a part of loading takes, the devices' work included."""
        start = perf_counter()
        yield
        for device in self._devices:
            device.synchronize(name)
        self.seconds[name] = perf_counter() - start


def _share(progress: Progress, number: int, count: int) -> Progress:
    """The progress of one of several ranks, taken for equal, as that of all."""
    return lambda done, total: progress(number * total + done, count * total)


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers as runs: (first, how many)."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and sum(runs[-1]) == row:
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((row, 1))
    return runs
