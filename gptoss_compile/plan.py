"""From the final graph to a launch plan: every node a step, every value a place."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, fx

from gptoss_compile.dialect import OPS, op_name
from gptoss_compile.exchange_area import RESERVED, ExchangeArea, lay_out
from gptoss_compile.kernels.layouts import layout_sources
from gptoss_compile.kernels.registry import SPECS
from gptoss_compile.kernels.spec import KernelSpec, Launch, LibrarySource, TensorSpec
from gptoss_compile.kernels.spec import Operand as KernelOperand
from gptoss_compile.kernels.tuned import of_step
from gptoss_compile.launch_plan import AnyLaunch, Extern, KernelLaunch, LaunchPlan, Layout, Operand, Step, Value
from gptoss_compile.memory import Lifetime, align, assign
from gptoss_compile.passes.base import Context
from gptoss_compile.target import Target
from gptoss_compile.trace import DTYPE_NAMES, Role


def node_operands(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by their names in the operator's schema."""
    schema = cast(Any, node.target)._schema.arguments
    given = {a.name: value for a, value in zip(schema, node.args, strict=False)}
    return {a.name: given.get(a.name, node.kwargs.get(a.name, a.default_value)) for a in schema}


def tensor_operands(operands: Mapping[str, Any]) -> dict[str, KernelOperand]:
    """The same with a TensorSpec in each tensor's place: what a KernelSpec is asked with."""
    return {name: _spec(v.meta["val"]) if isinstance(v, fx.Node) else v for name, v in operands.items()}


def _spec(value: Tensor) -> TensorSpec:
    return TensorSpec(tuple(value.shape), DTYPE_NAMES[value.dtype])


BinaryOf = Callable[[Launch], str]


def make_plan(graph: fx.Graph, ctx: Context, *, binary_of: BinaryOf | None = None) -> LaunchPlan:
    """The launch plan of a graph that holds kernel operators only. With several ranks its weights are still whole ones, see
    `sharding.rank_plan`.

    binary_of names the machine code of a launch; without it (the `cpu` target) steps have no launches, and nothing is in an
    exchange area.
    """
    nodes = [n for n in graph.nodes if n.op == "call_function" and n.target is not operator.getitem]
    step_of = {node: i for i, node in enumerate(nodes)}
    returned: tuple[fx.Node, ...] = next(n for n in graph.nodes if n.op == "output").args[0]
    places: dict[tuple[fx.Node, int], Operand] = {}
    lives: dict[tuple[fx.Node, int], Lifetime] = {}

    for node in nodes:  # what an operator returns is a new buffer, or an argument updated in place
        for index, value in enumerate(_outputs(node)):
            if index not in OPS[op_name(node)].updates:
                last = _last_use(node, index, step_of, returned[0], len(nodes))
                lives[node, index] = Lifetime(_bytes(value), step_of[node], last)
    area = ExchangeArea()
    if binary_of and ctx.ranks > 1:
        sources = {node: _resolve(cast(fx.Node, node.args[0])) for node in nodes if OPS[op_name(node)].exchange}
        area = lay_out(nodes, lives, sources, ctx.ranks)
    places |= area.places
    buffers = [(key, life) for key, life in lives.items() if key not in places]
    launches = {node: kernel_launches(node, ctx) if binary_of else () for node in nodes}
    scratch = {(node, i, j): Lifetime(spec.bytes, step_of[node], step_of[node]) for node in nodes
               for i, launch in enumerate(launches[node]) for j, spec in enumerate(launch.scratch)
               if j not in launch.zeroed}
    common = {(node, name): Lifetime(spec.bytes, step_of[node], step_of[node]) for node in nodes
              for launch in launches[node] for name, spec in launch.common if name not in RESERVED}
    offsets, arena = assign([life for _, life in buffers] + list(scratch.values()) + list(common.values()))
    for (key, _), offset in zip(buffers, offsets, strict=False):
        value = _outputs(key[0])[key[1]]
        places[key] = Operand("arena", offset, DTYPE_NAMES[value.dtype], tuple(value.shape))
    scratch_offsets = dict(zip((*scratch, *common), offsets[len(buffers):], strict=True))

    steps, workspace = [], 0
    for i, node in enumerate(nodes):
        operands = {name: _place(value, places) for name, value in node_operands(node).items()}
        for index, name in OPS[op_name(node)].updates.items():
            places[node, index] = cast(Operand, operands[name])
        planned: list[AnyLaunch] = []
        for number, launch in enumerate(launches[node]):
            assert binary_of is not None
            own, at = [], 0
            for j, spec in enumerate(launch.scratch):
                if j in launch.zeroed:
                    own.append(Operand("workspace", at, spec.dtype, spec.shape))
                    at += align(spec.bytes)
                else:
                    own.append(Operand("arena", scratch_offsets[node, number, j], spec.dtype, spec.shape))
            workspace = max(workspace, at)
            pdl = bool(node.meta.get("pdl"))
            if number > 0:
                pdl = ctx.target.has("pdl") and not isinstance(planned[-1], Extern)
            shared = {name: Operand("arena", scratch_offsets[node, name], spec.dtype, spec.shape)
                      for name, spec in launch.common if name not in RESERVED} | area.named(node, launch.args)
            if isinstance(launch.source, LibrarySource):
                planned.append(Extern(binary_of(launch), launch.source.function, launch.args, tuple(own), shared))
            else:
                planned.append(KernelLaunch(binary_of(launch), launch.grid, launch.args, tuple(own), pdl, shared,
                                            launch.carveout))
        kernel = node.meta["kernel"].name if "kernel" in node.meta else op_name(node)
        outputs = tuple(places[node, k] for k in range(len(_outputs(node))))
        frees = tuple((int(places[key].key), int(places[key].key) + align(life.size))
                      for key, life in buffers if life.last == i)
        steps.append(Step(op_name(node), kernel, operands, outputs, tuple(planned), frees,
                          *_cost(node, launches[node]), area.frees.get(i, ())))

    roles = [(n, n.meta["role"]) for n in graph.nodes if n.op == "placeholder"]
    external = {kind: tuple(_external(n, role) for n, role in roles if role.kind == kind) for kind in ("input", "cache")}
    weights = tuple(role.weight for n, role in roles if role.kind == "weight" and n.users)
    return LaunchPlan(ctx.bucket.name, ctx.target.name, DTYPE_NAMES[ctx.dtype], ctx.rank, ctx.ranks, arena, workspace,
                      external["input"], external["cache"], weights, _layouts(nodes) if binary_of else {}, tuple(steps),
                      cast(Operand, _place(returned[0], places)), exchange_bytes=area.bytes)


