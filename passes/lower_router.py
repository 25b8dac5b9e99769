"""RMSNorm + router projection + top-k -> gptoss::norm_route, one a layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from gptoss_compile.match import call, getitem
from gptoss_compile.passes.base import Context, Pass, PassResult, rewrite

ops = torch.ops.gptoss


def run(graph: fx.Graph, ctx: Context) -> PassResult:
    c = ctx.config

    def pattern(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        probs, ids = ops.route(F.linear(ops.rms_norm(x, norm_weight, c.rms_eps), weight, bias), c.experts_per_token)
        return probs, ids

    def build(x: fx.Node, norm_weight: fx.Node, weight: fx.Node, bias: fx.Node) -> list[fx.Node]:
        both = call(graph, ops.norm_route.default, x, norm_weight, weight, bias, c.rms_eps, c.experts_per_token)
        return [getitem(graph, both, 0), getitem(graph, both, 1)]

    examples = (ctx.example(ctx.bucket.tokens, c.hidden), ctx.example(c.hidden), ctx.example(c.num_experts, c.hidden),
                ctx.example(c.num_experts))
    return rewrite(graph, ctx, pattern, [examples], build)


LOWER_ROUTER = Pass("lower_router", run, lambda ctx: ctx.config.num_layers if ctx.ranks == 1 else None, "rtol")
