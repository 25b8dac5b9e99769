"""From a checkpoint's weights to those of an artifact, a slice of a tensor at a time.

A weight is a *recipe* over logical weights (see `artifact.Recipe`). Three ways to give them to the runtime:
`pack` stores their values in the artifact; `link` stores them once in the user's cache, in a directory named
by the hash of checkpoint and recipes, and the artifact holds that name and the files' hashes; `random:SEED`
stores nothing, the runtime generates them (`random_weights`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from gptoss_compile.artifact import ArtifactWriter, Recipe, canonical_json, pack_directory
from gptoss_compile.checkpoint import Checkpoint, CheckpointError
from gptoss_compile.logical import row_slices
from gptoss_compile.paths import Progress, atomic_directory, hash_files
from gptoss_compile.safetensors_io import DTYPES, encode_header, item_bytes
from gptoss_compile.weights import constant, cut_rows, parts_of

SHARD_BYTES = 2 << 30
_LAYOUT = 1  # of packs; part of their key
_NOTE = "pack.json"  # a pack's own list of its files
_TORCH = {"bf16": torch.bfloat16, "fp32": torch.float32, "i32": torch.int32, "u8": torch.uint8}


def check_mode(mode: str) -> None:
    """Raises ValueError for a mode that `add_weights` does not know."""
    if mode not in ("pack", "link") and not (mode.startswith("random:") and mode[7:].isdecimal()):
        raise ValueError(f"--weights must be pack, link or random:SEED (a number), found {mode!r}")


def add_weights(mode: str, checkpoint: Checkpoint, recipes: Sequence[Sequence[Recipe]],
                writer: ArtifactWriter, progress: Progress | None = None) -> None:
    """Give an artifact its weights: mode is `pack`, `link` or `random:SEED`; recipes hold one list a rank.

    Raises CheckpointError for a weight that is not finite, ValueError for an unknown mode.
    """
    check_mode(mode)
    if mode == "pack":
        pack(checkpoint, recipes, writer, progress)
    elif mode == "link":
        link(checkpoint, recipes, writer, progress)
    else:
        writer.set_weights({"mode": "random", "seed": int(mode[7:]), "recipes": _lists(recipes)})


def pack(checkpoint: Checkpoint, recipes: Sequence[Sequence[Recipe]], writer: ArtifactWriter,
         progress: Progress | None = None) -> None:
    """Store the weights in the artifact, as weights/model-00001.safetensors and so on."""
    folder = writer.add_file("weights/model-00001.safetensors").parent
    shards = _write_shards(folder, checkpoint, recipes, progress)
    writer.set_weights({"mode": "files", "shards": shards, "recipes": _lists(recipes)})


def link(checkpoint: Checkpoint, recipes: Sequence[Sequence[Recipe]], writer: ArtifactWriter,
         progress: Progress | None = None) -> None:
    """Store a reference to the pack of these weights in the user's cache, which is written unless it is
    there.
    """
    key = hashlib.sha256(canonical_json([_LAYOUT, checkpoint.digest(), _lists(recipes)])).hexdigest()[:32]
    folder = pack_directory(key)
    if not _intact(folder):
        with atomic_directory(folder) as fresh:
            shards = _write_shards(fresh, checkpoint, recipes, progress)
            files = _describe(fresh, [name for rank in shards for name in rank])
            (fresh / _NOTE).write_bytes(canonical_json({"shards": shards, "files": files}))
    note = json.loads((folder / _NOTE).read_bytes())
    files = {**note["files"], **_describe(folder, [_NOTE])}
    writer.set_weights({"mode": "link", "pack": key, "files": files, "shards": note["shards"],
                        "recipes": _lists(recipes)})


def _intact(folder: Path) -> bool:
    """Whether a pack's files are all there in their sizes. Their hashes are checked when an artifact is
    opened.
    """
    try:
        files = json.loads((folder / _NOTE).read_bytes())["files"]
        return all((folder / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _describe(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    paths = {name: folder / name for name in names}
    hashes = hash_files(paths)
    return {name: {"bytes": path.stat().st_size, "sha256": hashes[name]} for name, path in paths.items()}


def _lists(recipes: Sequence[Sequence[Recipe]]) -> list[list[dict[str, Any]]]:
    return [[dict(recipe) for recipe in rank] for rank in recipes]


@dataclass
class _Meter:
    """Counts bytes for a progress callback."""

    total: int
    report: Progress | None
    done: int = 0

    def add(self, size: int) -> None:
        self.done += size
        if self.report:
            self.report(self.done, self.total)


def _write_shards(folder: Path, checkpoint: Checkpoint, recipes: Sequence[Sequence[Recipe]],
                  progress: Progress | None) -> list[list[str]]:
    """Write every rank's weights and return the names of its files. Files are numbered through the ranks."""
    meter = _Meter(sum(_bytes(recipe) for rank in recipes for recipe in rank), progress)
    names: list[list[str]] = []
    count = 0
    for rank in recipes:
        names.append([])
        for shard in _split(rank):
            count += 1
            names[-1].append(f"model-{count:05d}.safetensors")
            _write_shard(folder / names[-1][-1], checkpoint, shard, meter)
    return names


