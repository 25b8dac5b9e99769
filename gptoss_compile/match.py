"""Finding and replacing subgraphs: a pattern is a plain function of tensors, traced like the model itself.

The matcher walks backwards from the pattern's first output. A node fits if its operator, its constants, its shape and
dtype and, in turn, its arguments fit. Further outputs of a pattern are sought among the users of what already fits.
A candidate that fits in part is a near miss, kept so that a compile error can say where and why it stopped.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from gptoss_compile.trace import DTYPE_NAMES, trace_function

Bindings = dict[fx.Node, fx.Node]
aten = torch.ops.aten
_RESHAPES = {aten.view.default, aten.reshape.default, aten.expand.default, aten.slice.Tensor, aten.contiguous.default}
_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default}
_COPIES = {aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default, aten.dropout.default}


@dataclass(frozen=True)
class NearMiss:
    """A place where a pattern fitted in part. `where` is the graph node at which it stopped."""

    matched: int
    total: int
    where: str
    reason: str

    def __str__(self) -> str:
        return f"matched {self.matched} of {self.total} nodes, stopped at %{self.where}: {self.reason}"


@dataclass(frozen=True)
class Match:
    """inputs: the graph nodes bound to the pattern's parameters; outputs: those the pattern returns."""

    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    nodes: frozenset[fx.Node]


class _Stop(Exception):
    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


class Pattern:
    """A function of tensors as a pattern. `examples` are meta tensors of the shapes it is to be found with.

    The pattern is simplified as the graph was by the canonicalising pass.
    """

    def __init__(self, function: Callable[..., Any], examples: Sequence[Tensor]) -> None:
        graph = trace_function(function, [torch.empty_like(e) for e in examples])  # one tensor given twice is one node
        simplify(graph)
        self.parameters = [n for n in graph.nodes if n.op == "placeholder"]
        returned = next(n for n in graph.nodes if n.op == "output").args[0]
        self.outputs: list[fx.Node] = list(returned)
        self.total = sum(n.op == "call_function" for n in graph.nodes)
        self.graph = graph  # keeps the nodes alive

    def match(self, anchor: fx.Node) -> Match | NearMiss:
        """Fit the pattern with `anchor` as its first output."""
        found: Bindings = {}
        try:
            _fit(self.outputs[0], anchor, found)
            for output in self.outputs[1:]:
                _locate(output, found)
        except _Stop as stop:
            count = sum(p.op == "call_function" for p in found)
            return NearMiss(count, self.total, stop.node.name, stop.reason)
        return Match(tuple(found[p] for p in self.parameters), tuple(found[o] for o in self.outputs),
                     frozenset(found[p] for p in found if p.op == "call_function"))


@dataclass
class Search:
    """What looking for a pattern in a graph gave: matches in graph order, disjoint in their outputs, and near misses."""

    matches: list[Match] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)


def search(graph: fx.Graph, patterns: Sequence[Pattern]) -> Search:
    """All places where one of the patterns fits. Near misses with at least two fitting nodes, the best first."""
    result, taken = Search(), set[fx.Node]()
    for pattern in patterns:
        for node in graph.find_nodes(op="call_function", target=pattern.outputs[0].target):
            outcome = pattern.match(node)
            if isinstance(outcome, NearMiss):
                if outcome.matched >= min(2, pattern.total - 1):
                    result.near_misses.append(outcome)
            elif not taken.intersection(outcome.outputs):
                taken.update(outcome.outputs)
                result.matches.append(outcome)
    result.near_misses.sort(key=lambda miss: -miss.matched)
    return result


def replace(graph: fx.Graph, match: Match, build: Callable[..., fx.Node | Sequence[fx.Node]]) -> Bindings:
    """Put `build(*match.inputs)`'s nodes in the place of the match's outputs and tell which replaces which. What nobody
    uses then is left to `erase_dead`."""
    with graph.inserting_before(after_all(match.inputs)):
        built = build(*match.inputs)
    renamed = dict(zip(match.outputs, [built] if isinstance(built, fx.Node) else built, strict=True))
    for old, new in renamed.items():
        old.replace_all_uses_with(new)
    return renamed


