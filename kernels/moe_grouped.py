"""moe_grouped: the mixture of experts of many tokens, grouped by expert.

Four launches share buffers. The sort lists each expert's (token, expert) pairs, a pair being the flat index t·A + a:
`order` [E, T] i32, ascending, -1 beyond, and `count` [E] i32, how many those are. The products then read every expert's
weights once a tile of pairs and leave `h` [T, A, I] and `y` [T, A, H]; the last launch mixes y. Weights as in moe.py.

The products take weights as the left operand, decoded in registers, and pairs as columns. How many tiles an expert has is
known on the device only: the grid holds the most there can be, a program finds its expert and tile from the counts, and
those beyond the last tile leave.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gptoss_compile.dialect import kernel_op
from gptoss_compile.kernels.common import (
    cdiv,
    expert_tile,
    jit,
    launch,
    mma,
    number,
    on_gpu,
    pow2,
    swiglu,
    tensor,
    total_bytes,
    touched_experts,
    trigger,
    wait,
)
from gptoss_compile.kernels.maths import experts_down, experts_up, rms_norm
from gptoss_compile.kernels.maths import swiglu as swiglu_twin
from gptoss_compile.kernels.spec import DType, KernelSpec, Launch, Operand, TensorSpec
from gptoss_compile.target import Target


@kernel_op("moe_grouped(Tensor x, Tensor norm_weight, Tensor ids, Tensor probs, Tensor up, Tensor? up_scales,"
           " Tensor up_bias, Tensor down, Tensor? down_scales, Tensor down_bias, float eps, float alpha, float limit)"
           " -> Tensor", fake=lambda x, *_: torch.empty_like(x))
def moe_grouped(x: Tensor, norm_weight: Tensor, ids: Tensor, probs: Tensor, up: Tensor, up_scales: Tensor | None,
                up_bias: Tensor, down: Tensor, down_scales: Tensor | None, down_bias: Tensor, eps: float, alpha: float,
                limit: float) -> Tensor:
    """x + sum over a of probs[a] (Wd[e_a] swiglu(Wu[e_a] rmsnorm(x) + bu[e_a]) + bd[e_a]): [T, H].

    x [T, H], ids [T, A] i32 (distinct in a token), probs [T, A] fp32, up_bias [E, 2I], down_bias [E, H]. The SwiGLU and
    the second product are rounded to x's dtype.
    """
    wide = experts_up(rms_norm(x, norm_weight, eps), ids, up, up_scales, up_bias)
    h = swiglu_twin(wide, alpha, limit).to(x.dtype)
    return mixed(x, h, ids, probs, down, down_scales, down_bias)


def mixed(x: Tensor, h: Tensor, ids: Tensor, probs: Tensor, down: Tensor, down_scales: Tensor | None,
          down_bias: Tensor) -> Tensor:
    """x + sum over a of probs[a] (W[e_a] h[a] + b[e_a]), the product rounded to x's dtype: [T, H] of h [T, A, I]."""
    y = experts_down(h, ids, down, down_scales, down_bias).to(x.dtype)
    return (x.float() + (y.float() * probs.unsqueeze(-1)).sum(1)).to(x.dtype)