def _split(recipes: Sequence[Recipe]) -> list[list[Recipe]]:
    """Shards of at most SHARD_BYTES, unless one weight is larger. Within one, wide dtypes come first, so that
    every
    tensor is aligned to its elements."""
    shards: list[list[Recipe]] = []
    used = SHARD_BYTES
    for recipe in recipes:
        size = _bytes(recipe)
        if used + size > SHARD_BYTES:
            shards.append([])
            used = 0
        shards[-1].append(recipe)
        used += size
    return [sorted(shard, key=lambda recipe: -item_bytes(DTYPES[recipe["dtype"]])) for shard in shards]


def _write_shard(path: Path, checkpoint: Checkpoint, recipes: Sequence[Recipe], meter: _Meter) -> None:
    header = {recipe["name"]: (DTYPES[recipe["dtype"]], tuple(recipe["shape"])) for recipe in recipes}
    assert len(header) == len(recipes), "two recipes with one name"
    with open(path, "wb") as file:
        file.write(encode_header(header))
        for recipe in recipes:
            before = file.tell()
            _write_weight(file, checkpoint, recipe, meter)
            assert file.tell() - before == _bytes(recipe), f"recipe {recipe['name']} does not fill its shape"


def _write_weight(file: BinaryIO, checkpoint: Checkpoint, recipe: Recipe, meter: _Meter) -> None:
    if "parts" not in recipe:
        meter.add(file.write(constant(recipe).tobytes()))
        return
    for name, cut in parts_of(recipe):
        info = checkpoint.logical[name]
        first, last, inner = cut_rows(info.shape, cut)
        for start, stop in row_slices((last - first, *info.shape[1:]), item_bytes(DTYPES[info.dtype])):
            rows = _convert(checkpoint.read_rows(name, first + start, first + stop)[inner], recipe["dtype"], name)
            if "largest" in recipe:
                _require_at_most(recipe["largest"], rows, name)
            data = memoryview(rows.contiguous().view(torch.uint8).numpy().data).cast("B")
            meter.add(file.write(data))


def _require_at_most(largest: int, scales: Tensor, name: str) -> None:
    found = int(scales.max())
    if found > largest:
        raise CheckpointError(f"tensor {name} holds the MXFP4 scale {found}, but this target's kernels take none above "
                              f"{largest} (weights of {6 * 2.0 ** (largest - 127)}): compile for another target, or from "
                              "BF16 experts")


def _convert(rows: Tensor, dtype: str, name: str) -> Tensor:
    assert (rows.dtype == torch.uint8) == (dtype == "u8"), f"{name}: {rows.dtype} cannot become {dtype}"
    converted = rows.to(_TORCH[dtype])
    if rows.dtype == torch.float32 and dtype == "bf16" and not converted.isfinite().all():
        raise CheckpointError(f"tensor {name} holds a value beyond the range of bf16")
    return converted


def _bytes(recipe: Mapping[str, Any]) -> int:
    return int(math.prod(recipe["shape"])) * item_bytes(DTYPES[recipe["dtype"]])
