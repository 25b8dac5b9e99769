"""Every kernel compiles for every target at the sizes of 20b and 120b and keeps its launch's contract; the cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptoss_compile import build as build_module
from gptoss_compile.build import Binary, build, build_all, key_of
from gptoss_compile.kernels.exchange import OPERATORS
from gptoss_compile.kernels.registry import SPECS
from gptoss_compile.kernels.spec import Launch, TensorSpec
from gptoss_compile.lint import check_all
from gptoss_compile.target import TARGETS, Target

GPU_TARGETS = [name for name, target in TARGETS.items() if target.is_gpu]
HIDDEN = INNER = 2880
HEADS, KV_HEADS, DIM, VOCABULARY, TOP_K, PAGE, CONTEXT, WINDOW = 64, 8, 64, 201088, 4, 16, 131072, 128


def i32(*shape: int) -> TensorSpec:
    return TensorSpec(shape, "i32")


def fp32(*shape: int) -> TensorSpec:
    return TensorSpec(shape, "fp32")


def bf16(*shape: int) -> TensorSpec:
    return TensorSpec(shape, "bf16")


def u8(*shape: int) -> TensorSpec:
    return TensorSpec(shape, "u8")


def experts(count: int, rows: int, columns: int, mxfp4: bool) -> dict[str, Any]:
    if not mxfp4:
        return {"weight": bf16(count, rows, columns), "scales": None, "bias": bf16(count, rows)}
    return {"weight": u8(count, rows, columns // 32, 16), "scales": u8(count, rows, columns // 32),
            "bias": bf16(count, rows)}


def dense_calls(tokens: int, rows: int | None) -> list[tuple[str, dict[str, Any]]]:
    """The operators of a step that are no attention and no mixture of experts."""
    width = (HEADS + 2 * KV_HEADS) * DIM
    return [
        ("embed", {"tokens": i32(tokens), "weight": bf16(VOCABULARY, HIDDEN)}),
        ("rope_table", {"positions": i32(tokens), "inv_freq": fp32(DIM // 2), "scale": 1.35}),
        ("norm_linear", {"x": bf16(tokens, HIDDEN), "norm_weight": bf16(HIDDEN), "weight": bf16(width, HIDDEN),
                         "bias": bf16(width), "eps": 1e-5}),
        ("linear_residual", {"x": bf16(tokens, HEADS * DIM), "weight": bf16(HIDDEN, HEADS * DIM),
                             "bias": bf16(HIDDEN), "residual": bf16(tokens, HIDDEN)}),
        ("norm_head", {"x": bf16(tokens, HIDDEN), "rows": i32(rows) if rows else None, "norm_weight": bf16(HIDDEN),
                       "weight": bf16(VOCABULARY, HIDDEN), "eps": 1e-5}),
    ]


def attention_calls(tokens: int, sequences: int, decode: bool) -> list[tuple[str, dict[str, Any]]]:
    calls: list[tuple[str, dict[str, Any]]] = []
    width = (HEADS + 2 * KV_HEADS) * DIM
    for window, entries in ((0, CONTEXT // PAGE), (WINDOW, -(-(WINDOW + 2048) // PAGE))):
        cache = {"cache": bf16(4096, 2, KV_HEADS, PAGE, DIM), "table": i32(sequences, entries),
                 "sequences": i32(tokens), "positions": i32(tokens)}
        rope = {"qkv": bf16(tokens, width), "cos_sin": fp32(tokens, 2, DIM // 2), **cache}
        score = {"sinks": bf16(HEADS), "window": window, "scale": DIM**-0.5}
        if decode:
            calls.append(("rope_kv_attention", {**rope, **score}))
        else:
            calls += [("rope_kv", rope), ("attention", {"q": bf16(tokens, HEADS, DIM), **cache, **score})]
    return calls


def moe_calls(tokens: int, count: int, mxfp4: bool = True) -> list[tuple[str, dict[str, Any]]]:
    x, norm, pairs = bf16(tokens, HIDDEN), bf16(HIDDEN), i32(tokens, TOP_K)
    up, down = experts(count, 2 * INNER, HIDDEN, mxfp4), experts(count, HIDDEN, INNER, mxfp4)
    act = {"alpha": 1.702, "limit": 7.0}
    calls: list[tuple[str, dict[str, Any]]] = [
        ("norm_route", {"x": x, "norm_weight": norm, "weight": bf16(count, HIDDEN), "bias": bf16(count), "eps": 1e-5,
                        "top_k": TOP_K})]
    if tokens * TOP_K <= count:
        return [*calls, ("moe_gate_up", {"x": x, "norm_weight": norm, "ids": pairs, **up, "eps": 1e-5, **act, "early": 1}),
                ("moe_down", {"h": bf16(tokens, TOP_K, INNER), "ids": pairs, "probs": fp32(tokens, TOP_K), **down,
                              "residual": x})]
    grouped = {"x": x, "norm_weight": norm, "ids": pairs, "probs": fp32(tokens, TOP_K), "up": up["weight"],
               "up_scales": up["scales"], "up_bias": up["bias"], "down": down["weight"], "down_scales": down["scales"],
               "down_bias": down["bias"], "eps": 1e-5, **act}
    return [*calls, ("moe_grouped", grouped), *([("moe_grouped_mx", grouped)] if mxfp4 else [])]


def test_every_operator_is_in_the_list() -> None:
    calls = [*dense_calls(1, None), *attention_calls(1, 1, True), *attention_calls(8, 1, False), *moe_calls(1, 32),
             *moe_calls(64, 32)]
    assert {op for op, _ in calls} == {spec.op for spec in SPECS} - set(OPERATORS)  # which test_sm90_exchange.py has


def launches(target: Target) -> list[Launch]:
    """decode-1, -8 and -256 and extend-2048, of 120b (128 experts) and 20b (32), and BF16 experts once."""
    calls = [*dense_calls(1, None), *dense_calls(8, None), *dense_calls(256, None), *dense_calls(2048, 256),
             *attention_calls(1, 1, True), *attention_calls(8, 8, True), *attention_calls(256, 256, True),
             *attention_calls(2048, 256, False),
             *moe_calls(1, 128), *moe_calls(8, 32), *moe_calls(256, 128), *moe_calls(2048, 128), *moe_calls(2048, 32),
             *moe_calls(1, 32, mxfp4=False), *moe_calls(256, 32, mxfp4=False)]
    found = []
    for op, operands in calls:
        spec = next((s for s in SPECS if s.op == op and s.supports(target, operands)), None)
        if spec is not None:
            found += spec.instantiate(target, operands)
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.mark.slow
@pytest.mark.parametrize("name", GPU_TARGETS)
def test_every_kernel_compiles_and_keeps_its_contract(name: str, cache: Path) -> None:
    target = Target.parse(name)
    planned = launches(target)
    binaries = build_all([launch.source for launch in planned], target, cache)
    pairs = [(launch, binaries[key_of(launch.source, target)]) for launch in planned]
    assert check_all(pairs, target) == []
    for launch, binary in pairs:
        assert binary.spilled == 0, f"{binary.symbol} {dict(launch.source.constexprs)} spills"
        assert binary.shared <= target.shared_bytes, f"{binary.symbol}: {binary.shared} bytes of shared memory"
        assert launch.grid[0] < 2**17, f"{binary.symbol}: {launch.grid[0]} blocks"
        assert binary.global_scratch_size == 0 and binary.profile_scratch_size == 0, binary.symbol


def small_launch(target: Target) -> Launch:
    (launch,) = next(s for s in SPECS if s.name == "embed").instantiate(
        target, {"tokens": i32(3), "weight": bf16(5, 64)})
    return launch


def test_same_source_same_bytes(tmp_path: Path) -> None:
    source, target = small_launch(Target.parse("sm90")).source, Target.parse("sm90")
    assert build(source, target, tmp_path / "a").code == build(source, target, tmp_path / "b").code


def test_warm_build_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target.parse("sm90")
    source = small_launch(target).source
    first = build(source, target, tmp_path)

    def refuse(*_: object) -> Binary:
        raise AssertionError("compiled in spite of the cache")

    monkeypatch.setattr(build_module, "_compile", refuse)
    assert build(source, target, tmp_path) == first
    assert build_all([source], target, tmp_path) == {first.key: first}


@pytest.mark.parametrize("damage", ["empty", "flip", "cut"])
def test_a_damaged_entry_is_compiled_again(tmp_path: Path, damage: str) -> None:
    target = Target.parse("gfx950")
    source = small_launch(target).source
    first = build(source, target, tmp_path)
    entry = tmp_path / first.key
    data = bytearray(entry.read_bytes())
    data[-100] ^= 1
    entry.write_bytes({"empty": b"", "flip": bytes(data), "cut": bytes(data[:-10])}[damage])
    assert build(source, target, tmp_path) == first


def test_the_key_knows_what_the_code_depends_on() -> None:
    source, target = small_launch(Target.parse("sm90")).source, Target.parse("sm90")
    others = [key_of(replace(source, num_warps=8), target), key_of(replace(source, num_stages=1), target),
              key_of(replace(source, constexprs=(*source.constexprs[:-1], ("PDL", False))), target),
              key_of(replace(source, signature=(("y_ptr", "*fp32"), *source.signature[1:])), target),
              key_of(source, Target.parse("sm100"))]
    assert len({key_of(source, target), *others}) == len(others) + 1
