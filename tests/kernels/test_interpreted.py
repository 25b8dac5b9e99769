"""Every Triton kernel through the interpreter against its twin: odd sizes, tails, padding, empty experts, ring wraps.

fp32 activations, so that only the order of additions differs; bf16 once per kernel that converts. Outputs start as NaN
and lie between guards (see kernels/interpret.py). The page of padding rows (0) is nobody's and is not compared.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from gptoss_compile.dialect import OPS
from gptoss_compile.kernels import registry  # noqa: F401  declares the operators
from gptoss_compile.kernels.interpret import interpret
from gptoss_compile.kernels.norm_linear import FEW_TOKENS


def copied(operands: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in operands.items()}


def compare(op: str, target: str = "sm90", tolerance: float = 1e-5, **operands: Any) -> tuple[Tensor, ...]:
    """Kernel against twin; the largest error relative to the largest value. Returns the twin's results."""
    expected = OPS[op].reference(**copied(operands))
    expected = expected if isinstance(expected, tuple) else (expected,)
    for i, (got, want) in enumerate(zip(interpret(op, target, copied(operands)), expected, strict=True)):
        if i in OPS[op].updates:
            got, want = got[1:], want[1:]
        assert got.shape == want.shape and got.dtype == want.dtype
        if want.dtype in (torch.int32, torch.uint8):
            assert torch.equal(got, want), f"{op} output {i}"
            continue
        error = (got.double() - want.double()).abs().max() / want.double().abs().max()
        assert error <= tolerance, f"{op} output {i}: relative error {error:.1e}"
    return expected


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("tokens", [1, 3, FEW_TOKENS + 1, 37])
@pytest.mark.parametrize(("hidden", "features"), [(96, 100), (90, 64), (64, 7)])
def test_dense(tokens: int, hidden: int, features: int) -> None:
    x, norm, weight = torch.randn(tokens, hidden), torch.randn(hidden), torch.randn(features, hidden)
    bias = torch.randn(features)
    compare("norm_linear", x=x, norm_weight=norm, weight=weight, bias=bias, eps=1e-5)
    compare("linear_residual", x=x, weight=weight, bias=bias, residual=torch.randn(tokens, features))
    rows = torch.randint(0, tokens, (tokens + 2,)).int()
    compare("norm_head", x=x, rows=rows, norm_weight=norm, weight=weight, eps=1e-5)
    compare("norm_head", x=x, rows=None, norm_weight=norm, weight=weight, eps=1e-5)
    compare("embed", tokens=torch.randint(0, features, (tokens,)).int(), weight=weight)


@pytest.mark.parametrize("tokens", [2, 6])
def test_dense_bf16(tokens: int) -> None:
    def values(*shape: int) -> Tensor:
        return torch.randn(shape).bfloat16()

    compare("norm_linear", tolerance=2e-2, x=values(tokens, 96), norm_weight=values(96), weight=values(40, 96),
            bias=values(40), eps=1e-5)
    compare("linear_residual", tolerance=2e-2, x=values(tokens, 96), weight=values(40, 96), bias=values(40),
            residual=values(tokens, 40))


@pytest.mark.parametrize("half", [8, 32, 45])
def test_rope_table_up_to_the_longest_context(half: int) -> None:
    positions = ints(-1, 0, 1, 4095, 65537, 131071)
    compare("rope_table", tolerance=3e-7, positions=positions, inv_freq=torch.rand(half), scale=1.3466)


@pytest.mark.parametrize("tokens", [1, 4, 5, 45])
@pytest.mark.parametrize(("experts", "top_k"), [(3, 1), (5, 3), (128, 4)])
def test_router(tokens: int, experts: int, top_k: int) -> None:
    compare("norm_route", x=torch.randn(tokens, 96), norm_weight=torch.randn(96), weight=torch.randn(experts, 96),
            bias=torch.randn(experts), eps=1e-5, top_k=top_k)


