"""The whole compiler against transformers' GptOssForCausalLM in fp32: the traced graph, the graph after every pass, the
interpreted plan and the CPU executor, for random configurations, three checkpoint layouts, and every way to cut a prompt.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gptoss_compile.checkpoint import Checkpoint
from gptoss_compile.compiler import Request, compile_checkpoint
from gptoss_compile.config import Bucket, ModelConfig
from gptoss_compile.demo import huggingface_config
from gptoss_compile.dialect import mxfp4_dequantize
from gptoss_compile.interpreter import PlanInterpreter, run_graph
from gptoss_compile.passes.base import Context
from gptoss_compile.pipeline import PASSES, run_passes
from gptoss_compile.plan import make_plan
from gptoss_compile.target import Target
from gptoss_compile.testing import with_merged
from gptoss_compile.trace import Geometry, cache_shapes, trace_model

from .stepper import Stepper

TOLERANCE = 1e-4  # max |difference of logits|; the logits are O(1)
CPU = Target.parse("cpu")
MAX_CONTEXT = 192


def random_config(seed: int, experts: str) -> ModelConfig:
    """Traits that have broken such code before: hidden sizes off the beaten multiples, few experts, both windows, one to
    three layers, positions past YaRN's original length."""
    rng = random.Random(seed)
    layers, kv_heads = rng.randint(1, 3), rng.randint(1, 2)
    sizes = [32 * n for n in (1, 2, 3, 5)] if experts == "mxfp4" else [20, 36, 50, 90]
    return ModelConfig(
        num_layers=layers, hidden=rng.choice(sizes), intermediate=rng.choice(sizes),
        num_heads=kv_heads * rng.choice((1, 4, 8)), num_kv_heads=kv_heads, head_dim=rng.choice((16, 32)),
        num_experts=rng.randint(4, 9) if rng.random() < 0.8 else 3,
        experts_per_token=rng.choice((1, 2, 3)), vocab_size=rng.randint(100, 300), sliding_window=rng.choice((16, 128)),
        windowed=tuple(i % 2 == 0 for i in range(layers)), rope_original_context=rng.choice((32, 64)), max_position=4096,
        expert_format=experts)  # type: ignore[arg-type]


def reference_logits(checkpoint: Checkpoint, prompt: list[int]) -> np.ndarray:
    """[T, V] of one full forward of transformers' model, in fp32."""
    from transformers import GptOssConfig, GptOssForCausalLM

    data = huggingface_config(checkpoint.config)
    data.pop("quantization_config", None)
    # its other implementations of experts refuse some of these sizes
    theirs = GptOssConfig(**data, attn_implementation="eager", experts_implementation="eager")
    model = GptOssForCausalLM(theirs).to(torch.float32).eval()
    state = {}
    for name in checkpoint.logical:
        value = checkpoint.read(name)
        base, _, kind = name.rpartition(".")
        if kind == "scales":
            continue
        if kind == "blocks":
            value, name = mxfp4_dequantize(value, checkpoint.read(f"{base}.scales"), torch.float32), f"{base}.weight"
        if name.endswith(("gate_up.weight", "down.weight")):
            value = value.transpose(1, 2)
        state[_huggingface_name(name)] = value.to(torch.float32)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all("inv_freq" in name for name in missing), (missing, unexpected)
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0].numpy()


def _huggingface_name(name: str) -> str:
    if not name.startswith("layers."):
        return {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}.get(name, name)
    _, layer, rest = name.split(".", 2)
    module, _, kind = rest.partition(".")
    table = {"attn_norm": "input_layernorm", "moe_norm": "post_attention_layernorm", "router": "mlp.router",
             "sinks": "self_attn.sinks", **{x: f"self_attn.{x}_proj" for x in "qkvo"}}
    if module in ("gate_up", "down"):
        return f"model.layers.{layer}.mlp.experts.{module}_proj" + ("_bias" if kind == "bias" else "")
    return f"model.layers.{layer}.{table[module]}" + (f".{kind}" if kind else "")


