"""The compiler on one page: the list of passes, and how it is run, checked and bisected.

    python -m gptoss_compile.pipeline bisect [MODEL] --target T [--bucket NAME]

finds the first pass, and within it the first match, that changes a graph's results beyond the pass's exactness.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import fx

from gptoss_compile.kernels import registry  # noqa: F401  declares the kernel operators
from gptoss_compile.passes.base import Context, Pass, PassResult
from gptoss_compile.passes.canonicalize import CANONICALIZE
from gptoss_compile.passes.fuse_allreduce_rms_norm import FUSE_ALLREDUCE_RMS_NORM
from gptoss_compile.passes.fuse_norm_linear import FUSE_NORM_LINEAR
from gptoss_compile.passes.fuse_pad_quant import FUSE_PAD_QUANT
from gptoss_compile.passes.fuse_residual import FUSE_RESIDUAL
from gptoss_compile.passes.fuse_rope_kv import FUSE_ROPE_KV
from gptoss_compile.passes.lower_attention_sinks import LOWER_ATTENTION_SINKS
from gptoss_compile.passes.lower_ends import LOWER_EMBEDDING, LOWER_HEAD
from gptoss_compile.passes.lower_moe import LOWER_MOE
from gptoss_compile.passes.lower_router import LOWER_ROUTER
from gptoss_compile.passes.merge_qkv import MERGE_QKV
from gptoss_compile.passes.place_pdl import PLACE_PDL
from gptoss_compile.passes.raise_attention_sinks import RAISE_ATTENTION_SINKS
from gptoss_compile.passes.raise_experts import RAISE_EXPERTS
from gptoss_compile.passes.raise_rms_norm import RAISE_RMS_NORM
from gptoss_compile.passes.raise_rope import RAISE_ROPE, RAISE_ROPE_TABLE
from gptoss_compile.passes.raise_router import RAISE_ROUTER
from gptoss_compile.passes.raise_swiglu import RAISE_SWIGLU
from gptoss_compile.passes.select_kernels import SELECT_KERNELS
from gptoss_compile.target import Target

PASSES: tuple[Pass, ...] = (
    CANONICALIZE,
    # raise: idioms of plain tensor code to one operator each
    RAISE_ROPE_TABLE,
    RAISE_RMS_NORM,
    RAISE_ROPE,
    RAISE_ROUTER,
    RAISE_SWIGLU,
    RAISE_ATTENTION_SINKS,
    RAISE_EXPERTS,
    # fuse and lower: operators to kernels, six a decode layer
    FUSE_ALLREDUCE_RMS_NORM,
    MERGE_QKV,
    FUSE_ROPE_KV,
    LOWER_EMBEDDING,
    LOWER_ATTENTION_SINKS,
    FUSE_NORM_LINEAR,
    LOWER_ROUTER,
    LOWER_HEAD,  # the three in which an exchange ends come before the two in which it begins, for its dtype
    FUSE_RESIDUAL,
    LOWER_MOE,
    FUSE_PAD_QUANT,
    # choose kernels and say how they are launched
    SELECT_KERNELS,
    PLACE_PDL,
)


class PassError(RuntimeError):
    """A pass matched another number of times than the model must give; the message shows the near misses."""


@dataclass(frozen=True)
class Record:
    """What one pass did to one graph."""

    name: str
    matches: int
    expected: int | None
    exactness: str
    nodes_before: int
    nodes_after: int
    seconds: float


@dataclass(frozen=True)
class Options:
    """For finding faults. skip: passes left out; limit: at most N rewrites of a pass. Either suspends the counts that
    follow from the configuration; that every operator must end in a kernel still holds."""

    skip: frozenset[str] = frozenset()
    limit: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = (self.skip | set(self.limit)) - {p.name for p in PASSES}
        if unknown:
            known = ", ".join(p.name for p in PASSES)
            raise ValueError(f"no pass is called {', '.join(sorted(unknown))}; the passes are: {known}")


Observer = Callable[[str, fx.Graph], None]


def run_passes(module: fx.GraphModule, ctx: Context, *, options: Options | None = None,
               passes: Sequence[Pass] = PASSES, observe: Iterable[Observer] = ()) -> list[Record]:
    """Run the passes in order on the traced graph, in place. Observers see the graph as traced and after each pass.

    Raises PassError where a count is not the declared one.
    """
    options = options or Options()
    watchers, records, graph = list(observe), [], module.graph
    for watch in watchers:
        watch("trace", graph)
    for each in passes:
        if each.name in options.skip:
            continue
        limit, before, start = options.limit.get(each.name), len(graph.nodes), time.perf_counter()
        result = each.run(graph, ctx.limited(limit))
        graph.lint()
        expected = result.expected if result.expected is not None else each.expect(ctx)
        records.append(Record(each.name, result.matches, expected, each.exactness, before, len(graph.nodes),
                              time.perf_counter() - start))
        enforced = result.expected is not None or not (options.skip or options.limit)
        if enforced and expected is not None and result.matches != expected:
            raise PassError(_explain(each, ctx, result, expected))
        for watch in watchers:
            watch(each.name, graph)
    return records


def _explain(each: Pass, ctx: Context, result: PassResult, expected: int) -> str:
    head = (f"pass {each.name} matched {result.matches} times in bucket {ctx.bucket.name}, "
            f"expected {expected} for this configuration")
    if not result.near_misses:
        return head + "; nothing came near the pattern"
    return head + ";\n  " + "\n  ".join(map(str, result.near_misses[:4]))


def main(arguments: Sequence[str] | None = None) -> int:
    from gptoss_compile import demo
    from gptoss_compile.checkpoint import Checkpoint
    from gptoss_compile.cli import parse_buckets
    from gptoss_compile.compiler import default_buckets
    from gptoss_compile.config_parse import parse_config
    from gptoss_compile.hub import locate
    from gptoss_compile.verify import bisect

    parser = argparse.ArgumentParser(prog="python -m gptoss_compile.pipeline", description="Debug the passes.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("bisect", help="find the first pass, and its first match, that changes results")
    command.add_argument("model", nargs="?", help="checkpoint folder or hub id (default: the demo model)")
    command.add_argument("--config", type=Path, help="a config.json alone; no weights are needed")
    command.add_argument("--target", default="cpu")
    command.add_argument("--bucket", type=parse_buckets, metavar="decode:8", help="(default: all of the target's)")
    command.add_argument("--tp", type=int, default=1, metavar="N", help="ranks")
    command.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        target = Target.parse(options.target)
        if options.config:
            config = parse_config(options.config, "mxfp4")
        else:
            config = Checkpoint.open(locate(options.model)).config if options.model else demo.source().config
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for bucket in options.bucket or default_buckets(target):
        culprit = bisect(config, bucket, target, ranks=options.tp, seed=options.seed)
        print(f"{bucket.name}: {culprit or 'every pass keeps its exactness'}")
        if culprit:
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
