"""Runs one operator's kernel on the GPU, as an executor would: built, its weights laid out, launched in order."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptoss_compile import library
from gptoss_compile.build import build, build_all, key_of
from gptoss_compile.dialect import OPS
from gptoss_compile.kernels.layouts import REFERENCES, layout_sources
from gptoss_compile.kernels.registry import EXTERN, SPECS
from gptoss_compile.kernels.spec import KernelSpec, Launch, LibrarySource, TensorSpec
from gptoss_compile.launch_plan import Operand
from gptoss_compile.runtime.cuda_driver import CudaError, Device
from gptoss_compile.runtime.libraries import Call, load_function, view
from gptoss_compile.target import Target
from gptoss_compile.trace import DTYPE_NAMES, DTYPES

TARGET = Target.parse("sm90")
Argument = Tensor | int | float | None
_devices: list[Device] = []


def device() -> Device:
    """The GPU, in the context that PyTorch uses too. Skips the test where there is none."""
    if not _devices:
        try:
            _devices.append(Device.open("sm90"))
        except CudaError as error:
            pytest.skip(f"no sm90 GPU: {error}")
        if not torch.cuda.is_available():
            pytest.skip("PyTorch here was built without CUDA")
    return _devices[0]


def chosen(op: str, operands: Mapping[str, Any], want: str | None = None) -> KernelSpec:
    """The kernel of that name, if it is another project's; else the first that supports the operands."""
    specs = [s for s in EXTERN if s.name == want] or SPECS
    return next(s for s in specs if s.op == op and s.supports(TARGET, operands))


def library_function(source: LibrarySource) -> Callable[..., Any]:
    """From the file that $GPTOSS_GPU_LIBRARY names (its .json beside it), or compiled here. Skips the test if neither."""
    try:
        if given := os.environ.get("GPTOSS_GPU_LIBRARY"):
            path = Path(given)
            return load_function(path.stem, path.read_bytes(), json.loads(path.with_suffix(".json").read_bytes()))
        if missing := library.missing():
            pytest.skip(f"no library: GPTOSS_GPU_LIBRARY names none, and to compile it {', '.join(missing)} is missing")
        binary = build(source, TARGET)
        return load_function(binary.stem, binary.code, binary.metadata())
    except CudaError as error:
        pytest.skip(str(error))


def spec_of(value: Argument) -> Any:
    return TensorSpec(tuple(value.shape), DTYPE_NAMES[value.dtype]) if isinstance(value, Tensor) else value  # type: ignore[arg-type]


def run_kernel(op: str, arguments: Mapping[str, Argument], want: str | None = None, *, runs: int = 2) -> tuple[Tensor, ...]:
    """What the kernel that sm90 chooses for `op` returns, run `runs` times over: counters must be left as they were found.

    Outputs and scratch are poisoned before each run, but for those that update an argument. `want`: the kernel's name.
    """
    prepared = Prepared(op, arguments, want)
    for _ in range(runs):
        prepared.poison()
        prepared.launch()
    return prepared.outputs