def _layouts(nodes: Sequence[fx.Node]) -> dict[str, Layout]:
    """How the chosen kernels want their weights."""
    layouts: dict[str, Layout] = {}
    for node in nodes:
        operands = node_operands(node)
        for operand, kind in node.meta["kernel"].layouts.items():
            sources = [operands[name] for name in layout_sources(operand, kind)]
            names = tuple(source.meta["role"].weight.name for source in sources)
            layout = layouts.setdefault(names[0], Layout(kind, names))
            assert layout.kind == kind, f"kernels want {names[0]} as {layout.kind} and as {kind}"
    return layouts


def kernel_launches(node: fx.Node, ctx: Context) -> tuple[Launch, ...]:
    """What the chosen kernel of a node launches."""
    kernel: KernelSpec = node.meta["kernel"]
    launches = kernel.instantiate(ctx.target, tensor_operands(node_operands(node)))
    step = {ctx.bucket.kind: ctx.bucket.tokens, "sequences": ctx.bucket.sequences}
    return of_step(ctx.target, step | ({"ranks": ctx.ranks} if ctx.ranks > 1 else {}), launches)


def _cost(node: fx.Node, launches: tuple[Launch, ...]) -> tuple[int, int]:
    """(bytes that must move, operations) of a step. Without launches, those that the operator's kernel would have: both
    follow from the shapes. An operator that has no kernel counts its operands and outputs."""
    if not launches:
        operands, target = tensor_operands(node_operands(node)), Target.parse("sm90")
        kernel = next((s for s in SPECS if s.op == op_name(node) and s.supports(target, operands)), None)
        if kernel is None:
            read = sum(value.bytes for value in operands.values() if isinstance(value, TensorSpec))
            return read + sum(map(_bytes, _outputs(node))), 0
        launches = kernel.instantiate(target, operands)
    return sum(x.moved for x in launches), sum(x.flops for x in launches)


def _outputs(node: fx.Node) -> tuple[Tensor, ...]:
    value = node.meta["val"]
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _resolve(node: fx.Node) -> tuple[fx.Node, int]:
    """The call and the index of its output that a node stands for."""
    return cast(tuple[fx.Node, int], node.args) if node.target is operator.getitem else (node, 0)


def _last_use(node: fx.Node, index: int, step_of: Mapping[fx.Node, int], logits: fx.Node, end: int) -> int:
    """The last step that reads output `index` of `node`; the logits are read behind the last one."""
    names = [n for n in (node, *node.users) if _resolve(n) == (node, index)]
    if logits in names:
        return end
    return max([step_of[node], *(step_of[user] for name in names for user in name.users if user in step_of)])


def _external(node: fx.Node, role: Role) -> Operand:
    value = node.meta["val"]
    return Operand(cast(Any, role.kind), role.name, DTYPE_NAMES[value.dtype], tuple(value.shape))


def _place(value: Any, places: Mapping[tuple[fx.Node, int], Operand]) -> Value:
    if not isinstance(value, fx.Node):
        return cast(Value, value)
    if value.op == "placeholder":
        return _external(value, value.meta["role"])
    return places[_resolve(value)]
