"""sm90's pairwise experts against their twins in fp32, and their time at the size of 120b."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gptoss_compile.dialect import OPS

from .harness import Argument, Prepared, device, error, milliseconds, run_kernel

pytestmark = pytest.mark.gpu
UP, DOWN = "sm90_moe_gate_up_pair", "sm90_moe_down_pair"
ACTIVATION = {"eps": 1e-5, "alpha": 1.702, "limit": 7.0, "early": 1}
# (hidden, inner, experts, top_k)
SHAPES = [(2880, 2880, 128, 4), (2880, 2880, 32, 4), (384, 384, 32, 4), (192, 1344, 5, 1), (960, 576, 8, 3),
          (2880, 1440, 32, 4), (2880, 672, 8, 4), (2880, 288, 8, 4), (384, 96, 8, 4), (576, 96, 5, 1)]


def experts(count: int, rows: int, columns: int, scales: tuple[int, int]) -> dict[str, Tensor]:
    """Random bits; scales anywhere in a range, its ends included."""
    groups = (count, rows, columns // 32)
    return {"weight": torch.randint(256, (*groups, 16), dtype=torch.uint8, device="cuda"),
            "scales": torch.randint(scales[0], scales[1] + 1, groups, dtype=torch.uint8, device="cuda"),
            "bias": torch.randn(count, rows, device="cuda").bfloat16()}


def routes(tokens: int, top_k: int, count: int) -> Tensor:
    return torch.rand(tokens, count, device="cuda").topk(top_k).indices.int()


def gate_up_call(tokens: int, shape: tuple[int, int, int, int], scales: tuple[int, int] = (97, 119),
                 norm: float = 1.0) -> dict[str, Argument]:
    """Where scales are large, norm's weights must be small, or every feature is clamped."""
    hidden, inner, count, top_k = shape
    norm_weight = (norm * (0.5 + torch.rand(hidden, device="cuda"))).bfloat16()
    return {"x": torch.randn(tokens, hidden, device="cuda").bfloat16(), "norm_weight": norm_weight,
            "ids": routes(tokens, top_k, count), **experts(count, 2 * inner, hidden, scales), **ACTIVATION}


def down_call(tokens: int, shape: tuple[int, int, int, int], scales: tuple[int, int] = (97, 119)) -> dict[str, Argument]:
    hidden, inner, count, top_k = shape
    return {"h": torch.randn(tokens, top_k, inner, device="cuda").bfloat16(), "ids": routes(tokens, top_k, count),
            "probs": torch.randn(tokens, top_k, device="cuda").softmax(-1), **experts(count, hidden, inner, scales),
            "residual": torch.randn(tokens, hidden, device="cuda").bfloat16()}


def check(op: str, call: dict[str, Argument], tolerance: float) -> None:
    """The twin rounds nowhere: its activations are fp32."""
    device()
    (got,) = run_kernel(op, call, UP if op == "moe_gate_up" else DOWN)
    wide = {k: v.float() if isinstance(v, Tensor) and v.dtype == torch.bfloat16 else v for k, v in call.items()}
    assert error(got, OPS[op].reference(*wide.values())) < tolerance


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_twins(shape: tuple[int, int, int, int], tokens: int) -> None:
    check("moe_gate_up", gate_up_call(tokens, shape), 5e-3)
    check("moe_down", down_call(tokens, shape), 3e-3)


@pytest.mark.parametrize(("scales", "norm"), [((97, 128), 2.0**-9), ((128, 128), 2.0**-10), ((0, 121), 1.0)])
def test_extreme_scales(scales: tuple[int, int], norm: float) -> None:
    check("moe_gate_up", gate_up_call(2, SHAPES[1], scales, norm), 5e-3)
    check("moe_down", down_call(2, SHAPES[1], scales), 3e-3)


def test_extreme_activations() -> None:
    """Elements from subnormal to large side by side; then rows that are all tiny, all large, and zero."""
    def spread(like: Tensor) -> Tensor:
        return (like.float() * torch.exp2(torch.randint(-135, 20, like.shape, device="cuda").float())).bfloat16()

    rows = torch.tensor([1.0, 2.0**-30, 2.0**20, 0.0], device="cuda")
    up, down = gate_up_call(4, SHAPES[2]), down_call(4, SHAPES[2])
    check("moe_gate_up", up | {"x": spread(up["x"])}, 5e-3)
    check("moe_gate_up", up | {"x": (up["x"].float() * rows[:, None]).bfloat16()}, 5e-3)
    check("moe_down", down | {"h": spread(down["h"])}, 3e-3)
    check("moe_down", down | {"h": (down["h"].float() * rows[:, None, None]).bfloat16()}, 3e-3)


@pytest.mark.parametrize("shape", SHAPES[3:])
def test_a_token_is_made_of_its_own_numbers(shape: tuple[int, int, int, int]) -> None:
    """Also where down's columns are filled up: its neighbours, and whatever lies behind h, are no numbers."""
    call = down_call(3, shape)
    (alone,) = run_kernel("moe_down", call, DOWN)
    tokens = torch.full((5, *call["h"].shape[1:]), torch.nan, device="cuda", dtype=torch.bfloat16)  # type: ignore[union-attr]
    tokens[1] = call["h"][1]  # type: ignore[index]
    (got,) = run_kernel("moe_down", call | {"h": tokens[:3]}, DOWN)
    assert torch.equal(got[1], alone[1]) and got[0].isnan().all() and got[2].isnan().all()


def test_equal_inputs_give_equal_bits() -> None:
    for op, call in (("moe_gate_up", gate_up_call(3, SHAPES[1])), ("moe_down", down_call(3, SHAPES[1]))):
        prepared = Prepared(op, call)
        seen = []
        for _ in range(20):
            prepared.poison()
            prepared.launch()
            seen.append(prepared.outputs[0].clone())
        assert all(torch.equal(seen[0], other) for other in seen)


def test_speed() -> None:
    """One token, one graph over 16 different layers of eight experts each, 0.85 GB in all."""
    shape = (2880, 2880, 8, 4)
    pairs = [(Prepared("moe_gate_up", gate_up_call(1, shape)), Prepared("moe_down", down_call(1, shape))) for _ in range(16)]
    size = 4 * 2880 * 2880 * 17 / 32  # bytes of a down
    for name, chain, moved in (("gate_up", [up for up, _ in pairs], 2 * size), ("down", [down for _, down in pairs], size),
                               ("both", [one for pair in pairs for one in pair], 3 * size)):
        time = milliseconds(chain) / len(pairs)
        print(f"{name}: {1000 * time:.2f} us a layer, {moved / time / 1e9:.2f} TB/s")
        assert moved / time > 1e9
