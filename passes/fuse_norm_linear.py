"""RMSNorm + projection + bias -> gptoss::norm_linear (QKV of each layer): the norm's factor is applied to the product.

With several ranks every layer but the first begins with an exchange: then gptoss::reduce_norm_linear.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from gptoss_compile.match import call, getitem
from gptoss_compile.passes.base import Context, Pass, PassResult, rewrite

ops = torch.ops.gptoss


def run(graph: fx.Graph, ctx: Context) -> PassResult:
    c, eps = ctx.config, ctx.config.rms_eps
    outputs = c.q_size + 2 * c.kv_size

    def pattern(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
        return (F.linear(ops.rms_norm(x, norm_weight, eps), weight, bias),)

    def reducing(partial: Tensor, residual: Tensor, norm_weight: Tensor, weight: Tensor,
                 bias: Tensor) -> tuple[Tensor, Tensor]:
        total, normed = ops.allreduce_add_rms_norm(partial, residual, norm_weight, eps)
        return F.linear(normed, weight, bias), total

    def build_reducing(*inputs: fx.Node) -> list[fx.Node]:
        both = call(graph, ops.reduce_norm_linear.default, *inputs, eps)
        total, projected = getitem(graph, both, 0), getitem(graph, both, 1)
        return [projected, total]

    x, projection = ctx.example(ctx.bucket.tokens, c.hidden), (ctx.example(outputs, c.hidden), ctx.example(outputs))
    results = [rewrite(graph, ctx, pattern, [(x, ctx.example(c.hidden), *projection)],
                       lambda x, g, w, b: call(graph, ops.norm_linear.default, x, g, w, b, eps))]
    if ctx.ranks > 1:
        results.append(rewrite(graph, ctx.after(results), reducing, [(x, x, ctx.example(c.hidden), *projection)],
                               build_reducing))
    return PassResult.sum(results)


FUSE_NORM_LINEAR = Pass("fuse_norm_linear", run, lambda ctx: ctx.config.num_layers, "rtol")
