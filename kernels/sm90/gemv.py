"""Products of a weight with up to 8 tokens on Hopper: one launch of gemv.cu."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gptoss_compile.kernels.common import cdiv, cuda_launch, number, tensor, total_bytes
from gptoss_compile.kernels.spec import Launch, Operand, TensorSpec
from gptoss_compile.target import Target

MAX_TOKENS = 8  # the columns of two matrix instructions
STEP = 64  # columns of the weight, a tile
MAX_RING = 16  # steps in flight, 128 registers
MAX_WARPS = 12  # of a block: three on each quarter of a processor, 168 registers a thread


@dataclass(frozen=True)
class Shape:
    """How a weight is dealt out: rows of a block; parts that split its columns, a warp each for every 8 rows; the 64-column
    steps that a warp has in flight; blocks that a processor must hold; and if it is given the number of blocks, each of
    which then takes several turns."""

    rows: int
    parts: int
    ring: int
    min_blocks: int
    blocks: int | None = None

    @property
    def threads(self) -> int:
        return self.rows // 8 * self.parts * 32

    def defines(self, columns: int, tokens: int) -> dict[str, int | float | str]:
        return {"K": columns, "ROWS": self.rows, "PARTS": self.parts, "RING": self.ring, "TOKENS": tokens,
                "MIN_BLOCKS": self.min_blocks}


def shared_bytes(columns: int, tokens: int, norm: bool) -> int:
    return (tokens + int(norm)) * columns * 2


def supports(target: Target, weight: TensorSpec) -> bool:
    """bf16 weights of whole tiles across and not too many for a block's warps."""
    features, columns = weight.shape
    return (target.name == "sm90" and weight.dtype == "bf16" and features % 8 == 0 and columns % STEP == 0
            and columns <= MAX_WARPS // 2 * MAX_RING * STEP)


def shape_of(target: Target, features: int, columns: int, tokens: int, norm: bool) -> Shape:
    """Weights of 48 to 96 KiB a block, all of them in flight from the start, two or three blocks a processor.

    A matrix of many rounds of blocks is taken in turns, x fetched once; what of it is in flight is then always a part, so it
    may leave registers to the sums of many tokens.
    """
    steps = columns // STEP
    parts = cdiv(steps, MAX_RING)
    ring = cdiv(steps, parts)
    rows = 16 if norm else 8
    min_blocks = MAX_WARPS // (rows // 8 * parts)
    slots = target.processors * min_blocks
    if cdiv(features, rows) < 4 * slots:
        return Shape(rows, parts, ring, min_blocks)
    if tokens > 4:
        ring = max(n for n in range(1, ring) if ring % n == 0)
    return Shape(rows, parts, ring, min_blocks, slots)


def gemv_launch(target: Target, operands: Mapping[str, Operand], out: TensorSpec) -> Launch:
    """The launch that fills `out` [tokens, N] for norm_linear, linear_residual or norm_head."""
    weight = tensor(operands, "weight")
    (tokens, features), columns = out.shape, weight.shape[1]
    norm = "norm_weight" in operands
    shape = shape_of(target, features, columns, tokens, norm)
    optional = {name: isinstance(operands.get(name), TensorSpec) for name in ("norm_weight", "rows", "bias", "residual")}
    grid = shape.blocks or cdiv(features, shape.rows)
    defines = shape.defines(columns, tokens) | {
        "N": features, "GRID": grid, "NORM": int(norm), "EXACT": 0, "EPS": number(operands, "eps") if norm else 0.0,
        "HAS_ROWS": int(optional["rows"]), "HAS_BIAS": int(optional["bias"]), "HAS_RESIDUAL": int(optional["residual"]),
        "FLOAT_OUT": int(out.dtype == "fp32")}
    args = ("weight", "x", *(name for name, given in optional.items() if given), "out0")
    return cuda_launch(
        "gemv.cu", "gemv", defines, args, grid=grid, threads=shape.threads,
        shared=shared_bytes(columns, tokens, norm),
        preloads=tuple(name for name in ("weight", "norm_weight", "bias") if name in args),
        moved=total_bytes(*operands.values(), out), flops=2 * tokens * features * columns)
