"""Hopper's grouped experts: what is launched for how many tokens, and that it compiles, all without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gptoss_compile.build import build_all, key_of
from gptoss_compile.kernels.moe_grouped import Sizes
from gptoss_compile.kernels.registry import SPECS
from gptoss_compile.kernels.sm90.moe_grouped import buffers, most_rows, stages, variant
from gptoss_compile.kernels.spec import CudaSource, DType, KernelSpec, Launch, TensorSpec
from gptoss_compile.lint import check_all
from gptoss_compile.target import Target

SM90 = Target.parse("sm90")
TOP_K = 4


def call(tokens: int, experts: int, hidden: int, inner: int, dtype: DType = "bf16") -> dict[str, Any]:
    found: dict[str, Any] = {
        "x": TensorSpec((tokens, hidden), dtype), "norm_weight": TensorSpec((hidden,), dtype),
        "ids": TensorSpec((tokens, TOP_K), "i32"), "probs": TensorSpec((tokens, TOP_K), "fp32"), "eps": 1e-5,
        "alpha": 1.702, "limit": 7.0}
    for name, rows, columns in (("up", 2 * inner, hidden), ("down", hidden, inner)):
        found |= {name: TensorSpec((experts, rows, columns // 32, 16), "u8"),
                  f"{name}_scales": TensorSpec((experts, rows, columns // 32), "u8"),
                  f"{name}_bias": TensorSpec((experts, rows), dtype)}
    return found


def chosen(operands: dict[str, Any], target: str = "sm90") -> KernelSpec:
    return next(s for s in SPECS if s.op == "moe_grouped" and s.supports(Target.parse(target), operands))


def test_who_runs_what() -> None:
    assert chosen(call(64, 32, 2880, 2880)).name == "sm90_moe_grouped"
    for operands, target in ((call(64, 32, 2880, 2880), "sm100"), (call(64, 32, 2880, 2880, "fp32"), "sm90"),
                             (call(64, 32, 64, 192), "sm90"), (call(64, 32, 192, 128), "sm90"),
                             (call(64, 512, 192, 192), "sm90"), (call(64, 32, 192, 192) | {"up_scales": None}, "sm90")):
        assert chosen(operands, target).name == "moe_grouped"


@pytest.mark.parametrize("experts", [8, 32, 128])
@pytest.mark.parametrize("tokens", [1, 5, 33, 500, 2048, 8192])
@pytest.mark.parametrize(("hidden", "inner"), [(2880, 2880), (2880, 1440), (2880, 288), (384, 384), (192, 576), (192, 96)])
def test_shared_memory_and_buffers_suffice(tokens: int, experts: int, hidden: int, inner: int) -> None:
    size = Sizes.of(call(tokens, experts, hidden, inner))
    picked = variant(size)
    depth = stages(SM90, size, picked)
    assert depth > 1 and hidden // 64 % depth == 0
    assert buffers(size, picked)["h_tiles"].shape[0] * 64 in (inner, inner + 32)
    launches = chosen(call(tokens, experts, hidden, inner)).instantiate(SM90, call(tokens, experts, hidden, inner))
    shared = launches[2].source.shared if isinstance(launches[2].source, CudaSource) else 0
    assert picked.blocks * (shared + 1024) <= 228 * 1024
    worst = [tokens] * TOP_K + [0] * (experts - TOP_K)  # all choose the same, or as many experts as there are
    spread = [size.pairs // experts + (e < size.pairs % experts) for e in range(experts)]
    for counts in (worst, spread):
        assert sum(-(-n // 8) * 8 for n in counts) <= most_rows(size)
        assert sum(-(-n // picked.widest) for n in counts) <= buffers(size, picked)["groups"].shape[0]


def test_few_tokens_an_expert_take_narrow_tiles() -> None:
    widths = [variant(Sizes.of(call(tokens, 128, 2880, 2880))).widest for tokens in (5, 32, 256, 512, 2048, 8192)]
    assert widths == sorted(widths) and len(set(widths)) == 2


def checked(operands: dict[str, Any], cache: Path) -> None:
    launches: tuple[Launch, ...] = chosen(operands).instantiate(SM90, operands)
    binaries = build_all([launch.source for launch in launches], SM90, cache)
    pairs = [(launch, binaries[key_of(launch.source, SM90)]) for launch in launches]
    assert check_all(pairs, SM90) == [] and [binary.spilled for _, binary in pairs] == [0, 0, 0, 0]


@pytest.mark.parametrize(("hidden", "inner"), [(384, 384), (192, 576), (576, 96)])
def test_narrow_tiles_compile(hidden: int, inner: int, tmp_path: Path) -> None:
    checked(call(32, 128, hidden, inner), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "inner"), [
    *((32, inner) for inner in (2880, 1440, 768, 672, 384, 288)), (8192, 2880), (8192, 1440)])
def test_published_sizes_compile(tokens: int, inner: int, tmp_path: Path) -> None:
    """Of one, two, four and eight ranks; the wide tiles, which take long, of one and two."""
    checked(call(tokens, 128, 2880, inner), tmp_path)
