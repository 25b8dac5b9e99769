"""Programmatic dependent launch: marks every kernel but a step's first as allowed to start before its predecessor ends.

What a kernel may do before `griddepcontrol.wait` is its own contract (`kernels.spec.Pdl`), which the lint checks in the
machine code. Weights may always be read early. What another kernel wrote may be read early only if that kernel has ended by
then: it is not the predecessor, and the predecessor lets its dependents start only after its own wait. The first kernel of a
step depends on copies of the inputs, not on a kernel, and is launched plainly.
"""

from __future__ import annotations

import itertools
import operator

from torch import fx

from gptoss_compile.match import NearMiss
from gptoss_compile.passes.base import Context, Pass, PassResult
from gptoss_compile.passes.select_kernels import calls
from gptoss_compile.plan import kernel_launches, node_operands


def run(graph: fx.Graph, ctx: Context) -> PassResult:
    if not ctx.target.has("pdl"):
        return PassResult(0)
    nodes = calls(graph)
    hazards = []
    for before, node in itertools.pairwise(nodes):
        node.meta["pdl"] = True
        hazards += [NearMiss(0, 1, node.name, f"it reads {name} before its wait, but %{before.name} may not have waited for "
                                              f"%{writer.name}, which writes it")
                    for name, writer in _early_reads(node, ctx) if writer is before or not _waits_first(before, ctx)]
    return PassResult(len(nodes[1:]) - len(hazards), tuple(hazards), expected=len(nodes[1:]))


def _early_reads(node: fx.Node, ctx: Context) -> list[tuple[str, fx.Node]]:
    """(operand, the kernel that writes it) for what a kernel reads before its wait and another kernel of the step wrote."""
    operands, found = node_operands(node), []
    for name in kernel_launches(node, ctx)[0].pdl.preloads:
        value = operands.get(name)
        if isinstance(value, fx.Node) and value.target is operator.getitem:
            value = value.args[0]
        if isinstance(value, fx.Node) and value.op == "call_function":
            found.append((name, value))
    return found


def _waits_first(node: fx.Node, ctx: Context) -> bool:
    return all(launch.pdl.trigger == "after_wait" for launch in kernel_launches(node, ctx))


PLACE_PDL = Pass("place_pdl", run, lambda ctx: None, "bitwise")
