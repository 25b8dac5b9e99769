"""How a model is cut over ranks: shares, refusals, counts of exchanges; passes and plans checked with several ranks."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from gptoss_compile import ir, model
from gptoss_compile.config import Bucket, ConfigError, ModelConfig
from gptoss_compile.config_parse import parse_config
from gptoss_compile.dialect import OPS, exchanged
from gptoss_compile.interpreter import PlanInterpreter, run_graphs, run_ranks
from gptoss_compile.launch_plan import LaunchPlan
from gptoss_compile.logical import logical_tensors
from gptoss_compile.passes.base import Context, Pass, PassResult
from gptoss_compile.pipeline import PASSES, PassError, run_passes
from gptoss_compile.plan import make_plan
from gptoss_compile.sharding import cut_of, is_zero, rank_config, rank_plan, spans
from gptoss_compile.target import Target
from gptoss_compile.testing import difference, rank_tensors, tiny_context, with_merged
from gptoss_compile.trace import Geometry, trace_model
from gptoss_compile.verify import bisect, verify

CPU, SM90 = Target.parse("cpu"), Target.parse("sm90")
DECODE, EXTEND = Bucket.decode(4), Bucket.extend(512, 16)


def published(name: str = "20b", layers: int | None = None, **changes: object) -> ModelConfig:
    config = parse_config(Path(__file__).parent.parent / "checkpoint" / "data" / f"config-{name}.json", "mxfp4")
    if layers is not None:
        changes |= {"num_layers": layers, "windowed": config.windowed[:layers]}
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def test_shares_are_whole_units_and_even_to_one() -> None:
    rng = random.Random(seed := random.randrange(10**6))
    print(f"seed {seed}")
    for _ in range(100):
        ranks = rng.randint(1, 8)
        units = rng.randint(ranks, 300)
        shares = spans(units, ranks)
        assert [a for a, _ in shares] == [0, *(b for _, b in shares[:-1])] and shares[-1][1] == units
        sizes = [b - a for a, b in shares]
        assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


@pytest.mark.parametrize(("ranks", "blocks", "stages"), [
    (2, [45, 45], [15, 15]), (4, [23, 22, 23, 22], [8, 7, 8, 7]),
    (8, [12, 11, 11, 11, 12, 11, 11, 11], [4, 4, 4, 3, 4, 4, 4, 3])])
def test_the_published_models_are_cut(ranks: int, blocks: list[int], stages: list[int]) -> None:
    for name in ("20b", "120b"):
        config = published(name)
        own = [rank_config(config, rank, ranks, CPU) for rank in range(ranks)]
        assert [c.intermediate // 32 for c in own] == blocks
        assert [rank_config(config, rank, ranks, SM90).intermediate for rank in range(ranks)] == [96 * n for n in stages]
        assert {(c.num_heads, c.num_kv_heads) for c in own} == {(64 // ranks, 8 // ranks)}


@pytest.mark.parametrize("target", ["cpu", "sm90"])
@pytest.mark.parametrize("experts", ["mxfp4", "bf16"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_every_number_of_a_weight_belongs_to_one_rank_or_to_all(ranks: int, experts: str, target: str) -> None:
    config = published(layers=1, expert_format=experts)
    for name, info in logical_tensors(config).items():
        cuts = [cut_of(name, config, rank, ranks, Target.parse(target)) for rank in range(ranks)]
        zeros = [is_zero(name, rank) for rank in range(ranks)]
        if cuts[0] is None:
            assert cuts == [None] * ranks
            assert zeros == [False] + [name.endswith((".o.bias", ".down.bias"))] * (ranks - 1)
            assert any(zeros) or "norm" in name or "router" in name or name == "embed.weight", name
            continue
        found = [cut for cut in cuts if cut]
        assert {cut.axis for cut in found} == {found[0].axis} and not any(zeros)
        edges = [0, *(cut.stop for cut in found)]
        assert [cut.start for cut in found] == edges[:-1] and edges[-1] == info.shape[found[0].axis], name
        if "gate_up" in name:
            assert all(cut.start % 2 == 0 for cut in found), "a gate and its up stay together"


@pytest.mark.parametrize(("changes", "ranks", "message"), [
    ({}, 16, "the model has 8 key/value heads, fewer than ranks, and they are not copied; shard over at most 8"),
    ({"num_kv_heads": 2}, 4, "the model has 2 key/value heads"),
    ({"intermediate": 96}, 4, "the model has 3 MXFP4 blocks of intermediate features"),
    ({"intermediate": 3, "expert_format": "bf16"}, 4, "the model has 3 intermediate features"),
    ({"vocab_size": 7}, 8, "the model has 7 rows of lm_head"),
    ({"intermediate": 288, "target": SM90}, 4, "the model has 3 groups of 96 intermediate features, .* at most 3"),
    ({"intermediate": 2912, "target": SM90}, 2, "for sm90 MXFP4 experts are shared in 96 features at a time, of which the "
                                                "model's 2912 are no multiple; compile with --tp 1, or for the cpu target")])
def test_models_that_cannot_be_cut(changes: dict[str, Any], ranks: int, message: str) -> None:
    target = changes.get("target", CPU)
    with pytest.raises(ConfigError, match=f"--tp {ranks}: {message}"):
        rank_config(published(**{name: value for name, value in changes.items() if name != "target"}), 0, ranks, target)


def test_sums_are_added_in_rank_order_in_fp32() -> None:
    parts = [torch.tensor([x], dtype=torch.float32) for x in (1e8, 1.0, -1e8)]
    assert exchanged("sum", parts).item() == 0.0 and exchanged("sum", parts[::-1]).item() == 0.0
    assert exchanged("sum", [parts[0], parts[2], parts[1]]).item() == 1.0
    halves = [torch.tensor([x], dtype=torch.bfloat16) for x in (256.0, 1.0, 1.0)]
    assert exchanged("sum", halves).item() == 258.0, "one by one in bf16 it would stay 256"
    assert exchanged("concat", [torch.ones(2, 1), torch.zeros(2, 2)]).shape == (2, 3)


def contexts(config: ModelConfig, bucket: Bucket, ranks: int) -> list[Context]:
    return Context(config, bucket, CPU, Geometry.of(config, [bucket], 16, 256), torch.bfloat16, ranks).of_ranks()


@pytest.mark.parametrize(("bucket", "ranks"), [(DECODE, 2), (EXTEND, 8)], ids=["decode-2", "extend-8"])
def test_the_exchanges_of_a_published_model(bucket: Bucket, ranks: int) -> None:
    ctx = contexts(published(layers=2), bucket, ranks)[1]
    module = trace_model(ctx.config, bucket, ctx.geometry, ctx.dtype, ranks, rank=ctx.rank)
    count = {r.name: r.matches for r in run_passes(module, ctx)}
    assert (count["fuse_allreduce_rms_norm"], count["fuse_norm_linear"], count["lower_router"]) == (4, 2, 2)
    assert (count["fuse_residual"], count["lower_moe"], count["lower_head"]) == (2, 2, 1)
    ops = [step.op for step in make_plan(module.graph, ctx).steps]
    sums = [op for op in ops if OPS[op].exchange == "sum"]
    assert sums == ["reduce_norm_route", "reduce_norm_linear", "reduce_norm_route", "reduce_norm_head"]
    assert ops[-1] == "all_gather" and len(ops) == 4 + 2 * 6
    before = [ops[i - 1] for i, op in enumerate(ops) if OPS[op].exchange == "sum"]
    assert all(op.endswith("_partial") for op in before), "nothing stands between producer and consumer"


class ForgetsOne(model.Model):
    """Someone forgot the sum behind one layer's experts."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, ranks: int = 1, rank: int = 0) -> None:
        super().__init__(config, dtype, ranks, rank)
        self.layers[1].reduce = torch.nn.Identity()


