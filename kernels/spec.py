"""What a kernel is to the compiler: a source, launch geometry, a PDL contract and the cost of one launch.

The PyTorch twin of a kernel is the reference of its operator, declared with `dialect.kernel_op` in the same file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gptoss_compile.target import Target

DType = Literal["bf16", "fp32", "i32", "u8"]
BYTES: dict[str, int] = {"bf16": 2, "fp32": 4, "i32": 4, "u8": 1}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one operand; row-major and contiguous."""

    shape: tuple[int, ...]
    dtype: DType

    @property
    def bytes(self) -> int:
        size = BYTES[self.dtype]
        for extent in self.shape:
            size *= extent
        return size


Operand = TensorSpec | int | float | None


@dataclass(frozen=True)
class Pdl:
    """A kernel's programmatic-dependent-launch contract.

    preloads: operands that do not depend on the previous kernel and are read before `griddepcontrol.wait`: weights,
              inputs of the step, or what a kernel further back wrote. The last is sound only if every kernel launched
              between that one and this triggers `after_wait`, so that this one's start proves that one's end.
    trigger:  when the kernel lets its dependents start: `early` (first thing) or `after_wait`.
    """

    preloads: tuple[str, ...] = ()
    trigger: Literal["early", "after_wait"] = "early"


@dataclass(frozen=True)
class Source:
    """One compilable kernel: everything its machine code depends on, hence the cache key's input.

    Triton: `function` is the JIT function, `signature` its parameters in order (pointer types like `*bf16`, `i32`,
    `constexpr`), `constexprs` the compile-time values. Shapes are constexprs, so pointers are the only launch arguments.
    """

    function: Any
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, Any], ...]
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class CudaSource:
    """One compilable kernel in CUDA C++.

    file: in kernels/<target>/, beside the headers it includes; symbol: its `extern "C"` entry; defines: the compile-time
    values, shapes too, as macros. Pointers are the only launch arguments. shared: dynamic shared memory in bytes.
    """

    file: str
    symbol: str
    defines: tuple[tuple[str, int | float | str], ...]
    threads: int
    shared: int = 0


@dataclass(frozen=True)
class LibrarySource:
    """A function of a shared library that puts another project's kernels into the stream: no machine code that we launch.

    file: in kernels/<target>/, see `gptoss_compile.library`. It takes tensors, row-major, and numbers. It is called while a
    graph is captured, so what it does on the host must hold for every replay. Its kernels know nothing of programmatic
    dependent launch: they, and what comes behind them, start when all before has ended.
    """

    file: str
    function: str


AnySource = Source | CudaSource | LibrarySource


@dataclass(frozen=True)
class Launch:
    """One launch of a source, or one call of a library's function, whose grid says nothing.

    args:      for each pointer parameter in order the operand it gets: an argument name of the op's schema, `out0`,
               `out1`, ..., `scratch0`, ..., or a name in `common`. A library's function also gets numbers.
    scratch:   buffers only this launch uses. Those in `zeroed` must hold zeros at the first launch and are left zeroed.
    common:    (name, buffer) for what several launches of one operator's call share: equal names are one buffer.
    moved / flops: bytes that must move through device memory and operations, for the time floor.
    promises:  machine instructions the lint must find in the SASS, e.g. `HGMMA`.
    carveout:  the share of an SM's first-level memory, in percent, that is best shared memory (-1: the driver's choice).
    """

    source: AnySource
    grid: tuple[int, int, int]
    args: tuple[str, ...]
    scratch: tuple[TensorSpec, ...] = ()
    zeroed: tuple[int, ...] = ()
    common: tuple[tuple[str, TensorSpec], ...] = ()
    pdl: Pdl = field(default_factory=Pdl)
    moved: int = 0
    flops: int = 0
    promises: tuple[str, ...] = ()
    carveout: int = -1


@dataclass(frozen=True)
class KernelSpec:
    """A kernel of operator `op`.

    supports(target, operands) says whether this kernel can run it; instantiate(target, operands) gives the launches in
    order (one, as a rule). Operands are keyed by the schema's argument names. layouts: for the operands that are weights
    and must not lie in memory row by row, how they do (a name in `kernels.layouts`). key: of another project's kernel, the
    operands that its time depends on, by which the target's table says where it is faster than ours.
    """

    name: str
    op: str
    supports: Callable[[Target, Mapping[str, Operand]], bool]
    instantiate: Callable[[Target, Mapping[str, Operand]], tuple[Launch, ...]]
    layouts: Mapping[str, str] = field(default_factory=dict)
    key: Callable[[Mapping[str, Operand]], dict[str, int]] | None = None
