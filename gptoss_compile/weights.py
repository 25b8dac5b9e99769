"""The runtime's reader of an artifact's weights. Standard library and numpy only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gptoss_compile.artifact import Artifact, Recipe
from gptoss_compile.logical import TensorInfo, logical_tensors, row_slices
from gptoss_compile.random_weights import random_values, round_bf16
from gptoss_compile.safetensors_io import map_arrays

Array = np.ndarray[Any, Any]


def read_weights(artifact: Artifact, rank: int = 0) -> Iterator[tuple[str, Array]]:
    """(recipe name, array) of each weight of a rank, one at a time; bf16 as uint16 bits.

    Stored weights are read-only views of a mapped file; random ones are generated.
    """
    section = artifact.manifest["weights"]
    if section["mode"] == "random":
        tensors = logical_tensors(artifact.config)
        for recipe in artifact.recipes(rank):
            yield recipe["name"], random_weight(recipe, tensors, section["seed"])
    else:
        for path in artifact.weight_files(rank):
            yield from map_arrays(path)


def random_weight(recipe: Recipe, tensors: Mapping[str, TensorInfo], seed: int) -> Array:
    """The value of a recipe over random logical weights; parts are concatenated along axis 0."""
    if "parts" not in recipe:
        return constant(recipe)
    pieces: list[Array] = []
    for name, cut in parts_of(recipe):
        shape = tensors[name].shape
        first, last, inner = cut_rows(shape, cut)
        steps = row_slices((last - first, *shape[1:]), 4) if cut else [(0, last)]
        pieces += [random_values(name, shape, recipe["dtype"], seed, first + start, first + stop)[inner]
                   for start, stop in steps]
    whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return whole.reshape(recipe["shape"])


def parts_of(recipe: Recipe) -> Iterator[tuple[str, Mapping[str, int] | None]]:
    """Each logical weight that a recipe is made of, with what is taken of it (None: all)."""
    cuts = recipe.get("cuts") or [None] * len(recipe["parts"])
    yield from zip(recipe["parts"], cuts, strict=True)


def cut_rows(shape: Sequence[int], cut: Mapping[str, int] | None) -> tuple[int, int, tuple[slice, ...]]:
    """How to read a cut by rows of axis 0: the first row, the one behind the last, and what to take of those rows."""
    if cut is None:
        return 0, shape[0], ()
    if cut["axis"] == 0:
        return cut["start"], cut["stop"], ()
    return 0, shape[0], (slice(None),) * cut["axis"] + (slice(cut["start"], cut["stop"]),)


def constant(recipe: Recipe) -> Array:
    """The array of a recipe that lists its values, or zeros."""
    types = {"fp32": np.float32, "i32": np.int32, "u8": np.uint8, "bf16": np.float32}
    if "values" not in recipe:
        return np.zeros(recipe["shape"], np.uint16 if recipe["dtype"] == "bf16" else types[recipe["dtype"]])
    array = np.array(recipe["values"], types[recipe["dtype"]]).reshape(recipe["shape"])
    return round_bf16(array) if recipe["dtype"] == "bf16" else array
