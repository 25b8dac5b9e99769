"""rope_kv, attention, rope_kv_attention: rotary embedding, the paged cache, attention with sinks.

The cache is [pages, 2, K, B, D] (index 1: 0 keys, 1 values). A table row is a ring of pages: position p lives in
entry (p // B) mod P, slot p mod B. Seen from a query at position p, slot j of the C = P·B holds position
p - ((p - j) mod C). So the kernels walk over positions, of which the last min(window, C) are visible.
Padding rows have position -1: they write to page 0, which belongs to nobody (the kernels write nothing), and see
no key. Softmax weights are powers of two of scores scaled by log2 e. The sink enters once, behind the last key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gptoss_compile.dialect import cache_rows, kernel_op
from gptoss_compile.kernels.common import (
    cdiv,
    integer,
    is_last,
    jit,
    launch,
    mma,
    number,
    on_gpu,
    pow2,
    tensor,
    total_bytes,
    trigger,
    wait,
)
from gptoss_compile.kernels.spec import KernelSpec, Launch, Operand, TensorSpec
from gptoss_compile.target import Target

LOG2E = tl.constexpr(1.4426950408889634)


def _rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Half-split rotation of x [T, heads, D] by cos_sin [T, 2, D/2]: (a, b) -> (a cos - b sin, b cos + a sin)"""
    cos, sin = cos_sin[:, 0:1], cos_sin[:, 1:2]
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _query_heads(qkv: Tensor, cache: Tensor) -> int:
    return int(qkv.shape[1] // cache.shape[4] - 2 * cache.shape[2])


def _rope_kv_fake(qkv: Tensor, cos_sin: Tensor, cache: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return qkv.new_empty((qkv.shape[0], _query_heads(qkv, cache), cache.shape[4])), torch.empty_like(cache)


@kernel_op("rope_kv(Tensor qkv, Tensor cos_sin, Tensor cache, Tensor table, Tensor sequences,"
           " Tensor positions) -> (Tensor, Tensor)", fake=_rope_kv_fake, updates={1: "cache"})
def rope_kv(qkv: Tensor, cos_sin: Tensor, cache: Tensor, table: Tensor, sequences: Tensor,
            positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated queries [T, Q, D] and the cache with the step's rotated keys and plain values stored.

    qkv [T, (Q + 2K)·D] (queries, keys, values), cos_sin [T, 2, D/2] fp32, table [S, P] i32, sequences and
    positions [T] i32.
    """
    heads, page, dim = cache.shape[2:]
    by_head = qkv.reshape(qkv.shape[0], -1, dim)
    q, k, v = torch.split(by_head, [_query_heads(qkv, cache), heads, heads], 1)
    pages, slots = cache_rows(table, sequences, positions, page)
    pages = torch.where(positions >= 0, pages, 0)
    rows = torch.stack((_rotate(k, cos_sin).to(cache.dtype), v.to(cache.dtype)), 1)  # [T, 2, K, D]
    which = torch.arange(2, device=qkv.device)[None, :, None]
    head = torch.arange(heads, device=qkv.device)[None, None, :]
    stored = cache.index_put((pages[:, None, None], which, head, slots[:, None, None]), rows)
    return _rotate(q, cos_sin).to(qkv.dtype), stored


@kernel_op("attention(Tensor q, Tensor cache, Tensor table, Tensor sequences, Tensor positions, Tensor sinks,"
           " int window, float scale) -> Tensor",
           fake=lambda q, *_: q.new_empty((q.shape[0], q.shape[1] * q.shape[2])))
def attention(q: Tensor, cache: Tensor, table: Tensor, sequences: Tensor, positions: Tensor, sinks: Tensor,
              window: int, scale: float) -> Tensor:
    """softmax over (scale · q·k of the visible keys, sink) applied to the values; the sink has none: [T, Q·D].

    q [T, Q, D], sinks [Q]. A key at position n is visible from p iff 0 <= n <= p and p - n < window (if not 0).
    """
    tokens, query_heads, dim = q.shape
    heads = cache.shape[2]
    q_TKGD = q.float().reshape(tokens, heads, -1, dim)
    if table.shape[0] == 1:
        both = cache[table[0].long()].permute(1, 2, 0, 3, 4).flatten(2, 3).float()  # [2, K, C, D]
        keys, values = both.unbind(0)
        scores = torch.einsum("tkgd,kcd->tkgc", q_TKGD, keys)
    else:
        pages = table[sequences.long()].long()  # [T, P]
        both = cache[pages].permute(2, 0, 3, 1, 4, 5).flatten(3, 4).float()  # [2, T, K, C, D]
        keys, values = both.unbind(0)
        scores = q_TKGD @ keys.transpose(-1, -2)
    slots = keys.shape[-2]
    age = torch.remainder(positions[:, None] - torch.arange(slots, device=q.device), slots)  # [T, C]
    visible = age <= positions[:, None]
    if window:
        visible = visible & (age < window)
    scores = (scores * scale).masked_fill(~visible[:, None, None, :], float("-inf"))
    sink = sinks.float().reshape(1, heads, -1, 1).expand(tokens, -1, -1, 1)
    probs = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    out = torch.einsum("tkgc,kcd->tkgd", probs, values) if table.shape[0] == 1 else probs @ values
    return out.reshape(tokens, query_heads * dim).to(q.dtype)


def _fused_fake(qkv: Tensor, cos_sin: Tensor, cache: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return qkv.new_empty((qkv.shape[0], _query_heads(qkv, cache) * cache.shape[4])), torch.empty_like(cache)


@kernel_op("rope_kv_attention(Tensor qkv, Tensor cos_sin, Tensor cache, Tensor table, Tensor sequences,"
           " Tensor positions, Tensor sinks, int window, float scale) -> (Tensor, Tensor)",
           fake=_fused_fake, updates={1: "cache"})
def rope_kv_attention(qkv: Tensor, cos_sin: Tensor, cache: Tensor, table: Tensor, sequences: Tensor,
                      positions: Tensor, sinks: Tensor, window: int, scale: float) -> tuple[Tensor, Tensor]:
    """`attention` of `rope_kv`, ([T, Q·D], cache), for decode buckets: token t is the only one of its sequence."""
    q, stored = rope_kv(qkv, cos_sin, cache, table, sequences, positions)
    return attention(q, stored, table, sequences, positions, sinks, window, scale), stored


@jit
def rotated(row: tl.tensor, cos_sin: tl.tensor, head: tl.tensor, inside: tl.tensor, D: tl.constexpr,
            DP: tl.constexpr) -> tl.tensor:
    """fp32 [len(head), DP]: heads `head` of a token at `row`, rotated by the token's table at `cos_sin`."""
    d = tl.arange(0, DP)
    half: tl.constexpr = D // 2
    partner = tl.where(d < half, d + half, d - half)
    mask = inside[:, None] & (d < D)[None, :]
    x = tl.load(row + head[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(row + head[:, None] * D + partner[None, :], mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(cos_sin + d % half, mask=d < D, other=0.0)
    sin = tl.load(cos_sin + half + d % half, mask=d < D, other=0.0)
    return x * cos[None, :] + y * tl.where(d < half, -sin, sin)[None, :]


@jit
def page_row(table_ptr: tl.tensor, sequence: tl.tensor, position: tl.tensor, mask: tl.tensor,
             kv_head: tl.tensor, KV: tl.constexpr, PAGE: tl.constexpr, P: tl.constexpr,
             D: tl.constexpr) -> tl.tensor:
    """Offset in the cache, in elements, of the key at `position`; its value lies KV·PAGE·D behind."""
    page = tl.load(table_ptr + sequence * P + position // PAGE % P, mask=mask, other=0).to(tl.int64)
    return ((page * 2 * KV + kv_head) * PAGE + position % PAGE) * D


@jit
def rope_kv_kernel(qkv_ptr: tl.tensor, cos_sin_ptr: tl.tensor, cache_ptr: tl.tensor, table_ptr: tl.tensor,
                   sequences_ptr: tl.tensor, positions_ptr: tl.tensor, out0_ptr: tl.tensor, Q: tl.constexpr,
                   KV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, P: tl.constexpr, QP: tl.constexpr,
                   KVP: tl.constexpr, DP: tl.constexpr, PDL: tl.constexpr) -> tl.tensor:
    """Program t: token t's queries rotated into out0, its rotated keys and plain values into the cache."""
    trigger(PDL)
    t = tl.program_id(0)
    position = tl.load(positions_ptr + t)
    sequence = tl.load(sequences_ptr + t)
    kv_head = tl.arange(0, KVP)
    stored = (kv_head < KV) & (position >= 0)
    slot = page_row(table_ptr, sequence, tl.maximum(position, 0), position >= 0, kv_head, KV, PAGE, P, D)
    wait(PDL)
    row = qkv_ptr + t * (Q + 2 * KV) * D
    cos_sin = cos_sin_ptr + t * D
    d = tl.arange(0, DP)
    q_head = tl.arange(0, QP)
    q = rotated(row, cos_sin, q_head, q_head < Q, D, DP)
    tl.store(out0_ptr + t * Q * D + q_head[:, None] * D + d[None, :], q.to(out0_ptr.dtype.element_ty),
             mask=(q_head < Q)[:, None] & (d < D)[None, :])
    k = rotated(row + Q * D, cos_sin, kv_head, stored, D, DP)
    mask = stored[:, None] & (d < D)[None, :]
    v = tl.load(row + (Q + KV) * D + kv_head[:, None] * D + d[None, :], mask=mask, other=0.0)
    place = cache_ptr + slot[:, None] + d[None, :]
    tl.store(place, k.to(cache_ptr.dtype.element_ty), mask=mask)
    tl.store(place + KV * PAGE * D, v.to(cache_ptr.dtype.element_ty), mask=mask)


@jit
def absorb(m: tl.tensor, l: tl.tensor, acc: tl.tensor, q: tl.tensor, keys: tl.tensor, visible: tl.tensor,
           present: tl.tensor, VALUES: tl.constexpr, SCALE: tl.constexpr, D: tl.constexpr,
           DP: tl.constexpr) -> tl.tensor:
    """One block of keys: (m, l, acc) -> the same with softmax(SCALE · q·k) · v of the visible keys taken in.

    m [M]: greatest score so far; l [M]: sum of 2^(score - m); acc [M, DP]: that sum over values. keys [BN]: pointers
    to keys, whose values lie VALUES behind; visible [M, BN]; present [BN]: what may be loaded.
    """
    d = tl.arange(0, DP)
    place = keys[:, None] + d[None, :]
    mask = present[:, None] & (d < D)[None, :]
    k = tl.load(place, mask=mask, other=0.0)
    v = tl.load(place + VALUES, mask=mask, other=0.0)
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
    score = tl.where(visible, score, float("-inf"))
    top = tl.maximum(m, tl.max(score, 1))
    base = tl.where(top == float("-inf"), 0.0, top)  # a row that has seen no key yet
    weight = tl.exp2(score - base[:, None])
    shrink = tl.exp2(m - base)
    acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return top, l * shrink + tl.sum(weight, 1), acc


@jit
def finished(m: tl.tensor, l: tl.tensor, acc: tl.tensor, sink: tl.tensor) -> tl.tensor:
    """acc / (l + the sink's share), [M, DP]; `sink` [M] is a score."""
    top = tl.maximum(m, sink)
    shrink = tl.exp2(m - top)
    return acc * (shrink / (l * shrink + tl.exp2(sink - top)))[:, None]


@jit
def attention_decode_kernel(qkv_ptr: tl.tensor, cos_sin_ptr: tl.tensor, cache_ptr: tl.tensor,
                            table_ptr: tl.tensor, sequences_ptr: tl.tensor, positions_ptr: tl.tensor,
                            sinks_ptr: tl.tensor, out0_ptr: tl.tensor, scratch0_ptr: tl.tensor,
                            scratch1_ptr: tl.tensor, scratch2_ptr: tl.tensor, SCALE: tl.constexpr,
                            Q: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
                            P: tl.constexpr, REACH: tl.constexpr, SPLITS: tl.constexpr, GP: tl.constexpr,
                            DP: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr) -> tl.tensor:
    """Program (token, kv head, split), split fastest: the head's G queries over the split's share of the keys.

    The token's own key and value are the start of split 0, which also stores them, so no program reads what another
    one writes. The other keys, at positions [first, position), are shared out in whole blocks of BN. With several
    splits each leaves (acc, m, l) in scratch0 [T, Q, SPLITS, D] and scratch1 [T, Q, SPLITS, 2], and the last one
    to arrive (counters in scratch2) merges them.
    """
    trigger(PDL)
    split = tl.program_id(0) % SPLITS
    kv_head = tl.program_id(0) // SPLITS % KV
    t = tl.program_id(0) // (SPLITS * KV)
    G: tl.constexpr = Q // KV
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    position = tl.load(positions_ptr + t)
    sequence = tl.load(sequences_ptr + t)
    head = kv_head * G + g
    sink = tl.load(sinks_ptr + head, mask=g < G, other=0.0).to(tl.float32) * LOG2E
    wait(PDL)
    row = qkv_ptr + t * (Q + 2 * KV) * D
    cos_sin = cos_sin_ptr + t * D
    q = rotated(row, cos_sin, head, g < G, D, DP).to(cache_ptr.dtype.element_ty)
    own = tl.full((1,), 0, tl.int32) + kv_head
    k_own = rotated(row + Q * D, cos_sin, own, own < KV, D, DP).to(cache_ptr.dtype.element_ty)
    v_own = tl.load(row + (Q + KV + kv_head) * D + d, mask=d < D, other=0.0).to(cache_ptr.dtype.element_ty)
    starts = (split == 0) & (position >= 0)
    slot = page_row(table_ptr, sequence, tl.maximum(position, 0), starts, kv_head, KV, PAGE, P, D)
    d_row = tl.expand_dims(d, 0)
    tl.store(cache_ptr + slot + d_row, k_own, mask=(d_row < D) & starts)
    tl.store(cache_ptr + slot + KV * PAGE * D + d, v_own, mask=(d < D) & starts)

    own_score = tl.sum(q.to(tl.float32) * k_own.to(tl.float32), 1) * SCALE
    m = tl.where(starts, own_score, float("-inf"))
    l = tl.where(starts, 1.0, 0.0) + tl.zeros((GP,), tl.float32)
    acc = tl.where(starts, v_own.to(tl.float32), 0.0)[None, :] + tl.zeros((GP, DP), tl.float32)
    first = tl.maximum(position - (REACH - 1), 0)
    share = ((position - first + SPLITS - 1) // SPLITS + BN - 1) // BN * BN
    low = first + split * share
    for start in range(low, tl.minimum(low + share, position), BN):
        n = start + tl.arange(0, BN)
        keys = cache_ptr + page_row(table_ptr, sequence, n, n < position, kv_head, KV, PAGE, P, D)
        m, l, acc = absorb(m, l, acc, q, keys, (n < position)[None, :], n < position, KV * PAGE * D, SCALE, D, DP)

    out = out0_ptr + (t * Q + head[:, None]) * D + d[None, :]
    inside = (g < G)[:, None] & (d < D)[None, :]
    if SPLITS == 1:
        tl.store(out, finished(m, l, acc, sink).to(out0_ptr.dtype.element_ty), mask=inside)
    else:
        part = (t * Q + head) * SPLITS
        tl.store(scratch0_ptr + (part + split)[:, None] * D + d[None, :], acc, mask=inside)
        tl.store(scratch1_ptr + (part + split) * 2, m, mask=g < G)
        tl.store(scratch1_ptr + (part + split) * 2 + 1, l, mask=g < G)
        if is_last(scratch2_ptr + t * KV + kv_head, SPLITS):
            m = tl.full((GP,), float("-inf"), tl.float32)
            l = tl.zeros((GP,), tl.float32)
            acc = tl.zeros((GP, DP), tl.float32)
            for other in range(SPLITS):
                m_part = tl.load(scratch1_ptr + (part + other) * 2, mask=g < G, other=0.0, cache_modifier=".cg")
                l_part = tl.load(scratch1_ptr + (part + other) * 2 + 1, mask=g < G, other=0.0, cache_modifier=".cg")
                acc_part = tl.load(scratch0_ptr + (part + other)[:, None] * D + d[None, :], mask=inside, other=0.0,
                                   cache_modifier=".cg")
                top = tl.maximum(m, m_part)
                base = tl.where(top == float("-inf"), 0.0, top)
                l = l * tl.exp2(m - base) + l_part * tl.exp2(m_part - base)
                acc = acc * tl.exp2(m - base)[:, None] + acc_part * tl.exp2(m_part - base)[:, None]
                m = top
            tl.store(out, finished(m, l, acc, sink).to(out0_ptr.dtype.element_ty), mask=inside)


@jit
def attention_extend_kernel(q_ptr: tl.tensor, cache_ptr: tl.tensor, table_ptr: tl.tensor,
                            sequences_ptr: tl.tensor, positions_ptr: tl.tensor, sinks_ptr: tl.tensor,
                            out0_ptr: tl.tensor, SCALE: tl.constexpr, T: tl.constexpr, Q: tl.constexpr,
                            KV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, P: tl.constexpr,
                            REACH: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr,
                            BN: tl.constexpr, PDL: tl.constexpr) -> tl.tensor:
    """Program (tile, kv head), head fastest: BT tokens x G queries against the keys of every sequence in the tile.

    Row r is query r mod GP of token r // GP. Sequences are taken one by one; rows of others are masked.
    """
    trigger(PDL)
    kv_head = tl.program_id(0) % KV
    tile = tl.program_id(0) // KV
    G: tl.constexpr = Q // KV
    r = tl.arange(0, BT * GP)
    g = r % GP
    t = tile * BT + r // GP
    position = tl.load(positions_ptr + t, mask=t < T, other=-1)
    sequence = tl.load(sequences_ptr + t, mask=t < T, other=0)
    active = position >= 0
    head = kv_head * G + g
    sink = tl.load(sinks_ptr + head, mask=g < G, other=0.0).to(tl.float32) * LOG2E
    wait(PDL)
    d = tl.arange(0, DP)
    place = (t * Q + head)[:, None] * D + d[None, :]
    inside = ((t < T) & (g < G))[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + place, mask=inside, other=0.0).to(cache_ptr.dtype.element_ty)
    m = tl.full((BT * GP,), float("-inf"), tl.float32)
    l = tl.zeros((BT * GP,), tl.float32)
    acc = tl.zeros((BT * GP, DP), tl.float32)
    never: tl.constexpr = 1 << 30
    for s in range(tl.min(tl.where(active, sequence, never)), tl.max(tl.where(active, sequence, -1)) + 1):
        mine = active & (sequence == s)
        low = tl.min(tl.where(mine, tl.maximum(position - (REACH - 1), 0), never))
        high = tl.max(tl.where(mine, position, -1)) + 1
        for start in range(low, high, BN):
            n = start + tl.arange(0, BN)
            keys = cache_ptr + page_row(table_ptr, s, n, n < high, kv_head, KV, PAGE, P, D)
            age = position[:, None] - n[None, :]
            visible = mine[:, None] & (age >= 0) & (age < REACH)
            m, l, acc = absorb(m, l, acc, q, keys, visible, n < high, KV * PAGE * D, SCALE, D, DP)
    tl.store(out0_ptr + place, finished(m, l, acc, sink).to(out0_ptr.dtype.element_ty), mask=inside)


def _geometry(operands: Mapping[str, Operand]) -> dict[str, Any]:
    """The constants that cache and table give."""
    _, _, heads, page, dim = tensor(operands, "cache").shape
    return {"KV": heads, "D": dim, "PAGE": page, "P": tensor(operands, "table").shape[1], "DP": max(pow2(dim), 16)}


def _reach(operands: Mapping[str, Operand]) -> int:
    """How many positions, the query's own included, a query may see."""
    capacity = tensor(operands, "table").shape[1] * tensor(operands, "cache").shape[3]
    window = integer(operands, "window")
    return min(window, capacity) if window else capacity


def rope_kv_launch(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    qkv, constants = tensor(operands, "qkv"), _geometry(operands)
    tokens, width = qkv.shape
    heads = width // constants["D"] - 2 * constants["KV"]
    out = TensorSpec((tokens, heads, constants["D"]), qkv.dtype)
    constants |= {"Q": heads, "QP": pow2(heads), "KVP": pow2(constants["KV"])}
    return (launch(rope_kv_kernel, target, {**operands, "out0": out}, constants, grid=tokens,
                   moved=2 * qkv.bytes + total_bytes(operands["cos_sin"]), flops=6 * tokens * width,
                   preloads=("positions", "sequences", "table")),)


def attention_launch(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    """Cost: half of the tokens' own sequence, the least a prompt's chunk can mean."""
    q, constants, reach = tensor(operands, "q"), _geometry(operands), _reach(operands)
    tokens, heads, dim = q.shape
    group = pow2(heads // constants["KV"])
    rows, block = (128, 64) if q.dtype == "bf16" else (32, 32)
    tile = max(min(rows // group, pow2(tokens)), 16 // group, 1)
    constants |= {"SCALE": number(operands, "scale") * LOG2E.value, "T": tokens, "Q": heads, "REACH": reach, "GP": group,
                  "BT": tile, "BN": block}
    keys = min(tokens, reach)
    out = TensorSpec((tokens, heads * dim), q.dtype)
    promises = mma(target, narrow=tile * group < 64) if q.dtype == "bf16" else ()
    return (launch(attention_extend_kernel, target, {**operands, "out0": out}, constants,
                   grid=cdiv(tokens, tile) * constants["KV"], moved=2 * q.bytes + keys * 2 * q.bytes // tokens,
                   flops=2 * tokens * heads * dim * keys, promises=promises, num_warps=8 if tile * group >= 128 else 4,
                   preloads=("positions", "sequences", "sinks")),)


def decode_launch(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    """Splits: enough programs for two on every processor, no split with less than two blocks of keys at full reach.

    Cost: the least, a context of one key.
    """
    qkv, constants, reach = tensor(operands, "qkv"), _geometry(operands), _reach(operands)
    (tokens, width), dim, kv_heads = qkv.shape, constants["D"], constants["KV"]
    heads, block = width // dim - 2 * kv_heads, 64
    splits = min(cdiv(2 * target.processors, tokens * kv_heads), cdiv(reach, 2 * block), 64)
    constants |= {"SCALE": number(operands, "scale") * LOG2E.value, "Q": heads, "REACH": reach, "SPLITS": splits,
                  "GP": max(pow2(heads // kv_heads), 16), "BN": block}
    scratch = (TensorSpec((tokens, heads, splits, dim), "fp32"), TensorSpec((tokens, heads, splits, 2), "fp32"),
               TensorSpec((tokens, kv_heads), "i32")) if splits > 1 else ()
    out = TensorSpec((tokens, heads * dim), qkv.dtype)
    return (launch(attention_decode_kernel, target, {**operands, "out0": out}, constants, grid=tokens * kv_heads * splits,
                   moved=qkv.bytes + out.bytes, flops=4 * tokens * heads * dim, scratch=scratch,
                   zeroed=(2,) if splits > 1 else (), preloads=("positions", "sequences", "sinks")),)


SPECS = (
    KernelSpec("rope_kv", "rope_kv", on_gpu, rope_kv_launch),
    KernelSpec("attention", "attention", on_gpu, attention_launch),
    KernelSpec("rope_kv_attention", "rope_kv_attention", on_gpu, decode_launch),
)
