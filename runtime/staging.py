"""Weights to the GPU, from mapped files or a generator, through two pinned buffers: reading and copying overlap."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from gptoss_compile.random_weights import widen_bf16
from gptoss_compile.runtime.cuda_driver import Bytes, Device

Array = np.ndarray[Any, Any]
Progress = Callable[[int, int], None]

CHUNK = 32 << 20  # bytes of each buffer


def upload_weights(device: Device, weights: Iterable[tuple[str, Array]], places: Mapping[str, int],
                   dtypes: Mapping[str, str], report: Callable[[int], None] | None = None) -> None:
    """Copy each weight to its place, and wait. dtypes: what the plans compute with; bf16 is widened to fp32 where that
    is asked for, which is exact. report(bytes) is called after each piece."""
    stream = device.new_stream()
    buffers = [_Buffer(device, stream) for _ in range(2)]
    device.synchronize("preparing memory")  # the zeros must not come after what is copied here
    try:
        for name, array in weights:
            address = places[name]
            for piece in _pieces(array, dtypes[name]):
                buffers[0].send(piece, address)
                buffers.reverse()
                address += piece.nbytes
                if report:
                    report(piece.nbytes)
    finally:
        for buffer in buffers:
            buffer.close()
        device.api.cuStreamDestroy(stream)


def _pieces(array: Array, dtype: str) -> Iterator[Bytes]:
    """The array's bytes, in pieces that fit a buffer."""
    flat = array.reshape(-1)
    widen = array.dtype == np.uint16 and dtype == "fp32"
    step = CHUNK // (4 if widen else array.itemsize)
    for start in range(0, flat.size, step):
        part = flat[start : start + step]
        yield (widen_bf16(part) if widen else part).view(np.uint8)


class _Buffer:
    """Pinned memory and the event behind the last copy from it."""

    def __init__(self, device: Device, stream: Any) -> None:
        self._device, self._stream = device, stream
        self._memory = device.allocate_pinned(CHUNK, "staging")
        self._event = device.check(device.api.cuEventCreate(0), "creating an event")

    def send(self, piece: Bytes, address: int) -> None:
        self._wait()
        part = self._memory[: piece.nbytes]
        np.copyto(part, piece)
        self._device.upload(address, part, self._stream)
        self._device.check(self._device.api.cuEventRecord(self._event, self._stream), "recording an event")

    def _wait(self) -> None:
        self._device.check(self._device.api.cuEventSynchronize(self._event), "copying weights")

    def close(self) -> None:
        self._wait()
        self._device.api.cuEventDestroy(self._event)
        self._device.release_pinned(self._memory)
