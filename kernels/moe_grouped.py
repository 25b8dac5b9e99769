"""moe_sort, moe_gate_up_grouped, moe_down_grouped, moe_combine: the experts of many tokens, grouped by expert.

`moe_sort` lists each expert's (token, expert) pairs; the products then read every expert's weights once a tile of
pairs. A pair is the flat index t·A + a. Weights as in moe.py. The products take weights as the left operand, decoded in
registers, and pairs as columns. How many tiles an expert has is known on the device only: the grid holds the most there
can be, a program finds its expert and tile from the counts, and those beyond the last tile leave.
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
    expert_tile,
    integer,
    jit,
    launch,
    mma,
    number,
    on_gpu,
    pow2,
    swiglu,
    tensor,
    total_bytes,
    trigger,
    wait,
)
from gptoss_compile.kernels.maths import experts_down, experts_up, ids_of_order, rms_norm
from gptoss_compile.kernels.maths import swiglu as swiglu_twin
from gptoss_compile.kernels.moe import expert_bytes
from gptoss_compile.kernels.spec import KernelSpec, Launch, Operand, TensorSpec
from gptoss_compile.target import Target


def _sort_fake(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    return ids.new_empty((experts, ids.shape[0])), ids.new_empty((experts,))


@kernel_op("moe_sort(Tensor ids, int experts) -> (Tensor, Tensor)", fake=_sort_fake)
def moe_sort(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """order [E, T] i32, the pairs routed to each expert, ascending, -1 beyond; count [E] i32, how many those are.

    ids [T, A] i32; the experts of one token are distinct.
    """
    tokens, top_k = ids.shape
    matches_ETA = ids[None] == torch.arange(experts, dtype=ids.dtype, device=ids.device)[:, None, None]
    member_ET = matches_ETA.any(-1)
    slot = torch.arange(tokens, device=ids.device)[None] * top_k + matches_ETA.int().argmax(-1)
    target = torch.where(member_ET, member_ET.int().cumsum(-1) - 1, tokens)  # the last column takes the others
    order = torch.full((experts, tokens + 1), -1, dtype=torch.int32, device=ids.device)
    order = order.scatter(1, target.long(), slot.int())[:, :tokens]
    return order.contiguous(), member_ET.sum(-1, dtype=torch.int32)


def _gate_up_fake(x: Tensor, norm_weight: Tensor, order: Tensor, count: Tensor, weight: Tensor,
                  scales: Tensor | None, bias: Tensor, eps: float, alpha: float, limit: float,
                  top_k: int) -> Tensor:
    return x.new_empty((x.shape[0], top_k, weight.shape[1] // 2))


@kernel_op("moe_gate_up_grouped(Tensor x, Tensor norm_weight, Tensor order, Tensor count, Tensor weight,"
           " Tensor? scales, Tensor bias, float eps, float alpha, float limit, int top_k) -> Tensor",
           fake=_gate_up_fake)
def moe_gate_up_grouped(x: Tensor, norm_weight: Tensor, order: Tensor, count: Tensor, weight: Tensor,
                        scales: Tensor | None, bias: Tensor, eps: float, alpha: float, limit: float,
                        top_k: int) -> Tensor:
    """`moe_gate_up` of pairs sorted by expert: [T, A, I]. x [T, H], order [E, T], count [E], bias [E, 2I]."""
    up = experts_up(rms_norm(x, norm_weight, eps), ids_of_order(order, top_k), weight, scales, bias)
    return swiglu_twin(up, alpha, limit).to(x.dtype)


def _down_fake(h: Tensor, order: Tensor, count: Tensor, weight: Tensor, *_: object) -> Tensor:
    return h.new_empty((h.shape[0], h.shape[1], weight.shape[1]))


@kernel_op("moe_down_grouped(Tensor h, Tensor order, Tensor count, Tensor weight, Tensor? scales,"
           " Tensor bias) -> Tensor", fake=_down_fake)
def moe_down_grouped(h: Tensor, order: Tensor, count: Tensor, weight: Tensor, scales: Tensor | None,
                     bias: Tensor) -> Tensor:
    """W[e] h + b[e] of every pair: [T, A, H]. h [T, A, I], order [E, T], count [E], bias [E, H]."""
    return experts_down(h, ids_of_order(order, h.shape[1]), weight, scales, bias).to(h.dtype)


@kernel_op("moe_combine(Tensor y, Tensor probs, Tensor residual) -> Tensor",
           fake=lambda y, probs, residual: residual.new_empty(residual.shape))
def moe_combine(y: Tensor, probs: Tensor, residual: Tensor) -> Tensor:
    """residual + sum over a of probs[a] y[a]: [T, H] of y [T, A, H], probs [T, A] fp32, residual [T, H]."""
    return (residual.float() + (y.float() * probs.unsqueeze(-1)).sum(1)).to(residual.dtype)


@jit
def moe_sort_kernel(ids_ptr: tl.tensor, out0_ptr: tl.tensor, out1_ptr: tl.tensor, T: tl.constexpr,
                    TOP_K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr) -> tl.tensor:
    """Program e lists the pairs of expert e."""
    trigger(PDL)
    e = tl.program_id(0)
    wait(PDL)
    found = tl.full((), 0, tl.int32)
    for start in range(0, T * TOP_K, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        mine = tl.load(ids_ptr + pair, mask=pair < T * TOP_K, other=-1) == e
        rank = found + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(out0_ptr + e * T + rank, pair, mask=mine)
        found += tl.sum(mine.to(tl.int32))
    tl.store(out1_ptr + e, found)
    for start in range(0, T, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        tl.store(out0_ptr + e * T + slot, tl.full((BLOCK,), -1, tl.int32), mask=(slot >= found) & (slot < T))


@jit
def find_tile(count_ptr: tl.tensor, order_ptr: tl.tensor, tile: tl.tensor, T: tl.constexpr, E: tl.constexpr,
              EP: tl.constexpr, BT: tl.constexpr) -> tl.tensor:
    """(expert, its pairs [BT], which of them exist) of a tile, tiles being counted expert by expert.

    Behind the last tile the expert is >= E.
    """
    e = tl.arange(0, EP)
    count = tl.load(count_ptr + e, mask=e < E, other=0)
    tiles = (count + BT - 1) // BT
    ends = tl.cumsum(tiles, 0)
    expert = tl.sum((ends <= tile).to(tl.int32))
    mine = e == expert
    slot = (tile - tl.sum(tl.where(mine, ends - tiles, 0))) * BT + tl.arange(0, BT)
    exists = slot < tl.sum(tl.where(mine, count, 0))
    return expert, tl.load(order_ptr + expert * T + slot, mask=exists, other=0), exists


@jit
def activated(acc: tl.tensor, bias_ptr: tl.tensor, n: tl.tensor, N: tl.constexpr, ALPHA: tl.constexpr,
              LIMIT: tl.constexpr) -> tl.tensor:
    """swiglu(acc + bias), [BN/2, BT], of acc [BN, BT] with gates in the even rows n and ups in the odd ones."""
    acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    pairs = tl.reshape(acc, (acc.shape[0] // 2, 2, acc.shape[1]))
    gate, up = tl.split(tl.permute(pairs, (0, 2, 1)))
    return swiglu(gate, up, ALPHA, LIMIT)


@jit
def moe_gate_up_grouped_kernel(x_ptr: tl.tensor, norm_weight_ptr: tl.tensor, order_ptr: tl.tensor,
                               count_ptr: tl.tensor, weight_ptr: tl.tensor, scales_ptr: tl.tensor,
                               bias_ptr: tl.tensor, out0_ptr: tl.tensor, T: tl.constexpr, E: tl.constexpr,
                               I: tl.constexpr, H: tl.constexpr, TOP_K: tl.constexpr, EPS: tl.constexpr,
                               ALPHA: tl.constexpr, LIMIT: tl.constexpr, EP: tl.constexpr, BN: tl.constexpr,
                               BT: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr) -> tl.tensor:
    """Program (tile, part), part fastest: weight rows part·BN …, that is BN/2 features, of BT pairs of one expert."""
    trigger(PDL)
    parts: tl.constexpr = (2 * I + BN - 1) // BN
    part = tl.program_id(0) % parts
    n = part * BN + tl.arange(0, BN)
    wait(PDL)
    expert, pair, exists = find_tile(count_ptr, order_ptr, tl.program_id(0) // parts, T, E, EP, BT)
    if expert < E:  # no early return: Triton's passes for Blackwell want structured control flow
        line = x_ptr + (pair // TOP_K)[:, None] * H
        acc = tl.zeros((BN, BT), tl.float32)
        squares = tl.zeros((BT,), tl.float32)
        for start in range(0, H, BK):
            k = start + tl.arange(0, BK)
            x = tl.load(line + k[None, :], mask=exists[:, None] & (k < H)[None, :], other=0.0).to(tl.float32)
            squares += tl.sum(x * x, 1)
            x *= tl.load(norm_weight_ptr + k, mask=k < H, other=0.0).to(tl.float32)[None, :]
            x = x.to(x_ptr.dtype.element_ty)
            acc = tl.dot(expert_tile(weight_ptr, scales_ptr, expert, n, start, 2 * I, H, BK, x.dtype), tl.trans(x), acc,
                         input_precision="ieee")
        acc *= tl.rsqrt(squares / H + EPS)[None, :]
        h = activated(acc, bias_ptr + expert * 2 * I, n, 2 * I, ALPHA, LIMIT)
        i = part * (BN // 2) + tl.arange(0, BN // 2)
        tl.store(out0_ptr + pair[None, :] * I + i[:, None], h.to(out0_ptr.dtype.element_ty),
                 mask=(i < I)[:, None] & exists[None, :])


@jit
def moe_down_grouped_kernel(h_ptr: tl.tensor, order_ptr: tl.tensor, count_ptr: tl.tensor, weight_ptr: tl.tensor,
                            scales_ptr: tl.tensor, bias_ptr: tl.tensor, out0_ptr: tl.tensor, T: tl.constexpr,
                            E: tl.constexpr, H: tl.constexpr, I: tl.constexpr, EP: tl.constexpr,
                            BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
                            PDL: tl.constexpr) -> tl.tensor:
    """Program (tile, part), part fastest: features part·BN … of BT pairs of one expert."""
    trigger(PDL)
    parts: tl.constexpr = (H + BN - 1) // BN
    n = tl.program_id(0) % parts * BN + tl.arange(0, BN)
    wait(PDL)
    expert, pair, exists = find_tile(count_ptr, order_ptr, tl.program_id(0) // parts, T, E, EP, BT)
    if expert < E:  # no early return: Triton's passes for Blackwell want structured control flow
        line = h_ptr + pair[:, None] * I
        acc = tl.zeros((BN, BT), tl.float32)
        for start in range(0, I, BK):
            k = start + tl.arange(0, BK)
            h = tl.load(line + k[None, :], mask=exists[:, None] & (k < I)[None, :], other=0.0)
            acc = tl.dot(expert_tile(weight_ptr, scales_ptr, expert, n, start, H, I, BK, h.dtype), tl.trans(h), acc,
                         input_precision="ieee")
        acc += tl.load(bias_ptr + expert * H + n, mask=n < H, other=0.0).to(tl.float32)[:, None]
        tl.store(out0_ptr + pair[None, :] * H + n[:, None], acc.to(out0_ptr.dtype.element_ty),
                 mask=(n < H)[:, None] & exists[None, :])


@jit
def moe_combine_kernel(y_ptr: tl.tensor, probs_ptr: tl.tensor, residual_ptr: tl.tensor, out0_ptr: tl.tensor,
                       H: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
                       PDL: tl.constexpr) -> tl.tensor:
    """Program (t, j), j fastest: columns j·BLOCK … of token t."""
    trigger(PDL)
    parts: tl.constexpr = (H + BLOCK - 1) // BLOCK
    t = tl.program_id(0) // parts
    h = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    wait(PDL)
    acc = tl.load(residual_ptr + t * H + h, mask=h < H, other=0.0).to(tl.float32)
    for a in tl.static_range(TOP_K):
        y = tl.load(y_ptr + (t * TOP_K + a) * H + h, mask=h < H, other=0.0).to(tl.float32)
        acc += y * tl.load(probs_ptr + t * TOP_K + a)
    tl.store(out0_ptr + t * H + h, acc.to(out0_ptr.dtype.element_ty), mask=h < H)


def group_tile(tokens: int, top_k: int, experts: int) -> tuple[int, int]:
    """(pairs a tile, the most tiles there can be): tiles as wide as an expert's average share, 16 to 128."""
    pairs = tokens * top_k
    tile = min(max(pow2(cdiv(pairs, experts)), 16), 128)
    return tile, min(experts * cdiv(tokens, tile), pairs // tile + min(experts, pairs))


def sort_launch(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    ids, experts = tensor(operands, "ids"), integer(operands, "experts")
    tokens, top_k = ids.shape
    outputs = {"out0": TensorSpec((experts, tokens), "i32"), "out1": TensorSpec((experts,), "i32")}
    constants = {"T": tokens, "TOP_K": top_k, "BLOCK": min(pow2(tokens * top_k), 1024)}
    return (launch(moe_sort_kernel, target, {**operands, **outputs}, constants, grid=experts,
                   moved=ids.bytes + total_bytes(*outputs.values())),)


def _tiles(operands: Mapping[str, Operand], x: TensorSpec, features: int, tokens: int,
           top_k: int) -> tuple[dict[str, Any], int]:
    """(the constants of a grouped product over rows of x, its grid)."""
    experts = tensor(operands, "weight").shape[0]
    tile, most = group_tile(tokens, top_k, experts)
    wide = min(max(pow2(features), 16), 128)
    deep = 64 if x.dtype == "bf16" and x.shape[-1] % 8 == 0 else 32  # loads in pieces smaller than 16 bytes hold more
    return {"T": tokens, "E": experts, "EP": pow2(experts), "BN": wide, "BT": tile, "BK": deep}, \
        most * cdiv(features, wide)


def _warps(constants: Mapping[str, int]) -> int:
    """More where the accumulator would fill four warps' registers."""
    return 8 if constants["BN"] * constants["BT"] >= 128 * 128 else 4


def grouped_gate_up_launch(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    x, weight, top_k = tensor(operands, "x"), tensor(operands, "weight"), integer(operands, "top_k")
    (tokens, hidden), inner = x.shape, weight.shape[1] // 2
    out = TensorSpec((tokens, top_k, inner), x.dtype)
    constants, grid = _tiles(operands, x, 2 * inner, tokens, top_k)
    constants |= {"I": inner, "H": hidden, "TOP_K": top_k, "EPS": number(operands, "eps"),
                  "ALPHA": number(operands, "alpha"), "LIMIT": number(operands, "limit")}
    pairs = tokens * top_k
    return (launch(moe_gate_up_grouped_kernel, target, {**operands, "out0": out}, constants, grid=grid,
                   moved=x.bytes + out.bytes + expert_bytes(operands, pairs), flops=4 * pairs * inner * hidden,
                   num_warps=_warps(constants),
                   promises=mma(target, narrow=constants["BN"] < 64) if x.dtype == "bf16" else ()),)


def grouped_down_launch(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    h, hidden = tensor(operands, "h"), tensor(operands, "weight").shape[1]
    tokens, top_k, inner = h.shape
    out = TensorSpec((tokens, top_k, hidden), h.dtype)
    constants, grid = _tiles(operands, h, hidden, tokens, top_k)
    pairs = tokens * top_k
    return (launch(moe_down_grouped_kernel, target, {**operands, "out0": out}, {**constants, "H": hidden, "I": inner},
                   grid=grid, moved=h.bytes + out.bytes + expert_bytes(operands, pairs),
                   flops=2 * pairs * inner * hidden,
                   num_warps=_warps(constants),
                   promises=mma(target, narrow=constants["BN"] < 64) if h.dtype == "bf16" else ()),)


def combine_launch(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    y, residual = tensor(operands, "y"), tensor(operands, "residual")
    tokens, top_k, hidden = y.shape
    block = min(pow2(hidden), 1024)
    return (launch(moe_combine_kernel, target, {**operands, "out0": residual},
                   {"H": hidden, "TOP_K": top_k, "BLOCK": block}, grid=tokens * cdiv(hidden, block),
                   moved=y.bytes + 2 * residual.bytes, flops=2 * tokens * top_k * hidden),)


SPECS = (
    KernelSpec("moe_sort", "moe_sort", on_gpu, sort_launch),
    KernelSpec("moe_gate_up_grouped", "moe_gate_up_grouped", on_gpu, grouped_gate_up_launch),
    KernelSpec("moe_down_grouped", "moe_down_grouped", on_gpu, grouped_down_launch),
    KernelSpec("moe_combine", "moe_combine", on_gpu, combine_launch),
)
