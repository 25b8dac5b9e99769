"""Several ranks in lockstep on a CPU against transformers, as `test_parity` does with one: unequal shares of MXFP4 blocks,
features, heads and vocabulary; the same bits on every rank; artifacts whose ranks have their own weights."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from gptoss_compile.artifact import Artifact
from gptoss_compile.checkpoint import Checkpoint
from gptoss_compile.compiler import Request, compile_checkpoint
from gptoss_compile.config import Bucket, ModelConfig
from gptoss_compile.dialect import OPS
from gptoss_compile.expected import expected_step, tensors_of
from gptoss_compile.inspect import main as inspect_main
from gptoss_compile.inspect import report
from gptoss_compile.interpreter import PlanInterpreter, run_ranks
from gptoss_compile.launch_plan import LaunchPlan, Step
from gptoss_compile.passes.base import Context
from gptoss_compile.pipeline import run_passes
from gptoss_compile.plan import make_plan
from gptoss_compile.target import Target
from gptoss_compile.testing import shard, with_merged
from gptoss_compile.trace import Geometry, trace_model

from .stepper import Stepper
from .test_parity import CPU, MAX_CONTEXT, TOLERANCE, reference_logits
from .test_parity import tensors_of as whole_tensors

Runner = Callable[[Bucket, Mapping[str, np.ndarray]], np.ndarray]


def config_for(ranks: int, experts: str, seed: int) -> ModelConfig:
    """The vocabulary and the experts cannot be shared equally, nor, among two ranks, the heads."""
    rng = random.Random(seed)
    unit = 32 if experts == "mxfp4" else 1
    kv_heads = 3 if ranks == 2 else ranks
    return ModelConfig(
        num_layers=2, hidden=rng.choice((32, 96)), intermediate=unit * (ranks + rng.randint(1, ranks - 1)),
        num_heads=kv_heads * rng.choice((1, 2)), num_kv_heads=kv_heads, head_dim=16, num_experts=5, experts_per_token=2,
        vocab_size=8 * rng.randint(12, 30) + 1, sliding_window=16, windowed=(True, False), rope_original_context=64,
        max_position=4096, expert_format=experts)  # type: ignore[arg-type]


class Lockstep:
    """The interpreted plans of all ranks as a runner of steps. Every step asserts that the ranks' bits are the same where
    they must be: in the residual stream and in the logits."""

    def __init__(self, plans: Mapping[Bucket, list[LaunchPlan]], tensors: list[dict[str, torch.Tensor]]) -> None:
        self.plans, self.tensors = plans, tensors
        self.replicated = 0  # buffers that were compared

    def __call__(self, bucket: Bucket, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        step = {name: torch.from_numpy(value) for name, value in inputs.items()}
        first: dict[tuple[int, int], torch.Tensor] = {}

        def watch(rank: int, number: int, done: Step, outputs: list[torch.Tensor]) -> None:
            whole = {"reduce_norm_linear": (0,), "reduce_norm_route": (0, 1, 2), "all_gather": (0,), "embed": (0,)}
            for index in whole.get(done.op, ()):
                if rank == 0:
                    first[number, index] = outputs[index].clone()
                else:
                    assert torch.equal(first[number, index], outputs[index]), (rank, number, done.op, index)
                    self.replicated += 1

        ranks = [PlanInterpreter(plan, {**own, **step}) for plan, own in zip(self.plans[bucket], self.tensors, strict=True)]
        return run_ranks(ranks, watch)[0].numpy()


def in_steps(run: Runner, geometry: Geometry, buckets: tuple[Bucket, ...], prompt: list[int]) -> np.ndarray:
    """The logits of a prompt that is run in two chunks and then token by token, or in one of these ways if there is but one
    bucket, beside a sequence that decodes."""
    stepper, got = Stepper(run, geometry, 2), []
    chunks = {"extend": [prompt[:20], prompt[20:33]] if len(buckets) == 2 else [prompt[:20], prompt[20:]],
              "decode": [[token] for token in (prompt[33:] if len(buckets) == 2 else prompt)]}
    for bucket in reversed(buckets):
        got += [stepper.step(bucket, [(0, chunk), (1, [7])])[0] for chunk in chunks[bucket.kind]]
    return np.concatenate(got)


DECODE, EXTEND = Bucket.decode(2), Bucket.extend(24, 2, 24)


@pytest.mark.parametrize(("ranks", "experts", "buckets"), [
    (2, "mxfp4", (DECODE, EXTEND)), (4, "bf16", (DECODE,)), (8, "mxfp4", (EXTEND,))])
def test_ranks_compute_the_model(ranks: int, experts: str, buckets: tuple[Bucket, ...], seed: int) -> None:
    config = config_for(ranks, experts, seed)
    checkpoint = Checkpoint.random(config, seed)
    geometry = Geometry.of(config, buckets, 16, MAX_CONTEXT)
    pages = Stepper.pages(geometry, 2)
    geometry = dataclasses.replace(geometry, pages=pages[0], window_pages=pages[1])
    tensors = [shard(whole_tensors(checkpoint, geometry), config, rank, ranks, CPU) for rank in range(ranks)]
    plans: dict[Bucket, list[LaunchPlan]] = {}
    for bucket in buckets:
        contexts, plan_of = Context(config, bucket, CPU, geometry, torch.float32, ranks).of_ranks(), {}
        assert len(set(contexts)) < ranks or ranks == 2, "ranks with equal shares have one graph"
        for ctx in set(contexts):
            module = trace_model(ctx.config, bucket, geometry, torch.float32, ranks, rank=ctx.rank)
            count = {r.name: r.matches for r in run_passes(module, ctx)}
            assert count["fuse_allreduce_rms_norm"] == 2 * config.num_layers
            plan_of[ctx] = make_plan(module.graph, ctx)
            assert sum(OPS[step.op].exchange == "sum" for step in plan_of[ctx].steps) == 2 * config.num_layers
            tensors = [with_merged(own, module.graph) for own in tensors]
        plans[bucket] = [plan_of[ctx] for ctx in contexts]
    run = Lockstep(plans, tensors)
    prompt = [random.Random(seed).randrange(config.vocab_size) for _ in range(36)]
    gap = np.abs(in_steps(run, geometry, buckets, prompt) - reference_logits(checkpoint, prompt)).max()
    assert gap <= TOLERANCE, (config, gap)
    assert run.replicated > 0


def test_an_artifact_of_two_ranks(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Compiled for the cpu target, served by its executor, with weights of each rank in every way to give them."""
    from gptoss_compile.runtime.executor_cpu import CpuExecutor

    config = dataclasses.replace(config_for(2, "mxfp4", seed), num_layers=1, windowed=(False,))
    checkpoint = Checkpoint.random(config, seed)
    request = Request(CPU, buckets=(DECODE, EXTEND), max_context=MAX_CONTEXT, ranks=2)
    artifact = compile_checkpoint(checkpoint, None, request, tmp_path / "pack")
    assert artifact.ranks == 2
    rank_weights = check_shares(artifact, checkpoint)
    for mode in ("link", f"random:{seed}"):
        other = compile_checkpoint(checkpoint, None, dataclasses.replace(request, weights=mode), tmp_path / mode[:4])
        for rank, wanted in enumerate(rank_weights):
            given = dict(other.open_weights(rank))
            assert given.keys() == wanted.keys() and all(np.array_equal(given[name], wanted[name]) for name in wanted)

    geometry = Geometry.of(config, request.buckets, artifact.page_size, MAX_CONTEXT)
    executor = CpuExecutor.load(artifact, num_pages=Stepper.pages(geometry, 2)[0], max_num_seqs=8)
    prompt = [random.Random(seed).randrange(config.vocab_size) for _ in range(36)]
    logits = in_steps(executor.run, geometry, (DECODE, EXTEND), prompt)
    assert np.abs(logits - reference_logits(checkpoint, prompt)).max() <= TOLERANCE

    first, second = expected_step(artifact, DECODE, tensors_of(artifact), seed)
    last = max(int(name.split(".")[1]) for name in first if name.startswith("step."))
    assert np.array_equal(first[f"step.{last}.0"], second[f"step.{last}.0"])
    assert first["cache.0"].shape[2] + second["cache.0"].shape[2] == config.num_kv_heads
    shares = report(artifact)["shares"]
    assert [share["intermediate"] for share in shares] == [32 * 2, 32]
    assert [share["kv_heads"] for share in shares] == [2, 1]
    assert inspect_main([str(artifact.path)]) == 0 and "what each rank has" in capsys.readouterr().out


