"""Reading a checkpoint: any published layout in, weights under their logical names out, one at a time.

Opening reads headers only, and checks that exactly the tensors of the config's model are there, in the right
shapes and dtypes. Reading a tensor reads its bytes alone, with plain reads into fresh memory, and checks that
all are finite.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptoss_compile.artifact import canonical_json
from gptoss_compile.config import ConfigError, ModelConfig
from gptoss_compile.config_parse import parse_config
from gptoss_compile.hub import INDEX, NotFound, inside, locate
from gptoss_compile.layouts import Layout, Placement, placements
from gptoss_compile.logical import TensorInfo, logical_tensors
from gptoss_compile.paths import Progress, cache_dir, hash_files
from gptoss_compile.random_weights import random_values
from gptoss_compile.safetensors_io import Entry, SafetensorsError, read_header

_TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "U8": torch.uint8}
_DENSE = ("BF16", "F32", "F16")
_LARGEST_SCALE = 252  # 6 * 2^(252 - 127) is the largest finite product; 255 means NaN


class CheckpointError(ValueError):
    """A checkpoint that cannot be compiled; the message names the file and the tensor or field."""


class Checkpoint(ABC):
    """A model's configuration and weights. `logical` lists the weights as they are read: name -> shape and
    dtype.
    """

    config: ModelConfig
    logical: Mapping[str, TensorInfo]
    folder: Path | None  # where its files are, if it has any

    @staticmethod
    def open(path_or_id: str | Path) -> Checkpoint:
        """The checkpoint in a folder, or the one with a Hugging Face id. Raises CheckpointError."""
        try:
            return _Files(locate(path_or_id))
        except (ConfigError, SafetensorsError, NotFound) as error:
            raise CheckpointError(str(error)) from None

    @staticmethod
    def random(config: ModelConfig, seed: int) -> Checkpoint:
        """Random weights that exist only while they are read; see `random_weights` for their distribution."""
        return _Random(config, seed)

    def read(self, name: str) -> Tensor:
        """The logical weight `name`, on the CPU. Raises CheckpointError if a value in it is not finite."""
        return self.read_rows(name, 0, self.logical[name].shape[0])

    @abstractmethod
    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start..stop (of axis 0) of a logical weight; nothing else is read."""

    @abstractmethod
    def digest(self, progress: Progress | None = None) -> str:
        """A hash of the configuration and of every weight, in hex."""


class _Random(Checkpoint):
    def __init__(self, config: ModelConfig, seed: int) -> None:
        self.config, self.logical, self.folder = config, logical_tensors(config), None
        self._seed = seed

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        info = self.logical[name]
        values = torch.from_numpy(random_values(name, info.shape, info.dtype, self._seed, start, stop))
        return values.view(torch.bfloat16) if info.dtype == "bf16" else values

    def digest(self, progress: Progress | None = None) -> str:
        return hashlib.sha256(canonical_json([self.config.to_json(), "random", self._seed])).hexdigest()


class _Files(Checkpoint):
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries = _read_headers(folder)
        names = self._entries.keys()
        layout: Layout = "original" if "embedding.weight" in names else "huggingface"
        packed = any(name.endswith("mlp1_weight.blocks") for name in names)
        self.config = parse_config(folder / "config.json", "mxfp4" if packed else "bf16")
        self._placements = placements(self.config, layout)
        _check_names(folder, self._entries, {placement.name for placement in self._placements.values()})
        self.logical = {name: self._check(name, info) for name, info in logical_tensors(self.config).items()}

    def _check(self, name: str, info: TensorInfo) -> TensorInfo:
        placement = self._placements[name]
        path, entry = self._entries[placement.name]
        if entry.shape != placement.shape:
            raise CheckpointError(f"{path}: tensor {placement.name} has shape {list(entry.shape)}, expected "
                                  f"{list(placement.shape)} from config.json")
        allowed = ("U8",) if info.dtype == "u8" else _DENSE
        if entry.dtype not in allowed:
            raise CheckpointError(f"{path}: tensor {placement.name} has dtype {entry.dtype}, expected "
                                  f"{' or '.join(allowed)}")
        return TensorInfo(info.shape, "fp32") if entry.dtype in ("F32", "F16") else info

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        placement = self._placements[name]
        path, entry = self._entries[placement.name]
        if not placement.transposed:
            return self._load(path, placement, entry, start, stop)
        rows = torch.empty((stop - start, *self.logical[name].shape[1:]), dtype=self._torch_dtype(entry))
        for i in range(start, stop):  # one expert at a time, so that no second copy of the whole exists
            rows[i - start] = self._load(path, placement, entry, i, i + 1)[0].T
        return rows

    @staticmethod
    def _torch_dtype(entry: Entry) -> torch.dtype:
        return torch.float32 if entry.dtype == "F16" else _TORCH[entry.dtype]

    @staticmethod
    def _load(path: Path, placement: Placement, entry: Entry, start: int, stop: int) -> Tensor:
        row = entry.bytes // entry.shape[0]
        raw = np.empty((stop - start) * row, np.uint8)
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(entry.start + (placement.start + start) * row)
                _read_fully(file, raw.data)
        except (OSError, EOFError) as error:
            raise CheckpointError(f"{path}: tensor {placement.name} cannot be read: {error}") from None
        _check_finite(raw, path, placement.name, entry)
        values = torch.from_numpy(raw).view(_TORCH[entry.dtype]).view(stop - start, *entry.shape[1:])
        return values.to(torch.float32) if entry.dtype == "F16" else values

    def digest(self, progress: Progress | None = None) -> str:
        paths = sorted({path for path, _ in self._entries.values()})
        content = [self.config.to_json(), _file_hashes(paths, progress)]
        return hashlib.sha256(canonical_json(content)).hexdigest()


