"""Several GPUs as ranks of one step: each has an exchange area, and operators run on all of them at once."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from gptoss_compile.build import build_all, key_of
from gptoss_compile.kernels.exchange import FLAGS_BYTES, HEADER_BYTES
from gptoss_compile.kernels.layouts import REFERENCES, layout_sources
from gptoss_compile.kernels.spec import Launch, TensorSpec
from gptoss_compile.memory import align
from gptoss_compile.runtime.cuda_driver import Kernel, bindings
from gptoss_compile.trace import DTYPE_NAMES, DTYPES

from .harness import TARGET, Argument, _parameters, chosen, device, spec_of

STEP_AT, REPORT_AT = 64, 80  # in the header, see kernels/sm90/exchange.cuh


@dataclass(frozen=True)
class At:
    """A tensor in every rank's exchange area."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Rank:
    """One GPU: its primary context, which PyTorch uses too, and a stream."""

    def __init__(self, number: int) -> None:
        self.number, self.api = number, bindings()
        self.handle = self.check(self.api.cuDeviceGet(number))
        self.context = self.check(self.api.cuDevicePrimaryCtxRetain(self.handle))
        with self.use():
            self.stream = self.check(self.api.cuStreamCreate(self.api.CUstream_flags.CU_STREAM_NON_BLOCKING))

    def check(self, result: tuple[Any, ...]) -> Any:
        assert result[0] == self.api.CUresult.CUDA_SUCCESS, f"rank {self.number}: {result[0].name}"
        return result[1] if len(result) == 2 else result[1:]

    @contextmanager
    def use(self) -> Iterator[None]:
        """In it this GPU's context is current; behind it, what was before. PyTorch's "cuda" is the GPU whose context is."""
        self.check(self.api.cuCtxPushCurrent(self.context))
        try:
            yield
        finally:
            self.check(self.api.cuCtxPopCurrent())

    def reach(self, other: Rank) -> None:
        if not self.check(self.api.cuDeviceCanAccessPeer(self.handle, other.handle)):
            pytest.skip(f"GPU {self.number} cannot reach the memory of GPU {other.number}")
        with self.use():
            (status,) = self.api.cuCtxEnablePeerAccess(other.context, 0)
        assert status.name in ("CUDA_SUCCESS", "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED"), status.name

    def load(self, binary: Any, carveout: int) -> Kernel:
        assert not (binary.global_scratch_size or binary.profile_scratch_size), f"{binary.stem}: its scratch is null here"
        attribute = self.api.CUfunction_attribute
        with self.use():
            module = self.check(self.api.cuModuleLoadData(binary.code))
            function = self.check(self.api.cuModuleGetFunction(module, binary.symbol.encode()))
            self.check(self.api.cuFuncLoad(function))  # not when it is first launched, which might wait for one that polls
            for name, value in ((attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, binary.shared),
                                (attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, carveout)):
                if value >= 0:
                    self.check(self.api.cuFuncSetAttribute(function, name, value))
        return Kernel(binary.stem, function, binary.threads, binary.shared)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """In the stream's order, both on this GPU."""
        with self.use():
            self.check(self.api.cuMemcpyDtoDAsync(target.data_ptr(), source.data_ptr(), source.nbytes, self.stream))

    def ended(self) -> bool:
        with self.use():
            (status,) = self.api.cuStreamQuery(self.stream)
        assert status.name in ("CUDA_SUCCESS", "CUDA_ERROR_NOT_READY"), f"rank {self.number}: {status.name}"
        return bool(status.name == "CUDA_SUCCESS")


@cache
def gpus(count: int) -> tuple[Rank, ...]:
    """That many, which reach each other's memory. Skips the test where there are fewer."""
    device()
    if torch.cuda.device_count() < count:
        pytest.skip(f"{count} ranks need {count} GPUs, and there are {torch.cuda.device_count()}")
    for i in range(count):
        torch.zeros(1, device=f"cuda:{i}")  # PyTorch's context
    found = tuple(Rank(i) for i in range(count))
    for rank in found:
        for other in found:
            if other is not rank:
                rank.reach(other)
    return found


