"""A bucket's launches, ready to go: one by one, or captured once as a CUDA graph that replays them.

Kernels that a plan marks `pdl` are launched with programmatic stream serialisation, which capture turns into
programmatic edges: such a kernel starts before its predecessor ends, and waits for it inside. Libraries of other projects'
kernels are called in their place.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptoss_compile.launch_plan import AnyLaunch, Extern, KernelLaunch, Operand, Step, Value
from gptoss_compile.runtime.cuda_driver import CudaError, Device, Kernel
from gptoss_compile.runtime.libraries import Call, view

_PROGRAMMATIC = (1, 1)  # (type, from_port) of an edge to a kernel that waits inside


@dataclass(frozen=True)
class Launch:
    """One kernel launch with its parameters in place. label: bucket, step, operator and kernel, for messages.

    keep: owns the memory that `parameters`, the address of a void*[], points to.
    """

    label: str
    config: Any
    function: Any
    parameters: int
    keep: Any
    pdl: bool

    def enqueue(self, device: Device) -> None:
        """Put it into the device's stream. Raises CudaError."""
        device.check(device.api.cuLaunchKernelEx(self.config, self.function, self.parameters, 0),
                     f"launching {self.label}")


AnyPrepared = Launch | Call
Loaded = Kernel | Callable[..., Any]  # a kernel, or a library's function
PlaceOf = Callable[[Operand], tuple[Operand, int]]  # an operand in its true shape, and its address


def prepare(device: Device, bucket: str, steps: Sequence[Step], kernels: Mapping[tuple[str, int], Loaded],
            place_of: PlaceOf) -> list[list[AnyPrepared]]:
    """The launches of each step. kernels: by binary and carve-out."""
    prepared = []
    for number, step in enumerate(steps):
        label = f"{bucket} step {number} ({step.op}, kernel {{}})"
        prepared.append([_prepare(device, label.format(launch.binary), step, launch, kernels[launch.binary, launch.carveout],
                                  place_of) for launch in step.launches])
    return prepared


def _prepare(device: Device, label: str, step: Step, launch: AnyLaunch, kernel: Loaded,
             place_of: PlaceOf) -> AnyPrepared:
    values = [_value(step, launch, name) for name in launch.args]
    if isinstance(launch, Extern):
        assert callable(kernel) and None not in values, f"{label}: {launch.args} are {values}"
        return Call(label, kernel, [view(*place_of(value), device) if isinstance(value, Operand) else value
                                    for value in values if value is not None])
    assert isinstance(kernel, Kernel)
    pointers = []
    for name, value in zip(launch.args, values, strict=True):
        assert isinstance(value, Operand), f"{step.op}: argument {name} is {value!r}, not a tensor"
        pointers.append(place_of(value)[1])
    return make_launch(device, label, launch, kernel, pointers)


def _value(step: Step, launch: AnyLaunch, name: str) -> Value:
    """What a launch calls `name`: an operand of the step, one of its outputs, or scratch, the launch's own or shared."""
    own = {**{f"out{i}": o for i, o in enumerate(step.outputs)}, **{f"scratch{i}": o for i, o in enumerate(launch.scratch)},
           **launch.common}
    return own[name] if name in own else step.operands[name]


def make_launch(device: Device, label: str, launch: KernelLaunch, kernel: Kernel, pointers: Sequence[int]) -> Launch:
    """Parameters: the pointers, then the two scratch pointers of Triton's kernels, here null; others ignore them."""
    values = (ctypes.c_uint64 * (len(pointers) + 2))(*pointers, 0, 0)
    start = ctypes.addressof(values)
    table = (ctypes.c_uint64 * len(values))(*(start + 8 * i for i in range(len(values))))
    config = device.api.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = launch.grid
    config.blockDimX, config.blockDimY, config.blockDimZ = kernel.threads, 1, 1
    config.sharedMemBytes, config.hStream = kernel.shared, device.stream
    if launch.pdl:
        attribute, value = device.api.CUlaunchAttribute(), device.api.CUlaunchAttributeValue()
        attribute.id = device.api.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        value.programmaticStreamSerializationAllowed = 1
        attribute.value = value
        config.attrs, config.numAttrs = [attribute], 1
    return Launch(label, config, kernel.function, ctypes.addressof(table), (values, table), launch.pdl)


class Graph:
    """All launches of a bucket, captured. programmatic: how many of its edges are."""

    def __init__(self, device: Device, bucket: str, launches: Sequence[AnyPrepared]) -> None:
        """Raises CudaError if a launch is refused or loses its programmatic attribute (drivers drop it silently)."""
        self._device, self._bucket = device, bucket
        self._launches = launches  # their parameters live as long as what replays them
        api, stream = device.api, device.stream
        mode = api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED  # the first call of a library loads its kernels
        device.check(api.cuStreamBeginCapture(stream, mode), f"capturing {bucket}")
        try:
            for launch in launches:
                launch.enqueue(device)
        except CudaError:
            api.cuStreamEndCapture(stream)  # ends the capture; what it returns is of no use
            raise
        graph = device.check(api.cuStreamEndCapture(stream), f"capturing {bucket}")
        self.programmatic = self._count_programmatic(graph)
        wanted = sum(launch.pdl for launch in launches[1:])  # before the first there is nothing to overlap with
        if self.programmatic != wanted:
            raise CudaError(f"capturing {bucket} gave {self.programmatic} programmatic edges instead of {wanted}: the "
                            "driver dropped the others' attribute")
        self._executable = device.check(api.cuGraphInstantiate(graph, 0), f"instantiating the graph of {bucket}")
        device.check(api.cuGraphDestroy(graph), f"destroying the template of {bucket}")

    def _count_programmatic(self, graph: Any) -> int:
        api, doing = self._device.api, f"reading the edges of {self._bucket}"
        *_, count = self._device.check(api.cuGraphGetEdges(graph, 0), doing)
        if not count:
            return 0
        _, _, edges, _ = self._device.check(api.cuGraphGetEdges(graph, count), doing)
        return sum((int(edge.type), int(edge.from_port)) == _PROGRAMMATIC for edge in edges)

    @property
    def device(self) -> Device:
        return self._device

    def replay(self) -> None:
        """Put all launches into the device's stream."""
        self._device.check(self._device.api.cuGraphLaunch(self._executable, self._device.stream),
                           f"replaying {self._bucket}")

    def close(self) -> None:
        self._device.api.cuGraphExecDestroy(self._executable)


class RankGraphs:
    """The graphs of all ranks, one a device, which run together."""

    def __init__(self, parts: Sequence[Graph]) -> None:
        self.parts = tuple(parts)
        self.programmatic = parts[0].programmatic
        self._alone = len(parts) == 1

    def replay(self) -> None:
        """Put all launches into the devices' streams."""
        if self._alone:
            return self.parts[0].replay()
        for part in self.parts:
            part.device.use()
            part.replay()

    def close(self) -> None:
        for part in self.parts:
            part.device.use()
            part.close()
