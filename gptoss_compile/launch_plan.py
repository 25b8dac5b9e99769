"""The launch plan: what the compiler hands to the runtime for one bucket. Standard library only, shared by both sides.

A plan is a list of steps over memory whose places are fixed: an arena of intermediates, weights, caches and inputs. A
step names its operator and operands (enough for the interpreter, which runs the kernels' twins) and its launches
(enough for a GPU executor, which knows nothing of operators). JSON, readable, no code in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

ITEM_BYTES = {"bf16": 2, "fp32": 4, "i32": 4, "u8": 1}
LAYOUTS = "plans/layouts.json"  # in artifacts whose kernels want weights laid out: the launch for each kind of layout
RANDOM_WEIGHTS = "plans/random_weights.json"  # in artifacts with random weights for a GPU: the launch that makes them
LARGEST_SCALE = 128  # e8m0, in MXFP4 layouts: 2^1 · 6, far beyond any weight; those above have no bf16 multiplier
TILE = 64  # rows and columns of a tile or slab of `kernels.layouts`
SLABS = 3  # of a stage, and stages that three warps of `moe_pair` share
SLAB_BYTES = 2176
ALIGNMENT = 256  # bytes; every buffer of the arena starts at a multiple
HEADER_BYTES = 256  # what an exchange area begins with, see `kernels.exchange`
FLAGS_BYTES = 256  # of one exchange


@dataclass(frozen=True)
class Cut:
    """A part of a tensor: start to stop along one axis."""

    axis: int
    start: int
    stop: int

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """Of the part of a tensor that has the shape `whole`."""
        return (*whole[: self.axis], self.stop - self.start, *whole[self.axis + 1 :])


@dataclass(frozen=True)
class Weight:
    """How a weight of the artifact is made from the checkpoint's logical tensors.

    parts: logical names concatenated along axis 0; or, for a constant of the architecture, its `values`. Zeros if there is
    neither. cuts: what is taken of each part, where several ranks share the model; none: all of it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[str, ...] = ()
    values: tuple[float, ...] = ()
    cuts: tuple[Cut, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value != ()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Weight:
        return cls(data["name"], data["dtype"], tuple(data["shape"]), tuple(data.get("parts", ())),
                   tuple(data.get("values", ())), tuple(Cut(**cut) for cut in data.get("cuts", ())))


@dataclass(frozen=True)
class Layout:
    """How the device keeps a weight whose kernels do not read it row by row, see `kernels.layouts`.

    sources: the weights of the artifact that it is made of, this one first; the others are not kept.
    """

    kind: str
    sources: tuple[str, ...]

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Of the laid out weight. shape: of the first source."""
        if self.kind == "tiles":
            rows, columns = shape
            return -(-rows // TILE) * TILE * columns * 2
        experts, rows, blocks, _ = shape
        return experts * (rows // TILE) * (-(-blocks * 32 // (SLABS * TILE)) * SLABS) * SLAB_BYTES


Place = Literal["arena", "workspace", "exchange", "slots", "shares", "input", "weight", "cache", "state"]
EXCHANGED: tuple[Place, ...] = ("exchange", "slots", "shares")  # in the area that all ranks read and write


@dataclass(frozen=True)
class Operand:
    """A tensor of a step: where it lives and its shape. `key`: byte offset in the arena, the workspace or
    the exchange area, or a name.

    The arena holds intermediates; the workspace, counters that start as zeros and that every kernel leaves as zeros. State
    is what one step leaves to the next, whatever its bucket; it has as many rows as the largest bucket.

    The exchange area is what the other ranks' kernels read and write; it starts as zeros. In place "slots" it holds fp32
    values, one tensor a rank behind another, each value as 8 bytes: itself and the step that it is of. In place "shares" row
    t of a rank's tensor is on rank t % ranks alone, as row t // ranks of the rank's part of the place; the ranks' parts lie
    one behind another and have ceil(rows / ranks) rows.
    """

    place: Place
    key: int | str
    dtype: str
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.item_bytes


Value = Operand | int | float | None


@dataclass(frozen=True)
class KernelLaunch:
    """One kernel launch. args: for each pointer an operand name of the step, `outN`, `scratchN` or a name in common.

    binary: stem of a file in the artifact's kernels/. pdl: launched with programmatic stream serialisation. common: buffers
    that the launches of a step share, by name. carveout: percent of an SM's first-level memory, see `kernels.spec.Launch`.
    """

    binary: str
    grid: tuple[int, int, int]
    args: tuple[str, ...]
    scratch: tuple[Operand, ...]
    pdl: bool
    common: dict[str, Operand] = field(default_factory=dict)
    carveout: int = -1


@dataclass(frozen=True)
class Extern:
    """One call of a function in a library of other projects' kernels. args: as a kernel's; tensors are passed row-major, as
    DLPack views of their places, and numbers as they are.

    binary: stem of a shared library in the artifact's kernels/. The call puts kernels into the stream, with no programmatic
    edge to or from them.
    """

    binary: str
    function: str
    args: tuple[str, ...]
    scratch: tuple[Operand, ...] = ()
    common: dict[str, Operand] = field(default_factory=dict)
    pdl: ClassVar[bool] = False
    carveout: ClassVar[int] = -1


AnyLaunch = KernelLaunch | Extern


@dataclass(frozen=True)
class Step:
    """One operator. frees: arena ranges [offset, end) that are dead behind it, exchange_frees: those of the exchange area;
    moved and flops: its least traffic in bytes and its operations, for time floors."""

    op: str
    kernel: str
    operands: dict[str, Value]
    outputs: tuple[Operand, ...]
    launches: tuple[AnyLaunch, ...]
    frees: tuple[tuple[int, int], ...]
    moved: int
    flops: int
    exchange_frees: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class LaunchPlan:
    """One bucket's step for one rank. caches: one a layer; weights: in the order of the traced graph's placeholders.

    exchange_bytes: the exchange area that every rank needs; all ranks have the same offsets in theirs.
    layouts: by name, the weights that the device keeps otherwise than row by row.
    feed and sample: on a GPU, what stands before and behind the steps; see `kernels/sample.py`.
    """

    bucket: str
    target: str
    dtype: str
    rank: int
    ranks: int
    arena_bytes: int
    workspace_bytes: int
    inputs: tuple[Operand, ...]
    caches: tuple[Operand, ...]
    weights: tuple[Weight, ...]
    layouts: dict[str, Layout]
    steps: tuple[Step, ...]
    logits: Operand
    feed: Step | None = None
    sample: Step | None = None
    exchange_bytes: int = 0

    def dumps(self) -> str:
        """Indented JSON with one step's parts to a line, the same bytes for equal plans."""
        return json.dumps(_encode(self), indent=1) + "\n"

    @classmethod
    def loads(cls, text: str) -> LaunchPlan:
        data = json.loads(text)
        feed, sample = (_step(data[name]) if data[name] else None for name in ("feed", "sample"))
        return cls(
            data["bucket"], data["target"], data["dtype"], data["rank"], data["ranks"], data["arena_bytes"],
            data["workspace_bytes"], tuple(map(_operand, data["inputs"])), tuple(map(_operand, data["caches"])),
            tuple(map(Weight.from_json, data["weights"])),
            {name: Layout(x["kind"], tuple(x["sources"])) for name, x in data["layouts"].items()},
            tuple(map(_step, data["steps"])), _operand(data["logits"]),
            feed, sample, data["exchange_bytes"])


def _encode(plan: LaunchPlan) -> dict[str, Any]:
    data = asdict(plan)
    data["weights"] = [w.to_json() for w in plan.weights]
    return data


def _operand(data: dict[str, Any]) -> Operand:
    return Operand(data["place"], data["key"], data["dtype"], tuple(data["shape"]))


def _launch(data: dict[str, Any]) -> AnyLaunch:
    common = {name: _operand(operand) for name, operand in data["common"].items()}
    args, scratch = tuple(data["args"]), tuple(map(_operand, data["scratch"]))
    if "function" in data:
        return Extern(data["binary"], data["function"], args, scratch, common)
    return KernelLaunch(data["binary"], tuple(data["grid"]), args, scratch, data["pdl"], common, data["carveout"])


def _step(data: dict[str, Any]) -> Step:
    operands = {k: _operand(v) if isinstance(v, dict) else v for k, v in data["operands"].items()}
    launches = tuple(map(_launch, data["launches"]))
    frees, exchange_frees = (tuple((a, b) for a, b in data[name]) for name in ("frees", "exchange_frees"))
    return Step(data["op"], data["kernel"], operands, tuple(map(_operand, data["outputs"])), launches, frees, data["moved"],
                data["flops"], exchange_frees)