@pytest.mark.slow
def test_an_artifact_of_two_gpus(tmp_path: Path, seed: int) -> None:
    """Compiled for Hopper, with few, some and many tokens a step; here its plans are interpreted. There is what each rank's
    GPU must compute, and where the ranks hold the same it is the same bit for bit."""
    config = dataclasses.replace(config_for(2, "mxfp4", seed), hidden=192, intermediate=3 * 96, head_dim=64, num_experts=8,
                                 vocab_size=1040)
    buckets = (DECODE, EXTEND, Bucket.extend(80, 2))
    checkpoint = Checkpoint.random(config, seed)
    artifact = compile_checkpoint(checkpoint, None, Request(Target.parse("sm90"), buckets=buckets, max_context=MAX_CONTEXT,
                                                            ranks=2), tmp_path / "artifact")
    check_shares(artifact, checkpoint)
    shares = report(artifact)["shares"]
    assert [share["intermediate"] for share in shares] == [2 * 96, 96]
    assert shares[0]["exchange"] == shares[1]["exchange"] > 0
    same = {"reduce_norm_linear": (0,), "reduce_norm_route": (0, 1, 2), "all_gather": (0,), "embed": (0,)}
    for bucket in buckets:
        first, second = expected_step(artifact, bucket, tensors_of(artifact), seed)
        assert first.keys() == second.keys() and {name for name in first if name.endswith(".change")}
        for number, step in enumerate(artifact.plan(bucket)["steps"]):
            assert all(f"step.{number}.{i}" in first for i, out in enumerate(step["outputs"]) if out["place"] != "cache")
            for index in same.get(step["op"], ()):
                name = f"step.{number}.{index}"
                assert np.array_equal(first[name], second[name]), (bucket.name, step["op"], index)
            if step["op"].endswith("_partial"):
                assert not np.array_equal(first[f"step.{number}.0"], second[f"step.{number}.0"])


