"""Running graphs and plans on a CPU, with the operators' references.

A plan runs as a GPU would run it: every intermediate in its place in the one arena, or in the rank's exchange area, caches
updated in place, and the bytes of a buffer filled with 0xFF (NaN in every float format used) as soon as the plan calls them
dead. So a wrong lifetime, a wrong place or an operator that reads what it should not turns into NaN, on a machine without a
GPU.

Several ranks run in lockstep, each with its own memory, and exchange where an operator says so (`OpInfo.exchange`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from gptoss_compile.dialect import OPS, exchanged, op_name
from gptoss_compile.kernels import registry  # noqa: F401  declares the kernel operators
from gptoss_compile.launch_plan import EXCHANGED, LaunchPlan, Operand, Step
from gptoss_compile.trace import DTYPES

Tensors = Mapping[str, Tensor]
Watch = Callable[[int, Step, list[Tensor]], None]
RankWatch = Callable[[int, int, Step, list[Tensor]], None]
MEMORY = ("arena", *EXCHANGED)  # places of intermediates


def run_graph(graph: fx.Graph, tensors: Tensors) -> tuple[Tensor, ...]:
    """(logits, new caches...) of any stage's graph. `tensors` holds inputs, caches and weights by their role's name."""
    return run_graphs([graph], [tensors])[0]


def run_graphs(graphs: Sequence[fx.Graph], tensors: Sequence[Tensors]) -> list[tuple[Tensor, ...]]:
    """The same of all ranks, in lockstep. The ranks' graphs make the same calls, if of other shapes."""
    values = [{n: each[n.meta["role"].name] for n in graph.nodes if n.op == "placeholder"}
              for graph, each in zip(graphs, tensors, strict=True)]
    calls = [[n for n in graph.nodes if n.op == "call_function"] for graph in graphs]
    for nodes in zip(*calls, strict=True):
        call_ranks(nodes, values, nodes[0].target)
    returned: list[Any] = [next(n for n in graph.nodes if n.op == "output").args[0] for graph in graphs]
    return [tuple(known[n] for n in nodes) for known, nodes in zip(values, returned, strict=True)]


def call_ranks(nodes: Sequence[fx.Node], values: Sequence[dict[fx.Node, Any]], function: Any) -> None:
    """One call, of `function`, on every rank: adds the ranks' results to the values that they know."""
    assert len({node.target for node in nodes}) == 1, f"ranks differ in %{nodes[0].name}"
    arguments: list[Any] = [fx.map_arg((node.args, _on_cpu(dict(node.kwargs))), known.__getitem__)
                            for node, known in zip(nodes, values, strict=True)]
    info = OPS.get(op_name(nodes[0]))
    if info and info.exchange:
        shared = exchanged(info.exchange, [args[0] for args, _ in arguments])
        arguments = [((shared, *args[1:]), kwargs) for args, kwargs in arguments]
    for node, known, (args, kwargs) in zip(nodes, values, arguments, strict=True):
        known[node] = function(*args, **kwargs)


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: torch.device("cpu") if isinstance(v, torch.device) else v for k, v in kwargs.items()}


class PlanInterpreter:
    """One rank's memory, and how its plan's steps run in it one by one.

    tensors: inputs, caches (updated in place) and weights by name.
    """

    def __init__(self, plan: LaunchPlan, tensors: Tensors) -> None:
        self.plan, self.tensors = plan, tensors
        self.arena = torch.full((plan.arena_bytes,), 0xFF, dtype=torch.uint8)
        self.exchange = torch.full((plan.exchange_bytes,), 0xFF, dtype=torch.uint8)

    def view(self, operand: Operand) -> Tensor:
        """The tensor at an operand's place. Of slots and shares, of which each rank has its own here, the first bytes."""
        if operand.place not in MEMORY:
            return self.tensors[str(operand.key)]
        memory = self.arena if operand.place == "arena" else self.exchange
        dtype, count = DTYPES[operand.dtype], 1
        for extent in operand.shape:
            count *= extent
        start = int(operand.key)
        return memory[start : start + count * dtype.itemsize].view(dtype).view(operand.shape)

    def operands(self, step: Step) -> dict[str, Any]:
        """A step's arguments, tensors as views of their places."""
        return {name: self.view(v) if isinstance(v, Operand) else v for name, v in step.operands.items()}

    def step(self, step: Step, operands: Mapping[str, Any]) -> list[Tensor]:
        """Run one step in the arena; returns views of its outputs."""
        results = OPS[step.op].reference(**operands)
        views = [self.view(o) for o in step.outputs]
        for view, result in zip(views, results if isinstance(results, tuple) else (results,), strict=True):
            assert view.shape == result.shape and view.dtype == result.dtype, (step.op, view.shape, result.shape)
            view.copy_(result)
        return views

    def free(self, step: Step) -> None:
        for memory, frees in ((self.arena, step.frees), (self.exchange, step.exchange_frees)):
            for start, end in frees:
                memory[start:end] = 0xFF

    def run(self, watch: Watch | None = None) -> Tensor:
        """The logits [R, V] of the only rank, a copy; the caches are updated in place. See `run_ranks`."""
        return run_ranks([self], watch and (lambda rank, *event: watch(*event)))[0]


def run_ranks(ranks: Sequence[PlanInterpreter], watch: RankWatch | None = None) -> list[Tensor]:
    """Run the ranks' plans in lockstep: every rank does its n-th step before any does the next.

    watch(rank, n, step, outputs) is called behind each. Returns each rank's logits, copies.
    """
    for number, steps in enumerate(zip(*(rank.plan.steps for rank in ranks), strict=True)):
        assert len({step.op for step in steps}) == 1, f"step {number} differs from rank to rank"
        operands = [rank.operands(step) for rank, step in zip(ranks, steps, strict=True)]
        if kind := OPS[steps[0].op].exchange:
            first = next(iter(steps[0].operands))
            shared = exchanged(kind, [each[first] for each in operands])
            operands = [{**each, first: shared} for each in operands]
        for i, (rank, step) in enumerate(zip(ranks, steps, strict=True)):
            outputs = rank.step(step, operands[i])
            if watch:
                watch(i, number, step, outputs)
            rank.free(step)
    return [rank.view(rank.plan.logits).clone() for rank in ranks]
