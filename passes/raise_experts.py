"""Expert gather + product + bias, with or without MXFP4 dequantisation -> gptoss::experts_linear, two a layer."""

from __future__ import annotations

import torch
from torch import fx

from gptoss_compile.dialect import OPS
from gptoss_compile.match import call
from gptoss_compile.passes.base import Context, Pass, PassResult, rewrite


def run(graph: fx.Graph, ctx: Context) -> PassResult:
    c, tokens = ctx.config, ctx.bucket.tokens
    reference, op = OPS["experts_linear"].reference, torch.ops.gptoss.experts_linear.default
    ids = ctx.example(tokens, c.experts_per_token, dtype=torch.int32)
    sizes = ((1, c.hidden, 2 * c.intermediate), (c.experts_per_token, c.intermediate, c.hidden))
    if c.expert_format == "mxfp4":
        return rewrite(
            graph, ctx,
            pattern=lambda x, ids, blocks, scales, bias: (reference(x, ids, blocks, scales, bias),),
            examples=[(ctx.example(tokens, copies, inputs), ids,
                       ctx.example(c.num_experts, outputs, inputs // 32, 16, dtype=torch.uint8),
                       ctx.example(c.num_experts, outputs, inputs // 32, dtype=torch.uint8),
                       ctx.example(c.num_experts, outputs)) for copies, inputs, outputs in sizes],
            build=lambda *x: call(graph, op, *x))
    return rewrite(
        graph, ctx,
        pattern=lambda x, ids, weight, bias: (reference(x, ids, weight, None, bias),),
        examples=[(ctx.example(tokens, copies, inputs), ids, ctx.example(c.num_experts, outputs, inputs),
                   ctx.example(c.num_experts, outputs)) for copies, inputs, outputs in sizes],
        build=lambda x, ids, weight, bias: call(graph, op, x, ids, weight, None, bias))


RAISE_EXPERTS = Pass("raise_experts", run, lambda ctx: 2 * ctx.config.num_layers, "bitwise")
