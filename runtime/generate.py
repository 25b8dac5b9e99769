"""Random weights made on the device by a kernel of the artifact: seconds of a processor become milliseconds of a GPU."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import numpy as np

from gptoss_compile.artifact import Artifact
from gptoss_compile.launch_plan import ITEM_BYTES, RANDOM_WEIGHTS, Cut, KernelLaunch
from gptoss_compile.logical import logical_tensors
from gptoss_compile.random_weights import DeviceParameters, device_parameters
from gptoss_compile.runtime.cuda_driver import Device, Kernel, load_kernel
from gptoss_compile.runtime.graphs import make_launch
from gptoss_compile.weights import parts_of

WORD = 4  # bytes


class Generator:
    """The kernel that fills memory with random values; see `kernels/generate.py`."""

    def __init__(self, artifact: Artifact, device: Device) -> None:
        planned = json.loads(artifact.file(RANDOM_WEIGHTS).read_bytes())
        self._device = device
        self._launch = KernelLaunch(planned["binary"], tuple(planned["grid"]), ("parameters", "out"), (), False)
        self._kernel: Kernel = load_kernel(artifact, device, planned["binary"])

    def run(self, jobs: Sequence[tuple[str, DeviceParameters, int, int]]) -> None:
        """Fill memory and wait. jobs: (what it is, parameters, an address aligned to 256, byte to start at)."""
        device = self._device
        rows = np.stack([parameters.row(start // WORD) for _, parameters, _, start in jobs])
        table = device.allocate(rows.nbytes, "parameters of random values")
        host = device.allocate_pinned(rows.nbytes, "parameters of random values")
        host[:] = rows.reshape(-1).view(np.uint8)
        device.upload(table, host, device.stream)
        for i, (what, _, address, _) in enumerate(jobs):
            pointers = (table + i * rows.shape[1] * WORD, address)
            make_launch(device, f"the generator of {what}", self._launch, self._kernel, pointers).enqueue(device)
        device.synchronize("generating random values")
        device.release_pinned(host)
        device.release(table)


def generate_weights(artifact: Artifact, rank: int, device: Device, places: Mapping[str, int],
                     dtypes: Mapping[str, str]) -> int:
    """A rank's random weights that have a place, there, equal to `weights.read_weights` bit for bit. Their bytes."""
    tensors, seed = logical_tensors(artifact.config), artifact.manifest["weights"]["seed"]
    jobs, total = [], 0
    for recipe in (r for r in artifact.recipes(rank) if "parts" in r and r["name"] in places):
        dtype, start = dtypes[recipe["name"]], 0
        for part, cut in parts_of(recipe):
            shape = tensors[part].shape
            assert start % WORD == 0, f"{part} does not start at a word of {recipe['name']}"
            taken = Cut(**cut) if cut else None
            parameters = device_parameters(part, shape, dtype, seed, taken)
            jobs.append((part, parameters, places[recipe["name"]], start))
            start += math.prod(taken.shape(shape) if taken else shape) * ITEM_BYTES[dtype]
        total += start
    if jobs:
        Generator(artifact, device).run(jobs)
    return total
