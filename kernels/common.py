"""What all Triton kernels share: device helpers, and how a launch is described.

Conventions of the kernels. A pointer parameter is called like the operand it gets, with `_ptr` behind: an argument of
the operator, `outN` or `scratchN`. Everything else is a compile-time constant; shapes too, so pointers are the only
launch arguments. An optional operand is a pointer or the constant None. `PDL` says whether the target has programmatic
dependent launch. Blocks are powers of two, and masks cut them to the shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gptoss_compile.kernels.spec import CudaSource, DType, Launch, Operand, Pdl, Source, TensorSpec
from gptoss_compile.target import Target


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, typed."""
    return triton.jit(function)


@jit
def wait(PDL: tl.constexpr) -> tl.tensor:
    """Everything the previous kernel wrote is visible behind this. Every program must come here once."""
    if PDL:
        gdc_wait()


@jit
def trigger(PDL: tl.constexpr) -> tl.tensor:
    """Lets the next kernel start; it still waits for this one's end before it reads what this one writes."""
    if PDL:
        gdc_launch_dependents()


@jit
def mxfp4(packed: tl.tensor, scales: tl.tensor) -> tl.tensor:
    """fp32 [N, 2·K] of MXFP4 bytes [N, K] (low nibble first) and e8m0 scales [N, K/16], decoded in registers.

    The nibble s|ee|m goes to bits 15|11,10|9 of an fp16, which then is 2^-14 times its value (denormals included); the
    block's scale 2^(s - 127) times 2^14 restores it. Exact for scales s <= 240.
    """
    bits = packed.to(tl.int16)
    even = ((bits & 7) << 9) | ((bits & 8) << 12)
    odd = ((bits & 112) << 5) | ((bits & 128) << 8)
    values = tl.join(even, odd).to(tl.float16, bitcast=True).to(tl.float32)
    factor = (scales.to(tl.int32) << 23).to(tl.float32, bitcast=True) * 16384.0
    blocks = tl.reshape(values, (scales.shape[0], scales.shape[1], 32)) * factor[:, :, None]
    return tl.reshape(blocks, (packed.shape[0], 2 * packed.shape[1]))


