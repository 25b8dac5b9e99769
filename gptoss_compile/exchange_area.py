"""What of a rank's step lies in memory that its peers touch, and where: the same place on every rank, as peers find a thing
in each other's memory by where it is in their own.

    header | flags of every exchange | slots of every sum | what is pulled, or written by peers: shares, sums, routes

The first three are where they are whatever the bucket, since they outlive a step: flags and slots hold the number of the
step that they are of, and what another bucket left there must not look like one. See `kernels.exchange`.

Behind them, a buffer may lie where another of the step lay if all ranks are known to have left that one. A two-shot sum is
what tells: from it, as from the end of a step, no rank goes on before all have read and written there what is theirs to read
and to write. So a rank may be ahead of another by the kernels up to the next exchange, no more. What peers write in an
exchange, when all have come to it, lives from that step on. What they write ahead of it, shares, lives from behind the
exchange before: nothing that is used later than that, by whoever is slowest, may be there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx

from gptoss_compile.dialect import OPS, op_name
from gptoss_compile.kernels.exchange import FEW_TOKENS, FLAGS_BYTES, HEADER_BYTES, ONE_SHOT_TOKENS
from gptoss_compile.launch_plan import EXCHANGED, LaunchPlan, Operand, Place
from gptoss_compile.memory import Lifetime, align, assign
from gptoss_compile.trace import DTYPE_NAMES

Buffer = tuple[fx.Node, int]  # a call and which of its outputs
HEADER = Operand("exchange", 0, "u8", (HEADER_BYTES,))
RESERVED = ("exchange", "flags")  # what launches call the header, and the flags of their step


@dataclass(frozen=True)
class ExchangeArea:
    """places: of the buffers that are in it; flags: of the steps that exchange; frees: ranges [offset, end) that may be
    used again behind a step, by its number."""

    places: dict[Buffer, Operand] = field(default_factory=dict)
    flags: dict[fx.Node, Operand] = field(default_factory=dict)
    frees: dict[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    bytes: int = 0

    def named(self, node: fx.Node, args: Sequence[str]) -> dict[str, Operand]:
        """The reserved names among a launch's arguments."""
        own = {"exchange": HEADER} | ({"flags": self.flags[node]} if node in self.flags else {})
        for name in set(args).intersection(RESERVED):
            assert self.bytes and name in own, f"{op_name(node)} exchanges nothing, but its kernel asks for {name}"
        return {name: place for name, place in own.items() if name in args}


def lay_out(nodes: Sequence[fx.Node], lives: Mapping[Buffer, Lifetime], sources: Mapping[fx.Node, Buffer],
            ranks: int) -> ExchangeArea:
    """The exchange area of a step. nodes: its calls in order; lives: of what they return; sources: for each that exchanges,
    the buffer that is its first argument."""
    slots_at = HEADER_BYTES + FLAGS_BYTES * len(sources)
    flags = {node: Operand("exchange", HEADER_BYTES + FLAGS_BYTES * i, "u8", (FLAGS_BYTES,))
             for i, node in enumerate(sources)}
    places: dict[Buffer, Operand] = {}
    shared: dict[Buffer, Lifetime] = {}
    pushed: set[Buffer] = set()
    whole_step = (0, len(nodes))
    behind = 0  # the first step behind the exchange before
    for number, (node, source) in zip(map(nodes.index, sources), sources.items(), strict=True):
        value = _value(source)
        tokens, width = value.shape
        if OPS[op_name(node)].exchange == "concat":  # ranks may hold unequal shares, but not at unequal places
            widest = -(-node.meta["val"].shape[-1] // ranks)
            shared[source] = Lifetime(tokens * widest * value.element_size(), *whole_step)
            continue
        if tokens <= FEW_TOKENS:
            places[source] = _operand("slots", slots_at, value)
        elif tokens <= ONE_SHOT_TOKENS:
            shared[source] = Lifetime(lives[source].size, *whole_step)
        else:  # the head's sum, behind which nobody waits, is read until the step ends
            pushed.add(source)
            size = ranks * -(-tokens // ranks) * width * value.element_size()
            shared[source] = Lifetime(size, behind, number if two_shot(node) else len(nodes))
        behind = number + 1
        slots_at += align(ranks * FEW_TOKENS * width * 8)
        if two_shot(node):  # the residual stream and what chooses experts, whose rows come from all ranks
            for index in range(3 if op_name(node) == "reduce_norm_route" else 1):
                shared[node, index] = lives[node, index]
    offsets, size = assign(list(shared.values()))
    frees: dict[int, tuple[tuple[int, int], ...]] = {}
    for (buffer, life), offset in zip(shared.items(), offsets, strict=True):
        places[buffer] = _operand("shares" if buffer in pushed else "exchange", slots_at + offset, _value(buffer))
        frees[life.last] = (*frees.get(life.last, ()), (slots_at + offset, slots_at + offset + align(life.size)))
    return ExchangeArea(places, flags, frees, slots_at + size)


def two_shot(node: fx.Node) -> bool:
    """Whether in the sum of this call each rank adds some of the rows, and gives them to all."""
    return op_name(node) in ("reduce_norm_linear", "reduce_norm_route") and _value((node, 0)).shape[0] > ONE_SHOT_TOKENS


def check_equal(plans: Sequence[LaunchPlan]) -> None:
    """Asserts that the ranks' plans have the same exchange area."""
    for plan in plans[1:]:
        for number, (step, first) in enumerate(zip(plan.steps, plans[0].steps, strict=True)):
            for index, (out, wanted) in enumerate(zip(step.outputs, first.outputs, strict=True)):
                mine, same = ((o.place, o.key) if o.place in EXCHANGED else "elsewhere" for o in (out, wanted))
                assert mine == same, (f"{plan.bucket}: output {index} of step {number} ({step.op}) is at {mine} on rank "
                                      f"{plan.rank} and at {same} on rank {plans[0].rank}")
        assert plan.exchange_bytes == plans[0].exchange_bytes, f"{plan.bucket}: exchange areas of unequal sizes"


def _value(buffer: Buffer) -> Tensor:
    node, index = buffer
    value = node.meta["val"]
    found: Tensor = value[index] if isinstance(value, tuple | list) else value
    return found


def _operand(place: Place, offset: int, value: Tensor) -> Operand:
    return Operand(place, offset, DTYPE_NAMES[value.dtype], tuple(value.shape))