def check_shares(artifact: Artifact, checkpoint: Checkpoint) -> list[dict[str, np.ndarray]]:
    """Put together, the ranks' weights are the checkpoint's. Returns each rank's, by recipe."""
    c = checkpoint.config
    ranks = [dict(artifact.open_weights(rank)) for rank in range(artifact.ranks)]

    def bits(name: str) -> np.ndarray:
        value = checkpoint.read(name)
        return value.view(torch.uint16).numpy() if value.dtype == torch.bfloat16 else value.numpy()

    axes = {"sinks": 0, "o.weight": 1, "gate_up.blocks": 1, "gate_up.scales": 1, "gate_up.bias": 1, "down.blocks": 2,
            "down.scales": 2}
    for layer in range(c.num_layers):
        at = f"layers.{layer}."
        for name, axis in axes.items():
            assert np.array_equal(np.concatenate([own[at + name] for own in ranks], axis), bits(at + name)), name
        for name in ("o.bias", "down.bias"):
            assert np.array_equal(ranks[0][at + name], bits(at + name)) and not ranks[1][at + name].any(), name
        for name in ("attn_norm.weight", "moe_norm.weight", "router.weight", "router.bias"):
            assert all(np.array_equal(own[at + name], bits(at + name)) for own in ranks), name
        for kind in ("weight", "bias"):
            q, k, v = (bits(f"{at}{x}.{kind}") for x in "qkv")
            heads = np.array([2, 1]) * c.head_dim  # rows of keys; queries have as many times more as there are heads to one
            for own, keys, at_key in zip(ranks, heads, (0, heads[0]), strict=True):
                rows, first = keys * c.heads_per_kv, at_key * c.heads_per_kv
                whole = np.concatenate([q[first : first + rows], k[at_key : at_key + keys], v[at_key : at_key + keys]])
                assert np.array_equal(own[f"{at}qkv.{kind}"], whole), kind
    assert np.array_equal(np.concatenate([own["lm_head.weight"] for own in ranks]), bits("lm_head.weight"))
    assert all(np.array_equal(own["embed.weight"], bits("embed.weight")) for own in ranks)
    return ranks