def _read_fully(file: Any, buffer: memoryview) -> None:
    """One read call moves at most 2 GiB."""
    while buffer:
        size = file.readinto(buffer)
        if not size:
            raise EOFError("the file ends in it")
        buffer = buffer[size:]


def _check_finite(raw: np.ndarray[Any, Any], path: Path, name: str, entry: Entry) -> None:
    """Raise CheckpointError if the bytes hold a NaN, an infinity, or an MXFP4 scale that makes one."""
    if entry.dtype == "U8":
        if name.endswith("scales") and raw.size and raw.max() > _LARGEST_SCALE:
            raise CheckpointError(f"{path}: tensor {name} has the MXFP4 scale {raw.max()}: 255 is NaN, "
                                  "254 and 253 reach infinity")
        return
    item, exponent = (np.uint32, 0x7F800000) if entry.dtype == "F32" else (
        np.uint16, 0x7F80 if entry.dtype == "BF16" else 0x7C00)
    values: np.ndarray[Any, Any] = raw.view(item)
    for at in range(0, len(values), 1 << 20):  # pieces that stay in the cache
        if ((values[at:at + (1 << 20)] & exponent) == exponent).any():
            raise CheckpointError(f"{path}: tensor {name} holds NaN or infinity")


def _read_headers(folder: Path) -> dict[str, tuple[Path, Entry]]:
    """Every tensor of the folder's safetensors files by its name on disk. The index, if there is one, names
    the files
    and must agree with them."""
    index = _read_index(folder)
    found = {path.name for path in folder.glob("*.safetensors")}
    names = sorted(set(index.values()) if index else found)
    entries: dict[str, tuple[Path, Entry]] = {}
    for name in names:
        path = folder / name
        if not inside(path, folder):
            source = f"{INDEX} points to {name}" if index else f"{name} is a link"
            raise CheckpointError(f"{folder}: {source}, which leaves the folder")
        if not path.is_file():
            held = next((tensor for tensor, shard in index.items() if shard == name), "any")
            raise CheckpointError(f"{path} is missing; {INDEX} lists it, among others for tensor {held}")
        for tensor, entry in read_header(path).items():
            if tensor in entries:
                raise CheckpointError(f"{path}: tensor {tensor} is also in {entries[tensor][0].name}")
            entries[tensor] = (path, entry)
    for tensor, name in index.items():
        if tensor not in entries or entries[tensor][0] != folder / name:
            raise CheckpointError(f"{folder / name}: tensor {tensor} is missing; {INDEX} places it there")
    for tensor, (path, _) in entries.items():
        if index and tensor not in index:
            raise CheckpointError(f"{path}: tensor {tensor} is not listed in {INDEX}")
    return entries


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor -> file, from the index; empty if the folder has none."""
    path = folder / INDEX
    if not path.exists():
        return {}
    try:
        listed = json.loads(path.read_bytes())["weight_map"]
        shards = {str(tensor): str(name) for tensor, name in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{path} is broken: it must hold an object `weight_map` of tensors and files "
                              f"({type(error).__name__}: {error})") from None
    if not shards:
        raise CheckpointError(f"{path} lists no tensors")
    return shards


def _check_names(folder: Path, entries: Mapping[str, tuple[Path, Entry]], expected: set[str]) -> None:
    files = sorted({path.name for path, _ in entries.values()})
    where = files[0] if len(files) == 1 else INDEX if (folder / INDEX).exists() else ", ".join(files)
    for name in sorted(expected - entries.keys()):
        raise CheckpointError(f"{folder / where}: tensor {name} is missing ({len(expected - entries.keys())} "
                              "missing in all)")
    for name in sorted(entries.keys() - expected):
        raise CheckpointError(f"{entries[name][0]}: tensor {name} is not one of the model that config.json "
                              "describes")


def _file_hashes(paths: list[Path], progress: Progress | None) -> list[list[str]]:
    """[name, sha256] of each file. Hashes are kept in the user's cache, each with the size and time of its
    file.
    """
    memory = cache_dir() / "digests"
    known: dict[Path, str] = {}
    keys = {path: hashlib.sha256(str(path.resolve()).encode()).hexdigest() for path in paths}
    stamps = {path: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}
    for path in paths:
        try:
            stamp, digest = json.loads((memory / keys[path]).read_bytes())
            if stamp == stamps[path]:
                known[path] = str(digest)
        except (OSError, ValueError, TypeError):
            pass  # never hashed, or the note is broken
    fresh = hash_files({str(path): path for path in paths if path not in known}, progress)
    memory.mkdir(parents=True, exist_ok=True)
    for name, digest in fresh.items():
        known[Path(name)] = digest
        note = memory / f"{keys[Path(name)]}.{os.getpid()}"
        note.write_text(json.dumps([stamps[Path(name)], digest]))
        note.rename(memory / keys[Path(name)])
    return [[path.name, known[path]] for path in paths]
