"""Three projections of one input -> one with concatenated weights and a split: one kernel reads the input once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from gptoss_compile.match import call, getitem
from gptoss_compile.passes.base import Context, Pass, PassResult, merged_weight, rewrite

aten = torch.ops.aten


def run(graph: fx.Graph, ctx: Context) -> PassResult:
    c = ctx.config
    sizes = [c.q_size, c.kv_size, c.kv_size]

    def pattern(x: Tensor, wq: Tensor, bq: Tensor, wk: Tensor, bk: Tensor, wv: Tensor, bv: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, wq, bq), F.linear(x, wk, bk), F.linear(x, wv, bv)

    def build(x: fx.Node, wq: fx.Node, bq: fx.Node, wk: fx.Node, bk: fx.Node, wv: fx.Node, bv: fx.Node) -> list[fx.Node]:
        weight, bias = merged_weight(graph, [wq, wk, wv], "qkv"), merged_weight(graph, [bq, bk, bv], "qkv")
        qkv = call(graph, aten.linear.default, x, weight, bias)
        split = call(graph, aten.split_with_sizes.default, qkv, sizes, -1)
        return [getitem(graph, split, i) for i in range(3)]

    projections = [t for n in sizes for t in (ctx.example(n, c.hidden), ctx.example(n))]
    return rewrite(graph, ctx, pattern, [(ctx.example(ctx.bucket.tokens, c.hidden), *projections)], build)


MERGE_QKV = Pass("merge_qkv", run, lambda ctx: ctx.config.num_layers, "ulp")
