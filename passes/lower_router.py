"""RMSNorm + router projection + top-k -> gptoss::norm_route, one a layer.

With several ranks the exchange of the attention's output comes first: gptoss::reduce_norm_route, which also gives the new
residual stream. The experts norm that for themselves, as with one rank.
"""

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

    def reducing(partial: Tensor, residual: Tensor, norm_weight: Tensor, weight: Tensor,
                 bias: Tensor) -> tuple[Tensor, ...]:
        total, normed = ops.allreduce_add_rms_norm(partial, residual, norm_weight, c.rms_eps)
        probs, ids = ops.route(F.linear(normed, weight, bias), c.experts_per_token)
        return probs, ids, total, normed

    def build_reducing(partial: fx.Node, residual: fx.Node, norm_weight: fx.Node, weight: fx.Node,
                       bias: fx.Node) -> list[fx.Node]:
        all_three = call(graph, ops.reduce_norm_route.default, partial, residual, norm_weight, weight, bias, c.rms_eps,
                         c.experts_per_token)
        total, probs, ids = (getitem(graph, all_three, i) for i in range(3))
        return [probs, ids, total, call(graph, ops.rms_norm.default, total, norm_weight, c.rms_eps)]

    x = ctx.example(ctx.bucket.tokens, c.hidden)
    weights = ctx.example(c.hidden), ctx.example(c.num_experts, c.hidden), ctx.example(c.num_experts)
    if ctx.ranks > 1:
        return rewrite(graph, ctx, reducing, [(x, x, *weights)], build_reducing)
    return rewrite(graph, ctx, pattern, [(x, *weights)], build)


LOWER_ROUTER = Pass("lower_router", run, lambda ctx: ctx.config.num_layers, "rtol")
