"""What a step is given and gives back: inputs in pinned memory, from which every rank copies, and the tokens it chose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from gptoss_compile.config import Bucket
from gptoss_compile.gumbel import NOTHING
from gptoss_compile.runtime.cuda_driver import Device
from gptoss_compile.runtime.executor import Ints
from gptoss_compile.runtime.weights_cuda import align


class InputBuffer:
    """A bucket's inputs, side by side, on each device and once in pinned memory, the page tables last: most steps leave them
    as they are, and then they are not sent.

    places: on each device the address of each input. copied: the events behind each device's last copy. arrays: in pinned
    memory, to be changed when these events have passed.
    """

    def __init__(self, devices: Sequence[Device], bucket: Bucket, shapes: Mapping[str, tuple[int, ...]]) -> None:
        sizes = {name: 4 * int(np.prod(shape)) for name, shape in shapes.items()}
        starts = dict(zip(sizes, accumulate(map(align, sizes.values()), initial=0), strict=False))
        total = sum(map(align, sizes.values()))
        self._devices = devices
        self._addresses = [device.allocate(total, f"inputs of {bucket}") for device in devices]
        self.places = [{name: address + start for name, start in starts.items()} for address in self._addresses]
        self._memory = devices[0].allocate_pinned(total, f"inputs of {bucket}")
        self._memory[:] = 0
        self.arrays: Mapping[str, Ints] = {
            name: self._memory[starts[name] : starts[name] + size].view(np.int32).reshape(shapes[name])
            for name, size in sizes.items()}
        self.arrays["source"][:], self.arrays["words"][:] = -1, NOTHING
        self.copied = [device.new_event() for device in devices]
        self._fixed, self._table = starts["window_table"], starts["full_table"]
        self._ring, self.columns = shapes["window_table"][1], shapes["full_table"][1]

    def send(self, rank: int, rows: int, columns: int) -> None:
        """Copy all but the page tables, and so many rows of these and columns of full_table."""
        device, address = self._devices[rank], self._addresses[rank]
        device.upload(address, self._memory[: self._fixed + 4 * rows * self._ring], device.stream)
        if rows:
            source, target = self._memory.ctypes.data + self._table, address + self._table
            device.upload_rows(target, source, rows, 4 * columns, 4 * self.columns)
        device.record(self.copied[rank])


class Landing:
    """Pinned memory for the tokens that a step chose, and the event behind their copy."""

    def __init__(self, device: Device, rows: int) -> None:
        self.memory = device.allocate_pinned(4 * rows, "chosen tokens")
        self.tokens: Ints = self.memory.view(np.int32)
        self.landed: Any = device.new_event()
