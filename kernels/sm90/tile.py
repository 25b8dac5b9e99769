"""Activations as the tiles that the matrix kernels of sm90 read: one launch of tile.cu."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from gptoss_compile.kernels.common import cdiv, cuda_launch
from gptoss_compile.kernels.spec import Launch, Operand, TensorSpec
from gptoss_compile.target import Target

THREADS = 128
BLOCKS_PER_PROCESSOR = 3  # 168 registers a thread: a row of 2,880 and its norm's weights take 96


def activation_tiles(rows: int, columns: int) -> TensorSpec:
    """[columns/64][ceil(rows/8)] atoms of 8 rows × 64 columns, a row's 16-byte chunk c at place c ^ (row mod 8)."""
    return TensorSpec((columns // 64, cdiv(rows, 8), 8, 64), "bf16")


def tile_launch(target: Target, operands: Mapping[str, Operand], common: Mapping[str, TensorSpec], into: str, *,
                source: str = "x", rows: str | None = None, norm_weight: str | None = None, eps: float = 0.0) -> Launch:
    """Rows of `source` [..., K] into the buffer `into` of `common`, which is `activation_tiles(R, K)`.

    rows:        an i32 vector of R row numbers; -1 leaves that row of the tiles as it is. None: every row in order.
    norm_weight: divides each row by its root mean square (with eps) and multiplies by this [K].
    All three are names in `operands` or, where an earlier launch of the same operator writes them, in `common`.
    """
    known: dict[str, Operand] = {**operands, **common}
    x = known[source]
    assert isinstance(x, TensorSpec) and x.dtype == "bf16" and x.shape[-1] % 64 == 0, f"cannot tile {x}"
    columns, count = x.shape[-1], prod(x.shape[:-1])
    if rows is not None:
        chosen = known[rows]
        assert isinstance(chosen, TensorSpec)
        (count,) = chosen.shape
    assert common[into] == activation_tiles(count, columns), f"{into} is {common[into]}"
    args = [name for name in (source, rows, norm_weight, into) if name is not None]
    grid = min(cdiv(count, THREADS // 32), BLOCKS_PER_PROCESSOR * target.processors)
    return cuda_launch(
        "tile.cu", "tile",
        {"R": count, "K": columns, "GATHER": int(rows is not None), "NORM": int(norm_weight is not None), "EPS": eps,
         "THREADS": THREADS, "BLOCKS": BLOCKS_PER_PROCESSOR},
        args, grid=grid, threads=THREADS, common={name: common[name] for name in args if name in common},
        preloads=(norm_weight,) if norm_weight else (), moved=2 * common[into].bytes)
