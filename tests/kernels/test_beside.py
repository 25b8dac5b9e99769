"""The kernels beside the graph, in the interpreter: random weights against their definition, advance against its twin."""

from __future__ import annotations

import math
import os
import random

import numpy as np
import pytest
import torch

from gptoss_compile.build import build
from gptoss_compile.dialect import OPS
from gptoss_compile.kernels.interpret import interpret
from gptoss_compile.kernels.registry import BESIDE
from gptoss_compile.kernels.spec import TensorSpec
from gptoss_compile.lint import check_launch
from gptoss_compile.random_weights import device_parameters, random_values
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


def test_one_launch_makes_more_than_one_round_of_blocks() -> None:
    shape = (8 * Target.parse("sm90").processors + 3, 4 * 1024)
    wanted = random_values("x.blocks", shape, "u8", 1)
    out = torch.zeros(wanted.nbytes // 4, dtype=torch.int32)
    parameters = torch.from_numpy(device_parameters("x.blocks", shape, "u8", 1).row(0))
    (found,) = interpret("random_weights", "sm90", {"parameters": parameters, "out": out})
    assert np.array_equal(found.numpy().view(np.uint8), wanted.reshape(-1))


@pytest.mark.parametrize(("tokens", "vocab"), [(1, 5000), (3, 1024), (40, 2500), (300, 77)])
def test_advance(tokens: int, vocab: int) -> None:
    torch.manual_seed(seed := int.from_bytes(os.urandom(4)))
    print(f"seed {seed}")
    logits = torch.randn(tokens, vocab).mul(4).round()  # many ties
    logits[0] = -math.inf if seed % 2 else -7.0  # all equal
    positions = torch.randint(-1, 9, (tokens,)).int()
    operands = {"logits": logits, "tokens": torch.randint(0, vocab, (tokens,)).int(), "positions": positions}
    wanted = OPS["advance"].reference(**operands)
    assert wanted[0][positions >= 0].tolist() == [int(np.argmax(r)) for r in logits[positions >= 0].numpy()]
    found = interpret("advance", "sm90", {k: v.clone() for k, v in operands.items()})
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype == torch.int32 and torch.equal(a, b)


@pytest.mark.parametrize("target", ["sm90", "sm100", "gfx950"])
def test_compiled_and_linted(target: str) -> None:
    machine = Target.parse(target)
    operands = {"advance": {"logits": TensorSpec((8, 201088), "fp32"), "tokens": TensorSpec((8,), "i32"),
                            "positions": TensorSpec((8,), "i32")},
                "random_weights": {"parameters": TensorSpec((8,), "i32"), "out": TensorSpec((1,), "i32")}}
    for spec in BESIDE:
        (launch,) = spec.instantiate(machine, operands[spec.op])
        binary = build(launch.source, machine)
        assert not check_launch(launch, binary, machine) and not binary.spilled
