"""Products of a weight with up to 8 tokens on Hopper: one launch of gemv.cu."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from gptoss_compile.kernels.common import cdiv, cuda_launch, number, tensor, total_bytes
from gptoss_compile.kernels.spec import Launch, Operand, TensorSpec
from gptoss_compile.kernels.tuned import choose
from gptoss_compile.target import Target

MAX_TOKENS = 8  # the columns of two matrix instructions
STEP = 64  # columns of the weight, a tile
MAX_COLUMNS = 6144  # 96 steps: 14 warps of a block
MOST_RING = 15  # steps that a warp can have in flight
REGISTERS = 65536  # of a processor


@dataclass(frozen=True)
class Shape:
    """How a weight is dealt out: rows of a block; parts that split its columns, a warp each for every 8 rows; the 64-column
    steps that a warp has in flight; blocks that a processor must hold."""

    rows: int
    parts: int
    ring: int
    min_blocks: int

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
            and columns <= MAX_COLUMNS)


def shape_of(target: Target, features: int, columns: int, tokens: int, norm: bool) -> Shape:
    """How many warps a processor holds decides how many registers, hence weights in flight, each has.

    Many rounds of blocks: 12 warps of 168 registers, all weights of a block in flight. Else all blocks run at once: 20 warps
    of 96. With a norm and many tokens x is what costs, so a processor has one block, which fetches it once: 16 warps of 128.
    """
    steps = columns // STEP
    parts = cdiv(steps, 15 if norm else 13)
    each = cdiv(steps, parts)
    if features > 16 * 4 * target.processors:
        return Shape(16, parts, min(each, MOST_RING), max(1, 6 // parts))
    rows = cdiv(features, target.processors * 8) * 8
    if norm and tokens > 4 and features % rows == 0 and rows // 8 * parts <= 16:
        return Shape(rows, parts, min(each, 8), 1)
    return Shape(16, parts, min(each, 6), max(1, min(10 // parts, cdiv(features, 16 * target.processors))))


def shapes(target: Target, features: int, columns: int, tokens: int, norm: bool) -> Iterator[Shape]:
    """Those worth measuring: 12 to 24 warps on a processor that share the work evenly, no more blocks than there are, and as
    many weights in flight as the registers of a warp hold."""
    steps = columns // STEP
    for rows, parts, blocks in product((8, 16, 24, 32), range(1, 13), (1, 2, 3, 4)):
        warps, each = rows // 8 * parts, cdiv(steps, parts)
        registers = min(REGISTERS // (32 * warps * blocks) // 8 * 8, 255)
        ring = min(each, MOST_RING, (registers - 48) // 8)  # a step of weights takes 8; 48 for all the rest
        if (warps <= 32 and 12 <= warps * blocks <= 24 and each * parts <= 1.1 * steps and ring >= min(each, 4)
                and (64 % rows == 0 or features % rows == 0) and cdiv(features, rows) > (blocks - 1) * target.processors
                and blocks * shared_bytes(columns, tokens, norm) <= target.shared_bytes):
            yield Shape(rows, parts, ring, blocks)


def batch_of(shape: Shape, items: int) -> int:
    """How many of a block's pairs of columns, of two ranks, a thread has in flight beside its weights: 10 registers each. A
    quarter of a processor's registers serves a quarter of its warps."""
    warps = cdiv(shape.threads // 32 * shape.min_blocks, 4)
    registers = min(REGISTERS // (4 * 32 * warps) // 8 * 8, 255)
    fitting, each = min(max((registers - 8 * shape.ring - 40) // 10, 1), 10), cdiv(items, shape.threads)
    return cdiv(each, cdiv(each, fitting))


def gemv_launch(target: Target, operands: Mapping[str, Operand], out: TensorSpec, *, push: bool = False) -> Launch:
    """The launch that fills `out` [tokens, N] for norm_linear, linear_residual or norm_head.

    push: the results go into the ranks' slots, `out` has their values. reduce_norm_linear is norm_linear of what comes into
    the slots `partial`, added to `residual`; that goes to out0, and `out` is out1.
    """
    weight = tensor(operands, "weight")
    (tokens, features), columns = out.shape, weight.shape[1]
    norm, collect = "norm_weight" in operands, "partial" in operands
    shape = shape_of(target, features, columns, tokens, norm)
    if not collect:  # which needs registers otherwise than what the table is about
        key = {"features": features, "columns": columns, "tokens": tokens, "norm": int(norm)}
        shape = choose(target, "gemv", key, shape, shapes(target, features, columns, tokens, norm))
    given = [name for name in ("norm_weight", "rows", "bias") if isinstance(operands.get(name), TensorSpec)]
    residual = "residual" in operands and not collect
    defines = shape.defines(columns, tokens) | {
        "N": features, "NORM": int(norm), "EXACT": 0, "EPS": number(operands, "eps") if norm else 0.0,
        "HAS_ROWS": int("rows" in given), "HAS_BIAS": int("bias" in given), "HAS_RESIDUAL": int(residual),
        "FLOAT_OUT": int(out.dtype == "fp32"), "PUSH": int(push), "COLLECT": int(collect)}
    args = ["weight", *(("partial", "residual") if collect else ("x",)), *given, *(["residual"] if residual else []),
            *(["exchange"] if push or collect else []), *(("out0", "out1") if collect else ("out0",))]
    if collect:
        defines |= {"BATCH": batch_of(shape, tokens * columns // 2)}
    return cuda_launch(
        "gemv.cu", "gemv", defines, args, grid=cdiv(features, shape.rows), threads=shape.threads,
        shared=shared_bytes(columns, tokens, norm),
        preloads=tuple(name for name in ("weight", "norm_weight", "bias") if name in args),
        moved=total_bytes(*operands.values(), out), flops=2 * tokens * features * columns)
