"""Plain tensor code of rotary embeddings -> gptoss::rope (queries and keys of each layer), and of their cosines and
sines -> gptoss::rope_table (one a step)."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from gptoss_compile.dialect import OPS
from gptoss_compile.match import call
from gptoss_compile.passes.base import Context, Pass, PassResult, rewrite


def run_table(graph: fx.Graph, ctx: Context) -> PassResult:
    scale = ctx.config.rope_concentration

    def table(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor]:
        angles = positions.to(torch.float32).unsqueeze(-1) * inv_freq
        return (torch.stack((angles.cos(), angles.sin()), 1) * scale,)

    positions = ctx.example(ctx.bucket.tokens, dtype=torch.int32)
    inv_freq = ctx.example(ctx.config.head_dim // 2, dtype=torch.float32)
    return rewrite(graph, ctx, table, [(positions, inv_freq)],
                   lambda p, f: call(graph, torch.ops.gptoss.rope_table.default, p, f, scale))


def run_rope(graph: fx.Graph, ctx: Context) -> PassResult:
    tokens, dim = ctx.bucket.tokens, ctx.config.head_dim
    table = ctx.example(tokens, 2, dim // 2, dtype=torch.float32)
    heads = {ctx.config.num_heads, ctx.config.num_kv_heads}
    return rewrite(
        graph, ctx,
        pattern=lambda x, cos_sin: (OPS["rope"].reference(x, cos_sin),),
        examples=[(ctx.example(tokens, n, dim), table) for n in sorted(heads)],
        build=lambda x, cos_sin: call(graph, torch.ops.gptoss.rope.default, x, cos_sin))


RAISE_ROPE_TABLE = Pass("raise_rope_table", run_table, lambda ctx: 1, "bitwise")
RAISE_ROPE = Pass("raise_rope", run_rope, lambda ctx: 2 * ctx.config.num_layers, "bitwise")
