"""The runtime's reader of an artifact's weights. Standard library and numpy only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gptoss_compile.artifact import Artifact, Recipe
from gptoss_compile.logical import TensorInfo, logical_tensors
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
    if "values" in recipe:
        return constant(recipe)
    parts = [random_values(name, tensors[name].shape, recipe["dtype"], seed) for name in recipe["parts"]]
    whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return whole.reshape(recipe["shape"])


def constant(recipe: Recipe) -> Array:
    """The array of a recipe that lists its values."""
    types = {"fp32": np.float32, "i32": np.int32, "u8": np.uint8, "bf16": np.float32}
    array = np.array(recipe["values"], types[recipe["dtype"]]).reshape(recipe["shape"])
    return round_bf16(array) if recipe["dtype"] == "bf16" else array
