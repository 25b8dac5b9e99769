"""Timing whole steps on a GPU: replays by events, and inputs that stand for long contexts. Shared by benches and the tuner;
needs neither PyTorch nor Triton.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gptoss_compile.artifact import Artifact
from gptoss_compile.config import Bucket
from gptoss_compile.launch_plan import Operand, Step
from gptoss_compile.random_weights import device_parameters
from gptoss_compile.runtime.executor import Ints
from gptoss_compile.runtime.executor_cuda import CudaExecutor
from gptoss_compile.runtime.generate import Generator
from gptoss_compile.runtime.graphs import AnyPrepared

Inputs = dict[str, Ints]
PIECE = 1 << 30  # bytes of a cache that are filled at once
STEPS = 64  # of a decoding sequence that its pages leave room for


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one replay in each of several groups."""

    groups: tuple[float, ...]

    @property
    def ms(self) -> float:
        return statistics.median(self.groups)

    @property
    def best(self) -> float:
        return min(self.groups)


def time_in_turns(executor: CudaExecutor, ways: Sequence[Callable[[], None]], replays: int, groups: int = 5,
                  before: Callable[[], None] = lambda: None) -> list[Timing]:
    """`groups` times, each of several ways in turn: before(), then `replays` back to back, timed by events. So what changes
    with time, as clocks do, is the same for all. One more group, the first, warms up. Of several ranks the slowest counts.
    """
    devices = [rank.device for rank in executor.ranks]
    events = [(device.new_event(), device.new_event()) for device in devices]
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(groups + 1):
        for way, found in zip(ways, times, strict=True):
            before()
            for device, (start, _) in zip(devices, events, strict=True):
                device.use()
                device.record(start)
            for _ in range(replays):
                way()
            for device, (_, end) in zip(devices, events, strict=True):
                device.use()
                device.record(end)
            executor.synchronize("timing")
            found.append(max(d.milliseconds(*pair) for d, pair in zip(devices, events, strict=True)) / replays)
    return [Timing(tuple(found[1:])) for found in times]


def time_replays(executor: CudaExecutor, replay: Callable[[], None], replays: int, groups: int = 5,
                 before: Callable[[], None] = lambda: None) -> Timing:
    """`time_in_turns` of one way."""
    return time_in_turns(executor, [replay], replays, groups, before)[0]


def replays_for(ms: float, most: int, seconds: float = 0.12) -> int:
    """How many replays of `ms` fill a group."""
    return max(2, min(most, math.ceil(seconds * 1e3 / max(ms, 1e-3))))


def fill_caches(executor: CudaExecutor, artifact: Artifact) -> None:
    """Random keys and values of variance one: zeros would cost less power than what a model stores."""
    bucket = executor.buckets[0]
    for rank in executor.ranks:
        generator = Generator(artifact, rank.device)
        for cache in rank.plans[bucket].caches:
            shape = rank.true_shape(cache)
            jobs = []
            for at in range(0, shape.bytes, PIECE):
                count = min(PIECE, shape.bytes - at) // shape.item_bytes
                parameters = device_parameters(f"{cache.key}.{at}.sinks", (count,), cache.dtype, 0)
                jobs.append((str(cache.key), parameters, rank.address(bucket, cache) + at, 0))
            generator.run(jobs)


def time_twice(executor: CudaExecutor, bucket: Bucket, again: Container[int]) -> float:
    """Milliseconds of the bucket's step, on inputs that are in their places, if those of its plan's steps whose numbers are
    in `again` run twice, before themselves with weights of another layer."""
    layers = executor.config.num_layers
    prepared: list[list[list[AnyPrepared]]] = [[] for _ in executor.ranks]
    for rank, launches in zip(executor.ranks, prepared, strict=True):
        for number, step in enumerate(rank.plans[bucket].steps):
            launches += rank.prepare(bucket, [other_weights(step, layers), step] if number in again else [step])
    graph = executor.capture(f"{bucket} in part twice", prepared)
    once = time_replays(executor, graph.replay, 2, 1).ms
    ms = time_replays(executor, graph.replay, replays_for(once, STEPS, 0.06), 3).ms
    graph.close()
    return ms


def other_weights(step: Step, layers: int) -> Step:
    """The step with the weights of the layer half the model away, which no cache holds."""

    def other(value: Any) -> Any:
        if not (isinstance(value, Operand) and value.place == "weight" and str(value.key).startswith("layers.")):
            return value
        _, layer, name = str(value.key).split(".", 2)
        return replace(value, key=f"layers.{(int(layer) + layers // 2) % layers}.{name}")

    return replace(step, operands={name: other(value) for name, value in step.operands.items()})


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


def step_inputs(executor: CudaExecutor, bucket: Bucket, context: int) -> Inputs:
    """A decode step with so much context, or the first chunk of a prompt, as long as the bucket is."""
    if bucket.kind == "decode":
        return decode_inputs(executor, bucket, context, STEPS)
    return prompt_chunks(executor, bucket.tokens, [bucket])[0][1]
