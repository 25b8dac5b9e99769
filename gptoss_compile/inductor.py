"""The `cpu` target's machine code: the final graph, its kernel operators decomposed into their references, compiled ahead
by AOTInductor to one shared library a bucket."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from gptoss_compile.dialect import OPS
from gptoss_compile.plan import op_name


class Decomposed(torch.nn.Module):
    """A graph as a module of (inputs, caches, weights), in the plan's order; caches are updated in place."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *tensors: Tensor) -> Tensor:
        values: dict[fx.Node, Any] = dict(zip(plan_order(self.graph), tensors, strict=True))
        for node in self.graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                function = node.target if node.target is operator.getitem else OPS[op_name(node)].reference
                values[node] = function(*args, **kwargs)
        logits, *caches = (values[n] for n in next(n for n in self.graph.nodes if n.op == "output").args[0])
        for old, new in zip((n for n in self.graph.nodes if _kind(n) == "cache"), caches, strict=True):
            values[old].copy_(new)
        return logits


def _kind(node: fx.Node) -> str:
    return str(node.meta["role"].kind) if node.op == "placeholder" else ""


def plan_order(graph: fx.Graph) -> list[fx.Node]:
    """The placeholders in the order of a plan: inputs, caches, then the weights that are used."""
    return [n for kind in ("input", "cache", "weight") for n in graph.nodes if _kind(n) == kind and (n.users or kind != "weight")]


def compile_graph(graph: fx.Graph, path: str) -> None:
    """Write the AOTInductor package of a graph to `path` (*.pt2)."""
    with FakeTensorMode():
        tensors = [torch.empty(v.shape, dtype=v.dtype) for v in (n.meta["val"] for n in plan_order(graph))]
        program = torch.export.export(Decomposed(graph), tuple(tensors), strict=False)
    torch._inductor.aoti_compile_and_package(program, package_path=path)
