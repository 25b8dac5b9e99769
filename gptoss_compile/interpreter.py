"""Running graphs and plans on a CPU, with the operators' references.

A plan runs as a GPU would run it: every intermediate in its place in the one arena, caches updated in place, and the
bytes of a buffer filled with 0xFF (NaN in every float format used) as soon as the plan calls them dead. So a wrong
lifetime, a wrong place or an operator that reads what it should not turns into NaN, on a machine without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from gptoss_compile.dialect import OPS
from gptoss_compile.kernels import registry  # noqa: F401  declares the kernel operators
from gptoss_compile.launch_plan import LaunchPlan, Operand, Step, Value
from gptoss_compile.trace import DTYPES

Tensors = Mapping[str, Tensor]
Watch = Callable[[int, Step, list[Tensor]], None]


def run_graph(graph: fx.Graph, tensors: Tensors) -> tuple[Tensor, ...]:
    """(logits, new caches...) of any stage's graph. `tensors` holds inputs, caches and weights by their role's name."""
    values = {n: tensors[n.meta["role"].name] for n in graph.nodes if n.op == "placeholder"}
    for node in graph.nodes:
        if node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **_on_cpu(kwargs))
        elif node.op == "output":
            return tuple(values[n] for n in node.args[0])
    raise AssertionError("a graph ends in an output node")


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: torch.device("cpu") if isinstance(v, torch.device) else v for k, v in kwargs.items()}


class PlanInterpreter:
    """One rank's memory and the means to run its plan's steps one by one.

    tensors: inputs, caches (updated in place) and weights by name. watch(i, step, outputs) is called behind each step.
    """

    def __init__(self, plan: LaunchPlan, tensors: Tensors) -> None:
        self.plan, self.tensors = plan, tensors
        self.arena = torch.full((plan.arena_bytes,), 0xFF, dtype=torch.uint8)

    def view(self, operand: Operand) -> Tensor:
        """The tensor at an operand's place."""
        if operand.place != "arena":
            return self.tensors[str(operand.key)]
        dtype, count = DTYPES[operand.dtype], 1
        for extent in operand.shape:
            count *= extent
        start = int(operand.key)
        return self.arena[start : start + count * dtype.itemsize].view(dtype).view(operand.shape)

    def step(self, step: Step) -> list[Tensor]:
        """Run one step in the arena; returns views of its outputs."""
        results = OPS[step.op].reference(**{name: self._value(v) for name, v in step.operands.items()})
        views = [self.view(o) for o in step.outputs]
        for view, result in zip(views, results if isinstance(results, tuple) else (results,), strict=True):
            assert view.shape == result.shape and view.dtype == result.dtype, (step.op, view.shape, result.shape)
            view.copy_(result)
        return views

    def free(self, step: Step) -> None:
        for start, end in step.frees:
            self.arena[start:end] = 0xFF

    def _value(self, value: Value) -> Any:
        return self.view(value) if isinstance(value, Operand) else value

    def run(self, watch: Watch | None = None) -> Tensor:
        """The logits [R, V], a copy; the caches are updated in place."""
        for i, step in enumerate(self.plan.steps):
            outputs = self.step(step)
            if watch:
                watch(i, step, outputs)
            self.free(step)
        return self.view(self.plan.logits).clone()
