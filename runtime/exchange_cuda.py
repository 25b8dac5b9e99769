"""What the ranks of one model share on several GPUs: areas through which their kernels exchange, and a watch over them.

Every rank has an area of its own, with the same layout on all ranks, that all can read and write. It begins with a header
(see `HEADER`) by which kernels find each other's areas, and which numbers the steps. A kernel that waits for another rank
gives up after `limit_ms`, by its own clock, and says in its rank's report whom it waited for; what it computes from there on
is of no use. So a rank that fails or stalls ends the step on all others, and here, but never hangs them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from gptoss_compile.launch_plan import HEADER_BYTES
from gptoss_compile.runtime.cuda_driver import CudaError, Device

HEADER = np.dtype([  # at the start of an area; the kernels' side is kernels/sm90/exchange.cuh
    ("base", np.uint64, (8,)),  # where this rank finds each rank's area
    ("step", np.uint32),  # the number of the step that runs, which its last exchange increments; never 0
    ("rank", np.uint32), ("ranks", np.uint32), ("limit_ms", np.uint32),
    ("report", np.uint64)])  # address of a u32: 0, or one more than the rank that was waited for in vain
LIMIT_MS = 1000  # for which kernels wait for each other
PATIENCE = 10.0  # seconds for which the host waits for a step of which no rank reports anything
PAUSE = 20e-6  # seconds between two looks; threads that serve requests compute meanwhile


class Exchange:
    """The areas of all ranks, one a device. areas: their addresses; failed: whether a rank was found to have failed."""

    def __init__(self, devices: Sequence[Device], size: int) -> None:
        assert len(devices) <= HEADER["base"].shape[0], "more ranks than a header has room for"
        self._devices, self.failed = devices, False
        self.areas = [device.allocate(max(size, HEADER_BYTES), "what ranks exchange") for device in devices]
        words = devices[0].allocate_pinned(4 * len(devices), "reports of ranks")
        words[:] = 0
        self.reports = words.view(np.uint32)
        for rank, device in enumerate(devices):
            header = np.zeros(1, HEADER)
            header["base"][0, : len(devices)] = self.areas
            header["step"], header["rank"], header["ranks"], header["limit_ms"] = 1, rank, len(devices), LIMIT_MS
            header["report"] = device.mapped(words) + 4 * rank
            memory = device.allocate_pinned(header.nbytes, "a header")
            memory[:] = header.view(np.uint8)
            device.upload(self.areas[rank], memory, device.stream)
            device.synchronize("writing a header")
            device.release_pinned(memory)

    def wait_for(self, rank: int, event: Any, doing: str) -> None:
        """Wait until a rank has passed an event. Raises CudaError, which names the rank, as soon as one has failed or has
        not answered another."""
        deadline = time.perf_counter() + PATIENCE
        while not self._passed(rank, event, doing):
            self.check(doing)
            self._keep(deadline, [rank], doing)
        self._check_reports(doing)

    def settle(self, doing: str) -> None:
        """Wait until all ranks have done all that they were given. Raises CudaError as `wait_for` does."""
        deadline = time.perf_counter() + PATIENCE
        while busy := self.check(doing):
            self._keep(deadline, busy, doing)

    def check(self, doing: str) -> list[int]:
        """The ranks that have something to do. Raises CudaError if one has failed."""
        busy = []
        for rank, device in enumerate(self._devices):
            try:
                if not device.idle(doing):
                    busy.append(rank)
            except CudaError as error:
                raise self._failure(rank, str(error)) from None
        self._check_reports(doing)
        return busy

    def _check_reports(self, doing: str) -> None:
        if self.reports.any():
            raise self._failure(self._missed(), f"did not answer within {LIMIT_MS / 1000:.1f} s, {doing}")

    def _passed(self, rank: int, event: Any, doing: str) -> bool:
        try:
            return self._devices[rank].passed(event, doing)
        except CudaError as error:
            raise self._failure(rank, str(error)) from None

    def _keep(self, deadline: float, busy: Sequence[int], doing: str) -> None:
        if time.perf_counter() > deadline:
            raise self._failure(busy[0], f"did not finish within {PATIENCE:.1f} s, {doing}")
        time.sleep(PAUSE)

    def _missed(self) -> int:
        """The rank that others waited for; if they waited for each other, one that itself waited for nobody."""
        named = [int(report) - 1 for report in self.reports if report]
        return min(set(named), key=lambda rank: (bool(self.reports[rank]), -named.count(rank)))

    def _failure(self, rank: int, what: str) -> CudaError:
        self.failed = True
        return CudaError(f"rank {rank} ({self._devices[rank]}) {what}")
