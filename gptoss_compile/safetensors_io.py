"""The safetensors file format: eight bytes of header length, a JSON header, then the tensors without gaps.

Read and written here rather than with the library so that a tensor can be written before the next one exists,
a part of one read without mapping its file (mapped pages count as resident memory), and every defect named.
Stdlib and numpy.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# bf16 has no numpy type: its bits travel as uint16.
NUMPY_TYPES: dict[str, Any] = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32, "I32": np.int32,
                               "U8": np.uint8}
DTYPES = {"bf16": "BF16", "fp32": "F32", "i32": "I32", "u8": "U8"}  # the project's names of what is written
_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I8": 1, "U8": 1, "I16": 2, "U16": 2, "I32": 4,
               "U32": 4, "I64": 8, "U64": 8, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
_MAX_HEADER = 100_000_000  # the format's own limit


class SafetensorsError(ValueError):
    """A file that is no valid safetensors file; the message names the file and the defect."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. start: its first byte, counted from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    bytes: int


def item_bytes(dtype: str) -> int:
    return _ITEM_BYTES[dtype]


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file by name, in the order of their data. Raises SafetensorsError for a broken or cut
    file.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise SafetensorsError(f"{path}: truncated, or no safetensors file: {size} bytes, "
                                       f"of which the header alone should take {8 + length}")
            header = json.loads(file.read(length))
    except OSError as error:
        raise SafetensorsError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        if isinstance(error, SafetensorsError):
            raise
        raise SafetensorsError(f"{path}: its header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise SafetensorsError(f"{path}: its header is no JSON object")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, item, 8 + length) for name, item in header.items()}
    ordered = dict(sorted(entries.items(), key=lambda pair: (pair[1].start, pair[1].bytes)))
    end = 8 + length
    for name, entry in ordered.items():
        if entry.start != end:
            raise SafetensorsError(f"{path}: tensor {name} starts at byte {entry.start}, its predecessor "
                                   f"ends at {end}")
        end = entry.start + entry.bytes
        if end > size:
            raise SafetensorsError(f"{path}: truncated in tensor {name}, which ends at byte {end} of a "
                                   f"file of {size}")
    if end != size:
        raise SafetensorsError(f"{path}: {size - end} bytes follow the last tensor")
    return ordered


def _entry(path: Path, name: str, item: Any, data: int) -> Entry:
    try:
        dtype, shape, (first, last) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
        numbers = all(type(value) is int and value >= 0 for value in (*shape, first, last))
    except (TypeError, KeyError, ValueError):
        numbers = False
    if not numbers or not isinstance(dtype, str):
        raise SafetensorsError(f"{path}: the header's entry of tensor {name} is malformed")
    if dtype not in _ITEM_BYTES:
        raise SafetensorsError(f"{path}: tensor {name} has the unknown dtype {dtype}")
    if last - first != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise SafetensorsError(f"{path}: tensor {name} ({dtype} {list(shape)}) does not fill its "
                               f"{last - first} bytes")
    return Entry(dtype, shape, data + first, last - first)


def encode_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """What precedes the data of a file that holds these tensors {name: (dtype such as BF16, shape)} in this
    order.

    Padded so that the data begins at a multiple of 64 bytes.
    """
    header: dict[str, Any] = {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * _ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def map_arrays(path: Path) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """(name, read-only array) of every tensor, in the order of the file, mapped and not read. bf16 comes as
    uint16.
    """
    entries = read_header(path)
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for name, entry in entries.items():
        dtype = np.dtype(NUMPY_TYPES[entry.dtype])
        flat = np.frombuffer(mapped, dtype, entry.bytes // dtype.itemsize, entry.start)
        yield name, flat.reshape(entry.shape)
