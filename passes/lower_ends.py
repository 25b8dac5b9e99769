"""The step's two ends: token embedding -> gptoss::embed, final norm + lm_head -> gptoss::norm_head (logits in fp32).

With several ranks the head begins with the last exchange: gptoss::reduce_norm_head, the logits of the rank's part of the
vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from gptoss_compile.match import call
from gptoss_compile.passes.base import Context, Pass, PassResult, rewrite

ops = torch.ops.gptoss


def run_embedding(graph: fx.Graph, ctx: Context) -> PassResult:
    examples = (ctx.example(ctx.bucket.tokens, dtype=torch.int32), ctx.example(ctx.config.vocab_size, ctx.config.hidden))
    return rewrite(graph, ctx, lambda tokens, weight: (F.embedding(tokens, weight),), [examples],
                   lambda tokens, weight: call(graph, ops.embed.default, tokens, weight))


def run_head(graph: fx.Graph, ctx: Context) -> PassResult:
    c, bucket = ctx.config, ctx.bucket
    x, norm = ctx.example(bucket.tokens, c.hidden), ctx.example(c.hidden)
    head, rows = ctx.example(ctx.head_rows, c.hidden), ctx.example(bucket.rows, dtype=torch.int32)

    def pattern(x: Tensor, norm: Tensor, head: Tensor, rows: Tensor | None = None) -> tuple[Tensor]:
        normed = ops.rms_norm(x, norm, c.rms_eps)
        return (F.linear(normed if rows is None else normed[rows.long()], head).to(torch.float32),)

    def build(x: fx.Node, norm: fx.Node, head: fx.Node, rows: fx.Node | None = None) -> fx.Node:
        return call(graph, ops.norm_head.default, x, rows, norm, head, c.rms_eps)

    def reducing(partial: Tensor, residual: Tensor, norm: Tensor, head: Tensor, rows: Tensor | None = None) -> tuple[Tensor]:
        _, normed = ops.allreduce_add_rms_norm(partial, residual, norm, c.rms_eps)
        return (F.linear(normed if rows is None else normed[rows.long()], head).to(torch.float32),)

    def build_reducing(partial: fx.Node, residual: fx.Node, norm: fx.Node, head: fx.Node,
                       rows: fx.Node | None = None) -> fx.Node:
        return call(graph, ops.reduce_norm_head.default, partial, residual, rows, norm, head, c.rms_eps)

    examples = (x, norm, head) if bucket.kind == "decode" else (x, norm, head, rows)
    if ctx.ranks > 1:
        return rewrite(graph, ctx, reducing, [(x, *examples)], build_reducing)
    return rewrite(graph, ctx, pattern, [examples], build)


LOWER_EMBEDDING = Pass("lower_embedding", run_embedding, lambda ctx: 1, "bitwise")
LOWER_HEAD = Pass("lower_head", run_head, lambda ctx: 1, "rtol")
