"""The operators of the `gptoss` namespace: how one is declared, and the few that the plain model needs.

Every operator has a schema, a reference in PyTorch (for a kernel op: the kernel's *twin*) and a shape function, so any
graph can be traced without data, run on a CPU and compared. All are functional; the planner alone turns updates of a
cache in place (see `OpInfo.updates`).

Shape suffixes used throughout the project:
    T tokens of a step · S sequences of a step · R rows with logits · H hidden · I intermediate · V vocabulary
    Q query heads · K key/value heads · D head dim · E experts · A experts a token (top-k) · N output features
    P page-table entries a sequence · B slots of a page · C = P·B keys that a sequence's table addresses
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

_LIBRARY: Any = torch.library.Library("gptoss", "DEF")  # type: ignore[no-untyped-call]
Function = Callable[..., Any]
Exchange = Literal["sum", "rounded_sum", "concat"]


@dataclass(frozen=True)
class OpInfo:
    """What the compiler knows of one operator beside its schema.

    reference: the maths in PyTorch. updates: output index -> argument name for outputs that are a new version of an
    argument, which the planner may therefore overwrite in place.

    exchange: for a collective, what it makes of its first argument before all else: the sum over the ranks, added in fp32
    in rank order and left so or rounded to the argument's dtype, or the ranks' tensors side by side along the last axis. The
    reference takes the result in the first argument's place; with one rank it is that argument.
    """

    name: str
    reference: Function
    updates: dict[int, str]
    is_kernel: bool
    exchange: Exchange | None = None


OPS: dict[str, OpInfo] = {}


def op(schema: str, *, fake: Function, updates: dict[int, str] | None = None, is_kernel: bool = False,
       exchange: Exchange | None = None) -> Callable[[Function], Function]:
    """Declare `gptoss::<schema>`; the decorated function is its reference.

    `fake` takes the same arguments and returns empty tensors of the result's shapes and dtypes.
    """

    def declare(reference: Function) -> Function:
        name = schema.split("(", 1)[0]
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, reference, "CPU")
        torch.library.register_fake(f"gptoss::{name}", fake, lib=_LIBRARY)
        OPS[name] = OpInfo(name, reference, updates or {}, is_kernel, exchange)
        return reference

    return declare


def kernel_op(schema: str, *, fake: Function, updates: dict[int, str] | None = None,
              exchange: Exchange | None = None) -> Callable[[Function], Function]:
    """Declare an operator that a KernelSpec implements; the decorated function is the kernel's twin."""
    return op(schema, fake=fake, updates=updates, is_kernel=True, exchange=exchange)


def op_name(node: fx.Node) -> str:
    """`norm_linear` for a call of gptoss::norm_linear; another operator's full name."""
    namespace, _, name = str(node.target).removesuffix(".default").partition(".")
    return name if namespace == "gptoss" else f"{namespace}::{name}"


def exchanged(kind: Exchange, parts: Sequence[Tensor]) -> Tensor:
    """What a collective makes of the ranks' tensors, given in rank order; the same bits on every rank."""
    if kind == "concat":
        return torch.cat(list(parts), -1)
    total = parts[0].to(torch.float32)
    for part in parts[1:]:
        total = total + part.to(torch.float32)
    return total.to(parts[0].dtype) if kind == "rounded_sum" else total


