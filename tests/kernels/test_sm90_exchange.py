"""The kernels of several ranks on Hopper exist for every rank's share, compile without spills and pass the lint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from gptoss_compile.build import build_all, key_of
from gptoss_compile.kernels.exchange import FEW_TOKENS, ONE_SHOT_TOKENS, OPERATORS
from gptoss_compile.kernels.registry import SPECS
from gptoss_compile.kernels.spec import CudaSource, Launch, TensorSpec
from gptoss_compile.lint import check_all
from gptoss_compile.target import Target

TARGET = Target.parse("sm90")


@dataclass(frozen=True)
class Share:
    """A rank's: query and kv heads of 64, features of every expert, columns of the logits. mxfp4: are the experts?"""

    hidden: int
    queries: int
    kv: int
    inner: int
    experts: int
    vocabulary: int
    columns: int
    mxfp4: bool = True


def shares(ranks: int, experts: int) -> list[Share]:
    """The largest and the smallest of gpt-oss: 2,880 features are 30 units of 96."""
    units = (-(-30 // ranks), 30 // ranks)
    return [Share(2880, 64 // ranks, 8 // ranks, 96 * n, experts, 201088, 201088 // ranks) for n in dict.fromkeys(units)]


SMALL = Share(576, 4, 1, 384, 40, 1003, 501)
EVERY = [*(share for ranks in (2, 4, 8) for experts in (32, 128) for share in shares(ranks, experts)), SMALL]


def bf16(*shape: int) -> TensorSpec:
    return TensorSpec(shape, "bf16")


def fp32(*shape: int) -> TensorSpec:
    return TensorSpec(shape, "fp32")


def i32(*shape: int) -> TensorSpec:
    return TensorSpec(shape, "i32")


def u8(*shape: int) -> TensorSpec:
    return TensorSpec(shape, "u8")


def experts(s: Share, rows: int, columns: int) -> dict[str, TensorSpec | None]:
    groups, bias = (s.experts, rows, columns // 32), bf16(s.experts, rows)
    if not s.mxfp4:
        return {"": bf16(s.experts, rows, columns), "scales": None, "bias": bias}
    return {"": u8(*groups, 16), "scales": u8(*groups), "bias": bias}


def calls(s: Share, tokens: int) -> dict[str, dict[str, Any]]:
    """What a rank calls in a step of so many tokens; from 100 on only the last of each of 64 sequences has logits."""
    few = tokens <= FEW_TOKENS
    x, pairs = bf16(tokens, s.hidden), (tokens, 4)
    sums = {"partial": fp32(tokens, s.hidden) if few else x, "residual": x}
    norm, act = {"norm_weight": bf16(s.hidden), "eps": 1e-5}, {"alpha": 1.702, "limit": 7.0}
    up, down = experts(s, 2 * s.inner, s.hidden), experts(s, s.hidden, s.inner)
    rows = 64 if tokens >= 100 else tokens
    width = 64 * (s.queries + 2 * s.kv)
    found: dict[str, dict[str, Any]] = {
        "linear_partial": {"x": bf16(tokens, 64 * s.queries), "weight": bf16(s.hidden, 64 * s.queries),
                           "bias": bf16(s.hidden)},
        "reduce_norm_route": {**sums, **norm, "weight": bf16(s.experts, s.hidden), "bias": bf16(s.experts), "top_k": 4},
        "reduce_norm_linear": {**sums, **norm, "weight": bf16(width, s.hidden), "bias": bf16(width)},
        "reduce_norm_head": {**sums, **norm, "rows": i32(rows) if rows < tokens else None,
                             "weight": bf16(s.columns // 8 * 8, s.hidden)},
        "all_gather": {"x": fp32(rows, s.columns), "columns": s.vocabulary},
    }
    if few:
        return found | {
            "moe_gate_up": {"x": x, **norm, **act, "ids": i32(*pairs), "weight": up.pop(""), **up, "early": 0},
            "moe_down_partial": {"h": bf16(*pairs, s.inner), "ids": i32(*pairs), "probs": fp32(*pairs),
                                 "weight": down.pop(""), **down}}
    return found | {"moe_grouped_partial": {
        "x": x, **norm, **act, "ids": i32(*pairs), "probs": fp32(*pairs), "up": up[""], "up_scales": up["scales"],
        "up_bias": up["bias"], "down": down[""], "down_scales": down["scales"], "down_bias": down["bias"]}}


def instantiate(s: Share, tokens: int) -> dict[str, tuple[Launch, ...]]:
    found = {}
    for op, operands in calls(s, tokens).items():
        spec = next(x for x in SPECS if x.op == op and x.supports(TARGET, operands))
        assert spec.name.startswith("sm90_") or ("moe" in op and not s.mxfp4), f"{op} of {tokens} tokens runs {spec.name}"
        found[op] = spec.instantiate(TARGET, operands)
        for launch in found[op]:
            known = {*operands, *dict(launch.common), "exchange", "flags", "out0", "out1", "out2", "scratch0"}
            assert set(launch.args) <= known
            assert isinstance(launch.source, CudaSource) or not s.mxfp4
            assert launch.moved > 0 or launch.source.symbol == "moe_sort"  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 8, 20, 64, 65, 512, 2048, 8192])
def test_every_share_has_its_kernels(tokens: int) -> None:
    for s in EVERY:
        found = instantiate(s, tokens)
        assert set(found) - {"moe_gate_up"} <= set(OPERATORS)
        for op in ("reduce_norm_linear", "reduce_norm_route", "reduce_norm_head"):
            first, *rest = found[op]
            assert all("x" not in launch.args for launch in rest)
            handed = "route_tiled" if tokens > ONE_SHOT_TOKENS else None  # which each rank runs for its share
            assert all(("exchange" in launch.args) == (launch.source.symbol == handed) for launch in rest)  # type: ignore[union-attr]
            defines = dict(first.source.defines)
            if tokens > FEW_TOKENS:
                assert defines["PUSHED"] == (tokens > ONE_SHOT_TOKENS)
                assert defines["SHARE"] == (tokens > ONE_SHOT_TOKENS and op != "reduce_norm_head")
                waits = [d for d in map(dict, (launch.source.defines for launch in found[op]))  # type: ignore[union-attr]
                         if d.get("DONE") or (d.get("SHARE") and "DONE" not in d)]
                assert len(waits) == defines["SHARE"], "the ranks meet once more, at the end"
        for op in ("linear_partial", "moe_grouped_partial"):
            if tokens > FEW_TOKENS:
                assert ("exchange" in found[op][-1].args) == (tokens > ONE_SHOT_TOKENS)
        last = dict(found["reduce_norm_linear"][-1].source.defines)
        assert found["reduce_norm_linear"][-1].args[-1] == "out1" and last.get("FLOAT_OUT", 0) == 0


PLAIN = replace(shares(4, 128)[1], mxfp4=False)  # BF16 experts, by the kernels of all targets and what pushes for them


@pytest.mark.parametrize("tokens", [1, 4, 5, 64, 65, 512])
def test_experts_in_bf16(tokens: int, tmp_path: Path) -> None:
    found = instantiate(PLAIN, tokens)
    few, many = tokens <= FEW_TOKENS, tokens > ONE_SHOT_TOKENS
    *products, last = found["moe_down_partial" if few else "moe_grouped_partial"]
    assert isinstance(last.source, CudaSource) and last.source.symbol == ("exchange_push" if few else "moe_combine")
    assert last.args == (("sums",) if few else ("probs", "y")) + (("exchange",) if few or many else ()) + ("out0",)
    assert last.pdl.preloads == (), "what it reads may be written by the kernel before the one before it"
    assert all(not {"out0", "exchange"} & set(launch.args) for launch in products)
    _check([*(launch for op in found if "moe" in op for launch in found[op])], tmp_path)


def test_nothing_is_read_before_it_is_there() -> None:
    """What a kernel may read before its wait: weights, and where the router's end is certain ids and probabilities."""
    for tokens in (1, 4, 64, 512):
        for op, launches in instantiate(EVERY[0], tokens).items():
            for launch in launches:
                early = set(launch.pdl.preloads)
                assert not early & {"x", "out0", "partial", "residual", "h", "exchange", "sums"}, op
    gate_up = instantiate(EVERY[0], 1)["moe_gate_up"]
    assert gate_up[0].pdl.trigger == "after_wait" and gate_up[0].pdl.preloads == ("norm_weight",)
    assert instantiate(EVERY[0], 4)["reduce_norm_route"][0].pdl.trigger == "after_wait"


@pytest.mark.parametrize(("share", "tokens"), [(EVERY[0], 1), (shares(2, 128)[0], 4), (shares(8, 128)[0], 3), (SMALL, 2)])
def test_kernels_of_few_tokens_keep_their_contract(share: Share, tokens: int, tmp_path: Path) -> None:
    _check([launch for launches in instantiate(share, tokens).values() for launch in launches], tmp_path)


def test_kernels_of_many_tokens_keep_their_contract(tmp_path: Path) -> None:
    """The exchange alone, and what it changed: the rest is one rank's."""
    steps = [instantiate(EVERY[0], 5), instantiate(EVERY[0], 65), instantiate(EVERY[0], 8192), instantiate(SMALL, 512)]
    changed = ("exchange_rows", "all_gather", "moe_combine", "route_tiled")
    found = [launch for step in steps for launches in step.values() for launch in launches
             if launch.source.symbol in changed or dict(launch.source.defines).get("PUSH")]  # type: ignore[union-attr]
    assert {launch.source.symbol for launch in found} == {*changed, "gemm"}  # type: ignore[union-attr]
    _check(found, tmp_path)


def _check(planned: list[Launch], cache: Path) -> None:
    binaries = build_all([launch.source for launch in planned], TARGET, cache)
    pairs = [(launch, binaries[key_of(launch.source, TARGET)]) for launch in planned]
    assert check_all(pairs, TARGET) == []
    for launch, binary in pairs:
        assert binary.spilled == 0, f"{binary.symbol} {dict(launch.source.defines)} spills"  # type: ignore[union-attr]
        assert binary.shared <= TARGET.shared_bytes
