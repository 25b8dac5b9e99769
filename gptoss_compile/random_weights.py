"""Random weights from a counter: any part of any tensor from its name alone, bit for bit. Numpy only.

The generator, for a CPU or a GPU. All arithmetic is on unsigned 32-bit words, modulo 2^32; elements are
numbered in row-major order.

    (k0, k1) = the first eight bytes of sha256(f"{seed}:{name}"), two little-endian words
    word(c)  = mix(mix(c ^ k0) + k1)                                   for the counter c = 0, 1, 2, ...
    mix(x)   : x ^= x >> 16; x *= 0x7FEB352D; x ^= x >> 15; x *= 0x846CA68B; x ^= x >> 16   (lowbias32)

A u8 tensor takes four values from each word, a bf16 tensor two, low bits first:

    blocks   the byte itself: two e2m1 values, uniform over the sixteen codes (root mean square 2.93)
    scales   e + (byte & 3), where e = 126 - round(log2(2.93 sqrt(inputs))): powers of two around the one
             that gives outputs of variance one (2^-8 to 2^-5 for 2,880 inputs)
    bf16     (offset + h) * scale in fp32, rounded to nearest even, with h the signed 16-bit half word. scale
             is sqrt(3 / inputs) / 2^15 for matrices (outputs of variance one), so too for `embed` and `sinks`
             with inputs = 1, and 2^-18 for biases (|b| < 1/8). Norm weights lie in 3/4 .. 5/4: offset 2^17,
             scale 2^-17.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptoss_compile.launch_plan import Cut

Array = np.ndarray[Any, Any]
BYTES, BF16, FP32 = range(3)  # how a device makes values of words
PARAMETERS = 12  # words of the kernel's `parameters`
_WORDS = 1 << 16  # at a time, so that intermediate results stay in the processor's cache


def random_values(name: str, shape: Sequence[int], dtype: str, seed: int,
                  start: int = 0, stop: int | None = None) -> Array:
    """Rows start..stop (of axis 0) of the random tensor with this logical name and full shape.

    bf16 comes as uint16 bits; fp32 holds the same values, widened. Raises ValueError for other dtypes than these and u8.
    """
    row = math.prod(shape[1:])
    stop = shape[0] if stop is None else stop
    first, count = start * row, (stop - start) * row
    per_word = _per_word(dtype)
    skip = first % per_word
    out = np.empty(count + skip, np.uint8 if dtype == "u8" else np.uint16)
    for at in range(0, len(out), _WORDS * per_word):
        piece = out[at:at + _WORDS * per_word]
        words = _words(name, seed, (first - skip + at) // per_word, -(-len(piece) // per_word))
        if dtype == "u8":
            piece[:] = _bytes(name, shape, words.astype("<u4", copy=False).view(np.uint8)[:len(piece)])
        else:
            piece[:] = _floats(name, shape, words.astype("<u4", copy=False).view(np.int16)[:len(piece)])
    values: Array = out[skip:].reshape(stop - start, *shape[1:])
    return widen_bf16(values) if dtype == "fp32" else values


@dataclass(frozen=True)
class DeviceParameters:
    """What a device needs to make a tensor: the generator's keys, how many words of it are used, and their meaning.

    mode BYTES: each byte of a word is (byte & a's) + b's; else each half is (half + a) · b, with b the bits of an fp32.
    A part of a tensor is made of rows of `width` units, the first from unit `offset` on and the next `stride` units behind
    each other; a unit is a word, or, where words do not fit, one value (`single`). width 0: the whole tensor.
    """

    key0: int
    key1: int
    counters: int
    mode: int
    a: int
    b: int
    width: int = 0
    stride: int = 0
    offset: int = 0
    single: bool = False

    def row(self, first: int) -> Array:
        """i32 [PARAMETERS], the kernel's `parameters`; first: of the words of 32 bits that are written."""
        values = (self.key0, self.key1, self.counters, first, self.mode, self.a, self.b,
                  self.width, self.stride, self.offset, self.single, 0)
        return np.array(values, np.int64).astype(np.uint32).view(np.int32)


def device_parameters(name: str, shape: Sequence[int], dtype: str, seed: int,
                      cut: Cut | None = None) -> DeviceParameters:
    """How a device makes `random_values(name, shape, dtype, seed)`, or a part of it; see `kernels/generate.py`."""
    key0, key1 = (int(k) for k in _key(name, seed))
    per_word, count = _per_word(dtype), math.prod(shape)
    width = stride = offset = 0
    single = False
    if cut:
        inner = math.prod(shape[cut.axis + 1:])
        width, stride, offset = (cut.stop - cut.start) * inner, shape[cut.axis] * inner, cut.start * inner
        count = math.prod(cut.shape(shape))
        single = any(x % per_word for x in (width, stride, offset))
        if not single:
            width, stride, offset = width // per_word, stride // per_word, offset // per_word
    counters = -(-count // per_word)
    if dtype == "u8":
        mode = BYTES
        a, b = (x * 0x01010101 for x in ((255, 0) if name.endswith(".blocks") else (3, _lowest_scale(shape))))
    else:
        a, scale = _distribution(name, shape)
        mode, b = BF16 if dtype == "bf16" else FP32, int(np.float32(scale).view(np.uint32))
    return DeviceParameters(key0, key1, counters, mode, a, b, width, stride, offset, single)


def _per_word(dtype: str) -> int:
    """How many values a word of the counter makes."""
    if dtype not in ("bf16", "fp32", "u8"):
        raise ValueError(f"random weights are bf16, fp32 or u8, not {dtype}")
    return 4 if dtype == "u8" else 2


def round_bf16(values: Array) -> Array:
    """The bits (uint16) of finite fp32 values rounded to bf16, to nearest even."""
    bits = values.view(np.uint32)
    rounded: Array = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def widen_bf16(bits: Array) -> Array:
    """The fp32 values of bf16 bits (uint16)."""
    wide: Array = (bits.astype(np.uint32) << 16).view(np.float32)
    return wide


def _key(name: str, seed: int) -> Array:
    return np.frombuffer(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "<u4")


def _words(name: str, seed: int, first: int, count: int) -> Array:
    key = _key(name, seed)
    words = np.arange(first, first + count, dtype=np.uint64).astype(np.uint32)
    words ^= key[0]
    _mix(words)
    words += key[1]
    _mix(words)
    return words


def _mix(x: Array) -> None:
    x ^= x >> 16
    x *= np.uint32(0x7FEB352D)
    x ^= x >> 15
    x *= np.uint32(0x846CA68B)
    x ^= x >> 16


def _bytes(name: str, shape: Sequence[int], raw: Array) -> Array:
    if name.endswith(".blocks"):
        return raw
    assert name.endswith(".scales"), name
    values: Array = (raw & 3) + np.uint8(_lowest_scale(shape))
    return values


def _lowest_scale(shape: Sequence[int]) -> int:
    return 126 - round(math.log2(2.93 * math.sqrt(32 * shape[-1])))


def _floats(name: str, shape: Sequence[int], halves: Array) -> Array:
    offset, scale = _distribution(name, shape)
    values: Array = (halves.astype(np.int32) + offset).astype(np.float32) * np.float32(scale)
    return round_bf16(values)


def _distribution(name: str, shape: Sequence[int]) -> tuple[int, float]:
    """(offset, scale) of a dense tensor's values."""
    if name.endswith("norm.weight"):
        return 1 << 17, 2.0**-17
    if name.endswith(".bias"):
        return 0, 2.0**-18
    inputs = 1 if name.endswith("sinks") or name == "embed.weight" else shape[-1]
    return 0, math.sqrt(3 / inputs) / 2**15