class Prepared:
    """One operator's launches with all their buffers in place."""

    def __init__(self, op: str, arguments: Mapping[str, Argument], want: str | None = None) -> None:
        self.device = device()
        torch.cuda.synchronize()
        info, operands = OPS[op], {name: spec_of(value) for name, value in arguments.items()}
        spec = chosen(op, operands, want)
        assert want is None or spec.name == want, f"{op} runs {spec.name}, not {want}"
        launches = spec.instantiate(TARGET, operands)
        ours = [launch.source for launch in launches if not isinstance(launch.source, LibrarySource)]
        binaries = build_all(ours, TARGET, processes=8)
        self.buffers: dict[str, Tensor] = {k: v.cuda().contiguous() for k, v in arguments.items() if isinstance(v, Tensor)}
        for name, layout in spec.layouts.items():
            sources = [self.buffers[source] for source in layout_sources(name, layout)]
            self.buffers[name] = REFERENCES[layout](*sources).contiguous()
        meta = [v.to("meta") if isinstance(v, Tensor) else v for v in arguments.values()]
        shapes = getattr(torch.ops.gptoss, op)(*meta)
        shapes = shapes if isinstance(shapes, tuple | list) else (shapes,)
        self.outputs = tuple(self.buffers[info.updates[i]] if i in info.updates else
                             torch.empty(tuple(s.shape), dtype=s.dtype, device="cuda") for i, s in enumerate(shapes))
        self.poisoned = [o for i, o in enumerate(self.outputs) if i not in info.updates]
        named: dict[str, Any] = {**arguments, **self.buffers, **{f"out{i}": o for i, o in enumerate(self.outputs)}}
        for launch in launches:
            for name, buffer in launch.common:
                if name not in named:
                    named[name] = _empty(buffer)
                    self.poisoned.append(named[name])
        self.calls = [self._library_call(launch.source, [named[a] for a in launch.args])
                      if isinstance(launch.source, LibrarySource) else
                      self._call(launch, binaries[key_of(launch.source, TARGET)], dict(named)) for launch in launches]

    def _library_call(self, source: LibrarySource, arguments: Sequence[Any]) -> Callable[[], None]:
        views = [view(Operand("arena", 0, DTYPE_NAMES[value.dtype], tuple(value.shape)), value.data_ptr(), self.device)
                 if isinstance(value, Tensor) else value for value in arguments]
        call = Call(source.function, library_function(source), views)
        return lambda: call.enqueue(self.device)

    def _call(self, launch: Launch, binary: Any, named: dict[str, Any]) -> Callable[[], None]:
        for i, buffer in enumerate(launch.scratch):
            named[f"scratch{i}"] = _empty(buffer)
            if i in launch.zeroed:
                named[f"scratch{i}"].zero_()
            else:
                self.poisoned.append(named[f"scratch{i}"])
        kernel = self.device.load_kernel(binary.stem, binary.code, binary.metadata(), launch.carveout)
        tensors = [named[a] for a in launch.args]
        pointers = [tensor.data_ptr() for tensor in tensors]
        config, function, (parameters, *keep) = _parameters(self.device, kernel, launch.grid, pointers)

        def put(_: Any = (tensors, keep)) -> None:
            self.device.check(self.device.api.cuLaunchKernelEx(config, function, parameters, 0), "launching")

        return put

    def poison(self) -> None:
        """0xFF everywhere: NaN, or a negative number."""
        for buffer in self.poisoned:
            buffer.view(torch.uint8).fill_(0xFF)
        torch.cuda.synchronize()

    def launch(self, *, wait: bool = True) -> None:
        for put in self.calls:
            put()
        if wait:
            self.device.synchronize("running")


def _parameters(device: Device, kernel: Any, grid: tuple[int, int, int], pointers: Sequence[int]) -> tuple[Any, Any, Any]:
    values = (ctypes.c_uint64 * (len(pointers) + 2))(*pointers, 0, 0)
    start = ctypes.addressof(values)
    table = (ctypes.c_uint64 * len(values))(*(start + 8 * i for i in range(len(values))))
    config = device.api.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = kernel.threads, 1, 1
    config.sharedMemBytes, config.hStream = kernel.shared, device.stream
    attribute, value = device.api.CUlaunchAttribute(), device.api.CUlaunchAttributeValue()
    attribute.id = device.api.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    value.programmaticStreamSerializationAllowed = 1
    attribute.value = value
    config.attrs, config.numAttrs = [attribute], 1
    return config, kernel.function, (ctypes.addressof(table), values, table)


def _empty(spec: TensorSpec) -> Tensor:
    return torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device="cuda")


def milliseconds(prepared: Sequence[Prepared], *, rounds: int = 5) -> float:
    """Median time of one pass over all, captured as one graph with programmatic edges. Many, so that the L2 is cold."""
    device_, api = prepared[0].device, prepared[0].device.api
    mode = api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    device_.check(api.cuStreamBeginCapture(device_.stream, mode), "capturing")
    for each in prepared:
        each.launch(wait=False)
    graph = device_.check(api.cuStreamEndCapture(device_.stream), "capturing")
    executable = device_.check(api.cuGraphInstantiate(graph, 0), "instantiating")
    start, end, times = device_.new_event(), device_.new_event(), []
    for _ in range(rounds + 2):
        device_.record(start)
        device_.check(api.cuGraphLaunch(executable, device_.stream), "replaying")
        device_.record(end)
        device_.synchronize("replaying")
        times.append(device_.milliseconds(start, end))
    return sorted(times[2:])[rounds // 2]


def error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected| in the 2-norm; infinite where something is not finite."""
    difference = (got.double() - expected.double().to(got.device)).norm() / expected.double().norm().to(got.device)
    return float(difference) if torch.isfinite(difference) else float("inf")
