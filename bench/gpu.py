"""What the GPU benches share beside `runtime.timing`: the bytes of a step, the yardstick. Needs no PyTorch and no Triton."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_compile.artifact import Artifact
from gptoss_compile.config import Bucket, ModelConfig
from gptoss_compile.launch_plan import KernelLaunch, Operand, Step
from gptoss_compile.runtime.executor_cuda import CudaExecutor
from gptoss_compile.runtime.graphs import AnyPrepared, make_launch
from gptoss_compile.runtime.rank_cuda import Rank
from gptoss_compile.runtime.timing import Inputs, replays_for, time_replays

Array = np.ndarray[Any, Any]
EXPERT_WEIGHTS = {f"{at}{kind}" for at in ("weight", "up", "down") for kind in ("", "_scales", "_bias")} | {"scales", "bias"}


# Bytes --------------------------------------------------------------------------------------------------------------


def touched_experts(experts: int, choices: int) -> float:
    """How many distinct experts uniformly random choices name, on average."""
    return experts * (1 - (1 - 1 / experts) ** choices)


def step_bytes(config: ModelConfig, step: Step, context: int, experts: float) -> int:
    """The bytes that a step of a decode plan must move if every sequence has `context` tokens and its layer touches so
    many distinct experts."""
    operands = {name: o for name, o in step.operands.items() if isinstance(o, Operand)}
    if step.op.startswith("moe_"):
        weights = sum(operands[name].bytes for name in EXPERT_WEIGHTS if name in operands)
        rest = sum(o.bytes for name, o in operands.items() if name not in EXPERT_WEIGHTS)
        return round(weights * experts / config.num_experts) + rest + sum(o.bytes for o in step.outputs)
    if "attention" in step.op:
        window = step.operands["window"]
        seen = min(int(window), context) if isinstance(window, int) and window else context
        _, two, heads, _, dim = operands["cache"].shape
        return step.moved + operands["positions"].shape[0] * seen * two * heads * dim * operands["cache"].item_bytes
    return step.moved


def seen_experts(executor: CudaExecutor, bucket: Bucket, inputs: Inputs) -> float:
    """Distinct experts a layer, the mean over layers, that a step on these inputs chooses."""
    counts = []

    def watch(rank: int, number: int, step: Step) -> None:
        if rank == 0 and step.op.endswith("norm_route"):
            counts.append(len(np.unique(executor.read(bucket, step.outputs[-1]))))

    executor.run_steps(bucket, inputs, watch)
    return statistics.fmean(counts)


# Artifacts ----------------------------------------------------------------------------------------------------------


def open_artifact(path: Path, ranks: int | None) -> Artifact:
    """The artifact, of so many ranks if that is asked for. Raises ValueError."""
    artifact = Artifact.open(path)
    if ranks is not None and artifact.ranks != ranks:
        raise ValueError(f"--tp {ranks}: it was compiled for {artifact.ranks}")
    return artifact


# Two runs of a model ------------------------------------------------------------------------------------------------

NEAR_TIE = 0.05  # of two router logits (whose variance is one): bf16 rounds them to 2^-8 of themselves


def cosines(one: Array, other: Array) -> Array:
    """Between the rows of two arrays, in fp64."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    found: Array = (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30)
    return found


# The yardstick ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Read:
    """A kernel of a chain: so many bytes; late: behind the kernel before. step: exchanges what this step of a plan does."""

    size: int
    late: bool = False
    step: Step | None = None


