"""The trained demo model as it is kept: expert weights in MXFP4, the rest in bf16, rows of used token ids only.

A file in the layout of safetensors: `config` (a JSON text) and `vocabulary` (the used ids, ascending) as tensors, then
the logical weights, with 1 + len(vocabulary) rows of embedding and head; row 0 is that of every other id. In the
repository it is compressed (xz), and known by its sha256.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptoss_compile.checkpoint import Checkpoint, CheckpointError
from gptoss_compile.config import ModelConfig
from gptoss_compile.demo.mxfp4 import quantize
from gptoss_compile.demo.network import is_expert
from gptoss_compile.logical import logical_tensors
from gptoss_compile.paths import Progress
from gptoss_compile.safetensors_io import encode_header, map_arrays

FILE = Path(__file__).parent / "weights" / "demo.safetensors.xz"
CHECKSUM = FILE.with_name(FILE.name + ".sha256")
_WIDE = ("embed.weight", "lm_head.weight")
_TYPES = {torch.bfloat16: "BF16", torch.uint8: "U8", torch.int32: "I32"}


def save(path: Path, config: ModelConfig, vocabulary: np.ndarray[Any, Any], weights: Mapping[str, Tensor]) -> None:
    """Write dense weights of the network as a file (not compressed), rounded to what a checkpoint keeps."""
    text = np.frombuffer(json.dumps(config.to_json()).encode(), np.uint8).copy()
    tensors = {"config": torch.from_numpy(text), "vocabulary": torch.from_numpy(vocabulary.astype(np.int32))}
    for name, weight in weights.items():
        if is_expert(name):
            at = name.removesuffix(".weight")
            tensors[f"{at}.blocks"], tensors[f"{at}.scales"] = quantize(weight.detach().cpu())
        else:
            tensors[name] = weight.detach().cpu().to(torch.bfloat16)
    header = encode_header({name: (_TYPES[t.dtype], tuple(t.shape)) for name, t in tensors.items()})
    body = b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors.values())
    path.write_bytes(header + body)


class Packed(Checkpoint):
    """A checkpoint read from such a file. Raises CheckpointError if it is not the one that `sha256` names."""

    def __init__(self, path: Path, sha256: str | None = None) -> None:
        self.folder = None
        self._digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if sha256 is not None and self._digest != sha256:
            raise CheckpointError(f"{path} is damaged: its sha256 is {self._digest}, expected {sha256}; get it again")
        self._tensors = _read(path)
        config = bytes(self._tensors.pop("config").numpy())
        self.config = ModelConfig.from_json(json.loads(config))
        self.vocabulary = self._tensors.pop("vocabulary").long()
        self.logical = logical_tensors(self.config)

    def compact(self, name: str) -> Tensor:
        """A weight as it is kept: embedding and head with 1 + len(vocabulary) rows."""
        return self._tensors[name]

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        if name not in _WIDE:
            return self._tensors[name][start:stop].clone()
        kept = self._tensors[name]
        rows = kept[:1].repeat(stop - start, 1)
        inside = (self.vocabulary >= start) & (self.vocabulary < stop)
        rows[self.vocabulary[inside] - start] = kept[1:][inside]
        return rows

    def digest(self, progress: Progress | None = None) -> str:
        return self._digest


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".xz":
        with TemporaryDirectory() as folder:
            plain = Path(folder) / path.stem
            plain.write_bytes(lzma.decompress(path.read_bytes()))
            return _read(plain)
    return {name: _tensor(array) for name, array in map_arrays(path)}


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    tensor = torch.from_numpy(array.copy())
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


def bundled() -> Packed:
    """The model that comes with the project. Raises CheckpointError if its file is missing or damaged."""
    if not FILE.exists():
        raise CheckpointError(f"the demo's weights are missing, {FILE}; install gptoss-compile again")
    return Packed(FILE, CHECKSUM.read_text().split()[0])


def bundle(path: Path) -> None:
    """Compress a saved file into the project, with its checksum."""
    Packed(path)
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_bytes(lzma.compress(path.read_bytes(), preset=9 | lzma.PRESET_EXTREME))
    CHECKSUM.write_text(f"{hashlib.sha256(FILE.read_bytes()).hexdigest()}  {FILE.name}\n")
