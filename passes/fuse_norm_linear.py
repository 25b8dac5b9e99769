"""RMSNorm + projection + bias -> gptoss::norm_linear (QKV of each layer): the norm's factor is applied to the product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from gptoss_compile.match import call
from gptoss_compile.passes.base import Context, Pass, PassResult, rewrite

ops = torch.ops.gptoss


def run(graph: fx.Graph, ctx: Context) -> PassResult:
    c, eps = ctx.config, ctx.config.rms_eps
    outputs = c.q_size + 2 * c.kv_size

    def pattern(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
        return (F.linear(ops.rms_norm(x, norm_weight, eps), weight, bias),)

    examples = (ctx.example(ctx.bucket.tokens, c.hidden), ctx.example(c.hidden), ctx.example(outputs, c.hidden),
                ctx.example(outputs))
    return rewrite(graph, ctx, pattern, [examples],
                   lambda x, g, w, b: call(graph, ops.norm_linear.default, x, g, w, b, eps))


FUSE_NORM_LINEAR = Pass("fuse_norm_linear", run, lambda ctx: ctx.config.num_layers if ctx.ranks == 1 else None, "rtol")