def test_a_forgotten_sum_does_not_compile() -> None:
    ctx = contexts(published(layers=2), DECODE, 2)[0]
    module = trace_model(ctx.config, DECODE, ctx.geometry, ctx.dtype, 2, model=ForgetsOne)
    with pytest.raises(PassError, match=r"pass fuse_allreduce_rms_norm matched 2 times .* expected 4"):
        run_passes(module, ctx)


@pytest.mark.parametrize(("ranks", "experts", "bucket"), [(2, "bf16", DECODE), (4, "mxfp4", EXTEND)])
def test_every_pass_keeps_the_numbers(ranks: int, experts: str, bucket: Bucket) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    assert len(verify(published(expert_format=experts), bucket, CPU, ranks=ranks, seed=seed)) == len(PASSES)


def test_a_wrong_pass_is_found_on_several_ranks() -> None:
    """It takes the residual for the partial sum, from the second layer on."""

    def run(graph: fx.Graph, ctx: Context) -> PassResult:
        nodes = list(graph.find_nodes(op="call_function", target=torch.ops.gptoss.reduce_norm_route.default))[: ctx.limit]
        for node in nodes[1:]:
            node.args = (node.args[1], *node.args[1:])
        return PassResult(len(nodes))

    at = next(i for i, p in enumerate(PASSES) if p.name == "fuse_residual")
    wrong = Pass("mix_up", run, lambda ctx: ctx.config.num_layers, "rtol")
    culprit = bisect(published(), DECODE, CPU, ranks=2, passes=(*PASSES[:at], wrong, *PASSES[at:]))
    assert culprit and culprit.verdict.name == "mix_up" and (culprit.match, culprit.total) == (2, 2)


