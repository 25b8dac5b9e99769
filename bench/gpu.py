"""What the GPU benches share: timing by events, inputs that stand for long contexts, the bytes of a step, the yardstick.

Needs neither PyTorch nor Triton.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_compile.config import Bucket, ModelConfig
from gptoss_compile.launch_plan import KernelLaunch, Operand, Step
from gptoss_compile.random_weights import device_parameters
from gptoss_compile.runtime.executor import Ints
from gptoss_compile.runtime.executor_cuda import CudaExecutor
from gptoss_compile.runtime.generate import Generator
from gptoss_compile.runtime.graphs import Graph, Launch, make_launch

Inputs = dict[str, Ints]
EXPERT_WEIGHTS = {f"{at}{kind}" for at in ("weight", "up", "down") for kind in ("", "_scales", "_bias")} | {"scales", "bias"}
PIECE = 1 << 30  # bytes of a cache that are filled at once


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one replay: the median of several groups, and the fastest."""

    ms: float
    best: float


def time_replays(executor: CudaExecutor, replay: Callable[[], None], replays: int, groups: int = 5,
                 before: Callable[[], None] = lambda: None) -> Timing:
    """`groups` times: before(), then `replays` back to back, timed by events. One more group, the first, warms up."""
    device = executor.device
    device.use()
    start, end = device.new_event(), device.new_event()
    times = []
    for _ in range(groups + 1):
        before()
        device.record(start)
        for _ in range(replays):
            replay()
        device.record(end)
        device.wait_for(end, "timing")
        times.append(device.milliseconds(start, end) / replays)
    return Timing(statistics.median(times[1:]), min(times[1:]))


def replays_for(ms: float, most: int, seconds: float = 0.12) -> int:
    """How many replays of `ms` fill a group."""
    return max(2, min(most, math.ceil(seconds * 1e3 / max(ms, 1e-3))))


def fill_caches(executor: CudaExecutor, generator: Generator) -> None:
    """Random keys and values of variance one: zeros would cost less power than what a model stores."""
    bucket = executor.buckets[0]
    for cache in executor.plans[bucket].caches:
        shape = executor.true_shape(cache)
        jobs = []
        for at in range(0, shape.bytes, PIECE):
            count = min(PIECE, shape.bytes - at) // shape.item_bytes
            parameters = device_parameters(f"{cache.key}.{at}.sinks", (count,), cache.dtype, 0)  # type: ignore[arg-type]
            jobs.append((str(cache.key), parameters, executor.address(bucket, cache) + at, 0))
        generator.run(jobs)


# Inputs -------------------------------------------------------------------------------------------------------------


def fits(executor: CudaExecutor, sequences: int, context: int, steps: int) -> bool:
    """Whether the pools hold these sequences at once."""
    full, window = pages_needed(executor, context, steps)
    return (context <= executor.max_context and sequences * full < executor.num_pages
            and sequences * window < executor.num_window_pages)


