"""norm_linear, linear_residual, norm_head: dense projections with RMSNorm in front or a residual behind.

Two kernels serve all three. `linear_few_kernel` holds its rows of the weights in registers before the wait and runs
through the tokens; `linear_tiled_kernel` multiplies tiles on the tensor cores, weights as the left operand, so that a
handful of tokens (the columns) still fills a matrix instruction. RMSNorm's factor is a property of the token, hence of
the column: both kernels multiply by norm_weight on the way in, sum the squares beside the product, scale at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gptoss_compile.dialect import kernel_op
from gptoss_compile.kernels.common import (
    cdiv,
    jit,
    launch,
    mma,
    on_gpu,
    pow2,
    tensor,
    total_bytes,
    trigger,
    wait,
)
from gptoss_compile.kernels.maths import rms_norm
from gptoss_compile.kernels.spec import KernelSpec, Launch, Operand, TensorSpec
from gptoss_compile.target import Target

FEW_TOKENS = 4


def _linear_fake(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@kernel_op("norm_linear(Tensor x, Tensor norm_weight, Tensor weight, Tensor bias, float eps) -> Tensor",
           fake=_linear_fake)
def norm_linear(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """rmsnorm(x) Wᵀ + b: [T, N] of x [T, H], norm_weight [H], weight [N, H], bias [N]."""
    return (rms_norm(x, norm_weight, eps) @ weight.float().T + bias.float()).to(x.dtype)


@kernel_op("linear_residual(Tensor x, Tensor weight, Tensor bias, Tensor residual) -> Tensor",
           fake=lambda x, weight, bias, residual: residual.new_empty(residual.shape))
def linear_residual(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """x Wᵀ + b + residual: [T, H] of x [T, K], weight [H, K], bias [H], residual [T, H]."""
    return (x.float() @ weight.float().T + bias.float() + residual.float()).to(residual.dtype)


def _head_fake(x: Tensor, rows: Tensor | None, norm_weight: Tensor, weight: Tensor, eps: float) -> Tensor:
    count = x.shape[0] if rows is None else rows.shape[0]
    return x.new_empty((count, weight.shape[0]), dtype=torch.float32)


@kernel_op("norm_head(Tensor x, Tensor? rows, Tensor norm_weight, Tensor weight, float eps) -> Tensor",
           fake=_head_fake)
def norm_head(x: Tensor, rows: Tensor | None, norm_weight: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Logits rmsnorm(x[rows]) Wᵀ: [R, V] fp32 of x [T, H], rows [R] i32 (None: every row), weight [V, H]."""
    chosen = x if rows is None else x[rows.long()]
    return rms_norm(chosen, norm_weight, eps) @ weight.float().T


@jit
def row_of(rows_ptr: tl.tensor, t: tl.tensor, T: tl.constexpr) -> tl.tensor:
    """The row of x that output row t is made of."""
    if rows_ptr is None:
        return t
    else:
        return tl.load(rows_ptr + t, mask=t < T, other=0)


@jit
def normed(x: tl.tensor, norm_weight_ptr: tl.tensor, k: tl.tensor, K: tl.constexpr) -> tl.tensor:
    """fp32 x[..., k] times norm_weight[k] if there is one."""
    if norm_weight_ptr is None:
        return x
    else:
        return x * tl.load(norm_weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)


