"""Projection + bias + residual -> gptoss::linear_residual (the attention's output projection of each layer).

With several ranks the residual is added behind the exchange, and the projection is gptoss::linear_partial.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from gptoss_compile.match import call
from gptoss_compile.passes.base import Context, Pass, PassResult, rewrite


def run(graph: fx.Graph, ctx: Context) -> PassResult:
    c, tokens = ctx.config, ctx.bucket.tokens

    def pattern(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
        return (residual + F.linear(x, weight, bias),)

    projection = ctx.example(tokens, c.q_size), ctx.example(c.hidden, c.q_size), ctx.example(c.hidden)
    if ctx.ranks > 1:
        return rewrite(graph, ctx, lambda x, w, b: (F.linear(x, w, b),), [projection],
                       lambda x, w, b: call(graph, torch.ops.gptoss.linear_partial.default, x, w, b))
    return rewrite(graph, ctx, pattern, [(ctx.example(tokens, c.hidden), *projection)],
                   lambda r, x, w, b: call(graph, torch.ops.gptoss.linear_residual.default, x, w, b, r))


FUSE_RESIDUAL = Pass("fuse_residual", run, lambda ctx: ctx.config.num_layers, "rtol")
