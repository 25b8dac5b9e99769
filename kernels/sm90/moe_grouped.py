"""moe_grouped with MXFP4 experts on Hopper: moe_route.cu, tile.cu and moe_grouped.cu.

Four launches. The sort gives every (token, expert) pair a row of the activation tiles, expert by expert; x is normed into
these rows; both projections run as one persistent launch; the last mixes the results. Buffers that they share:

    place [T, A] i32       the row of each pair
    groups [G, 4] i32      expert, first row and rows of each group, the tokens of a tile of the projections
    extent [2] i32         how many groups there are, and R / 8: the projections' machine code serves any number of tokens
    x_tiles, h_tiles       normed x and the SwiGLU's results as activation tiles
    y [R, H] bf16          the experts' results, row by row
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gptoss_compile.kernels.common import cdiv, cuda_launch, number, tensor
from gptoss_compile.kernels.moe_grouped import Sizes
from gptoss_compile.kernels.sm90.tile import activation_tiles, tile_launch
from gptoss_compile.kernels.spec import KernelSpec, Launch, Operand, TensorSpec
from gptoss_compile.kernels.tuned import choose
from gptoss_compile.target import Target

STAGE_ROWS = 192  # weight rows of a tile: three slabs of the weights' layout
STAGE_WEIGHTS = 3 * 2176  # bytes of these rows in 64 columns
BESIDE_STAGES = 4096  # bytes of shared memory: barriers, biases, descriptions of tiles
RESERVED = 1024  # bytes of shared memory that the system takes from each block
MOST_STAGES = 15
MOST_EXPERTS = 256  # counters of the sort in shared memory
SORT_THREADS, COMBINE_THREADS = 1024, 256
PUSH_BLOCKS = 6  # of the mix on a processor, where it pushes


@dataclass(frozen=True)
class Variant:
    """widest: tokens of a tile, a multiple of 8; blocks: on a processor."""

    widest: int
    blocks: int


def variant(size: Sizes) -> Variant:
    """By the tokens that an expert has on average.

    Few: two blocks on a processor keep more loads in flight; with so few registers 56 is the widest tile whose products
    ptxas does not serialise. Many: a weight is decoded for as many tokens as leave room for nine stages.
    """
    return Variant(56, 2) if size.pairs <= 8 * size.experts else Variant(144, 1)


def variants(target: Target, size: Sizes) -> Iterator[Variant]:
    """Those with a ring that is worth its name. Some of two blocks may have products that ptxas serialises."""
    every = [*(Variant(widest, 2) for widest in range(16, 65, 8)), *(Variant(widest, 1) for widest in range(48, 161, 16))]
    return (each for each in every if stages(target, size, each) >= 3)


def stages(target: Target, size: Sizes, chosen: Variant) -> int:
    """Of the ring: as many as fit, and a divisor of gate_up's depth, so that each of its tiles goes round without rest."""
    room = (target.shared_bytes + RESERVED) // chosen.blocks - RESERVED - BESIDE_STAGES
    most = min(room // (chosen.widest * 128 + STAGE_WEIGHTS), MOST_STAGES)
    return next(n for n in range(most, 0, -1) if size.hidden // 64 % n == 0)


def most_rows(size: Sizes) -> int:
    """Rows of the tiles, if every expert's last 8 have one."""
    return cdiv(size.pairs + 7 * min(size.experts, size.pairs), 8) * 8


def buffers(size: Sizes, chosen: Variant) -> dict[str, TensorSpec]:
    rows = most_rows(size)
    groups = size.pairs // chosen.widest + min(size.experts, size.pairs)
    return {"place": TensorSpec((size.tokens, size.top_k), "i32"),
            "groups": TensorSpec((groups, 4), "i32"), "extent": TensorSpec((2,), "i32"),
            "x_tiles": activation_tiles(rows, size.hidden), "h_tiles": activation_tiles(rows, cdiv(size.inner, 64) * 64),
            "y": TensorSpec((rows, size.hidden), "bf16")}


def supports(target: Target, operands: Mapping[str, Operand]) -> bool:
    """MXFP4 experts whose rows, in both projections, are whole tiles; one of gate_up's is gate and up of 96 features."""
    size = Sizes.of(operands)
    return (target.name == "sm90" and isinstance(operands["up_scales"], TensorSpec) and size.dtype == "bf16"
            and size.hidden % STAGE_ROWS == 0 and 2 * size.inner % STAGE_ROWS == 0 and size.experts <= MOST_EXPERTS)


def sort_launch(size: Sizes, chosen: Variant, shared: Mapping[str, TensorSpec]) -> Launch:
    written = {name: shared[name] for name in ("place", "groups", "extent")}
    defines = {"SORT": 1, "TOKENS": size.tokens, "TOP_K": size.top_k, "EXPERTS": size.experts, "ROWS": most_rows(size),
               "WIDEST": chosen.widest}
    return cuda_launch("moe_route.cu", "moe_sort", defines, ("ids", *written), grid=cdiv(size.pairs, SORT_THREADS),
                       threads=SORT_THREADS, common=written, moved=8 * size.pairs)


def experts_launch(target: Target, operands: Mapping[str, Operand], size: Sizes, chosen: Variant,
                   shared: Mapping[str, TensorSpec]) -> Launch:
    """Triggers late, so that the mix may read before its wait what the launches before this one wrote."""
    depth = stages(target, size, chosen)
    bytes_ = depth * (chosen.widest * 128 + STAGE_WEIGHTS) + BESIDE_STAGES
    defines = {"HIDDEN": size.hidden, "INNER": size.inner, "WIDEST": chosen.widest, "STAGES": depth,
               "BLOCKS": chosen.blocks, "SHARED": bytes_, "ALPHA": number(operands, "alpha"),
               "LIMIT": number(operands, "limit")}
    used = {name: shared[name] for name in ("x_tiles", "groups", "extent", "h_tiles", "y")}
    counters = TensorSpec((2 + shared["groups"].shape[0],), "i32")
    activations = 2 * size.pairs * (2 * size.hidden + 2 * size.inner)
    return cuda_launch(
        "moe_grouped.cu", "moe_grouped", defines,
        ("x_tiles", "groups", "extent", "up", "up_bias", "down", "down_bias", "h_tiles", "y", "scratch0"),
        grid=chosen.blocks * target.processors, threads=512, shared=bytes_, carveout=100, common=used, scratch=(counters,),
        zeroed=(0,), moved=activations + size.weight_bytes(operands, "up") + size.weight_bytes(operands, "down"),
        flops=6 * size.pairs * size.inner * size.hidden, late_trigger=True, promises=("HGMMA",))


def combine_launch(target: Target, operands: Mapping[str, Operand], size: Sizes, shared: Mapping[str, TensorSpec],
                   residual: bool, push: bool) -> Launch:
    """residual: adds x. push: each row goes to the rank whose share it is in. Without a `place` among the shared buffers y
    [T, A, H] has the pairs' order, and the kernel that makes it may have been started ahead of others."""
    x, used = tensor(operands, "x"), {name: shared[name] for name in ("place", "y") if name in shared}
    grid = cdiv(size.tokens * size.hidden // 8, COMBINE_THREADS)
    grid = min(grid, PUSH_BLOCKS * target.processors) if push else grid
    defines = {"SORT": 0, "TOKENS": size.tokens, "TOP_K": size.top_k, "HIDDEN": size.hidden, "THREADS": COMBINE_THREADS,
               "GRID": grid, "RESIDUAL": int(residual), "PLACED": int("place" in used), "PUSH": int(push)}
    own, peers = ("x",) if residual else (), ("exchange",) if push else ()
    return cuda_launch("moe_route.cu", "moe_combine", defines, (*own, "probs", *used, *peers, "out0"),
                       grid=grid, threads=COMBINE_THREADS, common=used,
                       moved=2 * x.bytes + 2 * size.pairs * size.hidden, flops=2 * size.pairs * size.hidden,
                       preloads=(*own, "probs", "place") if "place" in used else ())


def launches(target: Target, operands: Mapping[str, Operand], *, residual: bool = True,
             push: bool = False) -> tuple[Launch, ...]:
    """moe_grouped, or without the residual moe_grouped_partial; see `combine_launch`."""
    size = Sizes.of(operands)
    key = {name: getattr(size, name) for name in ("tokens", "top_k", "experts", "hidden", "inner")}
    chosen = choose(target, "moe_grouped", key, variant(size), variants(target, size))
    shared = buffers(size, chosen)
    return (sort_launch(size, chosen, shared),
            tile_launch(target, operands, shared, "x_tiles", places="place", norm_weight="norm_weight",
                        eps=number(operands, "eps")),
            experts_launch(target, operands, size, chosen, shared),
            combine_launch(target, operands, size, shared, residual, push))


SPECS = (KernelSpec("sm90_moe_grouped", "moe_grouped", supports, launches,
                    {"up": "mxfp4_gate_up", "down": "mxfp4_down"}),)