def tiny_plans(ranks: int) -> tuple[list[LaunchPlan], list[dict[str, torch.Tensor]], list[fx.Graph]]:
    whole = tiny_context(published(), DECODE, CPU, ranks)
    graphs: dict[Context, fx.Graph] = {}
    for ctx in dict.fromkeys(whole.of_ranks()):
        module = trace_model(ctx.config, ctx.bucket, ctx.geometry, ctx.dtype, ranks, rank=ctx.rank)
        run_passes(module, ctx)
        graphs[ctx] = module.graph
    each = [graphs[ctx] for ctx in whole.of_ranks()]
    plans = [rank_plan(make_plan(graphs[ctx], ctx), whole.config, rank, ranks) for rank, ctx in enumerate(whole.of_ranks())]
    tensors = rank_tensors(whole, random.randrange(10**6))
    return plans, [with_merged(own, graph) for own, graph in zip(tensors, each, strict=True)], each


def test_plans_in_lockstep_equal_the_graphs_and_notice_early_frees() -> None:
    plans, tensors, graphs = tiny_plans(2)
    assert [(plan.rank, plan.ranks) for plan in plans] == [(0, 2), (1, 2)]
    assert all(LaunchPlan.loads(plan.dumps()) == plan for plan in plans)
    expected = run_graphs(graphs, tensors)
    own = [{name: value.clone() for name, value in each.items()} for each in tensors]
    logits = run_ranks([PlanInterpreter(plan, each) for plan, each in zip(plans, own, strict=True)])
    for rank in range(2):
        assert torch.equal(logits[rank], expected[0][0]) and torch.equal(logits[rank], expected[rank][0])
        assert difference(expected[rank][1:], [own[rank][f"cache.{i}"] for i in range(2)]) == 0
    # a partial sum that rank 1 frees before the ranks read it poisons both
    at = next(i for i, step in enumerate(plans[1].steps) if step.op == "linear_partial")
    victim = plans[1].steps[at].outputs[0]
    early = dataclasses.replace(plans[1].steps[at], frees=((int(victim.key), int(victim.key) + victim.bytes),))
    steps = (*plans[1].steps[:at], early, *plans[1].steps[at + 1:])
    broken = [plans[0], dataclasses.replace(plans[1], steps=steps)]
    logits = run_ranks([PlanInterpreter(plan, each) for plan, each in zip(broken, tensors, strict=True)])
    assert all(each.isnan().any() for each in logits)


def test_a_dump_says_which_rank_it_is(tmp_path: Path) -> None:
    ctx = tiny_context(published(), DECODE, CPU, 2).of_ranks()[1]
    module = trace_model(ctx.config, ctx.bucket, ctx.geometry, ctx.dtype, 2, rank=1)
    (tmp_path / "x.py").write_text(ir.print_graph(module.graph, ctx, "trace"))
    assert ir.load(tmp_path / "x.py")[1] == ctx
    logits, *_ = ir.run_file(tmp_path / "x.py")
    assert logits.isfinite().all()
