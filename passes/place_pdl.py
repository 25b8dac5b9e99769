"""Programmatic dependent launch: marks every kernel but a step's first as allowed to start before its predecessor ends.

What a kernel may do before `griddepcontrol.wait` is its own contract (`kernels.spec.Pdl`), which the lint checks in the
machine code. Weights may always be read early. What another operator's kernels wrote may be read early only if all of them
have ended by then: the last of them is not the predecessor, and the predecessor lets its dependents start only after its own
wait. The first kernel of a step depends on copies of the inputs, not on a kernel, and is launched plainly; so is one behind
a library's, which know nothing of this.
"""

from __future__ import annotations

import itertools
import operator

from torch import fx

from gptoss_compile.kernels.spec import Launch, LibrarySource
from gptoss_compile.match import NearMiss
from gptoss_compile.passes.base import Context, Pass, PassResult
from gptoss_compile.passes.select_kernels import calls
from gptoss_compile.plan import kernel_launches, node_operands


def run(graph: fx.Graph, ctx: Context) -> PassResult:
    if not ctx.target.has("pdl"):
        return PassResult(0)
    nodes = [node for node in calls(graph) if "kernel" in node.meta]
    hazards = []
    launches = [(node, launch) for node in nodes for launch in kernel_launches(node, ctx)]
    marked = set(nodes[1:])
    for (before, last), (node, launch) in itertools.pairwise(launches):
        if isinstance(last.source, LibrarySource):
            marked -= {node} - {before}
            continue
        hazards += [NearMiss(0, 1, node.name, f"it reads {name} before its wait, but %{before.name} may not have waited for "
                                              f"%{writer.name}, which writes it")
                    for name, writer in _early_reads(node, launch)
                    if writer is before or last.pdl.trigger != "after_wait"]
    for node in marked:
        node.meta["pdl"] = True
    return PassResult(len(marked) - len(hazards), tuple(hazards), expected=len(marked))


def _early_reads(node: fx.Node, launch: Launch) -> list[tuple[str, fx.Node]]:
    """(operand, the call that writes it) for what a kernel reads before its wait and another call of the step wrote."""
    operands, found = node_operands(node), []
    for name in launch.pdl.preloads:
        value = operands.get(name)
        if isinstance(value, fx.Node) and value.target is operator.getitem:
            value = value.args[0]
        if isinstance(value, fx.Node) and value.op == "call_function":
            found.append((name, value))
    return found


PLACE_PDL = Pass("place_pdl", run, lambda ctx: None, "bitwise")
