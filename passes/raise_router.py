"""Top-k over the router's logits and the softmax over the chosen ones -> gptoss::route, one a layer."""

from __future__ import annotations

import torch
from torch import fx

from gptoss_compile.dialect import OPS
from gptoss_compile.match import call, getitem
from gptoss_compile.passes.base import Context, Pass, PassResult, rewrite


def run(graph: fx.Graph, ctx: Context) -> PassResult:
    top_k = ctx.config.experts_per_token

    def build(logits: fx.Node) -> list[fx.Node]:
        route = call(graph, torch.ops.gptoss.route.default, logits, top_k)
        return [getitem(graph, route, 0), getitem(graph, route, 1)]

    return rewrite(graph, ctx, lambda logits: OPS["route"].reference(logits, top_k),
                   [(ctx.example(ctx.bucket.tokens, ctx.config.num_experts),)], build)


RAISE_ROUTER = Pass("raise_router", run, lambda ctx: ctx.config.num_layers, "bitwise")
