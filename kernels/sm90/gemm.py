"""Dense projections of more than a few tokens on sm90: tile.cu brings the activations, gemm.cu multiplies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gptoss_compile.kernels.common import cdiv, cuda_launch, tensor, total_bytes
from gptoss_compile.kernels.sm90.tile import activation_tiles, tile_launch
from gptoss_compile.kernels.spec import Launch, Operand, TensorSpec
from gptoss_compile.target import Target

SLAB_BYTES = 64 * 128  # 64 rows × 64 columns of bf16
BARRIER_BYTES = 1024
LOAD_RATE = 28  # bytes a clock that one SM gets from the L2 while all of them load
EXCHANGE_CYCLES = 1500  # until the blocks of a cluster have each other's sums, besides their bytes
STORE_CYCLES = 1500  # until a tile is stored, besides 4 cycles a token


@dataclass(frozen=True)
class Shape:
    """How gemm.cu cuts out [T, N] = x [T, K] · Wᵀ. For the fields see the head of gemm.cu."""

    tokens: int
    features: int
    inner: int
    slabs: int
    width: int
    split: int
    pair: int

    @property
    def items(self) -> int:
        """Tiles of 64 · slabs rows of weights × width · pair tokens, a cluster each."""
        return cdiv(cdiv(self.features, 64), self.slabs) * cdiv(self.tokens, self.width * self.pair)

    @property
    def blocks(self) -> int:
        """Blocks of 64 columns that one thread block multiplies for an item."""
        return cdiv(self.inner // 64, self.split)

    @property
    def parts_bytes(self) -> int:
        """What a block receives from the others of its cluster."""
        return (self.split - 1) * cdiv(self.width // 8, self.split) * self.slabs * 128 * 16

    def clusters(self, target: Target) -> int:
        """How many clusters run at a time. The SMs come in groups of 16 or 18 that no cluster crosses."""
        size = self.split * self.pair
        return target.processors // size if size <= 2 else target.processors // 16 * (16 // size)

    def stages(self, target: Target) -> tuple[int, int]:
        """(weights, tokens): stages of the two rings.

        Tokens need four to hide the latency of the L2, or a whole K where it is small, since they are requested only
        when the kernel before has ended; all the rest goes to the weights, which come ahead.
        """
        weight, token = self.slabs * SLAB_BYTES, self.width * 128
        room = target.shared_bytes - BARRIER_BYTES - self.parts_bytes
        fair = room // (weight + token)
        tokens = min(self.blocks, max(min(fair, 4), 57344 // token))
        return min((room - tokens * token) // weight, self.blocks), tokens

    def cycles(self, target: Target) -> float:
        """A model of the time: each SM multiplies and loads at once, items run in rounds."""
        multiply = 2 * self.slabs * self.width  # 2,048 multiply-adds a clock
        load = (self.slabs * SLAB_BYTES / self.pair + self.width * 128) / LOAD_RATE
        item = self.blocks * max(multiply, load) + STORE_CYCLES + 4 * self.width
        exchange = EXCHANGE_CYCLES + self.parts_bytes / LOAD_RATE if self.split > 1 else 0
        return cdiv(self.items, self.clusters(target)) * item + exchange


def shapes(target: Target, tokens: int, features: int, inner: int) -> Iterator[Shape]:
    """All shapes that fit. A cluster that splits K takes one item only; pairs only pay where several tiles are."""
    for slabs in (1, 2, 3):
        for width in range(16, 256 + 1 if slabs < 3 else 192 + 1, 16):
            for split, pair in ((1, 1), (1, 2), *((n, 1) for n in range(2, 9))):
                shape = Shape(tokens, features, inner, slabs, width, split, pair)
                fits = min(shape.stages(target)) >= min(3, shape.blocks)
                once = split == 1 or (shape.items <= shape.clusters(target) and split <= inner // 64)
                if fits and once and width - 16 < tokens and (pair == 1 or width < tokens):
                    yield shape


def best_shape(target: Target, tokens: int, features: int, inner: int) -> Shape:
    return min(shapes(target, tokens, features, inner), key=lambda shape: shape.cycles(target))


def gemm_supports(target: Target, operands: Mapping[str, Operand]) -> bool:
    """bf16 operands, K in whole tiles, rows of outputs in whole vectors."""
    del target
    x, weight = tensor(operands, "x"), tensor(operands, "weight")
    residual = operands.get("residual")
    kinds = {x.dtype, weight.dtype, *((residual.dtype,) if isinstance(residual, TensorSpec) else ())}
    return kinds == {"bf16"} and weight.shape[0] % 8 == 0 and weight.shape[1] % 64 == 0


def gemm_launches(target: Target, operands: Mapping[str, Operand], out: TensorSpec) -> tuple[Launch, ...]:
    """`out` [T, N] of norm_linear, linear_residual or norm_head, by the operands that there are."""
    x, weight = tensor(operands, "x"), tensor(operands, "weight")
    present = {name for name, operand in operands.items() if isinstance(operand, TensorSpec)}
    (tokens, features), inner = out.shape, weight.shape[1]
    common = {"tiles": activation_tiles(tokens, inner)}
    eps = operands.get("eps", 0.0)
    assert isinstance(eps, float | int)
    first = tile_launch(target, operands, common, "tiles", rows="rows" if "rows" in present else None,
                        norm_weight="norm_weight" if "norm_weight" in present else None, eps=float(eps))
    shape = best_shape(target, tokens, features, inner)
    weights, stages = shape.stages(target)
    shared = (weights * shape.slabs * SLAB_BYTES + stages * shape.width * 128 + shape.parts_bytes
              + (2 * weights + 2 * stages + 1) * 8)
    grid = min(shape.items, shape.clusters(target)) * shape.split * shape.pair
    defines: dict[str, int | float | str] = {
        "TOKENS": tokens, "FEATURES": features, "INNER": inner, "GRID": grid, "SHARED": shared,
        "SLABS": shape.slabs, "WIDTH": shape.width, "SPLIT": shape.split, "PAIR": shape.pair,
        "WEIGHT_STAGES": weights, "TOKEN_STAGES": stages,
        "BIAS": int("bias" in present), "RESIDUAL": int("residual" in present), "FP32": int(out.dtype == "fp32"),
    }
    args = ("tiles", "weight", *(name for name in ("bias", "residual") if name in present), "out0")
    second = cuda_launch(
        "gemm.cu", "gemm", defines, args, grid=grid, threads=shape.slabs * 128 + 128, shared=shared, common=common,
        preloads=("weight",), promises=("HGMMA",), flops=2 * tokens * features * inner,
        moved=total_bytes(x, weight, operands.get("bias"), operands.get("residual"), out))
    return first, second
