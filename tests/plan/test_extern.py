"""Steps that are another project's: when they are chosen, and how they stand in a plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from gptoss_compile import library
from gptoss_compile.checkpoint import Checkpoint
from gptoss_compile.compiler import CompileError, Request, compile_checkpoint
from gptoss_compile.config import Bucket, ModelConfig
from gptoss_compile.interpreter import PlanInterpreter
from gptoss_compile.kernels import tuned
from gptoss_compile.kernels.spec import Launch
from gptoss_compile.launch_plan import Extern, KernelLaunch, LaunchPlan
from gptoss_compile.passes.base import Context
from gptoss_compile.pipeline import run_passes
from gptoss_compile.plan import make_plan
from gptoss_compile.target import Target
from gptoss_compile.testing import random_tensors
from gptoss_compile.trace import Geometry, trace_model

EXTEND, DECODE = Bucket.extend(48, 3, 8), Bucket.decode(1)
CONFIG = ModelConfig(
    num_layers=2, hidden=128, intermediate=64, num_heads=16, num_kv_heads=2, head_dim=64, num_experts=8,
    experts_per_token=4, vocab_size=512, sliding_window=32, windowed=(True, False), max_position=512,
    rope_original_context=64, eos_ids=(0,))
SM90 = Target.parse("sm90")


def compiled(bucket: Bucket, **extern: Any) -> tuple[LaunchPlan, fx.Graph, Context]:
    geometry = replace(Geometry.of(CONFIG, [EXTEND, DECODE], 16, 512), pages=200, window_pages=200)
    ctx = Context(CONFIG, bucket, SM90, geometry, torch.bfloat16, **extern)
    module = trace_model(CONFIG, bucket, geometry, torch.bfloat16)
    run_passes(module, ctx)

    def binary_of(launch: Launch) -> str:
        return str(getattr(launch.source, "file", "triton"))

    return make_plan(module.graph, ctx, binary_of=binary_of), module.graph, ctx


def plan_of(bucket: Bucket, **extern: Any) -> LaunchPlan:
    return compiled(bucket, **extern)[0]


def kernels(plan: LaunchPlan) -> list[str]:
    return [step.kernel for step in plan.steps if "attention" in step.op]


def test_our_own_unless_asked() -> None:
    assert kernels(plan_of(EXTEND)) == kernels(plan_of(EXTEND, extern="measured")) == ["sm90_attention_extend"] * 2
    assert kernels(plan_of(EXTEND, extern="always")) == ["flashinfer_attention"] * 2
    assert kernels(plan_of(DECODE, extern="always")) == ["sm90_attention_decode"] * 2, "it has no kernel for that"


def test_where_the_table_says_that_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "tokens=48 sequences=3 heads=16 kv_heads=2 window=0"
    entry = {"attention": {key: {"kernel": "flashinfer_attention"}}}
    monkeypatch.setattr(tuned, "table", lambda target: entry)
    assert kernels(plan_of(EXTEND, extern="measured")) == ["sm90_attention_extend", "flashinfer_attention"]
    assert kernels(plan_of(EXTEND)) == ["sm90_attention_extend"] * 2
    entry["attention"][key] = {"kernel": "one that is gone"}
    assert kernels(plan_of(EXTEND, extern="measured")) == ["sm90_attention_extend"] * 2


def test_nothing_is_launched_early_from_or_to_it() -> None:
    plan = plan_of(EXTEND, extern="always")
    assert LaunchPlan.loads(plan.dumps()) == plan
    launches = [launch for step in plan.steps for launch in step.launches]
    calls = [i for i, launch in enumerate(launches) if isinstance(launch, Extern)]
    assert len(calls) == 2
    plain = {0, *calls, *(i + 1 for i in calls)}
    assert [i for i, launch in enumerate(launches) if not launch.pdl] == sorted(plain)
    for i in calls:
        schedule, call = launches[i - 1 : i + 1]
        assert isinstance(schedule, KernelLaunch) and isinstance(call, Extern) and call.function == "attention"
        assert schedule.common == call.common and call.args[-3:] == ("out0", "window", "scale")


def test_its_plan_computes_what_ours_does(seed: int) -> None:
    """By the same twins, in memory that is laid out anew."""
    logits = []
    for extern in ("never", "always"):
        plan, graph, ctx = compiled(EXTEND, extern=extern)
        logits.append(PlanInterpreter(plan, random_tensors(graph, ctx, seed)).run())
    assert torch.equal(*logits) and bool(torch.isfinite(logits[0]).all())


def test_what_makes_the_library_must_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "PACKAGES", ("numpy", "a-package-of-nobodys"))
    request = Request(SM90, buckets=(EXTEND, DECODE), weights="random:0", extern="always")
    wanted = r"not installed: a-package-of-nobodys; pip install 'gptoss-compile\[extern-build\]'"
    with pytest.raises(CompileError, match=wanted):
        compile_checkpoint(Checkpoint.random(CONFIG, 0), None, request, tmp_path / "artifact")
