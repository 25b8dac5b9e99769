"""In decode buckets, RoPE + KV-set + attention with sinks -> one kernel, gptoss::rope_kv_attention, one a layer.

A decoding sequence brings one token, so whoever attends for it can also rotate and store its key. Extend buckets keep
`rope_kv` and `attention` apart: there a token's key is read by many blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from gptoss_compile.match import call, getitem
from gptoss_compile.passes.base import Context, Pass, PassResult, rewrite
from gptoss_compile.trace import cache_shapes

ops = torch.ops.gptoss


def run(graph: fx.Graph, ctx: Context) -> PassResult:
    if ctx.bucket.kind != "decode":
        return PassResult(0)
    c, tokens, scale = ctx.config, ctx.bucket.tokens, ctx.config.head_dim**-0.5
    matches, near = 0, []
    for windowed in sorted(set(c.windowed)):
        window = c.sliding_window if windowed else 0
        width = ctx.geometry.window_ring if windowed else ctx.geometry.table_width
        index = ctx.example(tokens, dtype=torch.int32)
        examples = (ctx.example(tokens, c.q_size + 2 * c.kv_size),
                    ctx.example(tokens, 2, c.head_dim // 2, dtype=torch.float32),
                    ctx.example(*cache_shapes(c, ctx.geometry)[c.windowed.index(windowed)]),
                    ctx.example(tokens, width, dtype=torch.int32), index, index, ctx.example(c.num_heads))

        def pattern(qkv: Tensor, cos_sin: Tensor, cache: Tensor, table: Tensor, sequences: Tensor, positions: Tensor,
                    sinks: Tensor, window: int = window) -> tuple[Tensor, Tensor]:
            q, written = ops.rope_kv(qkv, cos_sin, cache, table, sequences, positions)
            return ops.attention(q, written, table, sequences, positions, sinks, window, scale), written

        def build(*inputs: fx.Node, window: int = window) -> list[fx.Node]:
            both = call(graph, ops.rope_kv_attention.default, *inputs, window, scale)
            return [getitem(graph, both, 0), getitem(graph, both, 1)]

        left = None if ctx.limit is None else max(ctx.limit - matches, 0)
        found = rewrite(graph, ctx.limited(left), pattern, [examples], build)
        matches, near = matches + found.matches, [*near, *found.near_misses]
    return PassResult(matches, tuple(sorted(near, key=lambda miss: -miss.matched)))


LOWER_ATTENTION_SINKS = Pass(
    "lower_attention_sinks", run, lambda ctx: ctx.config.num_layers if ctx.bucket.kind == "decode" else 0, "rtol")
