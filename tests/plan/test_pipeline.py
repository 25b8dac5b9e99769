"""The pipeline on the published configurations: counts, refusals, bisection, dumps; and the plans it ends in."""

from __future__ import annotations

import copy
import dataclasses
import operator
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

from gptoss_compile import ir, model
from gptoss_compile.config import Bucket, ModelConfig
from gptoss_compile.config_parse import parse_config
from gptoss_compile.interpreter import PlanInterpreter
from gptoss_compile.launch_plan import LaunchPlan
from gptoss_compile.match import getitem
from gptoss_compile.memory import Lifetime, align, assign
from gptoss_compile.passes.base import Context, Pass, PassResult
from gptoss_compile.pipeline import PASSES, Options, PassError, Record, run_passes
from gptoss_compile.plan import make_plan
from gptoss_compile.target import TARGETS, Target
from gptoss_compile.testing import difference, random_tensors, run, tiny_context, with_merged
from gptoss_compile.trace import Geometry, trace_model
from gptoss_compile.verify import VerifyError, bisect, verify

DATA = Path(__file__).parent.parent / "checkpoint" / "data"
CPU = Target.parse("cpu")
DECODE, EXTEND = Bucket.decode(4), Bucket.extend(512, 16)


def published(name: str) -> ModelConfig:
    return parse_config(DATA / f"config-{name}.json", "mxfp4")


def compiled(config: ModelConfig, bucket: Bucket, target: str = "cpu",
             **kwargs: object) -> tuple[fx.Graph, Context, list[Record]]:
    target_, dtype = Target.parse(target), torch.float32 if target == "cpu" else torch.bfloat16
    ctx = Context(config, bucket, target_, Geometry.of(config, [bucket], 16, 4096), dtype)
    module = trace_model(config, bucket, ctx.geometry, dtype, model=kwargs.pop("model", model.Model))  # type: ignore[arg-type]
    return module.graph, ctx, run_passes(module, ctx, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "layers"), [("20b", 24), ("120b", 36)])
@pytest.mark.parametrize("bucket", [DECODE, EXTEND], ids=lambda b: b.kind)
def test_pass_counts_of_the_published_models(name: str, layers: int, bucket: Bucket) -> None:
    config = published(name)
    geometry = Geometry.of(config, [bucket], 16, 4096)
    traced = trace_model(config, bucket, geometry, torch.bfloat16)
    assert config.num_layers == layers
    for target in ("sm90", "sm100"):
        module = copy.deepcopy(traced)
        ctx = Context(config, bucket, Target.parse(target), geometry, torch.bfloat16)
        count = {r.name: r.matches for r in run_passes(module, ctx)}
        decode, mx = bucket.kind == "decode", target == "sm100" and bucket.tokens * 4 > config.num_experts
        kernels = 3 + layers * 6
        assert count == {
            "canonicalize": count["canonicalize"], "raise_rope_table": 1, "raise_rms_norm": 2 * layers + 1,
            "raise_rope": 2 * layers, "raise_router": layers, "raise_swiglu": layers, "raise_attention_sinks": layers,
            "raise_experts": 2 * layers, "fuse_allreduce_rms_norm": 0, "merge_qkv": layers, "fuse_rope_kv": layers,
            "lower_embedding": 1, "fuse_norm_linear": layers, "lower_attention_sinks": layers if decode else 0,
            "fuse_residual": layers, "lower_router": layers, "lower_moe": layers,
            "fuse_pad_quant": layers if mx else 0, "lower_head": 1, "select_kernels": kernels, "place_pdl": kernels - 1}
        calls = [n for n in module.graph.nodes if n.op == "call_function" and n.target is not operator.getitem]
        assert len(calls) == kernels and all(str(n.target).startswith("gptoss.") for n in calls)


