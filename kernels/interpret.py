"""Runs any kernel on a CPU, through Triton's interpreter, to compare it with its twin.

Whether a kernel is interpreted is decided when its module is imported, so kernels run in a process of their own. Outputs
and scratch start as 0xFF bytes (NaN in every float format), and lie between guard bytes that must not change. What the
interpreter gets wrong is replaced: it rounds half of the fp32 values to the wrong bf16 and multiplies the bit patterns
of bf16 matrices. It knows neither programmatic dependent launch nor block-scaled MMA; kernels do without under a constant.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

GUARD = 256  # bytes on either side of a buffer
POISON = 0xFF

Value = Tensor | int | float | None


class KernelMisbehaved(AssertionError):
    """A kernel wrote outside its buffers or left a counter that is not zero."""


def interpret(kernel: str, target: str, operands: Mapping[str, Value]) -> tuple[Tensor, ...]:
    """The outputs of the KernelSpec named `kernel`, instantiated for a target, on CPU operands keyed by the schema.

    Raises KernelMisbehaved, and AssertionError if the kernel does not support the target.
    """
    outputs: tuple[Tensor, ...] = _process().submit(_run, kernel, target, dict(operands)).result()
    return outputs


@cache
def _process() -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(1, get_context("spawn"))
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"  # must be there before the new process imports anything
    try:
        pool.submit(_prepare).result()
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
    atexit.register(pool.shutdown)
    return pool


def _prepare() -> None:
    """In the process that interprets: repair the interpreter."""
    torch.set_num_threads(1)
    import triton.language as tl
    from triton.runtime import interpreter

    kinds = {tl.bfloat16: torch.bfloat16, tl.float16: torch.float16, tl.float32: torch.float32,
             tl.float64: torch.float64, tl.float8e4nv: torch.float8_e4m3fn}
    raw = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}

    def convert(data: Any, source: Any, result: Any, _rounding: Any = None) -> Any:
        bits = torch.frombuffer(bytearray(data.tobytes()), dtype=raw[source.primitive_bitwidth])
        values = bits.view(kinds[source]).to(kinds[result])
        return values.view(raw[result.primitive_bitwidth]).numpy().reshape(data.shape)

    def dot(_builder: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        def wide(x: Any) -> Any:
            return convert(x.data, tl.bfloat16, tl.float32).view("float32") if x.dtype.scalar == tl.bfloat16 else x.data

        return interpreter.TensorHandle(wide(a) @ wide(b) + d.data, d.dtype.scalar)

    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot


def _run(kernel: str, target_name: str, operands: dict[str, Value]) -> tuple[Tensor, ...]:
    from gptoss_compile.dialect import OPS
    from gptoss_compile.kernels.registry import BESIDE, SPECS
    from gptoss_compile.kernels.spec import DType, Launch, Source, TensorSpec
    from gptoss_compile.target import Target

    spec = next(s for s in (*SPECS, *BESIDE) if s.name == kernel)
    target = Target.parse(target_name)
    names: dict[torch.dtype, DType] = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32",
                                       torch.uint8: "u8"}
    dtypes = {name: dtype for dtype, name in names.items()}
    described: dict[str, Any] = {k: TensorSpec(tuple(v.shape), names[v.dtype]) if isinstance(v, Tensor) else v
                                 for k, v in operands.items()}
    assert spec.supports(target, described), f"{kernel} does not support {target_name}"
    updates = OPS[spec.op].updates
    with torch.device("meta"):
        meta = {k: torch.empty(v.shape, dtype=v.dtype) if isinstance(v, Tensor) else v for k, v in operands.items()}
        shapes = getattr(torch.ops.gptoss, spec.op)(**meta)
    shapes = shapes if isinstance(shapes, tuple) else (shapes,)
    buffers: dict[str, Tensor | None] = {k: v for k, v in operands.items() if isinstance(v, Tensor | None)}
    fences: list[Tensor] = []

    def allocate(shape: tuple[int, ...], dtype: torch.dtype, fill: int) -> Tensor:
        count = dtype.itemsize * torch.Size(shape).numel()
        memory = torch.full((count + 2 * GUARD,), POISON, dtype=torch.uint8)
        memory[GUARD : GUARD + count] = fill
        fences.extend((memory[:GUARD], memory[GUARD + count :]))
        return memory[GUARD : GUARD + count].view(dtype).view(shape)

    outputs = []
    for i, shape in enumerate(shapes):
        updated = operands[updates[i]] if i in updates else None
        outputs.append(updated if isinstance(updated, Tensor) else allocate(tuple(shape.shape), shape.dtype, POISON))
        buffers[f"out{i}"] = outputs[-1]
    launch: Launch
    for launch in spec.instantiate(target, described):
        assert isinstance(launch.source, Source), f"{kernel} is no Triton kernel"
        for name, shared in launch.common:
            if name not in buffers:
                buffers[name] = allocate(shared.shape, dtypes[shared.dtype], POISON)
        for j, scratch in enumerate(launch.scratch):
            fill = 0 if j in launch.zeroed else POISON
            buffers[f"scratch{j}"] = allocate(scratch.shape, dtypes[scratch.dtype], fill)
        constants = dict(launch.source.constexprs) | {"PDL": False}
        if "SCALED_MMA" in constants:
            constants["SCALED_MMA"] = False
        pointers = [name for name, kind in launch.source.signature if kind != "constexpr"]
        launch.source.function[launch.grid](**dict(zip(pointers, map(buffers.__getitem__, launch.args), strict=True)),
                                            **constants)
        for j in launch.zeroed:
            counter = buffers[f"scratch{j}"]
            if counter is None or bool(counter.any()):
                raise KernelMisbehaved(f"{kernel} does not leave scratch{j} zeroed")
    if any(bool((fence != POISON).any()) for fence in fences):
        raise KernelMisbehaved(f"{kernel} writes outside its buffers")
    return tuple(outputs)
