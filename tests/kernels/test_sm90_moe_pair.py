"""sm90's pairwise experts compile without spills, keep their contract, and down has all its weights in flight early."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from gptoss_compile.build import build
from gptoss_compile.kernels.sm90.moe_pair import SPECS
from gptoss_compile.kernels.spec import TensorSpec
from gptoss_compile.lint import WAIT, check_launch, sass
from gptoss_compile.target import Target

SM90 = Target.parse("sm90")
UP, DOWN = SPECS


def calls(tokens: int, hidden: int, inner: int, top_k: int, count: int = 32) -> tuple[dict[str, Any], dict[str, Any]]:
    def bf16(*shape: int) -> TensorSpec:
        return TensorSpec(shape, "bf16")

    def experts(rows: int, columns: int) -> dict[str, Any]:
        return {"weight": TensorSpec((count, rows, columns // 32, 16), "u8"), "bias": bf16(count, rows),
                "scales": TensorSpec((count, rows, columns // 32), "u8")}

    ids = TensorSpec((tokens, top_k), "i32")
    return ({"x": bf16(tokens, hidden), "norm_weight": bf16(hidden), "ids": ids, **experts(2 * inner, hidden), "eps": 1e-5,
             "alpha": 1.702, "limit": 7.0},
            {"h": bf16(tokens, top_k, inner), "ids": ids, "probs": TensorSpec((tokens, top_k), "fp32"),
             **experts(hidden, inner), "residual": bf16(tokens, hidden)})


@pytest.mark.parametrize(("hidden", "inner", "top_k"), [
    (2880, 2880, 4), (2880, 1440, 4), (2880, 672, 4), (2880, 288, 4), (384, 384, 4), (384, 96, 4), (192, 1344, 1),
    (960, 576, 3)])
def test_they_compile_without_spills_and_keep_their_contract(hidden: int, inner: int, top_k: int, tmp_path: Path) -> None:
    for spec, operands in zip(SPECS, calls(2, hidden, inner, top_k), strict=True):
        assert spec.supports(SM90, operands)
        (launch,) = spec.instantiate(SM90, operands)
        binary = build(launch.source, SM90, tmp_path)
        assert check_launch(launch, binary, SM90) == [] and binary.spilled == 0
        if spec is DOWN:
            text = sass(binary)
            wait = WAIT.search(text)
            assert wait is not None
            early, every = (len(re.findall(r"LDG\.E\.NA\S*\.128", part)) for part in (text[:wait.start()], text))
            assert early == every == -(-inner // 192)


@pytest.mark.parametrize(("hidden", "inner", "target"), [(352, 384, "sm90"), (384, 352, "sm90"), (384, 384, "sm100")])
def test_what_they_refuse(hidden: int, inner: int, target: str) -> None:
    for spec, operands in zip(SPECS, calls(1, hidden, inner, 4), strict=True):
        assert not spec.supports(Target.parse(target), operands)
        assert not spec.supports(SM90, {**calls(1, 384, 384, 4)[spec is DOWN], "scales": None})
