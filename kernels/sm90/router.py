"""norm_route on Hopper: one launch of route_few.cu or, for many tokens, of route_tiled.cu."""

from __future__ import annotations

from collections.abc import Mapping

from gptoss_compile.kernels.common import cdiv, cuda_launch, integer, number, tensor, total_bytes
from gptoss_compile.kernels.sm90 import gemv
from gptoss_compile.kernels.spec import KernelSpec, Launch, Operand, TensorSpec
from gptoss_compile.target import Target

FEW_TOKENS = 128  # above, blocks of 8 tokens would read the weights too often
MAX_EXPERTS = 128  # two warpgroups, and what their stages leave of shared memory
TURNS = {16: 5, 32: 4, 64: 3}  # by tokens of a block, steps of 64 columns that shared memory holds twice


def supports(target: Target, operands: Mapping[str, Operand]) -> bool:
    weight = tensor(operands, "weight")
    experts, columns = weight.shape
    return (all(tensor(operands, name).dtype == "bf16" for name in ("x", "norm_weight", "bias"))
            and gemv.supports(target, weight) and experts <= MAX_EXPERTS
            and integer(operands, "top_k") <= experts
            and max(_tiled_shared(experts, columns, wide) for wide in TURNS) <= target.shared_bytes - 2048)


def _turn(columns: int, tokens: int) -> int:
    """Steps that route_tiled.cu takes at a time."""
    steps = columns // gemv.STEP
    return max(n for n in range(1, TURNS[tokens] + 1) if steps % n == 0)


def _tiled_shared(experts: int, columns: int, tokens: int) -> int:
    """Two turns of weights and of operands, which then hold the logits, and the norm's weight."""
    turn = _turn(columns, tokens)
    return 2 * turn * (cdiv(experts, 64) * 8192 + 2 * tokens * 128) + columns * 2


def few_tokens(target: Target, tokens: int, experts: int) -> int:
    """Tokens of a block, where weights land in registers: the fewest for which all blocks run at once."""
    return next((n for n in (1, 2, 4) if experts // 8 * cdiv(tokens, n) <= target.processors), gemv.MAX_TOKENS)


def launches(target: Target, operands: Mapping[str, Operand], *, share: bool = False) -> tuple[Launch, ...]:
    """norm_route, or reduce_norm_route where x comes into the slots `partial`. share: each rank routes its share of many
    tokens, and tells all.

    Few tokens: a block has 8 experts and up to 8 tokens, and the last block of those tokens chooses. Many: a block has
    all experts and 16 to 64 tokens, fewer where there would be too few blocks."""
    collect = "partial" in operands
    (tokens, columns), experts = tensor(operands, "residual" if collect else "x").shape, tensor(operands, "weight").shape[0]
    top_k = integer(operands, "top_k")
    defines: dict[str, int | float | str] = {"E": experts, "ALL_TOKENS": tokens, "TOP_K": top_k,
                                             "EPS": number(operands, "eps")}
    args: tuple[str, ...] = ("weight", "x", "norm_weight", "bias", "out0", "out1")
    moved, flops = total_bytes(*operands.values()) + 8 * tokens * top_k, 2 * tokens * experts * columns
    preloads = ("weight", "norm_weight", "bias")
    if tokens <= FEW_TOKENS:
        parts = cdiv(columns // gemv.STEP, 9)
        few = few_tokens(target, tokens, experts)
        shape = gemv.Shape(8, parts, cdiv(columns // gemv.STEP, parts), min_blocks=2 if parts <= 6 and not collect else 1)
        defines |= {**shape.defines(columns, few), "NORM": 1, "EXACT": 1, "COLLECT": int(collect)}
        if collect:
            defines |= {"BATCH": gemv.batch_of(shape, few * columns // 2)}
            args = ("weight", "partial", "residual", "norm_weight", "bias", "exchange", "out0", "out1", "out2")
        return (cuda_launch(
            "route_few.cu", "route_few", defines, (*args, "scratch0"), grid=experts // 8 * cdiv(tokens, few),
            threads=shape.threads, shared=gemv.shared_bytes(columns, few, True),
            scratch=(TensorSpec((tokens, experts), "i32"),), zeroed=(0,), preloads=preloads, late_trigger=True, moved=moved,
            flops=flops),)
    own = cdiv(tokens, 2) if share else tokens  # at most, of two ranks or more
    wide = next((n for n in (64, 32) if cdiv(own, n) >= target.processors // 2), 16)
    defines |= {"K": columns, "TOKENS": wide, "TURN": _turn(columns, wide), "SHARE": int(share)}
    counter: tuple[TensorSpec, ...] = ()
    if share:
        counter, args = (TensorSpec((1,), "i32"),), (*args[:4], "exchange", "flags", "scratch0", *args[4:])
    return (cuda_launch(
        "route_tiled.cu", "route_tiled", defines, args, grid=cdiv(tokens, wide), threads=cdiv(experts, 64) * 128,
        shared=_tiled_shared(experts, columns, wide), scratch=counter, zeroed=tuple(range(len(counter))), preloads=preloads,
        late_trigger=True, promises=("HGMMA",), moved=moved, flops=flops),)


SPECS = (KernelSpec("sm90_norm_route", "norm_route", supports, launches, {"weight": "tiles"}),)
