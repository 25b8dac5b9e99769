"""cuda.bindings.driver of a host with several GPUs, each at its own pace, which exchange through each other's memory.

Each GPU is a `FakeDriver` with a queue for its stream: what is put there runs when what is before it has run. A step that
exchanges runs when all GPUs have come to it, so whoever waits for one GPU before the others have work waits for ever, which
is an AssertionError here. A GPU in `stalled` does nothing any more; the others report it after the limit that the header of
their area sets.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from cuda.bindings import driver as real
from fake_cuda import OK, Captured, FakeDriver

from gptoss_compile.dialect import OPS, exchanged
from gptoss_compile.kernels.exchange import ONE_SHOT_TOKENS
from gptoss_compile.launch_plan import LaunchPlan, Operand, Step
from gptoss_compile.runtime.exchange_cuda import HEADER
from gptoss_compile.trace import DTYPES

PUSHED = ("slots", "shares")  # places in the memory of other ranks
QUEUED = ("cuMemsetD8Async", "cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuMemcpy2DAsync")  # their last argument: the stream
TAG = 0xFF800000


class Machine(FakeDriver):
    """One GPU of a host. Its kernels find those of its peers through the headers of their exchange areas."""

    host: FakeHost
    number: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self.queue: deque[Callable[[], bool]] = deque()  # each says whether it is done, and is asked again if not
        self.broken: Any = OK
        self.meeting: tuple[Step, dict[str, int]] | None = None  # the exchange at which it waits, with its addresses
        self.waits_since: float | None = None

    def pump(self) -> bool:
        """Run what can run; whether anything did."""
        ran = False
        while self.queue and self.broken == OK and self.number not in self.host.stalled and self.queue[0]():
            self.queue.popleft()
            ran = True
        return ran

    def header(self, address: int) -> Any:
        return np.frombuffer((ctypes.c_uint8 * HEADER.itemsize).from_address(address), HEADER)[0]

    def run_step(self, step: Step, at: dict[str, int]) -> bool:
        """Whether it could run: an exchange waits until all are there."""
        info = OPS[step.op]
        operands = {name: self._operand(name, value, at) if isinstance(value, Operand) and value.place not in PUSHED
                    else value for name, value in step.operands.items()}
        if info.exchange:
            parts = self.exchange(step, at)
            if parts is None:
                return False
            operands[next(iter(operands))] = exchanged(info.exchange, parts)
        results = info.reference(**operands)
        for i, (operand, result) in enumerate(zip(step.outputs, results if isinstance(results, tuple) else (results,),
                                                  strict=True)):
            address = at[info.updates.get(i, f"out{i}")]
            if operand.place == "slots":
                self.push(operand, address, result, at["exchange"])
            elif operand.place == "shares":
                for rank, place in enumerate(self.shares(operand, address, self.number, at["exchange"])):
                    self.rows(operand, place, rank).copy_(result[rank :: len(self.host.machines)])
            else:
                self._tensor(operand, address).copy_(result)
        if step.op == "all_gather":
            where = at["exchange"] + HEADER.fields["step"][1]  # type: ignore[index]
            ctypes.c_uint32.from_address(where).value += 1
        return True

    def push(self, operand: Operand, address: int, values: torch.Tensor, area: int) -> None:
        """Every value with the tag of the step into this rank's slots on every rank."""
        header = self.header(area)
        assert header["rank"] == self.number and header["ranks"] == len(self.host.machines)
        pairs = np.stack([values.numpy().view(np.uint32).reshape(-1),
                          np.full(values.numel(), header["step"] | TAG, np.uint32)], 1)
        for base in header["base"][: header["ranks"]].tolist():
            place = address - area + base + self.number * 2 * operand.bytes
            ctypes.memmove(place, pairs.ctypes.data, pairs.nbytes)

    def shares(self, operand: Operand, address: int, source: int, area: int) -> list[int]:
        """Where the shares of a rank's partial sum are, in each rank's area."""
        header = self.header(area)
        part = -(-operand.shape[0] // int(header["ranks"])) * (operand.bytes // operand.shape[0])
        return [address - area + base + source * part for base in header["base"][: header["ranks"]].tolist()]

    def rows(self, operand: Operand, address: int, rank: int) -> torch.Tensor:
        """Those of a partial sum that are in a rank's share."""
        rows = len(range(rank, operand.shape[0], len(self.host.machines)))
        return self._tensor(replace(operand, shape=(rows, *operand.shape[1:])), address)

    def exchange(self, step: Step, at: dict[str, int]) -> list[torch.Tensor] | None:
        """All ranks' parts in rank order, when all have come here; after the limit, which is reported, zeros."""
        operand = next(iter(step.operands.values()))
        assert isinstance(operand, Operand)
        header, machines = self.header(at["exchange"]), self.host.machines
        if (met := self.host.arrive(self, step, at)) is None:
            self.waits_since = self.waits_since or time.perf_counter()
            report = ctypes.c_uint32.from_address(int(header["report"]))
            if not report.value and time.perf_counter() - self.waits_since < header["limit_ms"] / 1000:
                return None
            missing = next((m.number for m in machines if m is not self and m.meeting is None), self.number)
            report.value = report.value or 1 + missing
            self.meeting = self.waits_since = None
            return [torch.zeros(operand.shape) for _ in machines]
        self.waits_since = None
        return met

    def parts(self, step: Step, at: dict[str, int], meeting: Sequence[tuple[Step, dict[str, int]]]) -> list[torch.Tensor]:
        """What this machine finds of all ranks."""
        name, operand = next(iter(step.operands.items()))
        assert isinstance(operand, Operand)
        header, found = self.header(at["exchange"]), []
        for rank, base in enumerate(header["base"][: len(meeting)].tolist()):
            if operand.place == "slots":
                start = at[name] + rank * 2 * operand.bytes
                pairs = np.frombuffer((ctypes.c_uint8 * (2 * operand.bytes)).from_address(start), np.uint32).reshape(-1, 2)
                assert (pairs[:, 1] == (header["step"] | TAG)).all(), f"{step.op}: slots of rank {rank} are of another step"
                found.append(torch.from_numpy(pairs[:, 0].copy().view(np.float32)).view(operand.shape))
            elif operand.place == "shares":
                whole = torch.empty(operand.shape, dtype=DTYPES[operand.dtype])
                for owner, place in enumerate(self.shares(operand, at[name], rank, at["exchange"])):
                    whole[owner :: len(meeting)] = self.rows(operand, place, owner)
                found.append(whole)
            else:
                place, (theirs, places) = at[name] - int(header["base"][self.number]) + base, meeting[rank]
                assert places[name] == place, f"{step.op}: not at the same place of every rank's area"
                found.append(self._tensor(theirs.operands[name], place).clone())  # type: ignore[arg-type]
        return found

    def _execute(self, captured: Captured) -> None:
        raise AssertionError("everything goes through the queue")

    def task(self, captured: Captured) -> Callable[[], bool]:
        """A launch, as what is put into the queue."""
        if captured.function.startswith("random_weights"):
            return lambda: self._generate(captured) is None
        if captured.function.startswith(("tiles", "mxfp4")):
            return lambda: self._lay_out(captured) is None
        found = self.arguments(captured)
        return lambda: found is None or self.run_step(*found)


@dataclass
class FakeHost:
    """What a test may set: `apart` (pairs of GPUs without access to each other), `stalled`, and each of the `machines`."""

    count: int
    memory: int
    apart: set[tuple[int, int]] = field(default_factory=set)
    stalled: set[int] = field(default_factory=set)
    calls: list[tuple[str, int]] = field(default_factory=list)  # (function, the GPU whose context was current)

    def __post_init__(self) -> None:
        self.machines = [Machine(memory=self.memory, devices=self.count) for _ in range(self.count)]
        for number, machine in enumerate(self.machines):
            machine.host, machine.number = self, number
        self.lock = threading.RLock()  # as the driver, any thread may call it at any time
        self.own = threading.local()
        self.events: dict[int, list[Any]] = {}  # (its GPU, how often it was recorded, how many of these the stream passed)
        self.peers: set[tuple[int, int]] = set()
        self.left: set[int] = set()  # those that have still to run the exchange to which all have come
        self.find: list[Callable[[], list[torch.Tensor]]] = []  # what each of them finds there

    @property
    def current(self) -> int:
        """The GPU whose context is this thread's."""
        return getattr(self.own, "current", 0)

    def expect(self, number: int, plan: LaunchPlan, shapes: dict[str, tuple[int, ...]], times: int) -> None:
        self.machines[number].expect(plan, shapes, times)

    def arrive(self, machine: Machine, step: Step, at: dict[str, int]) -> list[torch.Tensor] | None:
        """What is exchanged, when all have come to this exchange. From most none goes on before all have read."""
        if machine.number not in self.left:
            machine.meeting = machine.meeting or (step, at)
            if self.left or any(m.meeting is None for m in self.machines):
                return None
            meeting = [m.meeting for m in self.machines if m.meeting]
            assert len({known.op for known, _ in meeting}) == 1, "ranks meet in different steps"
            self.left = set(range(self.count))
            self.find = [functools.partial(m.parts, *own, meeting) for m, own in zip(self.machines, meeting, strict=True)]
            if step.op == "all_gather" or step.outputs[0].shape[0] > ONE_SHOT_TOKENS:
                self.find = [functools.partial(list, find()) for find in self.find]
        self.left.remove(machine.number)
        machine.meeting = None
        return self.find[machine.number]()

    def pump(self) -> None:
        while any([machine.pump() for machine in self.machines]):
            pass

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            return getattr(real, name)

        def answer(*args: Any) -> tuple[Any, ...]:
            self.calls.append((name, self.current))
            machine = self.machines[self.current]
            if name in machine.failing:
                return (machine.failing[name],)
            if (own := getattr(self, f"_{name}", None)) is not None:
                result = own(*args)
            elif name in QUEUED:
                assert args[-1] == self.current, f"{name}: another GPU's context is current"
                if name == "cuMemcpy2DAsync":
                    numbers = ("srcHost", "dstDevice", "srcPitch", "dstPitch", "WidthInBytes", "Height")
                    copy = SimpleNamespace(**{n: int(getattr(args[0], n)) for n in numbers})
                    copy.srcMemoryType, copy.dstMemoryType = args[0].srcMemoryType, args[0].dstMemoryType
                    args = (copy, args[1])
                work = getattr(machine, f"_{name}")
                machine.queue.append(lambda: work(*args) is None)
                self.pump()
                return (OK,)
            else:
                return tuple(getattr(machine, name)(*args))
            return (OK,) if result is None else result if isinstance(result, tuple) else (OK, result)

        def call(*args: Any) -> tuple[Any, ...]:
            with self.lock:
                return answer(*args)

        return call

    # What is not one GPU's own ------------------------------------------------------------------------------

    def _cuDevicePrimaryCtxRetain(self, device: int) -> str:
        return f"context {device}"

    def _cuDeviceGetName(self, size: int, device: int) -> Any:
        return (OK, b"Fake GPU\0")

    def _cuCtxSetCurrent(self, context: str) -> None:
        self.own.current = int(context.split()[1])

    def _cuDeviceCanAccessPeer(self, device: int, peer: int) -> int:
        return int((device, peer) not in self.apart)

    def _cuCtxEnablePeerAccess(self, context: str, flags: int) -> Any:
        pair = self.current, int(context.split()[1])
        if pair in self.peers:
            return (real.CUresult.CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED,)
        self.peers.add(pair)
        return None

    def _cuMemHostAlloc(self, size: int, flags: int) -> int:
        assert flags == real.CU_MEMHOSTALLOC_PORTABLE | real.CU_MEMHOSTALLOC_DEVICEMAP, "not usable from all GPUs"
        return self.machines[self.current]._cuMemHostAlloc(size, flags)

    def _cuMemHostGetDevicePointer(self, address: int, flags: int) -> int:
        return address

    def _cuStreamCreate(self, flags: Any) -> int:
        return self.current

    def _cuEventCreate(self, flags: int) -> int:
        self.events[len(self.events)] = [self.current, 0, 0]
        return len(self.events) - 1

    def _cuEventRecord(self, event: int, stream: int) -> None:
        known = self.events[event]
        assert known[0] == stream, "an event of another GPU"
        known[1] += 1
        number = known[1]

        def passed() -> bool:
            known[2] = number
            return True

        self.machines[stream].queue.append(passed)
        self.pump()

    def _cuEventQuery(self, event: int) -> Any:
        self.pump()
        device, recorded, passed = self.events[event]
        if self.machines[device].broken != OK:
            return (self.machines[device].broken,)
        return None if recorded == passed else (real.CUresult.CUDA_ERROR_NOT_READY,)

    def _cuEventSynchronize(self, event: int) -> None:
        assert self._cuEventQuery(event) is None, "this waits for ever"

    def _cuEventElapsedTime(self, start: int, end: int) -> float:
        assert self.events[start][0] == self.events[end][0], "events of different GPUs"
        return 1.0

    def _cuStreamQuery(self, stream: int) -> Any:
        self.pump()
        machine = self.machines[stream]
        if machine.broken != OK:
            return (machine.broken,)
        return (real.CUresult.CUDA_ERROR_NOT_READY,) if machine.queue else None

    def _cuStreamSynchronize(self, stream: int) -> Any:
        found = self._cuStreamQuery(stream)
        assert found is None or found[0] != real.CUresult.CUDA_ERROR_NOT_READY, "this waits for ever"
        return found

    def _cuLaunchKernelEx(self, config: Any, function: str, parameters: int, extra: int) -> None:
        machine = self.machines[self.current]
        assert int(config.hStream) == self.current, "another GPU's context is current"
        launch = Captured(config, function, parameters)
        if machine.capturing is not None:
            machine.capturing.append(launch)
            return
        machine.queue.append(machine.task(launch))
        self.pump()

    def _cuGraphLaunch(self, graph: list[Captured], stream: int) -> None:
        assert stream == self.current, "another GPU's context is current"
        machine = self.machines[stream]
        machine.queue.extend(machine.task(launch) for launch in graph)
        self.pump()
