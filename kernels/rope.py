"""rope_table: the cosines and sines of a step's positions, computed once and read by every layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton.language as tl
from torch import Tensor

from gptoss_compile.dialect import kernel_op
from gptoss_compile.kernels.common import cdiv, jit, launch, number, on_gpu, pow2, tensor, trigger, wait
from gptoss_compile.kernels.spec import KernelSpec, Launch, Operand, TensorSpec
from gptoss_compile.target import Target


def _fake(positions: Tensor, inv_freq: Tensor, scale: float) -> Tensor:
    return inv_freq.new_empty((positions.shape[0], 2, inv_freq.shape[0]))


@kernel_op("rope_table(Tensor positions, Tensor inv_freq, float scale) -> Tensor", fake=_fake)
def rope_table(positions: Tensor, inv_freq: Tensor, scale: float) -> Tensor:
    """[T, 2, D/2] fp32: scale·cos and scale·sin of positions [T] i32 times inv_freq [D/2] fp32 (radians)."""
    angle = positions.float().unsqueeze(-1) * inv_freq
    return torch.stack((angle.cos(), angle.sin()), 1) * scale


@jit
def sin_cos(angle: tl.tensor) -> tl.tensor:
    """(sine, cosine) of fp32 radians, to 1e-7 for |angle| < 1e6.

    angle = q·π/2 + r with |r| <= π/4, split in fp64; Taylor series of r; the quadrant q mod 4 swaps and negates. The
    library's functions would do, but keep a table in local memory for huge arguments that never come.
    """
    quarter = tl.floor(angle.to(tl.float64) * 0.6366197723675814 + 0.5)
    r = (angle.to(tl.float64) - quarter * 1.5707963267948966).to(tl.float32)
    q = quarter.to(tl.int32) & 3
    r2 = r * r
    s = r * (1 + r2 * (-1 / 6 + r2 * (1 / 120 + r2 * (-1 / 5040 + r2 * (1 / 362880)))))
    c = 1 + r2 * (-1 / 2 + r2 * (1 / 24 + r2 * (-1 / 720 + r2 * (1 / 40320 + r2 * (-1 / 3628800)))))
    sine = tl.where((q & 1) == 0, s, c)
    cosine = tl.where((q & 1) == 0, c, s)
    return tl.where(q >= 2, -sine, sine), tl.where((q == 1) | (q == 2), -cosine, cosine)


@jit
def rope_table_kernel(positions_ptr: tl.tensor, inv_freq_ptr: tl.tensor, out0_ptr: tl.tensor, T: tl.constexpr,
                      HALF: tl.constexpr, SCALE: tl.constexpr, BT: tl.constexpr, BLOCK: tl.constexpr,
                      PDL: tl.constexpr) -> tl.tensor:
    """Program i fills the rows of BT tokens."""
    trigger(PDL)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    f = tl.arange(0, BLOCK)
    position = tl.load(positions_ptr + t, mask=t < T, other=0).to(tl.float32)
    frequency = tl.load(inv_freq_ptr + f, mask=f < HALF, other=0.0)
    sine, cosine = sin_cos(position[:, None] * frequency[None, :])
    wait(PDL)
    out = out0_ptr + t[:, None] * (2 * HALF) + f[None, :]
    inside = (t < T)[:, None] & (f < HALF)[None, :]
    tl.store(out, cosine * SCALE, mask=inside)
    tl.store(out + HALF, sine * SCALE, mask=inside)


def instantiate(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    tokens, half = tensor(operands, "positions").shape[0], tensor(operands, "inv_freq").shape[0]
    out = TensorSpec((tokens, 2, half), "fp32")
    tile = min(pow2(tokens), 8)
    constants = {"T": tokens, "HALF": half, "SCALE": number(operands, "scale"), "BT": tile, "BLOCK": pow2(half)}
    return (launch(rope_table_kernel, target, {**operands, "out0": out}, constants, grid=cdiv(tokens, tile),
                   moved=out.bytes + 4 * tokens, flops=40 * tokens * half, preloads=("positions", "inv_freq")),)


SPECS = (KernelSpec("rope_table", "rope_table", on_gpu, instantiate),)
