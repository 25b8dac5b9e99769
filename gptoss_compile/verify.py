"""Does every pass keep the graph's results? Each is run on a two-layer random model and compared before and after.

With several ranks on all of their graphs, which run in lockstep; their shares of the model are unequal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from gptoss_compile.config import Bucket, ModelConfig
from gptoss_compile.interpreter import run_graphs
from gptoss_compile.passes.base import Context, Pass
from gptoss_compile.pipeline import PASSES
from gptoss_compile.target import Target
from gptoss_compile.testing import TOLERANCE, difference, rank_tensors, tiny_context, with_merged
from gptoss_compile.trace import trace_model


class VerifyError(RuntimeError):
    """A pass changed the graph's results beyond its declared exactness."""


@dataclass(frozen=True)
class Verdict:
    """How far one pass moved the results: the largest ‖after - before‖ / ‖before‖ of logits and caches."""

    name: str
    matches: int
    gap: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.gap <= self.tolerance


@dataclass(frozen=True)
class Culprit:
    """The first pass that changes the results, and which of its matches (counted from 1) is the first to do so."""

    verdict: Verdict
    match: int
    total: int

    def __str__(self) -> str:
        v = self.verdict
        return (f"pass {v.name} changes the result by {v.gap:.2e} (allowed {v.tolerance:.0e}); "
                f"the first match to do so is number {self.match} of {self.total}")


def verify(config: ModelConfig, bucket: Bucket, target: Target, *, ranks: int = 1, passes: Sequence[Pass] = PASSES,
           seed: int = 0, report: Callable[[Verdict], None] = lambda verdict: None) -> list[Verdict]:
    """Run every pass on the small model and compare. Raises VerifyError at the first that does not hold."""
    ctx = tiny_context(config, bucket, target, ranks)
    verdicts = []
    for verdict in _walk(ctx, passes, seed):
        report(verdict)
        verdicts.append(verdict)
        if not verdict.holds:
            raise VerifyError(f"pass {verdict.name} changed the result of bucket {bucket.name} on {target.name} by "
                              f"{verdict.gap:.2e}, allowed {verdict.tolerance:.0e}; find the match with "
                              "'python -m gptoss_compile.pipeline bisect'")
    return verdicts


def bisect(config: ModelConfig, bucket: Bucket, target: Target, *, ranks: int = 1, passes: Sequence[Pass] = PASSES,
           seed: int = 0) -> Culprit | None:
    """The first pass, then its first match, that breaks the declared exactness; None if all hold."""
    ctx = tiny_context(config, bucket, target, ranks)
    for index, verdict in enumerate(_walk(ctx, passes, seed)):
        if verdict.holds:
            continue
        good, bad = 0, verdict.matches  # with `good` matches the results hold, with `bad` they do not
        while bad - good > 1:
            middle = (good + bad) // 2
            *_, last = _walk(ctx, passes[: index + 1], seed, limit=middle)
            good, bad = (middle, bad) if last.holds else (good, middle)
        return Culprit(verdict, bad, verdict.matches)
    return None


def _walk(ctx: Context, passes: Sequence[Pass], seed: int, limit: int | None = None) -> list[Verdict]:
    """Verdicts up to and including the first that does not hold; `limit` applies to the last pass given."""
    ranks, tensors = ctx.of_ranks(), rank_tensors(ctx, seed)
    traced = {c: trace_model(c.config, c.bucket, c.geometry, c.dtype, c.ranks, rank=c.rank).graph
              for c in dict.fromkeys(ranks)}
    graphs = [traced[c] for c in ranks]
    verdicts: list[Verdict] = []
    before = _results(graphs, tensors)
    for each in passes:
        only = limit if each is passes[-1] else None
        result, *_ = [each.run(graph, c.limited(only)) for c, graph in traced.items()]
        after = _results(graphs, tensors)
        verdicts.append(Verdict(each.name, result.matches, difference(before, after), TOLERANCE[each.exactness]))
        if not verdicts[-1].holds:
            break
        before = after
    return verdicts


def _results(graphs: Sequence[fx.Graph], tensors: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """The ranks' logits and caches, without the null page, whose contents nobody may rely on."""
    outputs = run_graphs(graphs, [with_merged(own, graph) for own, graph in zip(tensors, graphs, strict=True)])
    return [value for logits, *caches in outputs for value in (logits, *(cache[1:] for cache in caches))]
