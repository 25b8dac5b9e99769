"""The counter-based generator against its specification, spelt out for one element at a time."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from gptoss_compile.checkpoint import Checkpoint
from gptoss_compile.config import ModelConfig
from gptoss_compile.random_weights import device_parameters, random_values, round_bf16, widen_bf16


def word(name: str, seed: int, counter: int) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    k0, k1 = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D & 0xFFFFFFFF
        x ^= x >> 15
        x = x * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 16

    return mix((mix(counter ^ k0) + k1) & 0xFFFFFFFF)


def test_matches_the_specification(seed: int) -> None:
    shape = (11, 3, 7)
    blocks = random_values("layers.0.down.blocks", shape, "u8", seed).ravel()
    scales = random_values("layers.0.down.scales", shape, "u8", seed).ravel()
    dense = {name: widen_bf16(random_values(name, shape, "bf16", seed)).ravel()
             for name in ("layers.3.q.weight", "layers.3.q.bias", "norm.weight", "embed.weight")}
    rules = {"layers.3.q.weight": (0, math.sqrt(3 / 7) / 2**15), "layers.3.q.bias": (0, 2.0**-18),
             "norm.weight": (1 << 17, 2.0**-17), "embed.weight": (0, math.sqrt(3) / 2**15)}
    lowest = 126 - round(math.log2(2.93 * math.sqrt(7 * 32)))
    for i in range(math.prod(shape)):
        assert blocks[i] == word("layers.0.down.blocks", seed, i // 4) >> 8 * (i % 4) & 255
        assert scales[i] == lowest + (word("layers.0.down.scales", seed, i // 4) >> 8 * (i % 4) & 3)
        for name, (offset, scale) in rules.items():
            half = word(name, seed, i // 2) >> 16 * (i % 2) & 0xFFFF
            half -= 0x10000 if half >= 0x8000 else 0
            value = np.float32(half + offset) * np.float32(scale)
            assert dense[name][i] == torch.tensor(value).to(torch.bfloat16).float().item(), name


@pytest.mark.parametrize("make", [random_values, device_parameters])
def test_other_dtypes_are_refused(make: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="random weights are bf16, fp32 or u8, not i32"):
        make("layers.0.o.weight", (4, 4), "i32", 0)


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "u8"])
def test_any_rows_alone(seed: int, dtype: str) -> None:
    """Also where a row is no multiple of a word, and beyond the size of one internal piece."""
    rng = random.Random(seed)
    name = "layers.0.gate_up.blocks" if dtype == "u8" else "layers.0.o.weight"
    shape = (rng.randint(5, 9), rng.randrange(40_001, 90_001, 2))
    whole = random_values(name, shape, dtype, seed)
    for start in range(shape[0]):
        stop = rng.randint(start + 1, shape[0])
        assert np.array_equal(random_values(name, shape, dtype, seed, start, stop), whole[start:stop])


def test_rounding_is_that_of_torch(seed: int) -> None:
    bits = np.random.default_rng(seed).integers(0, 2**32, 100_000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = np.concatenate([values[np.isfinite(values)], np.float32([1.00390625, 1.01171875, 0.0, -0.0])])
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(round_bf16(values), expected)


def test_different_names_and_seeds_are_unrelated() -> None:
    draws = [widen_bf16(random_values(f"layers.{i}.q.weight", (400, 500), "bf16", seed)).ravel()
             for i in range(3) for seed in range(3)]
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlation).max() < 0.02


def test_sizes_of_outputs(seed: int) -> None:
    """Matrices give outputs of about the size of their inputs, whatever their shape."""
    from gptoss_compile import dialect

    config = ModelConfig(1, 2880, 2880, 8, 8, 64, 2, 2, 64, 128, (True,))
    checkpoint = Checkpoint.random(config, seed)
    x = torch.randn(2880, generator=torch.Generator().manual_seed(seed))
    experts = dialect.mxfp4_dequantize(checkpoint.read("layers.0.gate_up.blocks")[:1],
                                       checkpoint.read("layers.0.gate_up.scales")[:1], torch.float32)
    for weight in (experts[0], checkpoint.read("layers.0.q.weight").float()):
        assert 0.4 < (weight @ x).std() < 4
    exponents = checkpoint.read("layers.0.gate_up.scales").int() - 127
    assert exponents.min() >= -8 and exponents.max() <= -4
