"""In decode buckets, RoPE + KV-set + attention with sinks -> one kernel, gptoss::rope_kv_attention, one a layer.

A decoding sequence brings one token, so whoever attends for it can also rotate and store its key. Extend buckets keep
`rope_kv` and `attention` apart: there a token's key is read by many blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from gptoss_compile.match import call, getitem
from gptoss_compile.passes.base import Context, Pass, PassResult, rewrite

ops = torch.ops.gptoss


def run(graph: fx.Graph, ctx: Context) -> PassResult:
    if ctx.bucket.kind != "decode":
        return PassResult(0)
    c, tokens, scale = ctx.config, ctx.bucket.tokens, ctx.config.head_dim**-0.5
    qkv, index = ctx.example(tokens, c.q_size + 2 * c.kv_size), ctx.example(tokens, dtype=torch.int32)
    cos_sin = ctx.example(tokens, 2, c.head_dim // 2, dtype=torch.float32)
    results: list[PassResult] = []
    for windowed in ctx.layer_kinds:

        def pattern(qkv: Tensor, cos_sin: Tensor, cache: Tensor, table: Tensor, sequences: Tensor, positions: Tensor,
                    sinks: Tensor, window: int = ctx.window(windowed)) -> tuple[Tensor, Tensor]:
            q, written = ops.rope_kv(qkv, cos_sin, cache, table, sequences, positions)
            return ops.attention(q, written, table, sequences, positions, sinks, window, scale), written

        def build(*inputs: fx.Node, window: int = ctx.window(windowed)) -> list[fx.Node]:
            both = call(graph, ops.rope_kv_attention.default, *inputs, window, scale)
            return [getitem(graph, both, 0), getitem(graph, both, 1)]

        examples = (qkv, cos_sin, *ctx.paged_examples(windowed), index, index, ctx.example(c.num_heads))
        results.append(rewrite(graph, ctx.after(results), pattern, [examples], build))
    return PassResult.sum(results)


LOWER_ATTENTION_SINKS = Pass(
    "lower_attention_sinks", run, lambda ctx: ctx.config.num_layers if ctx.bucket.kind == "decode" else 0, "rtol")
