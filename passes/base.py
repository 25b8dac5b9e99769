"""What a pass is. A new pass is one file with a `Pass` in it, one line in `pipeline.PASSES` and one before/after test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx

from gptoss_compile.config import Bucket, ModelConfig
from gptoss_compile.launch_plan import Weight
from gptoss_compile.match import NearMiss, Pattern, erase_dead, search
from gptoss_compile.match import replace as replace_match
from gptoss_compile.sharding import rank_config, spans
from gptoss_compile.target import Target
from gptoss_compile.trace import Geometry, Role, cache_shapes

Exactness = Literal["bitwise", "ulp", "rtol"]
Extern = Literal["never", "measured", "always"]


@dataclass(frozen=True)
class Context:
    """What a pass may know: the model, the step's shape, the target; never a device.

    With several ranks a graph is one rank's, and so is config (see `sharding`). limit: rewrite at most so many matches (for
    bisecting); None = all. extern: when to take other projects' kernels, `measured` meaning where they were
    measured faster than ours.
    """

    config: ModelConfig
    bucket: Bucket
    target: Target
    geometry: Geometry
    dtype: torch.dtype
    ranks: int = 1
    limit: int | None = None
    rank: int = 0
    extern: Extern = "never"

    @property
    def head_rows(self) -> int:
        """The rank's rows of lm_head."""
        start, stop = spans(self.config.vocab_size, self.ranks)[self.rank]
        return stop - start

    def of_ranks(self) -> list[Context]:
        """The context of each rank, from one with the whole model's config. Ranks with equal shares have the first such
        rank's, hence one graph. Raises ConfigError if the model cannot be shared."""
        own = [replace(self, config=rank_config(self.config, rank, self.ranks, self.target), rank=rank)
               for rank in range(self.ranks)]
        first: dict[tuple[ModelConfig, int], Context] = {}
        return [first.setdefault((ctx.config, ctx.head_rows), ctx) for ctx in own]

    def limited(self, limit: int | None) -> Context:
        return replace(self, limit=limit)

    def after(self, results: Sequence[PassResult]) -> Context:
        """The context for the next of several rewrites of one pass: what they made counts against the limit."""
        return self if self.limit is None else self.limited(max(self.limit - sum(r.matches for r in results), 0))

    def example(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A meta tensor for a pattern's parameter; the model's dtype unless another is given."""
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    @property
    def layer_kinds(self) -> list[bool]:
        """Whether there are full (False) and window (True) layers."""
        return sorted(set(self.config.windowed))

    def window(self, windowed: bool) -> int:
        """Keys a token sees in layers of that kind; 0 = all."""
        return self.config.sliding_window if windowed else 0

    def paged_examples(self, windowed: bool) -> tuple[Tensor, Tensor]:
        """Examples of the (cache, page table) of layers of that kind."""
        geometry = self.geometry
        width = geometry.window_ring if windowed else geometry.table_width
        cache = cache_shapes(self.config, geometry)[self.config.windowed.index(windowed)]
        return self.example(*cache), self.example(self.bucket.sequences, width, dtype=torch.int32)


@dataclass(frozen=True)
class PassResult:
    """matches: rewrites made. near_misses: where the pattern fitted in part, the best first. expected: the number of
    matches wanted, where it follows from the graph and not from the context."""

    matches: int
    near_misses: tuple[NearMiss, ...] = ()
    expected: int | None = None

    @staticmethod
    def sum(results: Sequence[PassResult]) -> PassResult:
        near = sorted((miss for r in results for miss in r.near_misses), key=lambda miss: -miss.matched)
        return PassResult(sum(r.matches for r in results), tuple(near))


@dataclass(frozen=True)
class Pass:
    """One named rewrite.

    expect: matches that a correct model must give, as a function of the context; None = any number.
    exactness: how equal the graph's results stay in fp32: `bitwise`; `ulp` (the same sums in another order); `rtol`
    (roundings moved, or a reduced precision that the pass exists to introduce).
    """

    name: str
    run: Callable[[fx.Graph, Context], PassResult]
    expect: Callable[[Context], int | None]
    exactness: Exactness


def rewrite(graph: fx.Graph, ctx: Context, pattern: Callable[..., Any], examples: Sequence[Sequence[Tensor]],
            build: Callable[..., fx.Node | Sequence[fx.Node]]) -> PassResult:
    """Replace each occurrence of the function `pattern`, traced at each of the example shapes, by `build(*inputs)`."""
    found = search(graph, [Pattern(pattern, shapes) for shapes in examples])
    matches = found.matches[: ctx.limit]
    renamed: dict[fx.Node, fx.Node] = {}
    for match in matches:  # an input may be what an earlier replacement of this run put in another's place
        renamed |= replace_match(graph, replace(match, inputs=tuple(renamed.get(n, n) for n in match.inputs)), build)
    erase_dead(graph)
    return PassResult(len(matches), tuple(found.near_misses[:8]))


def merged_weight(graph: fx.Graph, nodes: Sequence[fx.Node], name: str) -> fx.Node:
    """A weight placeholder that is `nodes`' weights concatenated along axis 0, called `name` beside the first of them."""
    weights = [node.meta["role"].weight for node in nodes]
    prefix, _, kind = weights[0].name.rsplit(".", 2)
    shape = (sum(w.shape[0] for w in weights), *weights[0].shape[1:])
    parts = tuple(part for w in weights for part in w.parts)
    merged = Weight(f"{prefix}.{name}.{kind}", weights[0].dtype, shape, parts)
    with graph.inserting_after(nodes[-1]):
        node = graph.placeholder("p_" + merged.name.replace(".", "_"))
    node.meta = {"val": nodes[0].meta["val"].new_empty(shape), "role": Role("weight", merged.name, merged)}
    return node
