"""Dense projections of more than a few tokens on sm90: tile.cu brings the activations, gemm.cu multiplies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import hypot

from gptoss_compile.kernels.common import cdiv, cuda_launch, tensor, total_bytes
from gptoss_compile.kernels.sm90.tile import activation_tiles, tile_launch
from gptoss_compile.kernels.spec import Launch, Operand, TensorSpec
from gptoss_compile.kernels.tuned import choose
from gptoss_compile.target import Target

SLAB_BYTES = 64 * 128  # 64 rows × 64 columns of bf16
BARRIER_BYTES = 1024
COPY_BYTES = 8192  # of tokens: smaller copies cost their thread more time than the bytes take
AHEAD_BYTES = 57344  # of tokens requested at a time, if their steps are few
# A model of an H100's time, in clocks, from measurements of gemm.cu
LOAD_RATE = 56  # bytes a clock into one SM
MEMORY_RATE = 1800  # bytes a clock from device memory into all
HEADER_COPY_BYTES = 96  # what gemm.cu keeps of an exchange area's header
EXCHANGE_RATE = 12  # bytes a clock from the other blocks of a cluster
EXCHANGE_CYCLES = 1500
STORE_CYCLES = 2000  # a tile's start and end, besides 4 a token
NEAR = 12  # shapes: how far the model may put the best one behind


@dataclass(frozen=True)
class Shape:
    """How gemm.cu cuts out [T, N] = x [T, K] · Wᵀ. For slabs, width and split see the head of gemm.cu."""

    tokens: int
    features: int
    inner: int
    slabs: int
    width: int
    split: int

    @property
    def items(self) -> int:
        """Tiles of 64 · slabs rows of weights × width tokens, a cluster each."""
        return cdiv(cdiv(self.features, 64), self.slabs) * cdiv(self.tokens, self.width)

    @property
    def steps(self) -> int:
        """Steps of 64 columns that one thread block multiplies for an item."""
        return cdiv(self.inner // 64, self.split)

    @property
    def step_bytes(self) -> int:
        """Of tokens in a step: the width, or all tokens in whole atoms."""
        return min(self.width, cdiv(self.tokens, 8) * 8) * 128

    @property
    def token_steps(self) -> int:
        """Steps that are one copy of tokens. They are neighbours in memory only where a tile has all tokens."""
        return max(1, min(COPY_BYTES // self.step_bytes, self.steps)) if self.tokens <= self.width else 1

    @property
    def parts_bytes(self) -> int:
        """What a block receives from the others of its cluster."""
        return (self.split - 1) * cdiv(self.width // 8, self.split) * self.slabs * 128 * 16

    @property
    def tile_bytes(self) -> int:
        """What holds a finished tile."""
        return 0

    def clusters(self, target: Target) -> int:
        """How many clusters run at a time. The SMs come in groups of 16 or 18 that no cluster crosses."""
        return target.processors // self.split if self.split <= 2 else target.processors // 16 * (16 // self.split)

    def stages(self, target: Target) -> tuple[int, int]:
        """(weights, tokens): stages of the two rings.

        Tokens need four to hide the latency of the L2, or a whole K where it is small, since they are requested only
        when the kernel before has ended; all the rest goes to the weights, which come ahead.
        """
        weight, token = self.slabs * SLAB_BYTES, self.token_steps * self.step_bytes
        room = target.shared_bytes - BARRIER_BYTES - self.parts_bytes - self.tile_bytes
        fair = room // (weight + token)
        tokens = min(cdiv(self.steps, self.token_steps), max(min(fair, 4), AHEAD_BYTES // token))
        return min((room - tokens * token) // weight, self.steps), tokens

    def cycles(self, target: Target) -> float:
        """Rounds of items, each of which loads and multiplies at once, beside all the weights from memory; then the sums.

        What runs beside something else is not quite free: the root of the sum of squares, not the larger.
        """
        multiply = 2 * self.slabs * self.width  # a step; 2,048 multiply-adds a clock
        load = (self.slabs * SLAB_BYTES + self.width * 128) / LOAD_RATE
        item = self.steps * max(multiply, load) + STORE_CYCLES + 4 * self.width
        exchange = EXCHANGE_CYCLES + self.parts_bytes / EXCHANGE_RATE if self.split > 1 else 0
        weights = 2 * self.features * self.inner / MEMORY_RATE
        return hypot(cdiv(self.items, self.clusters(target)) * item, weights) + exchange


@dataclass(frozen=True)
class PushShape(Shape):
    """Of a product that goes to other GPUs, through shared memory."""

    @property
    def tile_bytes(self) -> int:
        return self.slabs * self.width * 128 + HEADER_COPY_BYTES


def shapes(target: Target, tokens: int, features: int, inner: int, kind: type[Shape] = Shape) -> Iterator[Shape]:
    """All shapes that fit.

    Up to 128 tokens are one tile, so that the weights are read once. A cluster that splits K takes one item only; its
    sizes are those that fill groups of SMs (clusters of 3 and 5 ran in two rounds), and its blocks have two slabs (three
    send too much).
    """
    padded = cdiv(tokens, 16) * 16
    for slabs, widest, splits in ((2, 256, (1, 2, 4, 8)), (3, 192, (1,))):
        for width in range(padded if tokens <= 128 else 64, min(padded, widest) + 1, 16):
            for split in splits:
                shape = kind(tokens, features, inner, slabs, width, split)
                weights, copies = shape.stages(target)
                fits = weights >= min(3, shape.steps) and copies >= min(3, cdiv(shape.steps, shape.token_steps))
                once = split == 1 or (shape.items <= shape.clusters(target) and split <= inner // 64)
                if fits and once:
                    yield shape


def best_shape(target: Target, tokens: int, features: int, inner: int, kind: type[Shape] = Shape) -> Shape:
    return min(shapes(target, tokens, features, inner, kind), key=lambda shape: shape.cycles(target))


def near_shapes(target: Target, tokens: int, features: int, inner: int, kind: type[Shape] = Shape) -> Iterator[Shape]:
    """Those worth measuring: the best by the model."""
    return iter(sorted(shapes(target, tokens, features, inner, kind), key=lambda shape: shape.cycles(target))[:NEAR])


def gemm_supports(target: Target, operands: Mapping[str, Operand]) -> bool:
    """bf16 operands, K in whole tiles, rows of outputs in whole vectors."""
    del target
    x, weight = tensor(operands, "x"), tensor(operands, "weight")
    residual = operands.get("residual")
    kinds = {x.dtype, weight.dtype, *((residual.dtype,) if isinstance(residual, TensorSpec) else ())}
    return kinds == {"bf16"} and weight.shape[0] % 8 == 0 and weight.shape[1] % 64 == 0


def gemm_launches(target: Target, operands: Mapping[str, Operand], out: TensorSpec, *,
                  push: bool = False) -> tuple[Launch, ...]:
    """`out` [T, N] of norm_linear, linear_residual or norm_head, by the operands that there are. push: each row goes to the
    rank whose share it is in."""
    x, weight = tensor(operands, "x"), tensor(operands, "weight")
    present = {name for name, operand in operands.items() if isinstance(operand, TensorSpec)}
    (tokens, features), inner = out.shape, weight.shape[1]
    common = {"tiles": activation_tiles(tokens, inner)}
    eps = operands.get("eps", 0.0)
    assert isinstance(eps, float | int)
    first = tile_launch(target, operands, common, "tiles", rows="rows" if "rows" in present else None,
                        norm_weight="norm_weight" if "norm_weight" in present else None, eps=float(eps))
    name, kind = ("gemm_push", PushShape) if push else ("gemm", Shape)
    shape = choose(target, name, {"tokens": tokens, "features": features, "inner": inner},
                   best_shape(target, tokens, features, inner, kind), near_shapes(target, tokens, features, inner, kind))
    weights, stages = shape.stages(target)
    shared = (weights * shape.slabs * SLAB_BYTES + stages * shape.token_steps * shape.step_bytes + shape.parts_bytes
              + shape.tile_bytes + (2 * weights + 2 * stages + 3) * 8)
    grid = min(shape.items, shape.clusters(target)) * shape.split
    defines: dict[str, int | float | str] = {
        "TOKENS": tokens, "FEATURES": features, "INNER": inner, "GRID": grid, "SHARED": shared,
        "SLABS": shape.slabs, "WIDTH": shape.width, "SPLIT": shape.split,
        "WEIGHT_STAGES": weights, "TOKEN_STAGES": stages, "TOKEN_STEPS": shape.token_steps,
        "BIAS": int("bias" in present), "RESIDUAL": int("residual" in present), "FP32": int(out.dtype == "fp32"),
        "PUSH": int(push),
    }
    args = ("tiles", "weight", *(name for name in ("bias", "residual") if name in present),
            *(("exchange",) if push else ()), "out0")
    second = cuda_launch(
        "gemm.cu", "gemm", defines, args, grid=grid, threads=shape.slabs * 128 + 128, shared=shared, common=common,
        preloads=("weight",), promises=("HGMMA",), flops=2 * tokens * features * inner,
        moved=total_bytes(x, weight, operands.get("bias"), operands.get("residual"), out))
    return first, second