def tensors_of(checkpoint: Checkpoint, geometry: Geometry) -> dict[str, torch.Tensor]:
    """Weights as the fp32 graph wants them, and caches whose content must never matter."""
    weights = {name: checkpoint.read(name) for name in checkpoint.logical}
    weights = {name: w if w.dtype == torch.uint8 else w.to(torch.float32) for name, w in weights.items()}
    caches = {f"cache.{i}": torch.full(shape, 1e3) for i, shape in enumerate(cache_shapes(checkpoint.config, geometry))}
    return {**weights, **caches, "rope.weight": torch.tensor(checkpoint.config.rope_inverse_frequencies())}


def graph_runner(graph: torch.fx.Graph, tensors: dict[str, torch.Tensor]) -> Callable[..., np.ndarray]:
    state = with_merged(tensors, graph)

    def run(bucket: Bucket, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        logits, *caches = run_graph(graph, {**state, **{k: torch.from_numpy(v) for k, v in inputs.items()}})
        state.update({f"cache.{i}": cache for i, cache in enumerate(caches)})
        return logits.numpy()

    return run


def opened(source: Checkpoint, layout: str, folder: Path, make: SimpleNamespace) -> Checkpoint:
    """The checkpoint, written in a layout and read back."""
    write = make.original if layout == "original" else make.huggingface
    return Checkpoint.open(write(source, folder / "ck"))


CASES = [(1, "mxfp4", "huggingface"), (2, "mxfp4", "original"), (3, "bf16", "huggingface"), (4, "bf16", "original"),
         (5, "mxfp4", "huggingface"), (6, "bf16", "huggingface"), (7, "mxfp4", "original"), (8, "mxfp4", "huggingface")]


@pytest.mark.parametrize(("seed", "experts", "layout"), CASES)
def test_graph_after_every_pass_and_plan(seed: int, experts: str, layout: str, tmp_path: Path,
                                         make: SimpleNamespace) -> None:
    config = random_config(seed, experts)
    if layout == "original":  # that layout fixes the context length
        config = dataclasses.replace(config, rope_original_context=4096, max_position=131072)
    checkpoint = opened(Checkpoint.random(config, seed), layout, tmp_path, make)
    config = checkpoint.config
    rng = random.Random(seed)
    prompt = [rng.randrange(config.vocab_size) for _ in range(129)]
    expected = reference_logits(checkpoint, prompt)

    bucket = Bucket.extend(130, 2, 130)
    geometry = Geometry.of(config, [bucket], 16, MAX_CONTEXT)
    pages = Stepper.pages(geometry, 2)
    geometry = dataclasses.replace(geometry, pages=pages[0], window_pages=pages[1])
    ctx = Context(config, bucket, CPU, geometry, torch.float32)
    tensors = tensors_of(checkpoint, geometry)
    module = trace_model(config, bucket, geometry, torch.float32)
    gaps: dict[str, float] = {}

    def measure(name: str, run: Callable[..., np.ndarray]) -> None:
        logits = Stepper(run, geometry, 2).step(bucket, [(1, prompt)])[1]
        gaps[name] = float(np.abs(logits - expected).max())

    run_passes(module, ctx, observe=[lambda name, graph: measure(name, graph_runner(graph, tensors))])
    assert len(gaps) == len(PASSES) + 1
    plan, state = make_plan(module.graph, ctx), with_merged(tensors, module.graph)

    def interpret(bucket: Bucket, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        return PlanInterpreter(plan, {**state, **{k: torch.from_numpy(v) for k, v in inputs.items()}}).run().numpy()

    measure("plan", interpret)
    assert max(gaps.values()) <= TOLERANCE, (config, gaps)


@pytest.mark.parametrize("length", [127, 128, 129])
@pytest.mark.parametrize("window", [16, 128])
def test_decode_chunks_and_mixed_batches_equal_one_forward(length: int, window: int) -> None:
    """The same prompts whole, cut into chunks, token by token, and beside others in one step."""
    config = dataclasses.replace(random_config(11, "mxfp4"), sliding_window=window, num_layers=2, windowed=(True, False))
    checkpoint = Checkpoint.random(config, length)
    rng = random.Random(length)
    prompts = [[rng.randrange(config.vocab_size) for _ in range(n)] for n in (length + 3, 40)]
    expected = [reference_logits(checkpoint, prompt) for prompt in prompts]
    buckets = [Bucket.decode(2), Bucket.extend(64, 2, 64)]
    geometry = Geometry.of(config, buckets, 16, MAX_CONTEXT)
    pages = Stepper.pages(geometry, 2)
    geometry = dataclasses.replace(geometry, pages=pages[0], window_pages=pages[1])
    state = tensors_of(checkpoint, geometry)
    plans = {}
    for bucket in buckets:
        module = trace_model(config, bucket, geometry, torch.float32)
        ctx = Context(config, bucket, CPU, geometry, torch.float32)
        run_passes(module, ctx)
        plans[bucket] = make_plan(module.graph, ctx)
        state = with_merged(state, module.graph)

    def interpret(bucket: Bucket, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        tensors = {**state, **{k: torch.from_numpy(v) for k, v in inputs.items()}}
        return PlanInterpreter(plans[bucket], tensors).run().numpy()

    decode, extend = buckets
    stepper, got, done = Stepper(interpret, geometry, 2), ([], []), [0, 0]

    def step(bucket: Bucket, *counts: int) -> None:
        work = [(i, prompts[i][done[i] : done[i] + n]) for i, n in enumerate(counts) if n]
        for i, logits in stepper.step(bucket, work).items():
            got[i].append(logits)
            done[i] += len(logits)

    step(extend, 0, 5)  # one sequence alone in a bucket for two, with padding
    step(extend, 50, 1)  # a chunk beside a decoding sequence
    step(decode, 1, 1)
    step(extend, 30, 30)
    step(extend, length - 81 if length - 81 <= 64 else 46)  # up to the window's edge
    while done[0] < len(prompts[0]):
        step(decode, 1, 1 if done[1] < 40 else 0)
    while done[1] < 40:
        step(decode, 0, 1)
    for logits, wanted in zip(got, expected, strict=True):
        gap = np.abs(np.concatenate(logits) - wanted).max()
        assert gap <= TOLERANCE, gap


@pytest.mark.parametrize(("seed", "experts", "layout"), CASES)
def test_cpu_executor(seed: int, experts: str, layout: str, tmp_path: Path, make: SimpleNamespace) -> None:
    from gptoss_compile.runtime.executor_cpu import CpuExecutor

    checkpoint = opened(Checkpoint.random(random_config(seed, experts), seed), layout, tmp_path, make)
    buckets = (Bucket.decode(2), Bucket.extend(64, 2, 64))
    request = Request(CPU, buckets=buckets, max_context=MAX_CONTEXT)
    artifact = compile_checkpoint(checkpoint, None, request, tmp_path / "artifact")
    geometry = Geometry.of(checkpoint.config, buckets, artifact.page_size, MAX_CONTEXT)
    pages, _ = Stepper.pages(geometry, 2)
    executor = CpuExecutor.load(artifact, num_pages=pages, max_num_seqs=8)
    assert executor.window_ring == geometry.window_ring
    rng = random.Random(seed)
    prompt = [rng.randrange(checkpoint.config.vocab_size) for _ in range(131)]
    stepper, got = Stepper(executor.run, geometry, 2), []
    for chunk in (prompt[:50], prompt[50:114], prompt[114:127]):
        got.append(stepper.step(buckets[1], [(0, chunk)])[0])
    for token in prompt[127:]:
        got.append(stepper.step(buckets[0], [(0, [token])])[0])
    assert np.abs(np.concatenate(got) - reference_logits(checkpoint, prompt)).max() <= TOLERANCE
