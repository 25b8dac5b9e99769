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
                source: str = "x", rows: str | None = None, places: str | None = None, norm_weight: str | None = None,
                eps: float = 0.0) -> Launch:
    """Rows of `source` [..., K] into the buffer `into` of `common`, which is `activation_tiles(R, K)`.

    rows:        an i32 vector of R row numbers; -1 leaves that row of the tiles as it is. None: every row in order.
    places:      i32 [rows of source, n]: the n rows of the tiles that each goes to. None: row i goes to row i.
    norm_weight: divides each row by its root mean square (with eps) and multiplies by this [K].
    Names are those in `operands` or, where an earlier launch of the same operator writes them, in `common`.
    """
    known: dict[str, Operand] = {**operands, **common}
    x = known[source]
    assert isinstance(x, TensorSpec) and x.dtype == "bf16" and x.shape[-1] % 64 == 0, f"cannot tile {x}"
    columns, count, copies, tiles = x.shape[-1], prod(x.shape[:-1]), 0, common[into]
    if rows is not None:
        chosen = known[rows]
        assert isinstance(chosen, TensorSpec)
        (count,) = chosen.shape
    if places is not None:
        to = known[places]
        assert isinstance(to, TensorSpec) and to.shape[0] == count
        copies = to.shape[1]
    else:
        assert tiles == activation_tiles(count, columns), f"{into} is {tiles}"
    args = [name for name in (source, rows, norm_weight, places, into) if name is not None]
    grid = min(cdiv(count, THREADS // 32), BLOCKS_PER_PROCESSOR * target.processors)
    return cuda_launch(
        "tile.cu", "tile",
        {"R": count, "K": columns, "ATOMS": tiles.shape[1], "GATHER": int(rows is not None), "COPIES": copies,
         "NORM": int(norm_weight is not None), "EPS": eps, "THREADS": THREADS, "BLOCKS": BLOCKS_PER_PROCESSOR},
        args, grid=grid, threads=THREADS, common={name: common[name] for name in args if name in common},
        preloads=(norm_weight,) if norm_weight else (), moved=2 * count * columns * (1 + max(copies, 1)))