class Yardstick:
    """Chains of kernels that only read, over the memory of the weights; see read_kernel.py. Of several ranks each has one of
    its own, and all run at once. They wait for each other only where they exchange, in the bucket's own places."""

    def __init__(self, executor: CudaExecutor, folder: Path) -> None:
        self._executor = executor
        self._readers = [_Reader(rank, folder) for rank in executor.ranks]
        self.shapes = self._readers[0].shapes
        if not self.shapes:
            raise ValueError(f"{folder} holds no read kernels; make them with bench/read_kernel.py")

    def chain(self, bucket: Bucket, reads: Sequence[Sequence[Read]]) -> dict[str, Any]:
        """The fastest chain of each rank's reads: {"ms", "shape"}. Those that exchange do so with all of the bucket's steps,
        the last of which counts."""
        found = []
        for shape in self.shapes:
            graph = self._executor.capture("the yardstick", [
                [reader.launches(shape, bucket, read) for read in own]
                for reader, own in zip(self._readers, reads, strict=True)])
            once = time_replays(self._executor, graph.replay, 2, 1).ms
            found.append((time_replays(self._executor, graph.replay, replays_for(once, 64), 3).ms, shape))
            graph.close()
        ms, shape = min(found)
        return {"ms": round(ms, 4), "shape": shape}


class _Reader:
    """The kernels that read, on one rank's device."""

    def __init__(self, rank: Rank, folder: Path) -> None:
        self._rank, self._kernels = rank, {}
        for path in sorted(folder.glob("*.json")):
            meta = json.loads(path.read_bytes())
            code = path.with_suffix(".cubin").read_bytes()
            self._kernels[path.stem] = rank.device.load_kernel(path.stem, code, meta)
        self.shapes = sorted({name.rpartition("-")[0] for name in self._kernels})
        self._at = 0
        self._scratch = rank.device.allocate(1 << 20, "the yardstick")
        self._counts: dict[int, int] = {}  # partial sums of a rank -> where that number is

    def launches(self, shape: str, bucket: Bucket, read: Read) -> list[AnyPrepared]:
        """A read, and the exchange of its step: in the kernel that reads if the step has it in the kernel that computes,
        else by the step's own launches for it."""
        vector, out = self._scratch, self._scratch + (1 << 19)
        plain = partial(self._reads, shape, "late" if read.late else "early", read.size, (vector, out))
        if (step := read.step) is None:
            return plain()
        if step.op == "all_gather":
            return self._rank.prepare(bucket, [step])[0]
        slots = next((o for o in (step.operands.get("partial"), *step.outputs)
                      if isinstance(o, Operand) and o.place == "slots"), None)
        sums = ["partial" in launch.args for launch in step.launches]
        if any(sums[:-1]):
            prepared = self._rank.prepare(bucket, [step])[0]
            return [launch for launch, own in zip(prepared, sums, strict=True) if own] + plain()
        if slots is None:
            return plain()
        assert not read.late, f"{step.op} reads its weights early and exchanges"
        area, count = self._rank.areas[self._rank.number], self._count(math.prod(slots.shape))
        return self._reads(shape, "collect" if sums[-1] else "push", read.size,
                           (vector, area, self._rank.address(bucket, slots), count, out))

    def _reads(self, shape: str, kind: str, size: int, pointers: Sequence[int]) -> list[AnyPrepared]:
        """One kernel that reads `size` bytes, more than the cache holds behind what was read before; or several, if that is
        more than there is."""
        first, total = self._rank.weights.first, self._rank.weights.bytes
        block = int(shape.partition("-")[0]) * 4
        name, left = f"{shape}-{kind}", -(-size // block)
        if name not in self._kernels:
            raise ValueError(f"there is no read kernel {name}; make them again with bench/read_kernel.py")
        launches: list[AnyPrepared] = []
        while left:
            part = min(left, total // block)
            if self._at + part * block > total:
                self._at = 0
            planned = KernelLaunch(name, (part, 1, 1), (), (), True)
            launches.append(make_launch(self._rank.device, "the yardstick", planned, self._kernels[name],
                                        (first + self._at, *pointers)))
            self._at += part * block
            left -= part
        return launches

    def _count(self, values: int) -> int:
        """Where a number of partial sums is on the device."""
        if values not in self._counts:
            at = self._counts[values] = self._rank.device.allocate(4, "the yardstick")
            self._rank.upload(at, np.array([values], np.uint32).view(np.uint8))
        return self._counts[values]
