"""RMSNorm + gate_up + SwiGLU + down + weighted sum + residual -> kernels of the mixture of experts.

While tokens are few, each (token, expert) pair runs for itself (`moe_gate_up`, `moe_down`): pairs hardly ever share an
expert, whose weights are read once a pair. With more tokens they do: `moe_grouped` sorts pairs by expert and runs each
expert once over its own. With several ranks the residual is added behind the exchange, what ends the mixture gives partial
sums, and x comes from the router's kernel, so that nobody may read it before that has ended (`early`).
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from gptoss_compile.config import SWIGLU_ALPHA
from gptoss_compile.match import call
from gptoss_compile.passes.base import Context, Pass, PassResult, rewrite

ops = torch.ops.gptoss


PAIRWISE_TOKENS = 4  # up to here the pairs of 32 random experts name 0.8 of their number of distinct ones, or more


def is_grouped(ctx: Context) -> bool:
    return ctx.bucket.tokens > PAIRWISE_TOKENS


def run(graph: fx.Graph, ctx: Context) -> PassResult:
    c, tokens = ctx.config, ctx.bucket.tokens
    top_k, limit, mxfp4 = c.experts_per_token, c.swiglu_limit, c.expert_format == "mxfp4"

    def pattern(x: Tensor, norm_weight: Tensor, ids: Tensor, probs: Tensor, up: Tensor, up_bias: Tensor, down: Tensor,
                down_bias: Tensor, up_scales: Tensor | None = None, down_scales: Tensor | None = None) -> tuple[Tensor]:
        normed = ops.rms_norm(x, norm_weight, c.rms_eps).unsqueeze(1)
        hidden = ops.swiglu(ops.experts_linear(normed, ids, up, up_scales, up_bias), SWIGLU_ALPHA, limit).to(x.dtype)
        mixed = (ops.experts_linear(hidden, ids, down, down_scales, down_bias) * probs.unsqueeze(-1)).sum(1).to(x.dtype)
        return (x + mixed if ctx.ranks == 1 else mixed,)

    def build(x: fx.Node, norm: fx.Node, ids: fx.Node, probs: fx.Node, up: fx.Node, up_bias: fx.Node, down: fx.Node,
              down_bias: fx.Node, up_scales: fx.Node | None = None, down_scales: fx.Node | None = None) -> fx.Node:
        act = (c.rms_eps, SWIGLU_ALPHA, limit)
        if not is_grouped(ctx):
            early = () if ctx.ranks == 1 else (0,)
            h = call(graph, ops.moe_gate_up.default, x, norm, ids, up, up_scales, up_bias, *act, *early)
            mix = (h, ids, probs, down, down_scales, down_bias)
            return call(graph, ops.moe_down.default, *mix, x) if ctx.ranks == 1 else call(
                graph, ops.moe_down_partial.default, *mix)
        grouped = ops.moe_grouped.default if ctx.ranks == 1 else ops.moe_grouped_partial.default
        return call(graph, grouped, x, norm, ids, probs, up, up_scales, up_bias, down, down_scales, down_bias, *act)

    def experts(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        shape = (c.num_experts, outputs, inputs // 32, 16) if mxfp4 else (c.num_experts, outputs, inputs)
        return ctx.example(*shape, dtype=torch.uint8 if mxfp4 else None), ctx.example(c.num_experts, outputs)

    up, down = experts(2 * c.intermediate, c.hidden), experts(c.hidden, c.intermediate)
    scales = [w.new_empty(w.shape[:-1]) for w in (up[0], down[0])] if mxfp4 else []
    pairs = (tokens, top_k)
    examples = (ctx.example(tokens, c.hidden), ctx.example(c.hidden), ctx.example(*pairs, dtype=torch.int32),
                ctx.example(*pairs, dtype=torch.float32), *up, *down, *scales)
    return rewrite(graph, ctx, pattern, [examples], build)


LOWER_MOE = Pass("lower_moe", run, lambda ctx: ctx.config.num_layers, "rtol")
