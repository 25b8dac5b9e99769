"""cuda.bindings.driver without a GPU: device memory is host memory, and kernels are their operators' references.

Types and enums are the real package's. Launches are taken as the executor makes them: a kernel finds its tensors through the
pointers in its parameters, so a wrong place, a wrong order or a wrong shape gives other numbers than the interpreter's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from cuda.bindings import driver as real

from gptoss_compile.dialect import OPS
from gptoss_compile.kernels import registry  # noqa: F401
from gptoss_compile.launch_plan import KernelLaunch, LaunchPlan, Operand, Step
from gptoss_compile.random_weights import FP32, PARAMETERS
from gptoss_compile.trace import DTYPES

OK = real.CUresult.CUDA_SUCCESS
PDL = real.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


@dataclass
class Captured:
    """A recorded launch."""

    config: Any
    function: Any
    parameters: int

    @property
    def pdl(self) -> bool:
        return any(attribute.id == PDL for attribute in self.config.attrs[: self.config.numAttrs])


@dataclass
class FakeDriver:
    """What a test may set: the machine, `failing` (function name -> status), `drop_pdl`; `calls` counts what was called.

    Whoever runs a step says first which plan's launches will come (`expect`).
    """

    version: int = 13000
    capability: tuple[int, int] = (9, 0)
    memory: int = 1 << 30
    devices: int = 1
    init: Any = OK
    failing: dict[str, Any] = field(default_factory=dict)
    drop_pdl: bool = False
    codes: dict[bytes, str] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.blocks: dict[int, np.ndarray[Any, Any]] = {}
        self.sizes: dict[int, int] = {}
        self.capturing: list[Captured] | None = None
        self.todo: Iterator[tuple[Step, KernelLaunch]] = iter(())
        self.around: dict[str, Step] = {}
        self.seen: dict[str, int] = {}  # the addresses that a step's launches so far were given
        self.laid: dict[int, list[torch.Tensor]] = {}  # what lies, laid out, at an address
        self.shapes: dict[str, tuple[int, ...]] = {}

    def expect(self, plan: LaunchPlan, shapes: dict[str, tuple[int, ...]], times: int = 1) -> None:
        """The plan's steps, so often; what stands around them may come when it wants. shapes: of caches and state.

        Libraries' functions are called for real; a graph does not call them again.
        """
        self.todo = iter([(step, launch) for step in plan.steps for launch in step.launches
                          if isinstance(launch, KernelLaunch)] * times)
        self.around = {step.launches[0].binary: step for step in (plan.feed, plan.sample) if step}
        self.shapes = shapes

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            return getattr(real, name)

        def call(*args: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            if name in self.failing:
                return (self.failing[name],)
            result = getattr(self, f"_{name}", lambda *_: None)(*args)
            if isinstance(result, tuple) and result and isinstance(result[0], real.CUresult):
                return result
            return (OK,) if result is None else (OK, *result) if isinstance(result, tuple) else (OK, result)

        return call

    # The machine --------------------------------------------------------------------------------------------

    def _cuInit(self, flags: int) -> tuple[Any, ...]:
        return (self.init,)

    def _cuDriverGetVersion(self) -> int:
        return self.version

    def _cuDeviceGetCount(self) -> int:
        return self.devices

    def _cuDeviceGet(self, ordinal: int) -> int:
        return ordinal

    def _cuDeviceGetName(self, size: int, device: int) -> bytes:
        return b"Fake GPU\0\0"

    def _cuDeviceGetAttribute(self, attribute: Any, device: int) -> int:
        return self.capability["MINOR" in attribute.name]

    def _cuGetErrorString(self, status: Any) -> bytes:
        return b"in words"

    def _cuDevicePrimaryCtxRetain(self, device: int) -> str:
        return "context"

    def _cuStreamCreate(self, flags: Any) -> int:
        return 0

    def _cuEventCreate(self, flags: int) -> str:
        return "event"

    # Memory -------------------------------------------------------------------------------------------------

    @property
    def used(self) -> int:
        return sum(self.sizes.values())

    def _cuMemGetInfo(self) -> tuple[int, int]:
        return self.memory - self.used, self.memory

    def _cuMemAlloc(self, size: int) -> Any:
        if self.used + size > self.memory:
            return (real.CUresult.CUDA_ERROR_OUT_OF_MEMORY, 0)
        address = self._cuMemHostAlloc(size, 0)
        self.sizes[address] = size
        return address

    def _cuMemHostAlloc(self, size: int, flags: int) -> int:
        block = np.full(size + 256, 0xA5, np.uint8)  # nobody may take it for zeros
        address = -(-block.ctypes.data // 256) * 256
        self.blocks[address] = block
        return address

    def _cuMemFree(self, address: int) -> None:
        del self.blocks[address], self.sizes[address]

    def _cuMemFreeHost(self, address: int) -> None:
        del self.blocks[address]

    def _cuMemsetD8Async(self, address: int, byte: int, size: int, stream: Any) -> None:
        ctypes.memset(address, byte, size)

    def _cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: Any) -> None:
        ctypes.memmove(target, source, size)

    def _cuMemcpyDtoHAsync(self, target: int, source: int, size: int, stream: Any) -> None:
        ctypes.memmove(target, source, size)

    def _cuMemcpy2DAsync(self, copy: Any, stream: Any) -> None:
        assert (copy.srcMemoryType, copy.dstMemoryType) == (real.CUmemorytype.CU_MEMORYTYPE_HOST,
                                                            real.CUmemorytype.CU_MEMORYTYPE_DEVICE)
        for row in range(copy.Height):
            source, target = int(copy.srcHost) + row * copy.srcPitch, int(copy.dstDevice) + row * copy.dstPitch
            ctypes.memmove(target, source, copy.WidthInBytes)

    # Kernels and graphs -------------------------------------------------------------------------------------

    def _cuModuleLoadData(self, code: bytes) -> str:
        return self.codes[code]

    def _cuModuleGetFunction(self, module: str, symbol: bytes) -> str:
        assert module.startswith(symbol.decode())
        return module

    def _cuLaunchKernelEx(self, config: Any, function: str, parameters: int, extra: int) -> None:
        launch = Captured(config, function, parameters)
        if self.capturing is None:
            self._execute(launch)
        else:
            self.capturing.append(launch)

    def _cuFuncGetAttribute(self, attribute: Any, function: str) -> int:
        return 0  # no kernel here is made for clusters

    def _cuStreamBeginCapture(self, stream: Any, mode: Any) -> None:
        self.capturing = []

    def _cuStreamEndCapture(self, stream: Any) -> list[Captured] | None:
        captured, self.capturing = self.capturing, None
        return captured

    def _cuGraphGetEdges(self, graph: list[Captured], count: int) -> tuple[Any, ...]:
        kinds = [int(launch.pdl and not self.drop_pdl) for launch in graph[1:]]
        edges = [SimpleNamespace(type=kind, from_port=kind) for kind in kinds[:count]]
        return edges, edges, edges, len(kinds)

    def _cuGraphInstantiate(self, graph: list[Captured], flags: int) -> list[Captured]:
        return graph

    def _cuGraphLaunch(self, graph: list[Captured], stream: Any) -> None:
        for launch in graph:
            self._execute(launch)

    def _execute(self, captured: Captured) -> None:
        if captured.function.startswith("random_weights"):
            return self._generate(captured)
        if captured.function.startswith(("tiles", "mxfp4")):
            return self._lay_out(captured)
        if (found := self.arguments(captured)) is None:
            return
        step, at = found
        operands = {name: self._operand(name, value, at) if isinstance(value, Operand) else value
                    for name, value in step.operands.items()}
        results = OPS[step.op].reference(**operands)
        results = results if isinstance(results, tuple) else (results,)
        for i, (operand, result) in enumerate(zip(step.outputs, results, strict=True)):
            name = OPS[step.op].updates.get(i, f"out{i}")
            self._tensor(operand, at[name]).copy_(result)

    def arguments(self, captured: Captured) -> tuple[Step, dict[str, int]] | None:
        """The step whose last launch this is, and where its tensors are; None for one of the launches before."""
        around = self.around.get(captured.function)
        step, launch = (around, around.launches[0]) if around else next(self.todo)
        assert isinstance(launch, KernelLaunch) and captured.function == launch.binary
        c = captured.config
        assert (c.gridDimX, c.gridDimY, c.gridDimZ) == launch.grid and captured.pdl == launch.pdl
        count = len(launch.args) + 2
        table = (ctypes.POINTER(ctypes.c_uint64) * count).from_address(captured.parameters)
        values = [pointer.contents.value for pointer in table]
        assert values[-2:] == [0, 0], "the two scratch pointers"
        self.seen |= dict(zip(launch.args, values, strict=False))
        if launch is not step.launches[-1]:
            return None
        at, self.seen = self.seen, {}
        return step, at

    def _operand(self, name: str, operand: Operand, at: dict[str, int]) -> torch.Tensor:
        if name not in at:  # scales, which lie within their weight
            return self.laid[at["weight" if name == "scales" else name.removesuffix("_scales")]][1].view(operand.shape)
        if (laid := self.laid.get(at[name])) is not None:
            return laid[0].view(DTYPES[operand.dtype]).view(operand.shape)
        return self._tensor(operand, at[name])

    def _lay_out(self, captured: Captured) -> None:
        """Keeps the weight as it is, under the address where its layout would be: (parameters, source, scales, out)."""
        table = (ctypes.POINTER(ctypes.c_uint64) * 4).from_address(captured.parameters)
        row, source, scales, out = (pointer.contents.value for pointer in table)
        experts, rows, columns, _ = self._tensor(Operand("input", "parameters", "i32", (4,)), row).tolist()
        sizes = [(source, 2 * rows * columns)] if captured.function.startswith("tiles") else \
            [(source, experts * rows * columns // 2), (scales, experts * rows * columns // 32)]
        self.laid[out] = [self._tensor(Operand("weight", "", "u8", (size,)), at).clone() for at, size in sizes]

    def _generate(self, captured: Captured) -> None:
        """random_weights, which no plan announces: (parameters, out) and the two scratch pointers."""
        table = (ctypes.POINTER(ctypes.c_uint64) * 4).from_address(captured.parameters)
        row, out, *scratch = [pointer.contents.value for pointer in table]
        assert scratch == [0, 0] and out % 256 == 0
        parameters = self._tensor(Operand("input", "parameters", "i32", (PARAMETERS,)), row)
        _, _, counters, first, mode, *_ = parameters.tolist()
        target = self._tensor(Operand("weight", "out", "i32", (first + counters * (1 + (mode == FP32)),)), out)
        target.copy_(OPS["random_weights"].reference(parameters, target))

    def _tensor(self, operand: Operand, address: int) -> torch.Tensor:
        shape = self.shapes.get(str(operand.key), operand.shape)
        size = int(np.prod(shape)) * operand.item_bytes
        raw = (ctypes.c_uint8 * size).from_address(address)
        return torch.frombuffer(raw, dtype=torch.uint8).view(DTYPES[operand.dtype]).view(shape)
