"""rope_kv, attention, rope_kv_attention: rotary embedding, the paged cache, attention with sinks.

The cache is [pages, 2, K, B, D] (index 1: 0 keys, 1 values). A table row is a ring of pages: position p lives in entry
(p // B) mod P, slot p mod B. Seen from a query at position p, ring slot j of C = P·B holds position p - ((p - j) mod C).
Padding rows have position -1: they write to page 0, which belongs to nobody, and see no key.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptoss_compile.dialect import cache_rows, kernel_op


def _rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Half-split rotation of x [T, heads, D] by cos_sin [T, 2, D/2]: (a, b) -> (a cos - b sin, b cos + a sin)."""
    cos, sin = cos_sin[:, 0:1], cos_sin[:, 1:2]
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _query_heads(qkv: Tensor, cache: Tensor) -> int:
    return int(qkv.shape[1] // cache.shape[4] - 2 * cache.shape[2])


def _rope_kv_fake(qkv: Tensor, cos_sin: Tensor, cache: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return qkv.new_empty((qkv.shape[0], _query_heads(qkv, cache), cache.shape[4])), torch.empty_like(cache)


@kernel_op("rope_kv(Tensor qkv, Tensor cos_sin, Tensor cache, Tensor table, Tensor sequences, Tensor positions)"
           " -> (Tensor, Tensor)", fake=_rope_kv_fake, updates={1: "cache"})
def rope_kv(qkv: Tensor, cos_sin: Tensor, cache: Tensor, table: Tensor, sequences: Tensor,
            positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated queries [T, Q, D] and the cache with the step's rotated keys and plain values stored.

    qkv [T, (Q + 2K)·D] (queries, keys, values), cos_sin [T, 2, D/2] fp32, table [S, P], sequences and positions [T].
    """
    heads, page, dim = cache.shape[2:]
    q, k, v = qkv.unflatten(-1, (-1, dim)).split((_query_heads(qkv, cache), heads, heads), 1)
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
    """softmax over (scale · q·k of the visible keys, sink) applied to the values; the sink has none. [T, Q·D].

    q [T, Q, D], sinks [Q]. A key at position n is visible from p iff 0 <= n <= p and (window = 0 or p - n < window).
    """
    tokens, query_heads, dim = q.shape
    heads = cache.shape[2]
    q_TKGD = q.float().unflatten(1, (heads, query_heads // heads))
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
    sink = sinks.float().unflatten(0, (heads, -1))[None, :, :, None].expand(tokens, -1, -1, 1)
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
    """`attention` of `rope_kv` for decode buckets, where token t is the only one of sequence t: ([T, Q·D], cache)."""
    q, stored = rope_kv(qkv, cos_sin, cache, table, sequences, positions)
    return attention(q, stored, table, sequences, positions, sinks, window, scale), stored
