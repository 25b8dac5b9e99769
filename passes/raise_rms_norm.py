"""Plain tensor code of RMSNorm -> gptoss::rms_norm: two a layer and the final one."""

from __future__ import annotations

import torch
from torch import fx

from gptoss_compile.dialect import OPS
from gptoss_compile.match import call
from gptoss_compile.passes.base import Context, Pass, PassResult, rewrite


def run(graph: fx.Graph, ctx: Context) -> PassResult:
    eps, hidden = ctx.config.rms_eps, ctx.config.hidden
    rows = {ctx.bucket.tokens, ctx.bucket.rows}
    return rewrite(
        graph, ctx,
        pattern=lambda x, weight: (OPS["rms_norm"].reference(x, weight, eps),),
        examples=[(ctx.example(n, hidden), ctx.example(hidden)) for n in sorted(rows)],
        build=lambda x, weight: call(graph, torch.ops.gptoss.rms_norm.default, x, weight, eps))


RAISE_RMS_NORM = Pass("raise_rms_norm", run, lambda ctx: 2 * ctx.config.num_layers + 1, "bitwise")
