"""Sum over ranks + residual + RMSNorm -> gptoss::allreduce_add_rms_norm: with several ranks two a layer, else none.

The passes behind split the fused operator over its producer (which pushes its partial sums) and its consumer (which polls
them, adds the residual and normalises), so that no kernel of its own stands between them; see `kernels/exchange.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from gptoss_compile.match import call, getitem
from gptoss_compile.passes.base import Context, Pass, PassResult, rewrite

ops = torch.ops.gptoss


def run(graph: fx.Graph, ctx: Context) -> PassResult:
    eps = ctx.config.rms_eps

    def pattern(partial: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + ops.all_reduce(partial)
        return ops.rms_norm(total, weight, eps), total

    def build(partial: fx.Node, residual: fx.Node, weight: fx.Node) -> list[fx.Node]:
        both = call(graph, ops.allreduce_add_rms_norm.default, partial, residual, weight, eps)
        total, normed = getitem(graph, both, 0), getitem(graph, both, 1)
        return [normed, total]

    x = ctx.example(ctx.bucket.tokens, ctx.config.hidden)
    return rewrite(graph, ctx, pattern, [(x, x, ctx.example(ctx.config.hidden))], build)


FUSE_ALLREDUCE_RMS_NORM = Pass(
    "fuse_allreduce_rms_norm", run, lambda ctx: 2 * ctx.config.num_layers if ctx.ranks > 1 else 0, "bitwise")
