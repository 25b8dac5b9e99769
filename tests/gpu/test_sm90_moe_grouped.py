"""sm90's grouped experts against fp32, expert by expert: all variants, empty experts and busy ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gptoss_compile.dialect import mxfp4_dequantize
from gptoss_compile.kernels.maths import rms_norm, swiglu

from .harness import device, error, run_kernel

TOP_K = 4
pytestmark = pytest.mark.gpu


def experts(count: int, hidden: int, inner: int) -> dict[str, Tensor]:
    """Random MXFP4 experts: operands of `moe_grouped`."""
    device()
    found = {}
    for name, rows, columns in (("up", 2 * inner, hidden), ("down", hidden, inner)):
        shape = (count, rows, columns // 32)
        found[name] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, device="cuda")
        found[f"{name}_scales"] = torch.randint(117, 123, shape, dtype=torch.uint8, device="cuda")
        found[f"{name}_bias"] = torch.randn(count, rows, device="cuda").bfloat16()
    return found


@pytest.fixture(scope="module", params=[32, 128], ids=lambda count: f"{count} experts")
def published(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    """As many experts as 20b and 120b have, of their size."""
    return experts(request.param, 2880, 2880)


def choices(tokens: int, count: int, *, uneven: bool) -> Tensor:
    """Experts [T, A]; uneven: every seventh has none, the second one all tokens, and some are preferred."""
    scores = torch.randn(tokens, count, device="cuda")
    if uneven:
        scores += torch.randn(count, device="cuda")
        scores[:, ::7], scores[:, 1] = -torch.inf, torch.inf
    return scores.topk(TOP_K).indices.int()


def call(weights: dict[str, Tensor], ids: Tensor) -> dict[str, Any]:
    tokens, hidden = ids.shape[0], weights["down_bias"].shape[1]
    return {"x": torch.randn(tokens, hidden, device="cuda").bfloat16(),
            "norm_weight": (1 + torch.randn(hidden, device="cuda") / 4).bfloat16(), "ids": ids,
            "probs": torch.rand(ids.shape, device="cuda"), **weights, "eps": 1e-5, "alpha": 1.702, "limit": 7.0}


def mixture(a: dict[str, Any]) -> Tensor:
    """`moe_grouped`'s result less x, in fp32."""
    normed, y = rms_norm(a["x"], a["norm_weight"], a["eps"]), torch.zeros_like(a["x"], dtype=torch.float32)
    for e in range(a["up"].shape[0]):
        tokens, slots = (a["ids"] == e).nonzero(as_tuple=True)
        if len(tokens):
            up, down = (mxfp4_dequantize(a[n][e], a[f"{n}_scales"][e], torch.float32) for n in ("up", "down"))
            h = swiglu(normed[tokens] @ up.T + a["up_bias"][e].float(), a["alpha"], a["limit"])
            out = h @ down.T + a["down_bias"][e].float()
            y.index_add_(0, tokens, out * a["probs"][tokens, slots, None])
    return y


def check(arguments: dict[str, Any]) -> None:
    (got,) = run_kernel("moe_grouped", arguments, "sm90_moe_grouped")
    assert error(got.float() - arguments["x"].float(), mixture(arguments)) < 5e-3
    (again,) = run_kernel("moe_grouped", arguments, runs=1)
    assert torch.equal(got, again)


@pytest.mark.parametrize("tokens", [5, 33, 200, 2048])
@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
def test_published_sizes(published: dict[str, Tensor], tokens: int, uneven: bool) -> None:
    check(call(published, choices(tokens, published["up"].shape[0], uneven=uneven)))


@pytest.mark.parametrize(("hidden", "inner"), [(384, 384), (192, 576), (192, 96), (960, 288)])
@pytest.mark.parametrize("tokens", [1, 7, 130, 333, 3000])
def test_other_sizes(hidden: int, inner: int, tokens: int) -> None:
    check(call(experts(16, hidden, inner), choices(tokens, 16, uneven=tokens % 2 == 0)))


@pytest.mark.parametrize("inner", [1440, 768, 672, 384, 288, 96])
@pytest.mark.parametrize("tokens", [5, 33, 200, 2048])
def test_shares_of_ranks(inner: int, tokens: int) -> None:
    """Two, four and eight ranks' of the published sizes, and the least there can be."""
    check(call(experts(32, 2880, inner), choices(tokens, 32, uneven=tokens % 2 == 0)))


def test_all_tokens_choose_the_same() -> None:
    check(call(experts(8, 384, 384), torch.tensor([5, 0, 2, 7], device="cuda").repeat(1500, 1).int()))
