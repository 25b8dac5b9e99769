"""Chooses for every operator of a GPU target's graph the first kernel that supports the target and the shapes.

Where other projects' kernels are wanted (`Context.extern`), one of them that supports both is taken instead, always or if
the target's table says that it was measured faster. The choice is noted on the node (`meta["kernel"]`). An operator without
a kernel stays unmatched, which is a compile error that names it. The `cpu` target has no kernels: its graph is decomposed
and compiled by Inductor.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from gptoss_compile.dialect import OPS, op_name
from gptoss_compile.kernels.registry import EXTERN, SPECS
from gptoss_compile.kernels.spec import KernelSpec, Operand
from gptoss_compile.kernels.tuned import choose
from gptoss_compile.match import NearMiss, describe
from gptoss_compile.passes.base import Context, Pass, PassResult
from gptoss_compile.plan import node_operands, tensor_operands


def calls(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_function" and n.target is not operator.getitem]


def run(graph: fx.Graph, ctx: Context) -> PassResult:
    chosen, missed = 0, []
    nodes = calls(graph)
    for node in nodes:
        info = OPS.get(op_name(node))
        if info is None or not info.is_kernel:
            missed.append(NearMiss(0, 1, node.name, f"{node.target} {describe(node.meta['val'])} is no kernel operator"))
            continue
        if ctx.target.is_gpu:
            operands = tensor_operands(node_operands(node))
            spec = kernel_for(info.name, operands, ctx)
            if spec is None:
                missed.append(NearMiss(0, 1, node.name, f"no kernel for {info.name} on {ctx.target.name} with {operands}"))
                continue
            node.meta["kernel"] = spec
        chosen += 1
    return PassResult(chosen, tuple(missed), expected=len(nodes))


@dataclass(frozen=True)
class Project:
    """What a table says of an operator at some shapes. kernel: the name of the one that is fastest."""

    kernel: str


def kernel_for(op: str, operands: Mapping[str, Operand], ctx: Context) -> KernelSpec | None:
    """The kernel of an operator's call; None if there is none."""
    ours, theirs = (next((s for s in specs if s.op == op and s.supports(ctx.target, operands)), None)
                    for specs in (SPECS, EXTERN))
    if ours is None or theirs is None or ctx.extern == "never":
        return ours
    assert theirs.key is not None
    rivals = Project(ours.name), Project(theirs.name)
    fastest = choose(ctx.target, op, theirs.key(operands), rivals[0], rivals[1:])
    return theirs if ctx.extern == "always" or fastest == rivals[1] else ours


SELECT_KERNELS = Pass("select_kernels", run, lambda ctx: None, "bitwise")