def pages_needed(executor: CudaExecutor, context: int, steps: int) -> tuple[int, int]:
    """Pages of one sequence of `context` tokens in full layers, and in window layers while its last `steps` are made."""
    live = executor.config.sliding_window + steps + 1
    return -(-context // executor.page_size), min(-(-live // executor.page_size) + 1, executor.window_ring)


def decode_inputs(executor: CudaExecutor, bucket: Bucket, context: int, steps: int) -> Inputs:
    """Every sequence has pages of its own for `context` tokens, of which `steps` and one more are still to come."""
    count, rng = bucket.tokens, np.random.default_rng(context)
    plan = {str(operand.key): operand for operand in executor.plans[bucket].inputs}
    inputs = {name: np.zeros(operand.shape, np.int32) for name, operand in plan.items()}
    inputs["tokens"][:] = rng.integers(0, executor.config.vocab_size, count)
    inputs["positions"][:] = context - steps - 1
    inputs["sequences"][:] = np.arange(count)
    for sequence in range(count):
        place_pages(executor, inputs, sequence, context, steps)
    return inputs


def place_pages(executor: CudaExecutor, inputs: Inputs, sequence: int, context: int, steps: int) -> None:
    """Give a sequence its own pages: all of its full layers', and of window layers' those that `steps` steps reach."""
    full, window = pages_needed(executor, context, steps)
    inputs["full_table"][sequence, :full] = 1 + sequence * full + np.arange(full)
    first = max(full - window, 0)
    entries = np.arange(first, full)
    inputs["window_table"][sequence, entries % executor.window_ring] = 1 + sequence * window + entries % window


def prompt_chunks(executor: CudaExecutor, length: int, buckets: Iterable[Bucket]) -> list[tuple[Bucket, Inputs]]:
    """The steps of one prompt through extend buckets: the largest as long as it is filled, then the smallest that holds the
    rest."""
    buckets = sorted(buckets, key=lambda b: b.tokens)
    tokens = np.random.default_rng(length).integers(0, executor.config.vocab_size, length)
    steps, at = [], 0
    while at < length:
        bucket = next((b for b in buckets if b.tokens >= length - at), buckets[-1])
        count = min(bucket.tokens, length - at)
        inputs = {str(o.key): np.zeros(o.shape, np.int32) for o in executor.plans[bucket].inputs}
        inputs["positions"][:] = -1
        inputs["positions"][:count] = np.arange(at, at + count)
        inputs["tokens"][:count] = tokens[at : at + count]
        inputs["rows"][0] = count - 1
        place_pages(executor, inputs, 0, at + count, buckets[-1].tokens)
        steps.append((bucket, inputs))
        at += count
    return steps


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

    def watch(number: int, step: Step) -> None:
        if step.op == "norm_route":
            counts.append(len(np.unique(executor.read(bucket, step.outputs[1]))))

    executor.run_steps(bucket, inputs, watch)
    return statistics.fmean(counts)


# The yardstick ------------------------------------------------------------------------------------------------------


class Yardstick:
    """Chains of kernels that only read, over the memory of the weights; see read_kernel.py."""

    def __init__(self, executor: CudaExecutor, folder: Path) -> None:
        self._executor, self._kernels = executor, {}
        for path in sorted(folder.glob("*.json")):
            meta = json.loads(path.read_bytes())
            code = path.with_suffix(".cubin").read_bytes()
            self._kernels[path.stem] = executor.device.load_kernel(path.stem, code, meta)
        self.shapes = sorted({name.rpartition("-")[0] for name in self._kernels})
        if not self.shapes:
            raise ValueError(f"{folder} holds no read kernels; make them with bench/read_kernel.py")
        self._at = 0
        self._scratch = executor.device.allocate(1 << 20, "the yardstick")

    def chain(self, sizes: Iterable[tuple[int, bool]]) -> dict[str, Any]:
        """The fastest chain of one kernel for each (bytes, late): {"ms", "shape"}."""
        sizes, found = list(sizes), []
        for shape in self.shapes:
            graph = self._graph([launch for size, late in sizes for launch in self._reads(shape, size, late)])
            once = time_replays(self._executor, graph.replay, 2, 1).ms
            found.append((time_replays(self._executor, graph.replay, replays_for(once, 64), 3).ms, shape))
            graph.close()
        ms, shape = min(found)
        return {"ms": round(ms, 4), "shape": shape}

    def _graph(self, launches: Sequence[Launch]) -> Graph:
        return self._executor.capture("the yardstick", [launches])

    def _reads(self, shape: str, size: int, late: bool) -> list[Launch]:
        """One kernel that reads `size` bytes, more than the cache holds behind what was read before; or several, if that is
        more than there is."""
        first, total = self._executor.weights_range
        block = int(shape.partition("-")[0]) * 4
        name, left = f"{shape}-{'late' if late else 'early'}", -(-size // block)
        launches = []
        while left:
            part = min(left, total // block)
            if self._at + part * block > total:
                self._at = 0
            planned = KernelLaunch(name, (part, 1, 1), (), (), True)
            pointers = (first + self._at, self._scratch, self._scratch + (1 << 19))
            launches.append(make_launch(self._executor.device, "the yardstick", planned, self._kernels[name], pointers))
            self._at += part * block
            left -= part
        return launches