class Group:
    """`count` ranks with exchange areas: header, flags, then what `place` gives out."""

    def __init__(self, count: int, size: int, limit_ms: int = 2000, flags: int = 8) -> None:
        self.ranks = gpus(count)
        self.areas = [torch.zeros(size, dtype=torch.uint8, device=f"cuda:{i}") for i in range(count)]
        self.reports = torch.zeros(count, 64, dtype=torch.int32).pin_memory()
        self._flags, self._end, self.size = flags, HEADER_BYTES + flags * FLAGS_BYTES, size
        self._used_flags = 0
        for i, area in enumerate(self.areas):
            header = struct.pack("<8Q4IQ", *(self.areas[r].data_ptr() if r < count else 0 for r in range(8)), 1, i, count,
                                 limit_ms, self.reports[i].data_ptr())
            area[:len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8).to(area.device)
        self.synchronize()

    def place(self, shape: tuple[int, ...], dtype: torch.dtype, *, slots: bool = False, shares: bool = False) -> At:
        """Room in the exchange area, behind what has been given out; slots: one for each value of each rank; shares: for the
        largest share of the rows of each rank."""
        found = At(self._end, shape, dtype)
        elements = int(torch.Size((self._most(at=found), *shape[1:]) if shares else shape).numel())
        size = elements * (8 if slots else dtype.itemsize)
        self._end += align(len(self.ranks) * size if slots or shares else size)
        assert self._end <= self.size, "the exchange area is too small for the test"
        return found

    def flags(self) -> int:
        self._used_flags += 1
        assert self._used_flags <= self._flags
        return HEADER_BYTES + (self._used_flags - 1) * FLAGS_BYTES

    def read(self, rank: int, at: At) -> Tensor:
        """What a rank has there."""
        size = int(torch.Size(at.shape).numel()) * at.dtype.itemsize
        return self.areas[rank][at.offset:at.offset + size].view(at.dtype).view(at.shape)

    def read_slots(self, rank: int, at: At) -> list[Tensor]:
        """The values of each rank that a rank has in its slots."""
        count, elements = len(self.ranks), int(torch.Size(at.shape).numel())
        words = self.areas[rank][at.offset:at.offset + count * elements * 8].view(torch.float32).view(count, *at.shape, 2)
        return list(words[..., 0].unbind(0))

    def _most(self, at: At) -> int:
        return -(-at.shape[0] // len(self.ranks))

    def share(self, owner: int, source: int, at: At) -> Tensor:
        """What rank `owner` has of a partial sum of rank `source`: rows owner, owner + ranks, ..."""
        rows = len(range(owner, at.shape[0], len(self.ranks)))
        row = int(torch.Size(at.shape[1:]).numel()) * at.dtype.itemsize
        return self.read(owner, At(at.offset + source * self._most(at) * row, (rows, *at.shape[1:]), at.dtype))

    def read_shares(self, source: int, at: At) -> Tensor:
        """The rank's partial sum, from the ranks that have its rows; on the host."""
        found = torch.empty(at.shape, dtype=at.dtype)
        for owner in range(len(self.ranks)):
            found[owner::len(self.ranks)] = self.share(owner, source, at).cpu()
        return found

    def step(self, rank: int) -> int:
        return int(self.areas[rank][STEP_AT:STEP_AT + 4].view(torch.int32))

    def synchronize(self) -> None:
        for i, rank in enumerate(self.ranks):
            with rank.use():
                rank.check(rank.api.cuStreamSynchronize(rank.stream))
            torch.cuda.synchronize(i)

    def wait(self, seconds: float) -> float:
        """Until all streams have ended. Fails after so many seconds; returns how long it took."""
        start = time.monotonic()
        while not all(rank.ended() for rank in self.ranks):
            assert time.monotonic() < start + seconds, f"still running after {seconds} s"
            time.sleep(0.001)
        return time.monotonic() - start


class Call:
    """One operator on every rank. arguments: a rank's each; outputs: where some of them are, by their numbers; want: the
    kernel that must be chosen, if not sm90's own. Behind it `buffers` are the arguments in memory, a rank's each."""

    def __init__(self, group: Group, op: str, arguments: Sequence[Mapping[str, Argument | At]],
                 outputs: Mapping[int, At] | None = None, want: str | None = None) -> None:
        self.group, self.given = group, arguments
        self.outputs: list[list[Tensor | At]] = []
        self.calls: list[list[Any]] = []
        self.buffers: list[dict[str, Tensor]] = []
        self._poisoned: list[Tensor] = []
        self._counters: list[Tensor] = []
        flags = group.flags()
        planned = [self._instantiate(op, own, want or f"sm90_{op}") for own in arguments]
        binaries = build_all([launch.source for _, launches in planned for launch in launches], TARGET, processes=1)
        for rank, own, (spec, launches) in zip(group.ranks, arguments, planned, strict=True):
            area = group.areas[rank.number]
            named = {"exchange": area.data_ptr(), "flags": area.data_ptr() + flags}
            buffers = {k: v.to(area.device).contiguous() for k, v in own.items() if isinstance(v, Tensor)}
            for name, layout in spec.layouts.items():
                buffers[name] = REFERENCES[layout](*(buffers[s] for s in layout_sources(name, layout))).contiguous()
            self.buffers.append(buffers)
            named |= {k: v.data_ptr() for k, v in buffers.items()}
            named |= {k: area.data_ptr() + v.offset for k, v in own.items() if isinstance(v, At)}
            shapes = getattr(torch.ops.gptoss, op)(*map(_meta, own.values()))
            out: list[Tensor | At] = []
            for i, shape in enumerate(shapes if isinstance(shapes, tuple | list) else (shapes,)):
                at = (outputs or {}).get(i)
                out.append(at or self._empty(TensorSpec(tuple(shape.shape), DTYPE_NAMES[shape.dtype]), area))  # type: ignore[arg-type]
                named[f"out{i}"] = area.data_ptr() + at.offset if at else out[-1].data_ptr()  # type: ignore[union-attr]
            self.outputs.append(out)
            for launch in launches:
                for name, buffer in launch.common:
                    if name not in named:
                        named[name] = self._empty(buffer, area).data_ptr()
            self.calls.append([self._call(rank, launch, binaries[key_of(launch.source, TARGET)], dict(named), area)
                               for launch in launches])
        group.synchronize()

    @staticmethod
    def _instantiate(op: str, own: Mapping[str, Argument | At], want: str) -> tuple[Any, tuple[Launch, ...]]:
        operands = {name: TensorSpec(v.shape, DTYPE_NAMES[v.dtype]) if isinstance(v, At) else spec_of(v)  # type: ignore[arg-type]
                    for name, v in own.items()}
        spec = chosen(op, operands)
        assert spec.name == want, f"{op} runs {spec.name}, not {want}"
        return spec, spec.instantiate(TARGET, operands)

    def _empty(self, spec: TensorSpec, area: Tensor) -> Tensor:
        self._poisoned.append(torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device=area.device))
        return self._poisoned[-1]

    def _call(self, rank: Rank, launch: Launch, binary: Any, named: dict[str, int], area: Tensor) -> Any:
        for i, buffer in enumerate(launch.scratch):
            scratch = torch.zeros(buffer.shape, dtype=DTYPES[buffer.dtype], device=area.device)
            (self._counters if i in launch.zeroed else self._poisoned).append(scratch)
            named[f"scratch{i}"] = scratch.data_ptr()
        kernel = rank.load(binary, launch.carveout)
        return _parameters(rank, kernel, launch.grid, [named[a] for a in launch.args])  # type: ignore[arg-type]

    def counters_are_zero(self) -> bool:
        return not any(bool(counter.any()) for counter in self._counters)

    def poison(self) -> None:
        """0xFF in what the kernels write outside of the exchange area. Not while anything runs."""
        self.group.synchronize()
        for buffer in self._poisoned:
            buffer.view(torch.uint8).fill_(0xFF)
        self.group.synchronize()

    def launch(self, ranks: Sequence[int] | None = None) -> None:
        """On all ranks, or on some; waits for nothing."""
        for rank in self.group.ranks:
            if ranks is None or rank.number in ranks:
                self.launch_on(rank)

    def launch_on(self, rank: Rank) -> None:
        with rank.use():
            for config, function, parameters in self.calls[rank.number]:
                rank.check((*rank.api.cuLaunchKernelEx(config, function, parameters[0], 0), None))

    def output(self, rank: int, index: int) -> Tensor:
        found = self.outputs[rank][index]
        return self.group.read(rank, found) if isinstance(found, At) else found

    def all_outputs(self, rank: int) -> list[Tensor]:
        return [self.output(rank, i) for i in range(len(self.outputs[rank]))]


