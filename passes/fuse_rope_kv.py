"""Split + RoPE of queries and keys + cache write -> gptoss::rope_kv, one a layer."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from gptoss_compile.match import call, getitem
from gptoss_compile.passes.base import Context, Pass, PassResult, rewrite
from gptoss_compile.trace import cache_shapes

ops = torch.ops.gptoss


def run(graph: fx.Graph, ctx: Context) -> PassResult:
    c, tokens = ctx.config, ctx.bucket.tokens

    def pattern(qkv: Tensor, cos_sin: Tensor, cache: Tensor, table: Tensor, sequences: Tensor,
                positions: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = qkv.split([c.q_size, c.kv_size, c.kv_size], -1)
        q = ops.rope(q.view(-1, c.num_heads, c.head_dim), cos_sin)
        k = ops.rope(k.view(-1, c.num_kv_heads, c.head_dim), cos_sin)
        return q, ops.kv_write(cache, k, v.view(-1, c.num_kv_heads, c.head_dim), table, sequences, positions)

    def build(*inputs: fx.Node) -> list[fx.Node]:
        both = call(graph, ops.rope_kv.default, *inputs)
        return [getitem(graph, both, 0), getitem(graph, both, 1)]

    index = ctx.example(tokens, dtype=torch.int32)
    qkv = ctx.example(tokens, c.q_size + 2 * c.kv_size)
    cos_sin = ctx.example(tokens, 2, c.head_dim // 2, dtype=torch.float32)
    widths = {True: ctx.geometry.window_ring, False: ctx.geometry.table_width}
    kinds = {w: c.windowed.index(w) for w in (True, False) if w in c.windowed}
    examples = [(qkv, cos_sin, ctx.example(*cache_shapes(c, ctx.geometry)[layer]),
                 ctx.example(ctx.bucket.sequences, widths[kind], dtype=torch.int32), index, index)
                for kind, layer in kinds.items()]
    return rewrite(graph, ctx, pattern, examples[: 2 if _differ(examples) else 1], build)


def _differ(examples: list[tuple[Tensor, ...]]) -> bool:
    return len({tuple(t.shape for t in example) for example in examples}) > 1


FUSE_ROPE_KV = Pass("fuse_rope_kv", run, lambda ctx: ctx.config.num_layers, "bitwise")
