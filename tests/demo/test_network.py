"""The training network computes what the compiled model computes; MXFP4 rounding; the packed file."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import torch

from gptoss_compile.config import ModelConfig
from gptoss_compile.demo.mxfp4 import fake_quantize, quantize
from gptoss_compile.demo.network import Network, dense_shapes, is_expert
from gptoss_compile.demo.packed import Packed, save
from gptoss_compile.dialect import mxfp4_dequantize
from gptoss_compile.model import Model

CLASSES = 50


def _config(seed: int) -> ModelConfig:
    return ModelConfig(num_layers=3, hidden=64, intermediate=96, num_heads=8, num_kv_heads=(1, 2)[seed % 2], head_dim=16,
                       num_experts=8, experts_per_token=4, vocab_size=CLASSES, sliding_window=8,
                       windowed=(True, False, True), rope_original_context=16)


def _network(config: ModelConfig, seed: int) -> Network:
    """Random weights, biases and sinks included, of a size at which every part of the maths shows."""
    network = Network(config, CLASSES, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.weights:
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
    return network


def _model_logits(network: Network, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of one conversation by the model that is compiled, in fp32, on a cache of its own."""
    config, count = network.config, len(tokens)
    model = Model(dataclasses.replace(config, expert_format="bf16"), torch.float32)
    named = dict(zip(network.names, (weight.detach() for weight in network.weights), strict=True))
    model.load_state_dict({**named, "rope.weight": network.inv_freq})
    pages = -(-count // 4)
    caches = [torch.zeros(pages + 1, 2, config.num_kv_heads, 4, config.head_dim) for _ in range(config.num_layers)]
    table = torch.arange(1, pages + 1, dtype=torch.int32).unsqueeze(0)
    positions = torch.arange(count, dtype=torch.int32)
    sequences = torch.zeros(count, dtype=torch.int32)
    logits: torch.Tensor = model(tokens.int(), positions, sequences, table, table, None, caches)[0]
    return logits


def test_same_logits_as_the_model(seed: int) -> None:
    """Two conversations in one row, then padding: each gets the logits that it gets alone in the compiled model."""
    network = _network(_config(seed), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    lengths = (21, 30)
    tokens = torch.randint(0, CLASSES, (1, 56), generator=generator)
    positions, segments = torch.zeros_like(tokens), torch.full_like(tokens, -1)
    at = 0
    for number, length in enumerate(lengths):
        positions[0, at:at + length], segments[0, at:at + length] = torch.arange(length), number
        at += length
    with torch.no_grad():
        ours = network.logits(network(tokens, positions, segments)[0])[0]
        at = 0
        for length in lengths:
            theirs = _model_logits(network, tokens[0, at:at + length])
            worst = (ours[at:at + length] - theirs).abs().max().item()
            assert worst < 1e-3, f"seed {seed}: logits differ by {worst}"
            at += length


def test_quantize_keeps_what_mxfp4_can_say_and_rounds_the_rest_to_the_nearest() -> None:
    seed = int(np.random.default_rng().integers(1 << 30))
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (5, 3, 16), generator=generator, dtype=torch.uint8)
    blocks[..., 0] = 0x77  # a block's largest value is 6
    scales = torch.randint(110, 140, (5, 3), generator=generator, dtype=torch.uint8)
    exact = mxfp4_dequantize(blocks, scales, torch.float32)
    assert torch.equal(mxfp4_dequantize(*quantize(exact), torch.float32), exact), f"seed {seed}"
    weight = torch.randn(7, 64, generator=generator) * torch.randn(7, 1, generator=generator).exp()
    weight[0, :32] = 0
    kept = mxfp4_dequantize(*quantize(weight), torch.float32)
    assert torch.equal(fake_quantize(weight), weight + (kept - weight)), f"seed {seed}"
    largest = weight.view(7, 2, 32).abs().amax(-1, keepdim=True)
    error = (kept - weight).view(7, 2, 32).abs()
    assert bool((error <= largest / 5 + 1e-9).all()), f"seed {seed}: a value is off by more than half a step"


def test_packed_file_spreads_the_rows_over_the_vocabulary(tmp_path: Path) -> None:
    config = dataclasses.replace(_config(0), vocab_size=500)
    vocabulary = np.array([3, 17, 256, 499])
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in dense_shapes(config, 5).items()}
    save(tmp_path / "m.safetensors", config, vocabulary, weights)
    checkpoint = Packed(tmp_path / "m.safetensors")
    assert checkpoint.config == config
    for name, info in checkpoint.logical.items():
        value = checkpoint.read(name)
        assert tuple(value.shape) == info.shape and value.dtype == {"bf16": torch.bfloat16, "u8": torch.uint8}[info.dtype]
    embedding, rows = checkpoint.read("embed.weight"), weights["embed.weight"].bfloat16()
    assert torch.equal(embedding[torch.from_numpy(vocabulary)], rows[1:])
    assert torch.equal(embedding[4], rows[0]) and torch.equal(embedding[498], rows[0])
    assert torch.equal(checkpoint.read_rows("lm_head.weight", 200, 300), checkpoint.read("lm_head.weight")[200:300])
    name = next(name for name in weights if is_expert(name)).removesuffix(".weight")
    kept = mxfp4_dequantize(checkpoint.read(f"{name}.blocks"), checkpoint.read(f"{name}.scales"), torch.float32)
    assert torch.allclose(kept, fake_quantize(weights[f"{name}.weight"]), atol=1e-6)


def test_other_is_worth_as_much_as_all_unused_rows() -> None:
    """Cross entropy with OTHER's offset equals that over the whole vocabulary with equal unused rows."""
    generator = torch.Generator().manual_seed(0)
    hidden, rows = torch.randn(4, 8, generator=generator), torch.randn(6, 8, generator=generator)
    used, unused = 5, 95
    offset = torch.zeros(6)
    offset[0] = math.log(unused)
    compact = torch.log_softmax(hidden @ rows.T + offset, -1)
    whole = torch.log_softmax(hidden @ torch.cat((rows[1:], rows[:1].repeat(unused, 1))).T, -1)
    torch.testing.assert_close(compact[:, 1:], whole[:, :used])
