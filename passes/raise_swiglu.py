"""Plain tensor code of the clamped SwiGLU -> gptoss::swiglu, one a layer."""

from __future__ import annotations

import torch
from torch import fx

from gptoss_compile.config import SWIGLU_ALPHA
from gptoss_compile.dialect import OPS
from gptoss_compile.match import call
from gptoss_compile.passes.base import Context, Pass, PassResult, rewrite


def run(graph: fx.Graph, ctx: Context) -> PassResult:
    c = ctx.config
    example = ctx.example(ctx.bucket.tokens, c.experts_per_token, 2 * c.intermediate, dtype=torch.float32)
    return rewrite(
        graph, ctx,
        pattern=lambda x: (OPS["swiglu"].reference(x, SWIGLU_ALPHA, c.swiglu_limit),),
        examples=[(example,)],
        build=lambda x: call(graph, torch.ops.gptoss.swiglu.default, x, SWIGLU_ALPHA, c.swiglu_limit))


RAISE_SWIGLU = Pass("raise_swiglu", run, lambda ctx: ctx.config.num_layers, "bitwise")