def cache_rows(table_SP: Tensor, sequences_T: Tensor, positions_T: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """(page id, slot in the page) where each token's key and value live. A table is a ring: entry (pos // page) mod P."""
    safe = positions_T.clamp(min=0)
    pages = table_SP[sequences_T.long(), torch.remainder(safe // page, table_SP.shape[1]).long()]
    return pages.long(), torch.remainder(safe, page).long()


@op("kv_write(Tensor cache, Tensor k, Tensor v, Tensor table, Tensor sequences, Tensor positions) -> Tensor",
    fake=lambda cache, *_: torch.empty_like(cache), updates={0: "cache"})
def kv_write(cache: Tensor, k: Tensor, v: Tensor, table: Tensor, sequences: Tensor, positions: Tensor) -> Tensor:
    """The cache with the step's keys and values stored.

    cache [pages, 2, K, B, D] (index 1: 0 keys, 1 values), k and v [T, K, D], table [S, P] i32, sequences and positions
    [T] i32. Page 0 belongs to nobody: rows with position -1 (padding) are written there.
    """
    pages, slots = cache_rows(table, sequences, positions, cache.shape[3])
    pages = torch.where(positions >= 0, pages, 0)
    rows = torch.stack((k, v), 1).to(cache.dtype)  # [T, 2, K, D]
    by_slot = cache.permute(0, 3, 1, 2, 4)  # [pages, B, 2, K, D]
    return by_slot.index_put((pages, slots), rows).permute(0, 2, 3, 1, 4)


def _kv_read_fake(cache: Tensor, table: Tensor, sequences: Tensor) -> tuple[Tensor, Tensor]:
    _, _, heads, page, dim = cache.shape
    shape = (sequences.shape[0], table.shape[1] * page, heads, dim)
    return cache.new_empty(shape), cache.new_empty(shape)


@op("kv_read(Tensor cache, Tensor table, Tensor sequences) -> (Tensor, Tensor)", fake=_kv_read_fake)
def kv_read(cache: Tensor, table: Tensor, sequences: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [T, C, K, D] that each token's table addresses, in ring order: entry j holds a position p with
    p = j (mod C), C = P * B."""
    pages = table[sequences.long()].long()  # [T, P]
    rows = cache[pages].permute(2, 0, 1, 4, 3, 5)  # [2, T, P, B, K, D]
    both = rows.reshape(2, pages.shape[0], -1, cache.shape[2], cache.shape[4])
    return both[0].contiguous(), both[1].contiguous()


# e2m1: sign, two exponent bits, one mantissa bit (OCP Microscaling Formats v1.0, section 5.3.3)
MXFP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@op("mxfp4_dequantize(Tensor blocks, Tensor scales, ScalarType dtype) -> Tensor",
    fake=lambda blocks, scales, dtype: blocks.new_empty((*blocks.shape[:-2], blocks.shape[-2] * 32), dtype=dtype))
def mxfp4_dequantize(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., G*32] values of MXFP4 blocks [..., G, 16] u8 (low nibble = even element) times 2^(scales-127), scales
    [..., G] u8. Exact in bf16 and fp32."""
    table = torch.tensor(MXFP4_VALUES, dtype=torch.float32, device=blocks.device)
    nibbles = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)  # [..., G, 32]
    factor = torch.exp2(scales.to(torch.float32) - 127.0)
    return (table[nibbles.int()] * factor.unsqueeze(-1)).flatten(-2).to(dtype)


@op("all_reduce(Tensor x) -> Tensor", fake=lambda x: torch.empty_like(x), exchange="rounded_sum")
def all_reduce(x: Tensor) -> Tensor:
    """The sum of x over the ranks."""
    return x.clone()


@kernel_op("all_gather(Tensor x, int columns) -> Tensor",
           fake=lambda x, columns: x.new_empty((*x.shape[:-1], columns)), exchange="concat")
def all_gather(x: Tensor, columns: int) -> Tensor:
    """The ranks' x side by side along the last axis, which so gets `columns` elements; ranks may hold unequal shares."""
    return x.clone()


# The canonical operators: idioms of the plain model under a name. A pass raises an operator wherever its reference, the
# function below, appears in the traced graph; so these are written in the model's own words, and the passes behind
# match one node where the model has ten.


@op("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", fake=lambda x, weight, eps: torch.empty_like(x))
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight in fp32, rounded to x's dtype. x [T, H], weight [H]."""
    wide = x.to(torch.float32)
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (scaled * weight.to(torch.float32)).to(x.dtype)


@op("rope(Tensor x, Tensor cos_sin) -> Tensor", fake=lambda x, cos_sin: torch.empty_like(x))
def rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Half-split rotary embedding: (a, b) -> (a cos - b sin, b cos + a sin). x [T, N, D], cos_sin [T, 2, D/2] fp32."""
    cos, sin = cos_sin[:, 0].unsqueeze(1), cos_sin[:, 1].unsqueeze(1)
    first, second = x.to(torch.float32).chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def _route_fake(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


@op("route(Tensor logits, int top_k) -> (Tensor, Tensor)", fake=_route_fake)
def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The top_k experts a token and the softmax over their logits: (probs [T, A] fp32, ids [T, A] i32)."""
    best, ids = torch.topk(logits.to(torch.float32), top_k, -1)
    return torch.softmax(best, -1), ids.to(torch.int32)


def _swiglu_fake(x: Tensor, alpha: float, limit: float) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@op("swiglu(Tensor x, float alpha, float limit) -> Tensor", fake=_swiglu_fake)
def swiglu(x: Tensor, alpha: float, limit: float) -> Tensor:
    """gate · sigmoid(alpha · gate) · (up + 1) over interleaved gate and up, clamped: gate <= limit, |up| <= limit."""
    gate, up = x[..., ::2].clamp(max=limit), x[..., 1::2].clamp(min=-limit, max=limit)
    return gate * torch.sigmoid(gate * alpha) * (up + 1)


def _experts_linear_fake(x: Tensor, ids: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor) -> Tensor:
    return x.new_empty((*ids.shape, bias.shape[1]), dtype=torch.float32)


@op("experts_linear(Tensor x, Tensor ids, Tensor weight, Tensor? scales, Tensor bias) -> Tensor",
    fake=_experts_linear_fake)
def experts_linear(x: Tensor, ids: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor) -> Tensor:
    """Each token through its chosen experts: y[t, a] = W[ids[t, a]] x[t, a] + b[ids[t, a]], fp32 [T, A, N].

    x [T, A, inputs], or [T, 1, inputs] when every expert gets the same; weight: MXFP4 blocks [E, N, G, 16] with scales
    [E, N, G], or a dense [E, N, inputs] with scales None.
    """
    dense = weight if scales is None else torch.ops.gptoss.mxfp4_dequantize(weight, scales, bias.dtype)
    chosen, offset = dense[ids.long()], bias[ids.long()]
    product = torch.einsum("tai,taoi->tao", x.expand(-1, ids.shape[1], -1).to(torch.float32),
                           chosen.to(torch.float32))
    return product + offset.to(torch.float32)


def _allreduce_fake(partial: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(residual), torch.empty_like(residual)


@op("allreduce_add_rms_norm(Tensor partial, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    fake=_allreduce_fake, exchange="rounded_sum")
def allreduce_add_rms_norm(partial: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(residual + sum of partial over the ranks, its RMSNorm): the exchange between a producer and the next norm."""
    total = residual + partial
    return total, torch.ops.gptoss.rms_norm(total, weight, eps)
