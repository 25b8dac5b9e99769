"""norm_route of Hopper: the choice is that of logits in fp64, ties go to the lowest expert, few tokens and many."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .harness import Prepared, run_kernel

pytestmark = pytest.mark.gpu
EPS, TOP_K = 1e-5, 4


def arguments(tokens: int, experts: int, columns: int) -> dict[str, Tensor | float | int]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda")

    return {"x": (2 * randn(tokens, columns)).bfloat16(), "norm_weight": (0.3 * randn(columns) + 1).bfloat16(),
            "weight": (randn(experts, columns) * 2 * columns**-0.5).bfloat16(), "bias": randn(experts).bfloat16(),
            "eps": EPS, "top_k": TOP_K}


def logits_of(given: dict[str, Tensor | float | int]) -> Tensor:
    x, norm, weight, bias = (given[name].double() for name in ("x", "norm_weight", "weight", "bias"))  # type: ignore[union-attr]
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * norm @ weight.T + bias


def check(given: dict[str, Tensor | float | int]) -> None:
    probs, ids = run_kernel("norm_route", given, "sm90_norm_route")
    logits = logits_of(given)
    best, expected = logits.sort(dim=-1, descending=True, stable=True)
    chosen = logits.gather(-1, ids.long())
    assert (chosen - best[:, :TOP_K]).abs().max() < 2e-5, "an expert that is not among the best"
    clear = ((best[:, :TOP_K] - best[:, 1:TOP_K + 1]) > 4e-5).all(-1)
    assert (~clear).sum() <= 2 + len(ids) // 20, "too many close calls for a test"
    assert torch.equal(ids[clear].long(), expected[clear, :TOP_K])
    assert (probs - best[:, :TOP_K].softmax(-1)).abs().max() < 2e-5


@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 9, 100, 129, 2500, 8192])
@pytest.mark.parametrize("experts", [32, 128])
def test_choice(tokens: int, experts: int) -> None:
    check(arguments(tokens, experts, 2880))


@pytest.mark.parametrize("tokens", [3, 17, 150])
@pytest.mark.parametrize(("experts", "columns"), [(40, 448), (8, 64)])
def test_choice_of_odd_sizes(tokens: int, experts: int, columns: int) -> None:
    check(arguments(tokens, experts, columns))


@pytest.mark.parametrize("tokens", [2, 20, 200])
def test_the_lowest_of_equal_experts(tokens: int) -> None:
    given = arguments(tokens, 128, 384)
    for name in ("weight", "bias"):
        each = given[name]
        assert isinstance(each, Tensor)
        each[:] = each[:1]
    probs, ids = run_kernel("norm_route", given, "sm90_norm_route")
    assert torch.equal(ids, torch.arange(TOP_K, dtype=torch.int32, device="cuda").expand(tokens, TOP_K))
    assert torch.equal(probs, torch.full_like(probs, 0.25))


@pytest.mark.parametrize("tokens", [8, 1000])
def test_same_bits_every_time(tokens: int) -> None:
    prepared = Prepared("norm_route", arguments(tokens, 128, 2880), "sm90_norm_route")
    prepared.launch()
    first = [o.clone() for o in prepared.outputs]
    for _ in range(20):
        prepared.launch()
        assert all(torch.equal(a, b) for a, b in zip(prepared.outputs, first, strict=True))
