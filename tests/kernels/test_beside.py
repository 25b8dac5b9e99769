"""The kernels beside the graph, in the interpreter: random weights against their definition, the others against twins."""

from __future__ import annotations

import math
import os
import random

import numpy as np
import pytest
import torch

from gptoss_compile import gumbel
from gptoss_compile.build import build
from gptoss_compile.dialect import OPS
from gptoss_compile.kernels.interpret import interpret
from gptoss_compile.kernels.registry import BESIDE
from gptoss_compile.kernels.spec import TensorSpec
from gptoss_compile.launch_plan import Cut
from gptoss_compile.lint import check_launch
from gptoss_compile.random_weights import PARAMETERS, device_parameters, random_values
from gptoss_compile.target import Target

WEIGHTS = [("layers.1.gate_up.blocks", (3, 4, 5, 16), "u8"), ("layers.1.down.scales", (5, 3, 7), "u8"),
           ("layers.0.q.weight", (37, 90), "bf16"), ("norm.weight", (91,), "bf16"), ("layers.0.o.bias", (96,), "fp32"),
           ("embed.weight", (50, 60), "fp32"), ("layers.0.sinks", (7,), "bf16")]


@pytest.mark.parametrize(("name", "shape", "dtype"), WEIGHTS)
def test_random_weights_are_made_bit_for_bit(name: str, shape: tuple[int, ...], dtype: str) -> None:
    rng = random.Random(seed := int.from_bytes(os.urandom(4)))
    print(f"seed {seed}")
    wanted = random_values(name, shape, dtype, seed)  # type: ignore[arg-type]
    parameters = device_parameters(name, shape, dtype, seed)  # type: ignore[arg-type]
    first = rng.randrange(5)
    end = 4 * first + wanted.nbytes
    out = torch.randint(-2**31, 2**31, (-(-end // 4) + 3,)).int()
    operands = {"parameters": torch.from_numpy(parameters.row(first)), "out": out}
    before = out.numpy().copy().view(np.uint8)
    for found in (OPS["random_weights"].reference(**operands), *interpret("random_weights", "sm90", operands)):
        found = found.numpy().view(np.uint8)
        assert np.array_equal(found[4 * first : end], wanted.reshape(-1).view(np.uint8))
        assert np.array_equal(found[: 4 * first], before[: 4 * first])
        assert np.array_equal(found[-12:], before[-12:]), "no more than the word that holds the last value"


@pytest.mark.parametrize(("name", "shape", "dtype", "axis"), [
    ("layers.1.gate_up.blocks", (3, 8, 5, 16), "u8", 1), ("layers.1.down.blocks", (2, 3, 6, 16), "u8", 2),
    ("layers.1.down.scales", (3, 5, 90), "u8", 2), ("layers.1.down.scales", (4, 6, 8), "u8", 2),
    ("layers.0.q.weight", (16, 90), "bf16", 0), ("layers.0.o.weight", (6, 80), "fp32", 1),
    ("layers.0.o.weight", (7, 9), "bf16", 1), ("layers.0.sinks", (9,), "bf16", 0), ("layers.0.sinks", (9,), "fp32", 0)],
    ids=str)
def test_a_part_is_made_as_it_is_in_the_whole(name: str, shape: tuple[int, ...], dtype: str, axis: int) -> None:
    rng = random.Random(seed := int.from_bytes(os.urandom(4)))
    print(f"seed {seed}")
    whole = random_values(name, shape, dtype, seed)  # type: ignore[arg-type]
    start = rng.randrange(shape[axis])
    cut = Cut(axis, start, rng.randint(start + 1, shape[axis]))
    print(cut)
    wanted = whole[(slice(None),) * axis + (slice(cut.start, cut.stop),)]
    parameters = device_parameters(name, shape, dtype, seed, cut)  # type: ignore[arg-type]
    first = rng.randrange(5)
    end = 4 * first + wanted.nbytes
    out = torch.randint(-2**31, 2**31, (-(-end // 4) + 4,)).int()
    operands = {"parameters": torch.from_numpy(parameters.row(first)), "out": out}
    before = out.numpy().copy().view(np.uint8)
    for found in (OPS["random_weights"].reference(**operands), *interpret("random_weights", "sm90", operands)):
        found = found.numpy().view(np.uint8)
        assert np.array_equal(found[4 * first : end], np.ascontiguousarray(wanted).reshape(-1).view(np.uint8))
        assert np.array_equal(found[: 4 * first], before[: 4 * first])
        assert np.array_equal(found[-8:], before[-8:]), "no more than a pair of values that holds the last one"


def test_one_launch_makes_more_than_one_round_of_blocks() -> None:
    shape = (8 * Target.parse("sm90").processors + 3, 4 * 1024)
    wanted = random_values("x.blocks", shape, "u8", 1)
    out = torch.zeros(wanted.nbytes // 4, dtype=torch.int32)
    parameters = torch.from_numpy(device_parameters("x.blocks", shape, "u8", 1).row(0))
    (found,) = interpret("random_weights", "sm90", {"parameters": parameters, "out": out})
    assert np.array_equal(found.numpy().view(np.uint8), wanted.reshape(-1))


@pytest.mark.parametrize("tokens", [1, 5, 1500])
def test_feed(tokens: int) -> None:
    torch.manual_seed(seed := int.from_bytes(os.urandom(4)))
    print(f"seed {seed}")
    operands = {"tokens": torch.randint(0, 99, (tokens,)).int(),
                "source": torch.randint(-2, 7, (tokens,)).clamp(min=-1).int(),
                "sampled": torch.randint(100, 199, (7,)).int()}
    operands["sampled"][3] = -1
    wanted = OPS["feed"].reference(**operands)
    assert all(w == 0 if s == 3 else (w >= 100) == (s >= 0)
               for w, s in zip(wanted.tolist(), operands["source"].tolist(), strict=True))
    (found,) = interpret("feed", "sm90", {k: v.clone() for k, v in operands.items()})
    assert found.dtype == torch.int32 and torch.equal(found, wanted)


@pytest.mark.parametrize(("rows", "vocab"), [(1, 5000), (3, 1024), (40, 2500), (300, 77)])
def test_sample(rows: int, vocab: int) -> None:
    torch.manual_seed(seed := int.from_bytes(os.urandom(4)))
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    logits = torch.randn(rows, vocab).mul(4).round()  # many ties
    logits[0] = -7.0  # all equal
    limits = rng.integers(vocab // 2, vocab + 1, rows).tolist()
    temperatures = rng.choice([0, 0, -1, 1e-4, 0.7, 1, 3, 1e300], rows).tolist()
    words = torch.from_numpy(np.stack([gumbel.words(t, limit, int(rng.integers(-2**63, 2**63)), int(rng.integers(2**17)))
                                       for t, limit in zip(temperatures, limits, strict=True)]))
    sampled = torch.full((rows + 3,), 77, dtype=torch.int32)
    operands = {"logits": logits, "words": words, "sampled": sampled}
    wanted = OPS["sample"].reference(**operands)
    for row, (t, limit) in enumerate(zip(temperatures, limits, strict=True)):
        assert -1 <= wanted[row] < limit and (wanted[row] == -1) == (t < 0)
        assert t != 0 or wanted[row] == int(np.argmax(logits[row, :limit].numpy()))
    (found,) = interpret("sample", "sm90", {k: v.clone() for k, v in operands.items()})
    assert found.dtype == torch.int32 and found[rows:].tolist() == [77] * 3
    for row in torch.nonzero(found[:rows] != wanted[:rows]).flatten().tolist():  # logarithms differ in their last bits
        _, limit, low, high, counter = words[row].tolist()
        noise = np.float32(min(temperatures[row], 1e30)) * gumbel.noise(limit, low, high, counter)
        values = logits[row, :limit].numpy() + noise
        assert values[found[row]] == pytest.approx(values[wanted[row]], rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_token_without_a_finite_choice(bad: float) -> None:
    logits = torch.full((4, 3000), bad if bad == -math.inf else 1.0)
    logits[:2, 2222] = bad
    asked = [(0, 3000), (1, 3000), (0, 2222), (1, 2222)]
    words = torch.from_numpy(np.stack([gumbel.words(t, limit, 5) for t, limit in asked]))
    operands = {"logits": logits, "words": words, "sampled": torch.zeros(4).int()}
    (found,) = interpret("sample", "sm90", {k: v.clone() for k, v in operands.items()})
    assert found.tolist() == OPS["sample"].reference(**operands).tolist()
    assert (found == -1).tolist() == [True, True, bad == -math.inf, bad == -math.inf]


@pytest.mark.parametrize("target", ["sm90", "sm100", "gfx950"])
def test_compiled_and_linted(target: str) -> None:
    machine = Target.parse(target)
    tokens = TensorSpec((8,), "i32")
    operands = {"feed": {"tokens": tokens, "source": tokens, "sampled": tokens},
                "sample": {"logits": TensorSpec((8, 201088), "fp32"), "words": TensorSpec((8, 5), "i32"), "sampled": tokens},
                "random_weights": {"parameters": TensorSpec((PARAMETERS,), "i32"), "out": TensorSpec((1,), "i32")}}
    for spec in BESIDE:
        (launch,) = spec.instantiate(machine, operands[spec.op])
        binary = build(launch.source, machine)
        assert not check_launch(launch, binary, machine) and not binary.spilled
