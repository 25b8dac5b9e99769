"""Plans of several GPUs: what lies in the exchange area, that nothing there is overwritten while a peer may touch it, and
that such plans compute the model. Where no kernel takes these shapes there are stand-ins: launches that are only planned."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, fx

from gptoss_compile.config import Bucket, ModelConfig
from gptoss_compile.config_parse import parse_config
from gptoss_compile.dialect import OPS
from gptoss_compile.exchange_area import check_equal
from gptoss_compile.interpreter import PlanInterpreter, run_ranks
from gptoss_compile.kernels import embed
from gptoss_compile.kernels.exchange import FEW_TOKENS, FLAGS_BYTES, HEADER_BYTES, ONE_SHOT_TOKENS
from gptoss_compile.kernels.registry import SPECS
from gptoss_compile.kernels.spec import KernelSpec, Launch, Operand, Pdl, TensorSpec
from gptoss_compile.launch_plan import EXCHANGED, LaunchPlan, Step
from gptoss_compile.launch_plan import Operand as Placed
from gptoss_compile.memory import align
from gptoss_compile.passes import select_kernels
from gptoss_compile.passes.base import Context
from gptoss_compile.pipeline import run_passes
from gptoss_compile.plan import make_plan
from gptoss_compile.sharding import rank_plan
from gptoss_compile.target import Target
from gptoss_compile.testing import difference, rank_tensors, tiny_context, with_merged
from gptoss_compile.trace import Geometry, trace_model

SM90 = Target.parse("sm90")
FEW, ONE_SHOT, TWO_SHOT = Bucket.decode(FEW_TOKENS), Bucket.decode(ONE_SHOT_TOKENS), Bucket.extend(ONE_SHOT_TOKENS + 17, 3)
BUCKETS = pytest.mark.parametrize("bucket", [FEW, ONE_SHOT, TWO_SHOT], ids=["few", "one-shot", "two-shot"])


def _launches(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    """A consumer with many tokens has two kernels, the first of which waits for flags; with few tokens, one without."""
    (model,) = embed.SPECS[0].instantiate(target, {"tokens": TensorSpec((1,), "i32"), "weight": TensorSpec((8, 8), "bf16")})
    names = tuple(name for name, value in operands.items() if isinstance(value, TensorSpec))
    first = dataclasses.replace(model, args=(*names, "exchange", "out0"), pdl=Pdl())
    if "columns" in operands:
        return (dataclasses.replace(first, args=("x", "exchange", "flags", "out0")),)
    partial = operands.get("partial")
    if not isinstance(partial, TensorSpec) or partial.shape[0] <= FEW_TOKENS:
        return (first,)
    shared = TensorSpec(partial.shape, "bf16")
    return (dataclasses.replace(first, args=("partial", "exchange", "flags", "x"), common=(("x", shared),)),
            dataclasses.replace(first, args=("x", "out0"), common=(("x", shared),)))


STAND_INS = tuple(KernelSpec(f"stand_in_{op}", op, lambda target, operands: target.is_gpu, _launches)
                  for op in ("linear_partial", "moe_down_partial", "moe_grouped_partial", "reduce_norm_linear",
                             "reduce_norm_route", "reduce_norm_head", "all_gather"))


@pytest.fixture(autouse=True)
def _kernels_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select_kernels, "SPECS", (*SPECS, *STAND_INS))


def published(layers: int = 2) -> ModelConfig:
    config = parse_config(Path(__file__).parent.parent / "checkpoint" / "data" / "config-20b.json", "mxfp4")
    return dataclasses.replace(config, num_layers=layers, windowed=config.windowed[:layers], vocab_size=201093)


def planned(whole: Context) -> tuple[list[LaunchPlan], list[fx.Graph]]:
    """Each rank's plan and graph."""
    graphs: dict[Context, fx.Graph] = {}
    for ctx in dict.fromkeys(whole.of_ranks()):
        module = trace_model(ctx.config, ctx.bucket, ctx.geometry, ctx.dtype, ctx.ranks, rank=ctx.rank)
        run_passes(module, ctx)
        graphs[ctx] = module.graph
    made = {ctx: make_plan(graph, ctx, binary_of=lambda launch: "binary") for ctx, graph in graphs.items()}
    plans = [rank_plan(made[ctx], whole.config, rank, whole.ranks) for rank, ctx in enumerate(whole.of_ranks())]
    return plans, [graphs[ctx] for ctx in whole.of_ranks()]


@cache
def plans_of(bucket: Bucket, ranks: int) -> list[LaunchPlan]:
    """Of two layers of a published model, but for a vocabulary that ranks cannot share equally."""
    config = published()
    return planned(Context(config, bucket, SM90, Geometry.of(config, [bucket], 16, 256), torch.bfloat16, ranks))[0]


