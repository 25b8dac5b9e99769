"""Programmatic dependent launch: marks every kernel but a step's first as allowed to start before its predecessor ends.

What a kernel may do before `griddepcontrol.wait` is its own contract (`kernels.spec.Pdl`), which the lint checks in the
machine code. The first kernel of a step depends on copies of the inputs, not on a kernel, and is launched plainly.
"""

from __future__ import annotations

from torch import fx

from gptoss_compile.passes.base import Context, Pass, PassResult
from gptoss_compile.passes.select_kernels import calls


def run(graph: fx.Graph, ctx: Context) -> PassResult:
    if not ctx.target.has("pdl"):
        return PassResult(0)
    nodes = calls(graph)[1:][: ctx.limit]
    for node in nodes:
        node.meta["pdl"] = True
    return PassResult(len(nodes))


PLACE_PDL = Pass("place_pdl", run, lambda ctx: None, "bitwise")
