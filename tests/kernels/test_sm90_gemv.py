"""The register-landing products and the router of Hopper compile at real and odd sizes without spills and pass the lint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gptoss_compile.build import build_all, key_of
from gptoss_compile.kernels.registry import SPECS
from gptoss_compile.kernels.spec import Launch, TensorSpec
from gptoss_compile.lint import check_all
from gptoss_compile.target import Target

TARGET = Target.parse("sm90")


def bf16(*shape: int) -> TensorSpec:
    return TensorSpec(shape, "bf16")


def calls(tokens: int, hidden: int, heads: int, experts: int, vocabulary: int) -> list[tuple[str, dict[str, Any]]]:
    x, norm, rows = bf16(tokens, hidden), {"norm_weight": bf16(hidden), "eps": 1e-5}, TensorSpec((tokens,), "i32")
    return [
        ("norm_linear", {"x": x, **norm, "weight": bf16(heads + 1024, hidden), "bias": bf16(heads + 1024)}),
        ("linear_residual", {"x": bf16(tokens, heads), "weight": bf16(hidden, heads), "bias": bf16(hidden), "residual": x}),
        ("norm_head", {"x": x, "rows": None, **norm, "weight": bf16(vocabulary, hidden)}),
        ("norm_head", {"x": bf16(99, hidden), "rows": rows, **norm, "weight": bf16(vocabulary, hidden)}),
        ("norm_route", {"x": x, **norm, "weight": bf16(experts, hidden), "bias": bf16(experts), "top_k": 4}),
    ]


def launches(tokens: int, *sizes: int) -> list[Launch]:
    found: list[Launch] = []
    for op, operands in calls(tokens, *sizes):
        spec = next(s for s in SPECS if s.op == op and s.supports(TARGET, operands))
        assert spec.name == f"sm90_{op}" and spec.layouts == {"weight": "tiles"}
        found += spec.instantiate(TARGET, operands)
    return found


@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 8])
def test_gemv_and_router_keep_their_contract(tokens: int, tmp_path: Path) -> None:
    planned = launches(tokens, 2880, 4096, 128, 201088) + launches(tokens, 448, 1088, 40, 1000)
    _check(planned, tmp_path)


@pytest.mark.parametrize("experts", [32, 128])
def test_routers_of_many_tokens(experts: int, tmp_path: Path) -> None:
    _check([launches(tokens, 2880, 4096, experts, 64)[-1] for tokens in (9, 128)] + _tiled(experts), tmp_path)


def _tiled(experts: int) -> list[Launch]:
    spec = next(s for s in SPECS if s.name == "sm90_norm_route")
    return [launch for tokens in (129, 2500, 8192)
            for launch in spec.instantiate(TARGET, calls(tokens, 2880, 4096, experts, 64)[-1][1])]


def _check(planned: list[Launch], cache: Path) -> None:
    binaries = build_all([launch.source for launch in planned], TARGET, cache)
    pairs = [(launch, binaries[key_of(launch.source, TARGET)]) for launch in planned]
    assert check_all(pairs, TARGET) == []
    for launch, binary in pairs:
        assert binary.spilled == 0, f"{binary.symbol} {dict(launch.source.defines)} spills"  # type: ignore[union-attr]
        assert binary.shared <= TARGET.shared_bytes