def in_area(plan: LaunchPlan) -> dict[tuple[int, int], tuple[int, int, int, int]]:
    """What is in the exchange area, by step and output: [start, end) in bytes, and the first and the last step at which
    someone may touch it. A rank is at a step; a peer that is ahead of it may have left the exchange to which it comes next
    only when it comes there, so the peer pushes into its memory from behind its last exchange on. The head's sum, which no
    rank waits for, is read until all meet once more."""
    found, free = {}, 0
    for number, step in enumerate(plan.steps):
        for index, out in enumerate(step.outputs):
            if out.place in EXCHANGED:
                row = out.bytes // out.shape[0]
                size = {"slots": plan.ranks * 2 * out.bytes, "exchange": out.bytes,
                        "shares": plan.ranks * -(-out.shape[0] // plan.ranks) * row}[out.place]
                last = number
                for i, later in enumerate(plan.steps[number + 1:], number + 1):
                    if out in later.operands.values():
                        last = i if later.op != "reduce_norm_head" else len(plan.steps)
                    if out in later.outputs:
                        break
                found[number, index] = int(out.key), int(out.key) + size, free if out.place == "shares" else number, last
        free = number + 1 if OPS[step.op].exchange else free
    return found


def ops_of(plan: LaunchPlan) -> list[str]:
    return [step.op for step in plan.steps]


@BUCKETS
@pytest.mark.parametrize("ranks", [2, 8])
def test_what_lies_in_the_exchange_area(bucket: Bucket, ranks: int) -> None:
    plans = plans_of(bucket, ranks)
    plan, tokens = plans[0], bucket.tokens
    assert LaunchPlan.loads(plan.dumps()) == plan
    check_equal(plans)
    assert len({cast(Placed, p.steps[-1].operands["x"]).shape for p in plans}) == 2
    exchanges = [i for i, step in enumerate(plan.steps) if OPS[step.op].exchange]
    assert len(exchanges) == 2 * 2 + 1
    base = HEADER_BYTES + FLAGS_BYTES * len(exchanges)
    slots_end = base + 4 * align(ranks * FEW_TOKENS * 2880 * 8)
    places, wanted = in_area(plan), {(exchanges[-1] - 1, 0)}
    for number in exchanges[:-1]:
        wanted.add((number - 1, 0))
        if tokens > ONE_SHOT_TOKENS and plan.steps[number].op != "reduce_norm_head":
            wanted |= {(number, i) for i in range(3 if plan.steps[number].op == "reduce_norm_route" else 1)}
    assert places.keys() == wanted
    for number, step in enumerate(plan.steps):
        for index, out in enumerate(step.outputs):
            slots = step.op.endswith("_partial") and tokens <= FEW_TOKENS
            assert (out.place == "slots") == slots
            assert (out.place == "shares") == (step.op.endswith("_partial") and tokens > ONE_SHOT_TOKENS)
            if (number, index) in places:
                start, end, *_ = places[number, index]
                assert start % 256 == 0 and (base <= start and end <= slots_end if slots else slots_end <= start)
                assert end <= plan.exchange_bytes
                head = step.op == "reduce_norm_head"
                assert out.dtype == ("fp32" if slots or head else ("bf16", "fp32", "i32")[index])
    assert plan.logits.place == "arena"


@BUCKETS
def test_nothing_is_overwritten_while_peers_may_touch_it(bucket: Bucket) -> None:
    plan = plans_of(bucket, 2)[0]
    places, shared = in_area(plan), 0
    for (one, a), (other, b) in itertools.combinations(places.items(), 2):
        apart = a[1] <= b[0] or b[1] <= a[0]
        together = a[2] <= b[3] and b[2] <= a[3]
        assert apart or (bucket is TWO_SHOT and not together), (one, other)
        shared += not apart
    assert shared > 0 if bucket is TWO_SHOT else shared == 0, "two-shot sums leave their memory to later ones"
    freed = [r for step in plan.steps for r in step.exchange_frees]
    assert bool(freed) == (bucket is TWO_SHOT) and all(start >= HEADER_BYTES for start, _ in freed)


def test_what_outlives_a_step_lies_where_it_does_in_every_bucket() -> None:
    flags, slots = [], []
    for bucket in (Bucket.decode(1), FEW, ONE_SHOT, TWO_SHOT):
        plan = plans_of(bucket, 4)[0]
        flags.append([launch.common["flags"] for step in plan.steps for launch in step.launches if "flags" in launch.args])
        slots.append([step.outputs[0].key for step in plan.steps if step.outputs[0].place == "slots"])
    assert slots[0] == slots[1] and len(set(slots[0])) == 4 and slots[2:] == [[], []]
    assert flags[0] == flags[1] == flags[2][-1:] == flags[3][-1:], "with few tokens all_gather alone has flags"
    assert len({place.key for place in flags[2]}) == 5 and flags[2] == flags[3]


@BUCKETS
def test_launches_get_the_header_and_their_flags(bucket: Bucket) -> None:
    plan = plans_of(bucket, 2)[1]
    for step in plan.steps:
        for launch in step.launches:
            for name in {"exchange", "flags"}.intersection(launch.args):
                place = launch.common[name]
                assert (place.place, place.dtype) == ("exchange", "u8")
                assert place.key == 0 and place.bytes == HEADER_BYTES if name == "exchange" else place.key >= HEADER_BYTES
            assert "x" not in launch.common or launch.common["x"].place == "arena"
    exchanging = [step for step in plan.steps if OPS[step.op].exchange]
    exchanging += [step for step in plan.steps if step.outputs[0].place in ("slots", "shares")]
    assert all(any("exchange" in launch.args for launch in step.launches) for step in exchanging)


def test_ranks_that_disagree_are_noticed() -> None:
    first, second = plans_of(TWO_SHOT, 2)
    at = ops_of(second).index("linear_partial")
    moved = dataclasses.replace(second.steps[at].outputs[0], key=int(second.steps[at].outputs[0].key) + 256)
    steps = (*second.steps[:at], dataclasses.replace(second.steps[at], outputs=(moved,)), *second.steps[at + 1:])
    with pytest.raises(AssertionError, match=rf"output 0 of step {at} \(linear_partial\) is at .* on rank 1 and at"):
        check_equal([first, dataclasses.replace(second, steps=steps)])
    with pytest.raises(AssertionError, match="unequal sizes"):
        check_equal([first, dataclasses.replace(second, exchange_bytes=second.exchange_bytes + 256)])


def test_one_rank_exchanges_nothing() -> None:
    (plan,) = plans_of(FEW, 1)
    assert plan.exchange_bytes == 0 and not any("exchange" in launch.common for s in plan.steps for launch in s.launches)
    assert all(out.place != "exchange" for step in plan.steps for out in step.outputs)
    gate_up = next(step for step in plan.steps if step.op == "moe_gate_up")
    assert gate_up.operands["early"] == 1
    assert next(step for step in plans_of(FEW, 2)[0].steps if step.op == "moe_gate_up").operands["early"] == 0


def small(bucket: Bucket, ranks: int) -> Context:
    """The tiny model that eight ranks can share, in fp32."""
    ctx = tiny_context(published(), bucket, SM90, 8)
    geometry = dataclasses.replace(Geometry.of(ctx.config, [bucket], 4, 128), pages=160, window_pages=160)
    return dataclasses.replace(ctx, bucket=bucket, geometry=geometry, ranks=ranks)


@pytest.mark.parametrize(("bucket", "ways"), [(Bucket.decode(3), (2, 8)), (Bucket.extend(24, 2), (4,)), (TWO_SHOT, (2, 8))],
                         ids=["few", "one-shot", "two-shot"])
def test_ranks_compute_what_one_computes(bucket: Bucket, ways: tuple[int, ...], seed: int) -> None:
    wanted: list[Tensor] = []
    for ranks in (1, *ways):
        ctx = small(bucket, ranks)
        plans, graphs = planned(ctx)
        check_equal(plans)
        tensors = [with_merged(own, graph) for own, graph in zip(rank_tensors(ctx, seed), graphs, strict=True)]
        logits = run_ranks([PlanInterpreter(plan, own) for plan, own in zip(plans, tensors, strict=True)])
        assert all(torch.equal(each, logits[0]) for each in logits)
        caches = [torch.cat([own[f"cache.{i}"] for own in tensors], 2)[1:] for i in range(2)]
        used = [logits[0][: bucket.tokens], *caches]
        wanted = wanted or used
        assert difference(wanted, used) <= 2e-5, ranks


def broken(plan: LaunchPlan, number: int, step: Step) -> LaunchPlan:
    return dataclasses.replace(plan, steps=(*plan.steps[:number], step, *plan.steps[number + 1:]))


def test_what_is_freed_too_early_becomes_nan() -> None:
    ctx = small(TWO_SHOT, 2)
    plans, graphs = planned(ctx)
    each_rank = rank_tensors(ctx, random.randrange(10**6))
    tensors = [with_merged(own, graph) for own, graph in zip(each_rank, graphs, strict=True)]
    at = ops_of(plans[1]).index("linear_partial")
    victim: Placed = plans[1].steps[at].outputs[0]
    early = dataclasses.replace(plans[1].steps[at], exchange_frees=((int(victim.key), int(victim.key) + victim.bytes),))
    logits = run_ranks([PlanInterpreter(plan, own) for plan, own in zip(
        (plans[0], broken(plans[1], at, early)), tensors, strict=True)])
    assert all(each.isnan().any() for each in logits)