def after_all(nodes: Sequence[fx.Node]) -> fx.Node:
    """The first node behind all of `nodes` (and behind every placeholder)."""
    follower = max(nodes).next
    while follower.op == "placeholder":
        follower = follower.next
    return follower


def call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """A new call with its shape inferred on meta tensors."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
    return node


def getitem(graph: fx.Graph, node: fx.Node, index: int) -> fx.Node:
    item = graph.call_function(operator.getitem, (node, index))
    item.meta["val"] = node.meta["val"][index]
    return item


def describe(value: Any) -> str:
    """`bf16[4, 64]` for a tensor, its parts for a tuple."""
    if isinstance(value, Tensor):
        return f"{DTYPE_NAMES.get(value.dtype, str(value.dtype).removeprefix('torch.'))}{list(value.shape)}"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(map(describe, value)) + ")"
    return repr(value)


def _fit(p: fx.Node, g: fx.Node, found: Bindings) -> None:
    """Bind pattern node p to graph node g, and their arguments; raises _Stop where they differ."""
    if p in found:
        if found[p] is not g:
            raise _Stop(g, f"expected the same node as %{found[p].name}")
        return
    want, have = describe(p.meta["val"]), describe(g.meta.get("val"))
    if p.op == "call_function" and g.target != p.target:
        raise _Stop(g, f"expected {_name(p)}, found {_name(g)} {have}")
    if want != have:
        raise _Stop(g, f"shape {have}, expected {want}")
    if p.op == "placeholder":
        found[p] = g
        return
    mine, theirs = _flat(p), _flat(g)
    if len(mine) != len(theirs):
        raise _Stop(g, f"{_name(g)} has {len(theirs)} arguments, expected {len(mine)}")
    for a, b in zip(mine, theirs, strict=True):
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            _fit(a, b, found)
        elif isinstance(a, fx.Node) or isinstance(b, fx.Node) or type(a) is not type(b) or a != b:
            raise _Stop(g, f"argument {_show(b)} of {_name(g)}, expected {_show(a)}")
    if g in found.values():
        raise _Stop(g, "already matched as another node of the pattern")
    found[p] = g


def _locate(p: fx.Node, found: Bindings) -> None:
    """Bind a further output of the pattern: try every user of what is already bound."""
    failure: _Stop | None = None
    for candidate in _candidates(p, found):
        trial = dict(found)
        try:
            _fit(p, candidate, trial)
        except _Stop as stop:
            failure = stop
            continue
        found.update(trial)
        return
    near = next((found[a] for a in p.all_input_nodes if a in found), next(iter(found.values())))
    raise failure or _Stop(near, f"no user of it is the expected {_name(p)} {describe(p.meta['val'])}")


def _candidates(p: fx.Node, found: Bindings) -> Iterator[fx.Node]:
    if p in found:
        yield found[p]
    elif p.op == "call_function":
        for argument in p.all_input_nodes:
            for image in _candidates(argument, found):
                yield from (user for user in list(image.users) if user.target == p.target)


def _flat(node: fx.Node) -> list[Any]:
    schema = getattr(node.target, "_schema", None)
    args, kwargs = node.args, dict(node.kwargs)
    if schema is not None:  # positional and keyword spellings of one call are equal
        extra = [kwargs.pop(a.name, a.default_value) for a in schema.arguments[len(args):]]
        args = (*args, *extra)
    return list(pytree.tree_leaves((args, sorted(kwargs.items())), is_leaf=lambda x: x is None))


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_function" else f"{node.op} %{node.name}"


def _show(value: Any) -> str:
    return f"%{value.name}" if isinstance(value, fx.Node) else repr(value)


def erase_dead(graph: fx.Graph) -> None:
    """Drop calls that nobody uses. Every operator here is functional, so unused means dead."""
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)




def simplify(graph: fx.Graph) -> int:
    """Remove calls whose result is their first argument; returns how many."""
    removed = 0
    for node in list(graph.nodes):
        if node.op == "call_function" and _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            removed += 1
    erase_dead(graph)
    return removed


def _is_identity(node: fx.Node) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    if node.target in _CASTS or node.target in _COPIES:
        return before.dtype == after.dtype
    return node.target in _RESHAPES and before.shape == after.shape
