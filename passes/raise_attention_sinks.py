"""Cache read + masked scores + softmax with a sink column + weighted values -> gptoss::attention, one a layer."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from gptoss_compile.match import call
from gptoss_compile.passes.base import Context, Pass, PassResult, rewrite
from gptoss_compile.trace import cache_shapes


def attention(q: Tensor, cache: Tensor, table: Tensor, sequences: Tensor, positions: Tensor, sinks: Tensor, window: int,
              scale: float) -> Tensor:
    """The idiom as the model writes it; see `model.attend` for the maths."""
    keys, values = torch.ops.gptoss.kv_read(cache, table, sequences)
    tokens, capacity, kv_heads, _ = keys.shape
    grouped = q.to(torch.float32).view(tokens, kv_heads, -1, q.shape[-1])
    scores = torch.einsum("tkgd,tckd->tkgc", grouped, keys.to(torch.float32)) * scale
    back = torch.remainder(positions.unsqueeze(1) - torch.arange(capacity, device=q.device), capacity)
    hidden = back > positions.unsqueeze(1)
    if window:
        hidden = hidden | (back >= window)
    scores = scores.masked_fill(hidden.view(tokens, 1, 1, capacity), float("-inf"))
    column = sinks.to(torch.float32).view(1, kv_heads, -1, 1).expand(tokens, -1, -1, -1)
    weights = torch.softmax(torch.cat((scores, column), -1), -1)[..., :-1]
    out = torch.einsum("tkgc,tckd->tkgd", weights, values.to(torch.float32))
    return out.reshape(tokens, -1).to(q.dtype)


def run(graph: fx.Graph, ctx: Context) -> PassResult:
    c, tokens = ctx.config, ctx.bucket.tokens
    index = ctx.example(tokens, dtype=torch.int32)
    matches, near = 0, []
    for window in sorted({c.sliding_window if windowed else 0 for windowed in c.windowed}):
        layer = c.windowed.index(bool(window))
        width = ctx.geometry.window_ring if window else ctx.geometry.table_width
        examples = (ctx.example(tokens, c.num_heads, c.head_dim), ctx.example(*cache_shapes(c, ctx.geometry)[layer]),
                    ctx.example(ctx.bucket.sequences, width, dtype=torch.int32), index, index, ctx.example(c.num_heads))
        limited = ctx.limited(None if ctx.limit is None else max(ctx.limit - matches, 0))
        scale = c.head_dim**-0.5
        found = rewrite(
            graph, limited, lambda *x, w=window: (attention(*x, w, scale),), [examples],
            lambda *x, w=window: call(graph, torch.ops.gptoss.attention.default, *x, w, scale))
        matches += found.matches
        near += found.near_misses
    near.sort(key=lambda miss: -miss.matched)
    return PassResult(matches, tuple(near))


RAISE_ATTENTION_SINKS = Pass("raise_attention_sinks", run, lambda ctx: ctx.config.num_layers, "rtol")
