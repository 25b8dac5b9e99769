"""One rank of a model on its GPU: memory in which everything has its place, weights, caches, launches and their graphs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from gptoss_compile.artifact import Artifact, plan_file
from gptoss_compile.config import Bucket
from gptoss_compile.launch_plan import EXCHANGED, Extern, LaunchPlan, Operand, Step
from gptoss_compile.runtime.cuda_driver import Bytes, CudaError, Device, load_kernel
from gptoss_compile.runtime.graphs import AnyPrepared, Graph, Loaded, prepare
from gptoss_compile.runtime.libraries import load_function
from gptoss_compile.runtime.pools import pool_sizes
from gptoss_compile.runtime.staging import Progress
from gptoss_compile.runtime.weights_cuda import DeviceWeights, align

Array = np.ndarray[Any, Any]

RESERVE = 1 << 30  # bytes left free for graphs, the driver, and whoever else uses the GPU
NUMPY = {"bf16": np.uint16, "fp32": np.float32, "i32": np.int32, "u8": np.uint8}  # of operands; bf16 as its bits
POISON = 0xFF  # NaN in every float format used


class Rank:
    """What one GPU holds and runs of an artifact.

    Memory is taken in turn: by the constructor, `load_weights`, `allocate_caches` and `load_kernels`; then `install` makes
    each bucket's graph. areas: of all ranks, as this one sees them (see `exchange_cuda`); none if it is alone. inputs: for
    each bucket the addresses of its inputs.
    """

    def __init__(self, artifact: Artifact, device: Device, number: int) -> None:
        self.config, self.number, self.device = artifact.config, number, device
        self.plans = {b: LaunchPlan.loads(artifact.file(plan_file(b, number)).read_text()) for b in artifact.buckets}
        plans = self.plans.values()
        self._sizes = max(p.arena_bytes for p in plans), max(p.workspace_bytes for p in plans)
        self._allocate_arena()
        self.rows = max(bucket.rows for bucket in artifact.buckets)
        self.sampled = device.allocate(4 * self.rows, "chosen tokens")
        self._places = {"sampled": self.sampled}
        self.inputs: dict[Bucket, Mapping[str, int]] = {}
        self.areas: Sequence[int] = ()
        self.launches: dict[Bucket, list[list[AnyPrepared]]] = {}

    # Loading ------------------------------------------------------------------------------------------------

    def load_weights(self, artifact: Artifact, progress: Progress | None) -> None:
        """Before the caches take what memory is left: laying weights out takes some for a while."""
        self.weights = DeviceWeights(self.device, self.plans.values())
        self.weights.load(artifact, self.number, progress)
        self._places |= self.weights.places

    def pool_sizes(self, artifact: Artifact, num_pages: int | None, max_num_seqs: int) -> tuple[int, int]:
        """The pages for which there is room in this GPU's memory, see `pools.pool_sizes`."""
        cache = next(iter(self.plans.values())).caches[0]
        heads = cache.shape[2]
        config = replace(self.config, num_kv_heads=heads, num_heads=heads * self.config.heads_per_kv)
        return pool_sizes(config, page_size=artifact.page_size, window_ring=artifact.window_ring,
                          max_context=artifact.max_context, item_bytes=cache.item_bytes, num_pages=num_pages,
                          max_num_seqs=max_num_seqs, memory=max(self.device.free_bytes() - RESERVE, 0))

    def allocate_caches(self, num_pages: int, num_window_pages: int) -> None:
        self._pages = num_pages, num_window_pages
        caches = next(iter(self.plans.values())).caches
        sizes = {str(cache.key): self.true_shape(cache).bytes for cache in caches}
        purpose = f"the KV cache ({num_pages} pages, {num_window_pages} in window layers)"
        at = self.device.allocate(sum(map(align, sizes.values())), purpose)
        for name, size in sizes.items():
            self._places[name] = at
            at += align(size)

    def load_kernels(self, artifact: Artifact) -> None:
        wanted = sorted({kernel for plan in self.plans.values() for kernel in _kernels(plan)})
        self.kernels: dict[tuple[str, int], Loaded] = {
            kernel: load_kernel(artifact, self.device, *kernel) for kernel in wanted}
        for name in sorted({name for plan in self.plans.values() for name in _libraries(plan)}):
            files = {path: artifact.file(f"kernels/{path}").read_bytes() for path in (f"{name}.json", f"{name}.so")}
            self._load_library(name, files, artifact.target)

    def install(self, bucket: Bucket, plan: LaunchPlan, files: Mapping[str, bytes]) -> Graph:
        """Put a plan in a bucket's place; see `CudaExecutor.install`."""
        wanted = plan.arena_bytes, plan.workspace_bytes
        if any(size > here for size, here in zip(wanted, self._sizes, strict=True)):
            self._sizes = max(wanted[0], self._sizes[0]), max(wanted[1], self._sizes[1])
            self._allocate_arena()
        for name, carveout in set(_kernels(plan)) - self.kernels.keys():
            meta = json.loads(files[f"{name}.json"])
            self.kernels[name, carveout] = self.device.load_kernel(name, files[f"{name}.cubin"], meta, carveout)
        for name in _libraries(plan):
            if (name, -1) not in self.kernels:
                self._load_library(name, files, plan.target)
        steps, (before, behind) = self.prepare(bucket, plan.steps), self.prepare(bucket, _around(plan))
        graph = self.capture(bucket.name, [before, *steps, behind])
        self.plans[bucket], self.launches[bucket] = plan, steps
        return graph

    def prepare(self, bucket: Bucket, steps: Sequence[Step]) -> list[list[AnyPrepared]]:
        """The launches of steps of a bucket's plan."""
        return prepare(self.device, bucket.name, steps, self.kernels,
                       lambda operand: (self.true_shape(operand), self.address(bucket, operand)))

    def capture(self, name: str, steps: Iterable[Iterable[AnyPrepared]]) -> Graph:
        self.device.use()
        return Graph(self.device, name, [launch for step in steps for launch in step])

    # Places -------------------------------------------------------------------------------------------------

    def address(self, bucket: Bucket, operand: Operand) -> int:
        """Where an operand of the bucket's plan lives on the device."""
        if operand.place == "arena":
            return self._arena + int(operand.key)
        if operand.place == "workspace":
            return self._workspace + int(operand.key)
        if operand.place in EXCHANGED:
            return self.areas[self.number] + int(operand.key)
        if operand.place == "input":
            return self.inputs[bucket][str(operand.key)]
        return self._places[str(operand.key)]

    def true_shape(self, operand: Operand) -> Operand:
        """A cache with as many pages, and chosen tokens with as many rows, as there are here; any other operand as it is."""
        if operand.place == "state":
            return replace(operand, shape=(self.rows,))
        if operand.place != "cache":
            return operand
        windowed = self.config.windowed[int(str(operand.key).rpartition(".")[2])]
        return replace(operand, shape=(self._pages[windowed], *operand.shape[1:]))

    def _load_library(self, name: str, files: Mapping[str, bytes], target: str) -> None:
        meta = json.loads(files[f"{name}.json"])
        if meta["target"] != target:
            raise CudaError(f"library {name} was compiled for {meta['target']}, the artifact for {target}")
        self.kernels[name, -1] = load_function(name, files[f"{name}.so"], meta)

    def _allocate_arena(self) -> None:
        self._arena = self.device.allocate(self._sizes[0], "intermediate results")
        self._workspace = self.device.allocate(self._sizes[1], "kernels' counters")

    # Checking -----------------------------------------------------------------------------------------------

    def read(self, bucket: Bucket, operand: Operand) -> Array:
        """See `CudaExecutor.read`."""
        operand = self.true_shape(operand)
        if operand.place == "slots":
            return self._pairs(operand)[:, 0].copy().view(np.float32).reshape(operand.shape)
        if operand.place == "shares":
            found = np.empty(operand.shape, NUMPY[operand.dtype])
            for rank in range(len(self.areas)):
                part = found[rank :: len(self.areas)]
                part[...] = self._download(self._own_share(operand, rank), part.nbytes).view(found.dtype).reshape(part.shape)
            return found
        raw = self._download(self.address(bucket, operand), operand.bytes)
        return raw.view(NUMPY[operand.dtype]).reshape(operand.shape)

    def write(self, bucket: Bucket, operand: Operand, values: Array) -> None:
        """See `CudaExecutor.write`."""
        operand = self.true_shape(operand)
        assert (values.shape, values.dtype) == (operand.shape, NUMPY[operand.dtype]), (operand, values.shape)
        if operand.place == "shares":
            for rank in range(len(self.areas)):
                part = np.ascontiguousarray(values[rank :: len(self.areas)])
                self.upload(self._own_share(operand, rank), part.reshape(-1).view(np.uint8))
            return
        values = np.ascontiguousarray(values).reshape(-1)
        if operand.place != "slots":
            self.upload(self.address(bucket, operand), values.view(np.uint8))
            return
        pairs = self._pairs(operand)
        pairs[:, 0] = values.view(np.uint32)
        for area in self.areas:
            self.upload(area + self._own_slots(operand), pairs.reshape(-1).view(np.uint8))

    def poison(self, bucket: Bucket) -> None:
        """Fill the bucket's intermediate results with NaN."""
        self.device.use()
        self.device.fill(self._arena, self.plans[bucket].arena_bytes, POISON)

    def free(self, step: Step) -> None:
        """Fill with NaN what is dead behind a step."""
        self.device.use()
        for start, end in step.frees:
            self.device.fill(self._arena + start, end - start, POISON)
        for start, end in step.exchange_frees:
            self.device.fill(self.areas[self.number] + start, end - start, POISON)

    def _pairs(self, operand: Operand) -> Array:
        """What this rank last put into slots: u32 [values, 2], each value with the tag of its step."""
        address = self.areas[self.number] + self._own_slots(operand)
        return self._download(address, 2 * operand.bytes).view(np.uint32).reshape(-1, 2)

    def _own_slots(self, operand: Operand) -> int:
        """Where in every rank's area this rank's values of a partial sum are."""
        return int(operand.key) + 2 * operand.bytes * self.number

    def _own_share(self, operand: Operand, rank: int) -> int:
        """Where in `rank`'s area those rows of this rank's partial sum are that the other one adds."""
        rows, ranks = operand.shape[0], len(self.areas)
        return self.areas[rank] + int(operand.key) + -(-rows // ranks) * self.number * (operand.bytes // rows)

    def _download(self, address: int, size: int) -> Bytes:
        self.device.use()
        with self._pinned(size) as raw:
            self.device.download(raw, address, self.device.stream)
            self.device.synchronize("reading memory")
            return raw.copy()

    def upload(self, address: int, data: Bytes) -> None:
        """Put bytes at an address."""
        self.device.use()
        with self._pinned(data.nbytes) as raw:
            raw[:] = data
            self.device.upload(address, raw, self.device.stream)
            self.device.synchronize("writing memory")

    @contextmanager
    def _pinned(self, size: int) -> Iterator[Bytes]:
        raw = self.device.allocate_pinned(size, "a check")
        try:
            yield raw
        finally:
            self.device.release_pinned(raw)


def _around(plan: LaunchPlan) -> tuple[Step, Step]:
    assert plan.feed and plan.sample, "plans for a GPU choose their tokens there"
    return plan.feed, plan.sample


def _kernels(plan: LaunchPlan) -> list[tuple[str, int]]:
    """(binary, carve-out) of all kernels that a plan launches."""
    steps = (*plan.steps, *_around(plan))
    return sorted({(launch.binary, launch.carveout) for step in steps for launch in step.launches
                   if not isinstance(launch, Extern)})


def _libraries(plan: LaunchPlan) -> list[str]:
    """The libraries whose functions a plan calls."""
    return sorted({launch.binary for step in plan.steps for launch in step.launches if isinstance(launch, Extern)})
