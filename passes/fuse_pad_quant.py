"""Pad + quantise: on targets with block-scaled MMA the grouped experts get their input as MXFP8.

RMSNorm, padding of the features to the MMA's tile and quantisation to e4m3 with one e8m0 scale per 32 values are one
launch of `moe_grouped_mx`, in place of the norm that `moe_grouped` would otherwise repeat for every tile. Steps whose
experts are not grouped are bound by weights, gain nothing and keep bf16.
"""

from __future__ import annotations

import torch
from torch import fx

from gptoss_compile.match import call, erase_dead
from gptoss_compile.passes.base import Context, Pass, PassResult
from gptoss_compile.passes.lower_moe import is_grouped

ops = torch.ops.gptoss


def applies(ctx: Context) -> bool:
    return (ctx.target.has("block_scaled_mma") and is_grouped(ctx) and ctx.config.expert_format == "mxfp4"
            and ctx.dtype == torch.bfloat16 and ctx.ranks == 1)


def run(graph: fx.Graph, ctx: Context) -> PassResult:
    if not applies(ctx):
        return PassResult(0)
    nodes = list(graph.find_nodes(op="call_function", target=ops.moe_grouped.default))[: ctx.limit]
    for node in nodes:
        with graph.inserting_before(node):
            node.replace_all_uses_with(call(graph, ops.moe_grouped_mx.default, *node.args))
    erase_dead(graph)
    return PassResult(len(nodes))


FUSE_PAD_QUANT = Pass("fuse_pad_quant", run, lambda ctx: ctx.config.num_layers if applies(ctx) else 0, "rtol")