def microseconds(group: Group, calls: Sequence[Call], *, repeats: int = 20, rounds: int = 5) -> float:
    """Median time of the calls, the last of which ends a step: `repeats` steps are a graph on each rank."""
    graphs, events = [], []
    for rank in group.ranks:
        mode = rank.api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        with rank.use():
            rank.check((*rank.api.cuStreamBeginCapture(rank.stream, mode), None))
            for _ in range(repeats):
                for call in calls:
                    call.launch_on(rank)
            graphs.append(rank.check(rank.api.cuGraphInstantiate(rank.check(rank.api.cuStreamEndCapture(rank.stream)), 0)))
            events.append([rank.check(rank.api.cuEventCreate(0)) for _ in range(2)])
    times = []
    for _ in range(rounds + 2):
        for rank, graph, (start, end) in zip(group.ranks, graphs, events, strict=True):
            with rank.use():
                rank.check((*rank.api.cuEventRecord(start, rank.stream), None))
                rank.check((*rank.api.cuGraphLaunch(graph, rank.stream), None))
                rank.check((*rank.api.cuEventRecord(end, rank.stream), None))
        group.wait(10)
        times.append(max(rank.check(rank.api.cuEventElapsedTime(*pair))
                         for rank, pair in zip(group.ranks, events, strict=True)) / repeats * 1e3)
    return float(sorted(times[2:])[rounds // 2])


def _meta(value: Argument | At) -> Any:
    if isinstance(value, At):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return value.to("meta") if isinstance(value, Tensor) else value