@jit
def expert_tile(weight_ptr: tl.tensor, scales_ptr: tl.tensor, expert: tl.tensor, rows: tl.tensor,
                start: tl.tensor, N: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
                DTYPE: tl.constexpr) -> tl.tensor:
    """Rows `rows`, columns start … start + BK of an expert's [N, K] weights: [len(rows), BK] in DTYPE, 0 outside.

    MXFP4 if there are scales.
    """
    inside = (rows < N)[:, None]
    row = expert.to(tl.int64) * N + rows[:, None]
    if scales_ptr is None:
        k = start + tl.arange(0, BK)
        return tl.load(weight_ptr + row * K + k[None, :], mask=inside & (k < K)[None, :], other=0.0).to(DTYPE)
    else:
        byte = start // 2 + tl.arange(0, BK // 2)
        block = start // 32 + tl.arange(0, BK // 32)
        packed = tl.load(weight_ptr + row * (K // 2) + byte[None, :], mask=inside & (byte < K // 2)[None, :], other=0)
        scales = tl.load(scales_ptr + row * (K // 32) + block[None, :], mask=inside & (block < K // 32)[None, :],
                         other=0)
        return mxfp4(packed, scales).to(DTYPE)


@jit
def swiglu(gate: tl.tensor, up: tl.tensor, ALPHA: tl.constexpr, LIMIT: tl.constexpr) -> tl.tensor:
    """g · sigmoid(ALPHA · g) · (u + 1) with g = min(gate, LIMIT), u = clamp(up, ±LIMIT)."""
    gate = tl.minimum(gate, LIMIT)
    up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    return gate / (1.0 + tl.exp(-ALPHA * gate)) * (up + 1.0)


@jit
def is_last(counter_ptr: tl.tensor, ARRIVALS: tl.constexpr) -> tl.tensor:
    """True in the last of ARRIVALS programs that come here, which then sees what the others stored before.

    The counter must be zero before the kernel and is zero behind it. Read the others' data with `cache_modifier=".cg"`:
    the first-level cache may hold older lines.
    """
    tl.debug_barrier()  # all threads' stores before the one thread's release
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == ARRIVALS - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


def pow2(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def tensor(operands: Mapping[str, Operand], name: str) -> TensorSpec:
    value = operands[name]
    assert isinstance(value, TensorSpec), f"operand {name} is {value}, not a tensor"
    return value


def integer(operands: Mapping[str, Operand], name: str) -> int:
    value = operands[name]
    assert isinstance(value, int), f"operand {name} is {value}, not an integer"
    return value


def number(operands: Mapping[str, Operand], name: str) -> float:
    value = operands[name]
    assert isinstance(value, int | float), f"operand {name} is {value}, not a number"
    return float(value)


def on_gpu(target: Target, operands: Mapping[str, Operand]) -> bool:
    """`supports` of a kernel that runs everywhere."""
    return target.is_gpu


def launch(function: Any, target: Target, operands: Mapping[str, Operand], constants: Mapping[str, Any], *, grid: int,
           moved: int, flops: int = 0, scratch: Sequence[TensorSpec] = (), zeroed: tuple[int, ...] = (),
           common: Mapping[str, TensorSpec] | None = None, preloads: tuple[str, ...] = (), late_trigger: bool = False,
           promises: tuple[str, ...] = (), num_warps: int = 4, num_stages: int = 3) -> Launch:
    """A launch of `function` on a one-dimensional grid.

    operands: the operator's arguments and its outputs as out0, out1, …; constants: the function's constants but PDL.
    """
    shared = dict(common or {})
    tensors: dict[str, Operand] = {**operands, **shared, **{f"scratch{i}": spec for i, spec in enumerate(scratch)}}
    values = {**constants, "PDL": target.has("pdl")}
    signature, constexprs, args = [], [], []
    for parameter in function.arg_names:
        operand = parameter.removesuffix("_ptr")
        if operand == parameter:
            signature.append((parameter, "constexpr"))
            constexprs.append((parameter, values[parameter]))
        elif isinstance(spec := tensors.get(operand), TensorSpec):
            signature.append((parameter, "*" + spec.dtype))
            args.append(operand)
        else:
            signature.append((parameter, "constexpr"))
            constexprs.append((parameter, None))
    source = Source(function, tuple(signature), tuple(constexprs), num_warps, num_stages)
    pdl = Pdl(preloads, "after_wait" if late_trigger else "early")
    return Launch(source, (grid, 1, 1), tuple(args), tuple(scratch), zeroed, tuple(shared.items()), pdl, moved, flops,
                  promises)


def cuda_launch(file: str, symbol: str, defines: Mapping[str, int | float | str], args: Sequence[str], *,
                grid: int | tuple[int, int, int], threads: int, moved: int, flops: int = 0, shared: int = 0,
                carveout: int = -1, scratch: Sequence[TensorSpec] = (), zeroed: tuple[int, ...] = (),
                common: Mapping[str, TensorSpec] | None = None, preloads: tuple[str, ...] = (),
                late_trigger: bool = False, promises: tuple[str, ...] = ()) -> Launch:
    """A launch of a kernel in CUDA C++. args: what each parameter gets, see `Launch.args`."""
    source = CudaSource(file, symbol, tuple(defines.items()), threads, shared)
    pdl = Pdl(preloads, "after_wait" if late_trigger else "early")
    return Launch(source, (grid, 1, 1) if isinstance(grid, int) else grid, tuple(args), tuple(scratch), zeroed,
                  tuple((common or {}).items()), pdl, moved, flops, promises, carveout)


def mma(target: Target, *, narrow: bool = False) -> tuple[str, ...]:
    """The instruction that `tl.dot` of bf16 must become: the warpgroup's or the tensor memory's, where there is one.

    narrow: the tile has fewer than 64 rows, for which neither exists.
    """
    if narrow:
        return ()
    return ("HGMMA",) if target.has("wgmma") else ("UTCHMMA",) if target.has("tcgen05") else ()


def total_bytes(*specs: Operand) -> int:
    return sum(spec.bytes for spec in specs if isinstance(spec, TensorSpec))


def touched_experts(experts: int, pairs: int) -> float:
    """How many distinct experts `pairs` uniformly random choices name, on average."""
    return experts * (1 - (1 - 1 / experts) ** pairs)


def dtype_of(operands: Mapping[str, Operand], name: str) -> DType:
    return tensor(operands, name).dtype