@pytest.mark.parametrize("tokens", [3, 20])
def test_router_ties_go_to_the_lowest_expert(tokens: int) -> None:
    _, ids = compare("norm_route", x=torch.randn(tokens, 64), norm_weight=torch.randn(64), weight=torch.zeros(6, 64),
                     bias=torch.tensor([1.0, 2, 2, 1, 2, 0]), eps=1e-5, top_k=4)
    assert ids.tolist() == [[1, 2, 4, 0]] * tokens


def experts_of(count: int, rows: int, columns: int, mxfp4: bool) -> dict[str, Any]:
    if not mxfp4:
        return {"weight": torch.randn(count, rows, columns), "scales": None, "bias": torch.randn(count, rows)}
    return {"weight": torch.randint(0, 256, (count, rows, columns // 32, 16), dtype=torch.uint8),
            "scales": torch.randint(118, 125, (count, rows, columns // 32), dtype=torch.uint8),
            "bias": torch.randn(count, rows)}


def choices(tokens: int, experts: int, top_k: int, skip: int) -> Tensor:
    """Random distinct experts [T, A], none of them `skip`."""
    used = [e for e in range(experts) if e != skip]
    return torch.tensor([random.sample(used, top_k) for _ in range(tokens)], dtype=torch.int32)


ACTIVATION = {"alpha": 1.702, "limit": 7.0}
SHAPES = [(64, 96, True), (96, 64, True), (90, 54, False), (288, 32, True)]


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize(("hidden", "inner", "mxfp4"), SHAPES)
def test_experts_of_few_tokens(tokens: int, hidden: int, inner: int, mxfp4: bool) -> None:
    ids = choices(tokens, 6, 2, skip=0)
    compare("moe_gate_up", x=torch.randn(tokens, hidden), norm_weight=torch.randn(hidden), ids=ids,
            **experts_of(6, 2 * inner, hidden, mxfp4), eps=1e-5, **ACTIVATION, early=tokens % 2)
    compare("moe_down", h=torch.randn(tokens, 2, inner), ids=ids, probs=torch.rand(tokens, 2),
            **experts_of(6, hidden, inner, mxfp4), residual=torch.randn(tokens, hidden))


def grouped_call(ids: Tensor, experts: int, hidden: int, inner: int, mxfp4: bool) -> dict[str, Any]:
    """Operands of `moe_grouped` with random weights."""
    call = {"x": torch.randn(ids.shape[0], hidden), "norm_weight": torch.randn(hidden), "ids": ids,
            "probs": torch.rand(ids.shape), "eps": 1e-5, **ACTIVATION}
    for name, rows, columns in (("up", 2 * inner, hidden), ("down", hidden, inner)):
        made = experts_of(experts, rows, columns, mxfp4)
        call |= {name: made["weight"], f"{name}_scales": made["scales"], f"{name}_bias": made["bias"]}
    return call


@pytest.mark.parametrize("tokens", [2, 19, 70])
@pytest.mark.parametrize(("hidden", "inner", "mxfp4"), SHAPES)
def test_experts_grouped(tokens: int, hidden: int, inner: int, mxfp4: bool) -> None:
    experts, top_k = 5, 2
    call = grouped_call(choices(tokens, experts, top_k, skip=random.randrange(experts)), experts, hidden, inner, mxfp4)
    compare("moe_grouped", **call)
    if mxfp4:  # a value between two of e4m3 may go to either
        compare("moe_grouped_mx", target="sm100", tolerance=5e-3, **call)


def test_all_tokens_at_one_expert() -> None:
    compare("moe_grouped", **grouped_call(torch.zeros(150, 1, dtype=torch.int32) + 2, 4, 40, 32, False))


def test_quantising_zeros_and_extremes() -> None:
    call = grouped_call(choices(3, 5, 2, skip=0), 5, 64, 32, True)
    call["x"] *= torch.tensor([[0.0], [1e-30], [1.0]])
    call["x"][2, :32] *= 1e-12
    compare("moe_grouped_mx", target="gfx950", tolerance=5e-3, **call)


HEADS, KV_HEADS, DIM, PAGE = 6, 2, 16, 4


def cache_of(sequences: int, entries: int) -> dict[str, Tensor]:
    """A cache of noise and tables of distinct pages, none of them page 0."""
    pages = 1 + sequences * entries
    table = (1 + torch.randperm(pages - 1)).reshape(sequences, entries).int()
    return {"cache": torch.randn(pages, 2, KV_HEADS, PAGE, DIM), "table": table}


def qkv_of(positions: Tensor) -> dict[str, Tensor]:
    angles = OPS["rope_table"].reference(positions, torch.rand(DIM // 2), 1.2)
    return {"qkv": torch.randn(positions.shape[0], (HEADS + 2 * KV_HEADS) * DIM), "cos_sin": angles}


# (window, pages a sequence): full attention without wrap, and rings of 36 and 160 slots that positions lap many times
TABLES = [(0, 80), (19, 9), (128, 40)]


@pytest.mark.parametrize(("window", "entries"), TABLES)
@pytest.mark.parametrize("target", ["sm90", "gfx950"])
def test_decode_attention(window: int, entries: int, target: str) -> None:
    edges = [0, 1, 126, 127, 128, 129, 255, 319] if not window else [0, 18, 19, 20, 127, 128, 129, 1000]
    positions = ints(*edges, -1)
    sequences = torch.arange(len(positions)).int()
    compare("rope_kv_attention", target, **qkv_of(positions), **cache_of(len(positions), entries),
            sequences=sequences, positions=positions, sinks=torch.randn(HEADS), window=window, scale=0.25)


def test_decode_attention_in_one_split() -> None:
    positions = ints(*range(1, 141))
    compare("rope_kv_attention", **qkv_of(positions), **cache_of(140, 40), sequences=torch.arange(140).int(),
            positions=positions, sinks=torch.randn(HEADS), window=0, scale=0.25)


@pytest.mark.parametrize(("window", "entries"), TABLES)
@pytest.mark.parametrize("lengths", [(29,), (1, 1, 1, 7, 5), (3, 1, 12)])
def test_extend_attention(window: int, entries: int, lengths: tuple[int, ...]) -> None:
    """Chunks of several sequences in one tile, starting on either side of the window's edge, then padding."""
    sequences, positions = [], []
    for s, length in enumerate(lengths):
        start = random.choice([0, 100, 120, 127, 128, 129]) if not window else random.choice([0, 17, 18, 127, 128, 500])
        sequences += [s] * length
        positions += range(start, start + length)
    sequences, positions = ints(*sequences, s, s), ints(*positions, -1, -1)
    paged = {**cache_of(len(lengths), entries), "sequences": sequences, "positions": positions}
    q, stored = compare("rope_kv", **qkv_of(positions), **paged)
    compare("attention", q=q, **{**paged, "cache": stored}, sinks=torch.randn(HEADS), window=window, scale=0.25)


def test_attention_bf16() -> None:
    positions, sequences = ints(5, 6, 7, 40, -1), ints(0, 0, 0, 1, 1)
    paged = {**cache_of(2, 16), "sequences": sequences, "positions": positions}
    paged["cache"] = paged["cache"].bfloat16()
    qkv = qkv_of(positions)
    qkv["qkv"] = qkv["qkv"].bfloat16()
    q, stored = compare("rope_kv", tolerance=1e-2, **qkv, **paged)
    sinks = torch.randn(HEADS).bfloat16()
    compare("attention", tolerance=2e-2, q=q, **{**paged, "cache": stored}, sinks=sinks, window=0, scale=0.25)
    paged |= {"positions": ints(5, 40), "sequences": ints(0, 1)}
    qkv = {k: v[[0, 3]] for k, v in qkv.items()}
    compare("rope_kv_attention", tolerance=2e-2, **qkv, **paged, sinks=sinks, window=0, scale=0.25)