@jit
def linear_few_kernel(x_ptr: tl.tensor, rows_ptr: tl.tensor, norm_weight_ptr: tl.tensor, weight_ptr: tl.tensor,
                      bias_ptr: tl.tensor, residual_ptr: tl.tensor, out0_ptr: tl.tensor, T: tl.constexpr,
                      N: tl.constexpr, K: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr,
                      HEAD: tl.constexpr, TAIL: tl.constexpr, PDL: tl.constexpr) -> tl.tensor:
    """Program i: output columns i·ROWS … of all T tokens, out[t, n] = Σ_k W[n, k] x[t, k].

    K is cut into two blocks, HEAD (the largest power of two <= K) and TAIL (0 if there is no rest).
    """
    trigger(PDL)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, HEAD)
    row = weight_ptr + n[:, None] * K
    w = tl.load(row + k[None, :], mask=(n < N)[:, None], other=0.0)
    if TAIL > 0:
        k_tail = HEAD + tl.arange(0, TAIL)
        w_tail = tl.load(row + k_tail[None, :], mask=(n < N)[:, None] & (k_tail < K)[None, :], other=0.0)
    wait(PDL)
    for t in tl.static_range(T):
        line = x_ptr + row_of(rows_ptr, t, T) * K
        x = tl.load(line + k).to(tl.float32)
        squares = tl.sum(x * x)
        y = tl.sum(w.to(tl.float32) * normed(x, norm_weight_ptr, k, K)[None, :], 1)
        if TAIL > 0:
            x = tl.load(line + k_tail, mask=k_tail < K, other=0.0).to(tl.float32)
            squares += tl.sum(x * x)
            y += tl.sum(w_tail.to(tl.float32) * normed(x, norm_weight_ptr, k_tail, K)[None, :], 1)
        if norm_weight_ptr is not None:
            y *= tl.rsqrt(squares / K + EPS)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            y += tl.load(residual_ptr + t * N + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(out0_ptr + t * N + n, y.to(out0_ptr.dtype.element_ty), mask=n < N)


@jit
def multiply(acc: tl.tensor, squares: tl.tensor, w: tl.tensor, line: tl.tensor, start: tl.tensor,
             inside: tl.tensor, norm_weight_ptr: tl.tensor, K: tl.constexpr, BK: tl.constexpr) -> tl.tensor:
    """One K step: (acc [BN, BT] + w [BN, BK] · xᵀ, squares [BT] + Σ x²) with x = the lines' columns from `start`."""
    k = start + tl.arange(0, BK)
    x = tl.load(line[:, None] + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
    if norm_weight_ptr is not None:
        squares += tl.sum(x * x, 1)
        x *= tl.load(norm_weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    return tl.dot(w, tl.trans(x.to(w.dtype)), acc, input_precision="ieee"), squares


@jit
def linear_tiled_kernel(x_ptr: tl.tensor, rows_ptr: tl.tensor, norm_weight_ptr: tl.tensor,
                        weight_ptr: tl.tensor, bias_ptr: tl.tensor, residual_ptr: tl.tensor,
                        out0_ptr: tl.tensor, T: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
                        EPS: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
                        PDL: tl.constexpr) -> tl.tensor:
    """Program (i, j), j fastest: BN output columns of BT tokens. The first tile of weights is loaded before the wait."""
    trigger(PDL)
    token_tiles: tl.constexpr = (T + BT - 1) // BT
    n = tl.program_id(0) // token_tiles * BN + tl.arange(0, BN)
    t = tl.program_id(0) % token_tiles * BT + tl.arange(0, BT)
    k = tl.arange(0, BK)
    row = weight_ptr + n[:, None] * K
    w = tl.load(row + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
    wait(PDL)
    line = x_ptr + row_of(rows_ptr, t, T) * K
    acc = tl.zeros((BN, BT), tl.float32)
    squares = tl.zeros((BT,), tl.float32)
    acc, squares = multiply(acc, squares, w, line, 0, t < T, norm_weight_ptr, K, BK)
    for start in range(BK, K, BK):
        k = start + tl.arange(0, BK)
        w = tl.load(row + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
        acc, squares = multiply(acc, squares, w, line, start, t < T, norm_weight_ptr, K, BK)
    if norm_weight_ptr is not None:
        acc *= tl.rsqrt(squares / K + EPS)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    inside = (n < N)[:, None] & (t < T)[None, :]
    place = t[None, :] * N + n[:, None]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out0_ptr + place, acc.to(out0_ptr.dtype.element_ty), mask=inside)


def row_blocks(inner: int) -> tuple[int, int]:
    """(HEAD, TAIL) of a row of `inner` weights."""
    head = 1 << (inner.bit_length() - 1)
    return head, pow2(inner - head) if inner > head else 0


def _linear(target: Target, operands: Mapping[str, Operand], out: TensorSpec) -> tuple[Launch, ...]:
    """The launch that fills `out` [T, N] for any of the three operators."""
    weight = tensor(operands, "weight")
    (tokens, features), inner = out.shape, weight.shape[1]
    constants: dict[str, Any] = {"T": tokens, "N": features, "K": inner, "EPS": operands.get("eps", 0.0)}
    moved, flops = total_bytes(*operands.values(), out), 2 * tokens * features * inner
    all_operands = {**operands, "out0": out}
    if tokens <= FEW_TOKENS:
        head, tail = row_blocks(inner)
        rows = min(pow2(max(1, 65536 // (pow2(inner) * 2))), 16)
        constants |= {"ROWS": rows, "HEAD": head, "TAIL": tail}
        return (launch(linear_few_kernel, target, all_operands, constants, grid=cdiv(features, rows),
                       preloads=("weight",), num_warps=8, moved=moved, flops=flops),)
    tile = min(max(pow2(tokens), 16), 128 if weight.dtype == "bf16" else 32)
    token_tiles = cdiv(tokens, tile)
    wide = next((n for n in (128, 64) if features // n * token_tiles >= target.processors), 32)
    constants |= {"BN": wide, "BT": tile, "BK": 64 if weight.dtype == "bf16" else 32}
    promises = mma(target, narrow=wide < 64) if weight.dtype == "bf16" else ()
    warps = 8 if wide * tile >= 128 * 128 else 4
    return (launch(linear_tiled_kernel, target, all_operands, constants, grid=cdiv(features, wide) * token_tiles,
                   preloads=("weight",), promises=promises, num_warps=warps, moved=moved, flops=flops),)


def norm_linear_launch(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    x, weight = tensor(operands, "x"), tensor(operands, "weight")
    return _linear(target, operands, TensorSpec((x.shape[0], weight.shape[0]), x.dtype))


def linear_residual_launch(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    return _linear(target, operands, tensor(operands, "residual"))


def norm_head_launch(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    rows = operands["rows"]
    count = (rows if isinstance(rows, TensorSpec) else tensor(operands, "x")).shape[0]
    return _linear(target, operands, TensorSpec((count, tensor(operands, "weight").shape[0]), "fp32"))


SPECS = (
    KernelSpec("norm_linear", "norm_linear", on_gpu, norm_linear_launch),
    KernelSpec("linear_residual", "linear_residual", on_gpu, linear_residual_launch),
    KernelSpec("norm_head", "norm_head", on_gpu, norm_head_launch),
)
