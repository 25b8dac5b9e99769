"""All weights of an artifact in a GPU's memory, each laid out as the kernels read it.

A weight that the plans want laid out goes to a staging area first, with the scales that become part of it, and a kernel of
the artifact moves it to its place. Random weights are made on the device too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from gptoss_compile.artifact import Artifact
from gptoss_compile.launch_plan import ALIGNMENT, ITEM_BYTES, LAYOUTS, KernelLaunch, LaunchPlan, Layout, Weight
from gptoss_compile.runtime.cuda_driver import Device, load_kernel
from gptoss_compile.runtime.generate import generate_weights
from gptoss_compile.runtime.graphs import make_launch
from gptoss_compile.runtime.staging import Progress, upload_weights
from gptoss_compile.weights import constant

STAGING = 2 << 30  # bytes of weights that are laid out at a time, unless one alone is larger


def align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class DeviceWeights:
    """Memory for the weights of all plans. places: each one's address; first and bytes: where all of them lie."""

    def __init__(self, device: Device, plans: Iterable[LaunchPlan]) -> None:
        self._device = device
        self._weights: dict[str, Weight] = {}
        self._layouts: dict[str, Layout] = {}
        for plan in plans:
            self._weights |= {w.name: w for w in plan.weights}
            self._layouts |= plan.layouts
        absorbed = {name for layout in self._layouts.values() for name in layout.sources[1:]}
        sizes = {name: self._bytes(name) for name in self._weights if name not in absorbed}
        self.bytes = sum(map(align, sizes.values()))
        self.first = at = device.allocate(self.bytes, "weights")
        self.places: dict[str, int] = {}
        for name, size in sizes.items():
            self.places[name] = at
            at += align(size)

    def load(self, artifact: Artifact, rank: int, progress: Progress | None = None) -> None:
        """Fill them with a rank's weights. progress: (bytes brought to the device, of all)."""
        recipes = {recipe["name"]: recipe for recipe in artifact.recipes(rank)}
        missing = self._weights.keys() - recipes.keys()
        assert not missing, f"the artifact has no weights {sorted(missing)}"
        filler = _Filler(artifact, rank, self._device, self._weights, sum(map(self._stored_bytes, self._weights)), progress)
        filler.fill({name: place for name, place in self.places.items() if name not in self._layouts})
        if not self._layouts:
            return
        kernels = _LayoutKernels(artifact, self._device, len(self._layouts))
        batches = list(self._batches())
        size = max(sum(map(self._staged_bytes, batch)) for batch in batches)
        staging = self._device.allocate(size, "weights to be laid out")
        for batch in batches:
            at, staged = staging, {}
            for name in batch:
                for source in self._layouts[name].sources:
                    staged[source] = at
                    at += align(self._stored_bytes(source))
            filler.fill(staged)
            for name in batch:
                layout = self._layouts[name]
                kernels.run(layout.kind, self._weights[name].shape, [staged[s] for s in layout.sources], self.places[name])
            self._device.synchronize("laying weights out")
        kernels.close()
        self._device.release(staging)

    def _batches(self) -> Iterator[list[str]]:
        """The weights to be laid out, as many at a time as the staging area takes."""
        batch: list[str] = []
        used = 0
        for name in self._layouts:
            size = self._staged_bytes(name)
            if batch and used + size > STAGING:
                yield batch
                batch, used = [], 0
            batch.append(name)
            used += size
        yield batch

    def _staged_bytes(self, name: str) -> int:
        return sum(align(self._stored_bytes(source)) for source in self._layouts[name].sources)

    def _stored_bytes(self, name: str) -> int:
        weight = self._weights[name]
        return int(np.prod(weight.shape)) * ITEM_BYTES[weight.dtype]

    def _bytes(self, name: str) -> int:
        layout = self._layouts.get(name)
        return layout.bytes(self._weights[name].shape) if layout else self._stored_bytes(name)


class _Filler:
    """Puts a rank's weights, as they are stored, at addresses."""

    def __init__(self, artifact: Artifact, rank: int, device: Device, weights: dict[str, Weight], total: int,
                 progress: Progress | None) -> None:
        self._artifact, self._rank, self._device = artifact, rank, device
        self._done, self._total, self._progress = 0, total, progress
        self._dtypes = {name: weight.dtype for name, weight in weights.items()}
        self._random = artifact.weights.startswith("random:")
        if self._random:
            self._arrays: dict[str, Any] = {r["name"]: constant(r) for r in artifact.recipes(rank) if "parts" not in r}
        else:
            self._arrays = dict(artifact.open_weights(rank))

    def fill(self, places: dict[str, int]) -> None:
        if self._random:
            self._report(generate_weights(self._artifact, self._rank, self._device, places, self._dtypes))
        here = ((name, self._arrays[name]) for name in places if name in self._arrays)
        upload_weights(self._device, here, places, self._dtypes, self._report)

    def _report(self, size: int) -> None:
        self._done += size
        if self._progress:
            self._progress(self._done, self._total)


class _LayoutKernels:
    """The artifact's kernels that lay weights out, and the memory from which they learn shapes."""

    def __init__(self, artifact: Artifact, device: Device, count: int) -> None:
        planned = json.loads(artifact.file(LAYOUTS).read_bytes())
        self._device = device
        self._kernels = {name: load_kernel(artifact, device, name) for name in {p["binary"] for p in planned.values()}}
        self._launches = {kind: KernelLaunch(p["binary"], tuple(p["grid"]), tuple(p["args"]), (), False)
                          for kind, p in planned.items()}
        self._table = device.allocate(16 * count, "shapes of weights")
        self._host = device.allocate_pinned(16 * count, "shapes of weights")
        self._used = 0

    def run(self, kind: str, shape: Sequence[int], sources: Sequence[int], out: int) -> None:
        """Put a launch into the device's stream. shape: of the first source."""
        experts, rows, columns = (1, *shape) if kind == "tiles" else (shape[0], shape[1], shape[2] * 32)
        row = self._host[16 * self._used : 16 * (self._used + 1)]
        row[:] = np.array((experts, rows, columns, kind == "mxfp4_down"), np.int32).view(np.uint8)
        parameters = self._table + 16 * self._used
        self._used += 1
        self._device.upload(parameters, row, self._device.stream)
        launch = self._launches[kind]
        addresses = {"parameters": parameters, "source": sources[0], "scales": sources[-1], "out": out}
        make_launch(self._device, f"the layout {kind}", launch, self._kernels[launch.binary],
                    [addresses[name] for name in launch.args]).enqueue(self._device)

    def close(self) -> None:
        """Give the memory back, when all is done."""
        self._device.release(self._table)
        self._device.release_pinned(self._host)
