"""norm_route: RMSNorm, the router's logits, top-k and the softmax over those k, in one kernel.

The experts are shared out over programs; each leaves its logits in scratch, and the last one to arrive for a tile of
tokens chooses. The kernel triggers its dependents only behind its own wait: whoever starts behind it may then read
what was written before this kernel (`moe_gate_up` reads x).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton.language as tl
from torch import Tensor

from gptoss_compile.dialect import kernel_op
from gptoss_compile.kernels.common import (
    cdiv,
    integer,
    is_last,
    jit,
    launch,
    number,
    on_gpu,
    pow2,
    tensor,
    total_bytes,
    trigger,
    wait,
)
from gptoss_compile.kernels.maths import rms_norm
from gptoss_compile.kernels.norm_linear import FEW_TOKENS, row_blocks
from gptoss_compile.kernels.spec import KernelSpec, Launch, Operand, TensorSpec
from gptoss_compile.target import Target


def _route_fake(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor, eps: float,
                top_k: int) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], top_k)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int32)


@kernel_op("norm_route(Tensor x, Tensor norm_weight, Tensor weight, Tensor bias, float eps, int top_k)"
           " -> (Tensor, Tensor)", fake=_route_fake)
def norm_route(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor, eps: float,
               top_k: int) -> tuple[Tensor, Tensor]:
    """Probabilities [T, A] fp32 and experts [T, A] i32, best first, the lowest id first on ties.

    x [T, H], weight [E, H], bias [E]. The softmax runs over the A chosen logits.
    """
    logits = rms_norm(x, norm_weight, eps) @ weight.float().T + bias.float()
    best, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    return best[:, :top_k].softmax(-1), ids[:, :top_k].int()


@jit
def choose(logits_ptr: tl.tensor, probs_ptr: tl.tensor, ids_ptr: tl.tensor, t: tl.tensor, T: tl.constexpr,
           E: tl.constexpr, EP: tl.constexpr, TOP_K: tl.constexpr, AP: tl.constexpr) -> tl.tensor:
    """The best TOP_K experts of tokens t and the softmax over their logits, from logits [T, E] to probs and ids."""
    e = tl.arange(0, EP)
    a = tl.arange(0, AP)
    logits = tl.load(logits_ptr + t[:, None] * E + e[None, :], mask=(t < T)[:, None] & (e < E)[None, :], other=0.0,
                     cache_modifier=".cg")
    logits = tl.where(e[None, :] < E, logits, float("-inf"))
    best = tl.max(logits, 1)
    weights = tl.zeros((t.shape[0], AP), tl.float32)
    for i in tl.static_range(TOP_K):
        top, index = tl.max(logits, 1, return_indices=True, return_indices_tie_break_left=True)
        weights = tl.where(a[None, :] == i, tl.exp(top - best)[:, None], weights)
        tl.store(ids_ptr + t * TOP_K + i, index, mask=t < T)
        logits = tl.where(e[None, :] == index[:, None], float("-inf"), logits)
    probs = weights / tl.sum(weights, 1)[:, None]
    tl.store(probs_ptr + t[:, None] * TOP_K + a[None, :], probs, mask=(t < T)[:, None] & (a < TOP_K)[None, :])


@jit
def route_few_kernel(x_ptr: tl.tensor, norm_weight_ptr: tl.tensor, weight_ptr: tl.tensor, bias_ptr: tl.tensor,
                     out0_ptr: tl.tensor, out1_ptr: tl.tensor, scratch0_ptr: tl.tensor, scratch1_ptr: tl.tensor,
                     T: tl.constexpr, E: tl.constexpr, H: tl.constexpr, EPS: tl.constexpr, TOP_K: tl.constexpr,
                     ROWS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, TP: tl.constexpr,
                     EP: tl.constexpr, AP: tl.constexpr, PDL: tl.constexpr) -> tl.tensor:
    """Program i: logits of experts i·ROWS … for all T tokens. H is cut into HEAD and TAIL as in norm_linear."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, HEAD)
    row = weight_ptr + n[:, None] * H
    w = tl.load(row + k[None, :], mask=(n < E)[:, None], other=0.0).to(tl.float32)
    w *= tl.load(norm_weight_ptr + k).to(tl.float32)[None, :]
    if TAIL > 0:
        k_tail = HEAD + tl.arange(0, TAIL)
        w_tail = tl.load(row + k_tail[None, :], mask=(n < E)[:, None] & (k_tail < H)[None, :], other=0.0)
        w_tail = w_tail.to(tl.float32)
        w_tail *= tl.load(norm_weight_ptr + k_tail, mask=k_tail < H, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(bias_ptr + n, mask=n < E, other=0.0).to(tl.float32)
    wait(PDL)
    trigger(PDL)
    for t in tl.static_range(T):
        x = tl.load(x_ptr + t * H + k).to(tl.float32)
        squares = tl.sum(x * x)
        y = tl.sum(w * x[None, :], 1)
        if TAIL > 0:
            x = tl.load(x_ptr + t * H + k_tail, mask=k_tail < H, other=0.0).to(tl.float32)
            squares += tl.sum(x * x)
            y += tl.sum(w_tail * x[None, :], 1)
        tl.store(scratch0_ptr + t * E + n, y * tl.rsqrt(squares / H + EPS) + bias, mask=n < E)
    if is_last(scratch1_ptr, (E + ROWS - 1) // ROWS):
        choose(scratch0_ptr, out0_ptr, out1_ptr, tl.arange(0, TP), T, E, EP, TOP_K, AP)


@jit
def route_tiled_kernel(x_ptr: tl.tensor, norm_weight_ptr: tl.tensor, weight_ptr: tl.tensor, bias_ptr: tl.tensor,
                       out0_ptr: tl.tensor, out1_ptr: tl.tensor, scratch0_ptr: tl.tensor,
                       scratch1_ptr: tl.tensor, T: tl.constexpr, E: tl.constexpr, H: tl.constexpr,
                       EPS: tl.constexpr, TOP_K: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr,
                       BK: tl.constexpr, EP: tl.constexpr, AP: tl.constexpr, PDL: tl.constexpr) -> tl.tensor:
    """Program (tile of tokens, block of experts), experts fastest: logits [BE, BT], then the choice by the last one.

    x · norm_weight goes into the product as the sum of two values of the weights' type, so that its rounding does not
    decide which expert wins.
    """
    parts: tl.constexpr = (E + BE - 1) // BE
    n = tl.program_id(0) % parts * BE + tl.arange(0, BE)
    tile = tl.program_id(0) // parts
    t = tile * BT + tl.arange(0, BT)
    k = tl.arange(0, BK)
    row = weight_ptr + n[:, None] * H
    line = x_ptr + t[:, None] * H
    bias = tl.load(bias_ptr + n, mask=n < E, other=0.0).to(tl.float32)
    w = tl.load(row + k[None, :], mask=(n < E)[:, None] & (k < H)[None, :], other=0.0)
    wait(PDL)
    trigger(PDL)
    acc = tl.zeros((BE, BT), tl.float32)
    squares = tl.zeros((BT,), tl.float32)
    for start in range(0, H, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(line + k[None, :], mask=(t < T)[:, None] & (k < H)[None, :], other=0.0).to(tl.float32)
        squares += tl.sum(x * x, 1)
        x *= tl.load(norm_weight_ptr + k, mask=k < H, other=0.0).to(tl.float32)[None, :]
        coarse = x.to(w.dtype)
        acc = tl.dot(w, tl.trans(coarse), acc, input_precision="ieee")
        acc = tl.dot(w, tl.trans((x - coarse.to(tl.float32)).to(w.dtype)), acc, input_precision="ieee")
        k += BK
        w = tl.load(row + k[None, :], mask=(n < E)[:, None] & (k < H)[None, :], other=0.0)
    logits = acc * tl.rsqrt(squares / H + EPS)[None, :] + bias[:, None]
    tl.store(scratch0_ptr + t[None, :] * E + n[:, None], logits, mask=(n < E)[:, None] & (t < T)[None, :])
    if is_last(scratch1_ptr + tile, parts):
        choose(scratch0_ptr, out0_ptr, out1_ptr, t, T, E, EP, TOP_K, AP)


def instantiate(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    (tokens, hidden), experts = tensor(operands, "x").shape, tensor(operands, "weight").shape[0]
    top_k = integer(operands, "top_k")
    outputs = {"out0": TensorSpec((tokens, top_k), "fp32"), "out1": TensorSpec((tokens, top_k), "i32")}
    constants = {"T": tokens, "E": experts, "H": hidden, "EPS": number(operands, "eps"), "TOP_K": top_k,
                 "EP": pow2(experts), "AP": pow2(top_k)}
    logits = TensorSpec((tokens, experts), "fp32")
    moved, flops = total_bytes(*operands.values(), *outputs.values()), 2 * tokens * experts * hidden
    if tokens <= FEW_TOKENS:
        head, tail = row_blocks(hidden)
        rows = 2
        constants |= {"ROWS": rows, "HEAD": head, "TAIL": tail, "TP": pow2(tokens)}
        return (launch(route_few_kernel, target, {**operands, **outputs}, constants, grid=cdiv(experts, rows),
                       scratch=(logits, TensorSpec((1,), "i32")), zeroed=(1,), late_trigger=True,
                       preloads=("weight", "norm_weight", "bias"), num_warps=8, moved=moved,
                       flops=flops),)
    block, tile = min(max(pow2(experts), 16), 32), min(max(pow2(tokens), 16), 32)
    tiles = cdiv(tokens, tile)
    constants |= {"BE": block, "BT": tile, "BK": 64}
    return (launch(route_tiled_kernel, target, {**operands, **outputs}, constants, grid=tiles * cdiv(experts, block),
                   scratch=(logits, TensorSpec((tiles,), "i32")), zeroed=(1,), late_trigger=True,
                   preloads=("weight", "bias"), moved=moved, flops=flops),)


SPECS = (KernelSpec("norm_route", "norm_route", on_gpu, instantiate),)
