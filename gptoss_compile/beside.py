"""The kernels beside the graph, compiled: the greedy end of a decode step, and what fills and lays out weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gptoss_compile.artifact import canonical_json
from gptoss_compile.build import Binary, build
from gptoss_compile.kernels import advance, generate
from gptoss_compile.kernels.sm90 import layout
from gptoss_compile.kernels.spec import Launch, TensorSpec
from gptoss_compile.launch_plan import LAYOUTS, RANDOM_WEIGHTS, KernelLaunch, LaunchPlan, Operand, Step
from gptoss_compile.memory import align
from gptoss_compile.passes.base import Context
from gptoss_compile.target import Target


def advance_launch(ctx: Context) -> Launch:
    """The launch of `advance` for a decode bucket."""
    count = ctx.bucket.tokens
    (launch,) = advance.instantiate(ctx.target, {
        "logits": TensorSpec((count, ctx.config.vocab_size), "fp32"), "tokens": TensorSpec((count,), "i32"),
        "positions": TensorSpec((count,), "i32")})
    return launch


def with_advance(plan: LaunchPlan, launch: Launch, binary: str, target: Target) -> LaunchPlan:
    """The plan with `advance` behind its steps. Its scratch lies behind the arena, its counters in the workspace."""
    inputs = {str(operand.key): operand for operand in plan.inputs}
    arena, workspace, scratch = plan.arena_bytes, 0, []
    for i, spec in enumerate(launch.scratch):
        if i in launch.zeroed:
            scratch.append(Operand("workspace", workspace, spec.dtype, spec.shape))
            workspace += align(spec.bytes)
        else:
            scratch.append(Operand("arena", arena, spec.dtype, spec.shape))
            arena += align(spec.bytes)
    tokens, positions = inputs["tokens"], inputs["positions"]
    planned = KernelLaunch(binary, launch.grid, launch.args, tuple(scratch), target.has("pdl"))
    step = Step("advance", "advance", {"logits": plan.logits, "tokens": tokens, "positions": positions},
                (tokens, positions), (planned,), (), launch.moved, launch.flops)
    return replace(plan, advance=step, arena_bytes=arena, workspace_bytes=max(plan.workspace_bytes, workspace))


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
    (launch,) = generate.instantiate(target, {"parameters": TensorSpec((8,), "i32"), "out": TensorSpec((1,), "i32")})
    binary = build(launch.source, target)
    planned = {"binary": binary.stem, "grid": list(launch.grid)}
    return [(RANDOM_WEIGHTS, canonical_json(planned)), *binary_files(binary)]