@jit
def moe_sort_kernel(ids_ptr: tl.tensor, order_ptr: tl.tensor, count_ptr: tl.tensor, T: tl.constexpr,
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
        tl.store(order_ptr + e * T + rank, pair, mask=mine)
        found += tl.sum(mine.to(tl.int32))
    tl.store(count_ptr + e, found)
    for start in range(0, T, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        tl.store(order_ptr + e * T + slot, tl.full((BLOCK,), -1, tl.int32), mask=(slot >= found) & (slot < T))


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
                               count_ptr: tl.tensor, up_ptr: tl.tensor, up_scales_ptr: tl.tensor,
                               up_bias_ptr: tl.tensor, h_ptr: tl.tensor, T: tl.constexpr, E: tl.constexpr,
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
            acc = tl.dot(expert_tile(up_ptr, up_scales_ptr, expert, n, start, 2 * I, H, BK, x.dtype), tl.trans(x), acc,
                         input_precision="ieee")
        acc *= tl.rsqrt(squares / H + EPS)[None, :]
        h = activated(acc, up_bias_ptr + expert * 2 * I, n, 2 * I, ALPHA, LIMIT)
        i = part * (BN // 2) + tl.arange(0, BN // 2)
        tl.store(h_ptr + pair[None, :] * I + i[:, None], h.to(h_ptr.dtype.element_ty),
                 mask=(i < I)[:, None] & exists[None, :])


@jit
def moe_down_grouped_kernel(h_ptr: tl.tensor, order_ptr: tl.tensor, count_ptr: tl.tensor, down_ptr: tl.tensor,
                            down_scales_ptr: tl.tensor, down_bias_ptr: tl.tensor, y_ptr: tl.tensor, T: tl.constexpr,
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
            acc = tl.dot(expert_tile(down_ptr, down_scales_ptr, expert, n, start, H, I, BK, h.dtype), tl.trans(h), acc,
                         input_precision="ieee")
        acc += tl.load(down_bias_ptr + expert * H + n, mask=n < H, other=0.0).to(tl.float32)[:, None]
        tl.store(y_ptr + pair[None, :] * H + n[:, None], acc.to(y_ptr.dtype.element_ty),
                 mask=(n < H)[:, None] & exists[None, :])


@jit
def moe_combine_kernel(y_ptr: tl.tensor, probs_ptr: tl.tensor, x_ptr: tl.tensor, out0_ptr: tl.tensor,
                       H: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
                       PDL: tl.constexpr) -> tl.tensor:
    """Program (t, j), j fastest: columns j·BLOCK … of token t."""
    trigger(PDL)
    parts: tl.constexpr = (H + BLOCK - 1) // BLOCK
    t = tl.program_id(0) // parts
    h = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    wait(PDL)
    acc = tl.load(x_ptr + t * H + h, mask=h < H, other=0.0).to(tl.float32)
    for a in tl.static_range(TOP_K):
        y = tl.load(y_ptr + (t * TOP_K + a) * H + h, mask=h < H, other=0.0).to(tl.float32)
        acc += y * tl.load(probs_ptr + t * TOP_K + a)
    tl.store(out0_ptr + t * H + h, acc.to(out0_ptr.dtype.element_ty), mask=h < H)


@dataclass(frozen=True)
class Sizes:
    """The extents of a call of the operator, and the buffers that its launches share."""

    tokens: int
    hidden: int
    top_k: int
    experts: int
    inner: int
    dtype: DType

    @classmethod
    def of(cls, operands: Mapping[str, Operand]) -> Sizes:
        x, (tokens, top_k), bias = tensor(operands, "x"), tensor(operands, "ids").shape, tensor(operands, "up_bias")
        return cls(tokens, x.shape[1], top_k, bias.shape[0], bias.shape[1] // 2, x.dtype)

    @property
    def pairs(self) -> int:
        return self.tokens * self.top_k

    @property
    def groups(self) -> dict[str, TensorSpec]:
        return {"order": TensorSpec((self.experts, self.tokens), "i32"), "count": TensorSpec((self.experts,), "i32")}

    @property
    def h(self) -> TensorSpec:
        return TensorSpec((self.tokens, self.top_k, self.inner), self.dtype)

    @property
    def y(self) -> TensorSpec:
        return TensorSpec((self.tokens, self.top_k, self.hidden), self.dtype)

    @property
    def tile(self) -> int:
        """Pairs a tile: as wide as an expert's average share, 16 to 128."""
        return min(max(pow2(cdiv(self.pairs, self.experts)), 16), 128)

    @property
    def most_tiles(self) -> int:
        """The most tiles there can be."""
        return min(self.experts * cdiv(self.tokens, self.tile), self.pairs // self.tile + min(self.experts, self.pairs))

    def tiles(self, features: int) -> tuple[dict[str, Any], int]:
        """(the constants of a product that makes `features` of every pair, its grid)."""
        wide = min(max(pow2(features), 16), 128)
        return {"T": self.tokens, "E": self.experts, "EP": pow2(self.experts), "BN": wide, "BT": self.tile,
                "I": self.inner, "H": self.hidden}, self.most_tiles * cdiv(features, wide)

    def weight_bytes(self, operands: Mapping[str, Operand], name: str) -> int:
        """Bytes of the weights, scales and biases `name` of the experts that random choices touch."""
        every = total_bytes(*(operands[name + part] for part in ("", "_scales", "_bias")))
        return round(every * touched_experts(self.experts, self.pairs) / self.experts)


def warps(constants: Mapping[str, int]) -> int:
    """More where the accumulator would fill four warps' registers."""
    return 8 if constants["BN"] * constants["BT"] >= 128 * 128 else 4


def depth(size: Sizes, columns: int) -> int:
    """The K step of a product with rows of `columns` values: loads in pieces smaller than 16 bytes hold more registers."""
    return 64 if size.dtype == "bf16" and columns % 8 == 0 else 32


def promised(target: Target, size: Sizes, constants: Mapping[str, int]) -> tuple[str, ...]:
    return mma(target, narrow=constants["BN"] < 64) if size.dtype == "bf16" else ()


def sort_launch(target: Target, operands: Mapping[str, Operand]) -> Launch:
    size = Sizes.of(operands)
    constants = {"T": size.tokens, "TOP_K": size.top_k, "BLOCK": min(pow2(size.pairs), 1024)}
    return launch(moe_sort_kernel, target, operands, constants, grid=size.experts, common=size.groups,
                  moved=total_bytes(operands["ids"], *size.groups.values()))


def gate_up_launch(target: Target, operands: Mapping[str, Operand]) -> Launch:
    size = Sizes.of(operands)
    constants, grid = size.tiles(2 * size.inner)
    constants |= {"BK": depth(size, size.hidden), "TOP_K": size.top_k, "EPS": number(operands, "eps"),
                  "ALPHA": number(operands, "alpha"), "LIMIT": number(operands, "limit")}
    moved = total_bytes(operands["x"], size.h) + size.weight_bytes(operands, "up")
    return launch(moe_gate_up_grouped_kernel, target, operands, constants, grid=grid, common={**size.groups, "h": size.h},
                  moved=moved, flops=4 * size.pairs * size.inner * size.hidden, num_warps=warps(constants),
                  promises=promised(target, size, constants))


def down_launch(target: Target, operands: Mapping[str, Operand]) -> Launch:
    size = Sizes.of(operands)
    constants, grid = size.tiles(size.hidden)
    constants |= {"BK": depth(size, size.inner)}
    moved = total_bytes(size.h, size.y) + size.weight_bytes(operands, "down")
    return launch(moe_down_grouped_kernel, target, operands, constants, grid=grid,
                  common={**size.groups, "h": size.h, "y": size.y}, moved=moved,
                  flops=2 * size.pairs * size.inner * size.hidden, num_warps=warps(constants),
                  promises=promised(target, size, constants))


def combine_launch(target: Target, operands: Mapping[str, Operand]) -> Launch:
    size, x = Sizes.of(operands), tensor(operands, "x")
    block = min(pow2(size.hidden), 1024)
    return launch(moe_combine_kernel, target, {**operands, "out0": x},
                  {"H": size.hidden, "TOP_K": size.top_k, "BLOCK": block}, grid=size.tokens * cdiv(size.hidden, block),
                  common={"y": size.y}, moved=size.y.bytes + 2 * x.bytes, flops=2 * size.pairs * size.hidden)


def grouped_launches(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    return tuple(make(target, operands) for make in (sort_launch, gate_up_launch, down_launch, combine_launch))


SPECS = (KernelSpec("moe_grouped", "moe_grouped", on_gpu, grouped_launches),)
