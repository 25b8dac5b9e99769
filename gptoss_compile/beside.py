"""The kernels beside the graph, compiled: what stands before and behind a served step, and what makes weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from gptoss_compile.artifact import canonical_json
from gptoss_compile.build import Binary, build
from gptoss_compile.gumbel import FIELDS
from gptoss_compile.kernels import generate, sample
from gptoss_compile.kernels.sm90 import layout
from gptoss_compile.kernels.spec import Launch, TensorSpec
from gptoss_compile.launch_plan import LAYOUTS, RANDOM_WEIGHTS, KernelLaunch, LaunchPlan, Operand, Step, Value
from gptoss_compile.memory import align
from gptoss_compile.passes.base import Context
from gptoss_compile.random_weights import PARAMETERS
from gptoss_compile.target import Target


def serving_launches(ctx: Context) -> dict[str, Launch]:
    """The launches of `feed` and `sample` for a bucket."""
    bucket = ctx.bucket
    tokens, sampled = TensorSpec((bucket.tokens,), "i32"), TensorSpec((bucket.rows,), "i32")
    logits, words = TensorSpec((bucket.rows, ctx.config.vocab_size), "fp32"), TensorSpec((bucket.rows, FIELDS), "i32")
    (feed,) = sample.instantiate_feed(ctx.target, {"tokens": tokens, "source": tokens, "sampled": sampled})
    (choose,) = sample.instantiate_sample(ctx.target, {"logits": logits, "words": words, "sampled": sampled})
    return {"feed": feed, "sample": choose}


def with_serving(plan: LaunchPlan, launches: Mapping[str, Launch], binary_of: Callable[[Launch], str],
                 target: Target) -> LaunchPlan:
    """The plan with `feed` before its steps and `sample` behind them, whose scratch lies behind the arena.

    The first kernel then waits for `feed` to end, whose tokens it or the next may read before it waits for anything.
    """
    tokens = next(operand for operand in plan.inputs if operand.key == "tokens")
    rows = plan.logits.shape[0]
    sampled = Operand("state", "sampled", "i32", (rows,))
    source = Operand("input", "source", "i32", tokens.shape)
    words = Operand("input", "words", "i32", (rows, FIELDS))
    arena, workspace, scratch = plan.arena_bytes, 0, []
    for i, spec in enumerate(launches["sample"].scratch):
        if i in launches["sample"].zeroed:
            scratch.append(Operand("workspace", workspace, spec.dtype, spec.shape))
            workspace += align(spec.bytes)
        else:
            scratch.append(Operand("arena", arena, spec.dtype, spec.shape))
            arena += align(spec.bytes)

    def step(name: str, operands: dict[str, Value], out: Operand, scratch: Sequence[Operand], pdl: bool) -> Step:
        launch = launches[name]
        planned = KernelLaunch(binary_of(launch), launch.grid, launch.args, tuple(scratch), pdl)
        return Step(name, name, operands, (out,), (planned,), (), launch.moved, launch.flops)

    first, *others = plan.steps
    if isinstance(first.launches[0], KernelLaunch):
        first = replace(first, launches=(replace(first.launches[0], pdl=False), *first.launches[1:]))
    return replace(
        plan, steps=(first, *others), arena_bytes=arena, workspace_bytes=max(plan.workspace_bytes, workspace),
        feed=step("feed", {"tokens": tokens, "source": source, "sampled": sampled}, tokens, (), False),
        sample=step("sample", {"logits": plan.logits, "words": words, "sampled": sampled}, sampled, scratch,
                    target.has("pdl")))


def layout_files(plans: Sequence[LaunchPlan], target: Target) -> list[tuple[str, bytes]]:
    """The artifact's files by which its weights are laid out on the device; none if no kernel asks for that."""
    kinds = {layout.kind for plan in plans for layout in plan.layouts.values()}
    if not kinds:
        return []
    planned, files = {}, []
    for kind, launch in layout.launches(target).items():
        binary = build(launch.source, target)
        planned[kind] = {"binary": binary.stem, "grid": list(launch.grid), "args": list(launch.args)}
        files += binary_files(binary)
    return [(LAYOUTS, canonical_json(planned)), *dict(files).items()]


def binary_files(binary: Binary) -> list[tuple[str, bytes]]:
    return [(f"kernels/{binary.stem}.{binary.suffix}", binary.code),
            (f"kernels/{binary.stem}.json", canonical_json(binary.metadata()))]


def random_weights_files(target: Target) -> list[tuple[str, bytes]]:
    """The artifact's files by which its random weights are generated on the device."""
    operands = {"parameters": TensorSpec((PARAMETERS,), "i32"), "out": TensorSpec((1,), "i32")}
    (launch,) = generate.instantiate(target, operands)
    binary = build(launch.source, target)
    planned = {"binary": binary.stem, "grid": list(launch.grid)}
    return [(RANDOM_WEIGHTS, canonical_json(planned)), *binary_files(binary)]