class OtherNorm(model.Layer):
    """Someone rewrote a norm: another epsilon, so the operator would compute something else."""

    def forward(self, x_TH: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
        self.config = dataclasses.replace(self.config, rms_eps=1e-3) if self.window else self.config
        return super().forward(x_TH, *args)


class EditedModel(model.Model):
    def __init__(self, config: ModelConfig, dtype: torch.dtype, ranks: int = 1, rank: int = 0) -> None:
        super().__init__(config, dtype, ranks, rank)
        self.layers = torch.nn.ModuleList(OtherNorm(config, i, dtype, ranks) for i in range(config.num_layers))


def test_an_edited_model_does_not_compile_and_the_error_shows_where() -> None:
    config = dataclasses.replace(published("20b"), num_layers=2, windowed=(True, False))
    with pytest.raises(PassError) as error:
        compiled(config, DECODE, model=EditedModel)
    text = str(error.value)
    assert "pass raise_rms_norm matched 3 times" in text and "expected 5" in text
    assert re.search(r"matched \d of \d+ nodes, stopped at %\w+: argument 0\.001 of aten\.add\.Tensor, expected 1e-05", text)


def test_unknown_pass_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no pass is called fuse_everything; the passes are: canonicalize, "):
        Options(skip=frozenset({"fuse_everything"}))


def test_skipping_a_fusion_leaves_operators_without_kernels() -> None:
    config = dataclasses.replace(published("20b"), num_layers=2, windowed=(True, False))
    with pytest.raises(PassError, match=r"select_kernels matched \d+ times.*\n.*is no kernel operator"):
        compiled(config, DECODE, options=Options(skip=frozenset({"fuse_rope_kv"})))


@pytest.mark.parametrize("experts", ["mxfp4", "bf16"])
@pytest.mark.parametrize("bucket", [DECODE, EXTEND], ids=lambda b: b.kind)
def test_every_pass_keeps_the_numbers(experts: str, bucket: Bucket) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    config = dataclasses.replace(published("120b"), expert_format=experts)  # type: ignore[arg-type]
    assert len(verify(config, bucket, CPU, seed=seed)) == len(PASSES)


def planted(wrong_from: int) -> tuple[Pass, ...]:
    """The pipeline with a pass that is wrong from its `wrong_from`-th rewrite on: it takes keys for values' sake."""

    def run(graph: fx.Graph, ctx: Context) -> PassResult:
        nodes = list(graph.find_nodes(op="call_function", target=torch.ops.gptoss.norm_route.default))[: ctx.limit]
        for i, node in enumerate(nodes, 1):
            args = list(node.args)
            if i >= wrong_from:
                args[4] = 0.5  # the norm's epsilon
            with graph.inserting_before(node):
                new = graph.call_function(node.target, tuple(args))
            new.meta = dict(node.meta)
            for user in list(node.users):
                with graph.inserting_after(new):
                    user.replace_all_uses_with(getitem(graph, new, user.args[1]))  # type: ignore[arg-type]
        return PassResult(len(nodes))

    wrong = Pass("tidy_router", run, lambda ctx: ctx.config.num_layers, "ulp")
    at = next(i for i, p in enumerate(PASSES) if p.name == "lower_moe")
    return (*PASSES[:at], wrong, *PASSES[at:])


@pytest.mark.parametrize("first", [1, 2])
def test_a_planted_wrong_pass_is_found(first: int) -> None:
    config = published("20b")
    culprit = bisect(config, DECODE, CPU, passes=planted(first))
    assert culprit and culprit.verdict.name == "tidy_router" and (culprit.match, culprit.total) == (first, 2)
    assert f"number {first} of 2" in str(culprit)
    assert bisect(config, DECODE, CPU) is None
    with pytest.raises(VerifyError, match="pass tidy_router changed the result"):
        verify(config, DECODE, CPU, passes=planted(first))


def test_bisect_command() -> None:
    command = [sys.executable, "-m", "gptoss_compile.pipeline", "bisect", "--config", str(DATA / "config-20b.json"),
               "--target", "cpu", "--bucket", "decode:2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "every pass keeps its exactness" in done.stdout, done.stderr


# ------------------------------------------------------------------------------------------------ dumps


def dump(folder: Path) -> tuple[fx.Graph, Context]:
    ctx = tiny_context(published("20b"), EXTEND, CPU)
    module = trace_model(ctx.config, ctx.bucket, ctx.geometry, ctx.dtype)
    run_passes(module, ctx, observe=[ir.Dumper(folder, ctx)])
    return module.graph, ctx


def test_every_dumped_stage_runs_and_gives_the_graphs_numbers(tmp_path: Path) -> None:
    graph, ctx = dump(tmp_path)
    stages = sorted(tmp_path.glob("*.py"))
    assert [p.stem for p in stages] == ["00-trace", *(f"{i:02d}-{p.name}" for i, p in enumerate(PASSES, 1))]
    assert len(list(tmp_path.glob("*.diff"))) == len(PASSES)
    expected = run(graph, random_tensors(graph, ctx, seed=5))
    for stage in stages:
        assert difference(expected, ir.run_file(stage, seed=5)) < 2e-5, stage.name


def test_an_edited_dump_runs_and_a_broken_one_says_what_is_wrong(tmp_path: Path,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    dump(tmp_path)
    last = sorted(tmp_path.glob("*.py"))[-1]
    original = ir.run_file(last)
    text = last.read_text()
    head = "rows, p_norm_weight, p_lm_head_weight, {})"
    last.write_text(text.replace(head.format("1e-05"), head.format("0.7")))
    assert difference(original, ir.run_file(last)) > 1e-3
    last.write_text(text.replace("PARAMETERS", "PARAMETRES"))
    assert ir.main(["run", str(last)]) == 2
    assert "not a dump that can run: KeyError: 'PARAMETERS'" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ plans


def plan_of(bucket: Bucket) -> tuple[LaunchPlan, dict[str, Tensor], fx.Graph]:
    ctx = tiny_context(published("20b"), bucket, CPU)
    module = trace_model(ctx.config, ctx.bucket, ctx.geometry, ctx.dtype)
    run_passes(module, ctx)
    tensors = random_tensors(module.graph, ctx, seed=random.randrange(10**6))
    return make_plan(module.graph, ctx), with_merged(tensors, module.graph), module.graph


@pytest.mark.parametrize("bucket", [DECODE, EXTEND], ids=lambda b: b.kind)
def test_the_interpreted_plan_equals_the_graph(bucket: Bucket) -> None:
    plan, tensors, graph = plan_of(bucket)
    assert LaunchPlan.loads(plan.dumps()) == plan
    logits, *caches = run(graph, tensors)
    own = {name: t.clone() for name, t in tensors.items()}
    assert torch.equal(PlanInterpreter(plan, own).run(), logits)
    for i, cache in enumerate(caches):
        assert torch.equal(own[f"cache.{i}"], cache)


def test_a_buffer_freed_too_early_becomes_nan() -> None:
    plan, tensors, _ = plan_of(DECODE)
    victim = plan.steps[0].outputs[0]  # the embedding: read by the first layer's last step of attention as the residual
    early = dataclasses.replace(plan.steps[1], frees=((int(victim.key), int(victim.key) + victim.bytes),))
    broken = dataclasses.replace(plan, steps=(plan.steps[0], early, *plan.steps[2:]))
    assert PlanInterpreter(broken, tensors).run().isnan().any()


def test_the_arena_is_smaller_than_the_sum_of_its_buffers() -> None:
    plan, _, _ = plan_of(EXTEND)
    total = sum(align(o.bytes) for s in plan.steps for o in s.outputs if o.place == "arena")
    assert plan.arena_bytes < total / 2


def test_memory_assignment_never_overlaps_what_lives_together() -> None:
    rng = random.Random(seed := random.randrange(10**6))
    print(f"seed {seed}")
    for _ in range(200):
        buffers = []
        for _ in range(rng.randrange(0, 30)):
            first = rng.randrange(20)
            buffers.append(Lifetime(rng.choice((1, 255, 256, 257, 4000)), first, first + rng.randrange(6)))
        offsets, top = assign(buffers)
        for i, a in enumerate(buffers):
            assert offsets[i] % 256 == 0 and offsets[i] + a.size <= top
            for j, b in enumerate(buffers[:i]):
                together = a.first <= b.last and b.first <= a.last
                apart = offsets[i] + a.size <= offsets[j] or offsets[j] + b.size <= offsets[i]
                assert apart or not together
    assert assign([]) == ([], 0)


def test_targets_are_described_not_asked() -> None:
    assert set(TARGETS) == {"sm90", "sm100", "sm103", "sm120", "gfx950", "cpu"}
    with pytest.raises(ValueError, match="unknown target 'sm89'; known targets: sm90, "):
        Target.parse("sm89")
