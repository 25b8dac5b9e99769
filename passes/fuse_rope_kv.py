"""Split + RoPE of queries and keys + cache write -> gptoss::rope_kv, one a layer."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from gptoss_compile.match import call, getitem
from gptoss_compile.passes.base import Context, Pass, PassResult, rewrite

ops = torch.ops.gptoss


def run(graph: fx.Graph, ctx: Context) -> PassResult:
    c, tokens = ctx.config, ctx.bucket.tokens

    def pattern(qkv: Tensor, cos_sin: Tensor, cache: Tensor, table: Tensor, sequences: Tensor,
                positions: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = torch.split(qkv, [c.q_size, c.kv_size, c.kv_size], -1)
        q = ops.rope(q.view(-1, c.num_heads, c.head_dim), cos_sin)
        k = ops.rope(k.view(-1, c.num_kv_heads, c.head_dim), cos_sin)
        return q, ops.kv_write(cache, k, v.view(-1, c.num_kv_heads, c.head_dim), table, sequences, positions)

    def build(*inputs: fx.Node) -> list[fx.Node]:
        both = call(graph, ops.rope_kv.default, *inputs)
        return [getitem(graph, both, 0), getitem(graph, both, 1)]

    index = ctx.example(tokens, dtype=torch.int32)
    qkv = ctx.example(tokens, c.q_size + 2 * c.kv_size)
    cos_sin = ctx.example(tokens, 2, c.head_dim // 2, dtype=torch.float32)
    examples = [(qkv, cos_sin, *ctx.paged_examples(windowed), index, index) for windowed in ctx.layer_kinds]
    return rewrite(graph, ctx, pattern, examples, build)


FUSE_ROPE_KV = Pass("fuse_rope_kv", run, lambda ctx: ctx.config.num_layers, "bitwise")
