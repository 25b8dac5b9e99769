"""A GPU's buffers against those of the plan interpreter, step by step; then graphs against single launches, bit for bit.

The expected arrays are written by `python -m gptoss_compile.expected`, elsewhere: nothing here needs PyTorch. Every step
is given the interpreter's own results of the steps before it, so an error is seen where it is made and no other one is. Of
several ranks each one is held against its own file, and where they must hold the same bits, against the others.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gptoss_compile import gumbel
from gptoss_compile.config import Bucket
from gptoss_compile.launch_plan import Operand, Step
from gptoss_compile.random_weights import widen_bf16
from gptoss_compile.runtime.executor_cuda import CudaExecutor

Array = np.ndarray[Any, Any]

# (largest error of an element relative to itself plus the buffer's root mean square; relative error of the norm). A step
# rounds its bf16 results (2^-9 of an element) and, on the tensor cores, products' inputs; a wrong result is off by more.
LIMITS = {"bf16": (0.03, 0.01), "fp32": (0.02, 0.005), "i32": (0.0, 0.0), "u8": (0.0, 0.0)}
CHAIN_LIMIT = 0.1  # of a row of logits' norm, when every step works on what the GPU computed before


@dataclass(frozen=True)
class Comparison:
    """One buffer of a rank, found and wanted. element and norm: see LIMITS; for integers the share of unequal ones."""

    rank: int
    number: int
    op: str
    kernels: tuple[str, ...]
    buffer: str
    dtype: str
    element: float
    norm: float

    @property
    def good(self) -> bool:
        element, norm = LIMITS[self.dtype]
        return self.element <= element and self.norm <= norm


@dataclass
class Report:
    """What was seen of one bucket. chain: the norm error of the typical row of a whole step's logits, for a near tie of a
    router may send a token elsewhere; faults: what must not be."""

    bucket: str
    launches: int
    programmatic: int
    comparisons: list[Comparison] = field(default_factory=list)
    chain: float = float("nan")
    replays: int = 0
    replay_seconds: float = float("nan")
    faults: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.faults


def check_bucket(executor: CudaExecutor, bucket: Bucket, expected: Sequence[Mapping[str, Array]], replays: int) -> Report:
    """Run one step in every way there is and compare. expected: each rank's arrays."""
    plan = executor.plans[bucket]
    steps, around = plan.steps, [step for step in (plan.feed, plan.sample) if step]
    report = Report(bucket.name, sum(len(step.launches) for step in (*steps, *around)), executor.graphs[bucket].programmatic)
    inputs = {name.removeprefix("input."): value for name, value in expected[0].items() if name.startswith("input.")}
    _each_step(executor, bucket, inputs, expected, report)
    _restore_caches(executor, bucket, expected)
    logits = executor.run_steps(bucket, inputs, lambda *event: _same_on_all(executor, bucket, report, *event))
    caches = _caches(executor, bucket)
    rows = inputs["positions"] >= 0 if bucket.kind == "decode" else slice(None)  # others are of padding
    wanted = expected[0][f"step.{len(steps) - 1}.0"]
    report.chain = float(np.median([errors_of(a, b, "fp32")[1] for a, b in zip(logits[rows], wanted[rows], strict=True)]))
    if not report.chain <= CHAIN_LIMIT:
        report.faults.append(f"the whole step's logits are {report.chain:.2e} off")
    _restore_caches(executor, bucket, expected)
    _replay(executor, bucket, inputs, logits, replays, report)
    _choices(executor, bucket, inputs, logits, report)
    if any(not np.array_equal(a, b) for a, b in zip(caches, _caches(executor, bucket), strict=True)):
        report.faults.append("the graph leaves other keys and values than its launches one by one")
    if any(executor.workspace(rank.number).any() for rank in executor.ranks):
        report.faults.append("a kernel left its counters other than zero")
    return report


def _each_step(executor: CudaExecutor, bucket: Bucket, inputs: Mapping[str, Array], expected: Sequence[Mapping[str, Array]],
               report: Report) -> None:
    used = inputs["positions"] >= 0

    def watch(rank: int, number: int, step: Step) -> None:
        known, kernels = expected[rank], tuple(launch.binary for launch in step.launches)
        for index, operand in enumerate(step.outputs):
            found, name = executor.read(bucket, operand, rank), f"step.{number}.{index}"
            if operand.place == "cache":
                before, change = known[str(operand.key)], known[f"{operand.key}.change"]
                wanted = _with_pages(found, (before.view(change.dtype) ^ change).view(before.dtype))
                errors = errors_of(found[1:], wanted[1:], operand.dtype)  # page 0 takes whatever padding leaves
            else:
                wanted = known[name]
                rows = used if wanted.shape[0] == len(used) else slice(None)  # rows of padding may hold anything
                errors = errors_of(found[rows], wanted[rows], operand.dtype)
            executor.write(bucket, operand, wanted, rank)
            seen = Comparison(rank, number, step.op, kernels, _describe(operand, index), operand.dtype, *errors)
            report.comparisons.append(seen)
            if not seen.good:
                where = f" of rank {rank}" if len(executor.ranks) > 1 else ""
                report.faults.append(f"step {number}{where} {step.op} ({', '.join(seen.kernels)}): {seen.buffer} is off by "
                                     f"{seen.element:.2e} (element), {seen.norm:.2e} (norm)")

    _restore_caches(executor, bucket, expected)
    executor.run_steps(bucket, inputs, watch)


def _same_on_all(executor: CudaExecutor, bucket: Bucket, report: Report, rank: int, number: int, step: Step) -> None:
    """Behind an exchange all ranks must hold the same: the residual stream, or all logits."""
    if rank and step.op.startswith(("reduce_", "all_gather")) and step.op != "reduce_norm_head":
        first = executor.plans[bucket].steps[number].outputs[0]
        if executor.read(bucket, step.outputs[0], rank).tobytes() != executor.read(bucket, first).tobytes():
            report.faults.append(f"step {number} {step.op}: rank {rank} holds other bits in out0 than rank 0")


def _replay(executor: CudaExecutor, bucket: Bucket, inputs: Mapping[str, Array], logits: Array, replays: int,
            report: Report) -> None:
    """The graph, again and again on the same inputs (writing the same keys again): always the same bits."""
    executor.poison(bucket)
    seconds = []
    for _ in range(replays):
        start = time.perf_counter()
        found = executor.run(bucket, inputs)
        seconds.append(time.perf_counter() - start)
        report.replays += 1
        if not np.array_equal(found.view(np.uint32), logits.view(np.uint32)):
            report.faults.append(f"replay {report.replays} gives other logits than the launches one by one")
            break
    report.replay_seconds = float(np.median(seconds))


def _choices(executor: CudaExecutor, bucket: Bucket, inputs: Mapping[str, Array], logits: Array, report: Report) -> None:
    """The graph again, its tokens fed and others chosen, greedily and at temperatures: what was fed is where it belongs, and
    what was chosen has the largest value, but for what a logarithm's last bits may change."""
    plan, rows, vocab = executor.plans[bucket], bucket.rows, executor.config.vocab_size
    sampled, tokens = _operand(plan.sample, "sampled"), _operand(plan.feed, "tokens")
    temperatures = np.resize((0, 1, -1, 0.3), rows).tolist()
    asked = np.stack([gumbel.words(t, vocab - row % 3, 12345678901 * row, row) for row, t in enumerate(temperatures)])
    fed = np.resize(np.array(inputs["tokens"][::-1], np.int32), executor.true_shape(sampled).shape)
    for rank in executor.ranks:
        executor.write(bucket, sampled, fed, rank.number)
    source = np.where(inputs["positions"] >= 0, np.arange(bucket.tokens) % rows, -1).astype(np.int32)
    expected = np.where(source >= 0, fed[source], inputs["tokens"])
    executor.upload(bucket, {**inputs, "source": source, "words": asked})
    executor.graphs[bucket].replay()
    if not all(np.array_equal(executor.read(bucket, tokens, rank.number), expected) for rank in executor.ranks):
        report.faults.append("tokens of the step before do not come where they belong")
    executor.run(bucket, {**inputs, "words": asked})
    chosen, *others = [executor.read(bucket, sampled, rank.number)[:rows] for rank in executor.ranks]
    if not all(np.array_equal(other, chosen) for other in others):
        report.faults.append("ranks choose different tokens")
    for row in np.flatnonzero(chosen != gumbel.choose(logits, asked)).tolist():
        temperature, (_, limit, *key) = temperatures[row], asked[row].tolist()
        values = logits[row, :limit] + np.float32(max(temperature, 0)) * gumbel.noise(limit, *key)
        if temperature <= 0 or not 0 <= chosen[row] < limit or values[chosen[row]] < values.max() - 1e-4:
            report.faults.append(f"row {row}: token {chosen[row]} is chosen at temperature {temperature}")


def _operand(step: Step | None, name: str) -> Operand:
    value = step.operands[name] if step else None
    assert isinstance(value, Operand)
    return value


def _describe(operand: Operand, index: int) -> str:
    return str(operand.key) if operand.place == "cache" else f"out{index} {operand.dtype}{list(operand.shape)}"


def errors_of(found: Array, wanted: Array, dtype: str) -> tuple[float, float]:
    """(element, norm) as in LIMITS; infinite where something found is not finite."""
    if dtype in ("i32", "u8"):
        share = float((found != wanted).mean())
        return share, share
    a, b = (widen_bf16(x).astype(np.float64) if dtype == "bf16" else x.astype(np.float64) for x in (found, wanted))
    if not np.isfinite(a).all():
        return float("inf"), float("inf")
    norm = max(float(np.sqrt((b * b).sum())), 1e-30)
    rms = norm / max(b.size, 1) ** 0.5
    gap = np.abs(a - b)
    return float((gap / (np.abs(b) + rms)).max(initial=0.0)), float(np.sqrt((gap * gap).sum()) / norm)


def _caches(executor: CudaExecutor, bucket: Bucket) -> list[Array]:
    return [rank.read(bucket, cache) for rank in executor.ranks for cache in rank.plans[bucket].caches]


def _restore_caches(executor: CudaExecutor, bucket: Bucket, expected: Sequence[Mapping[str, Array]]) -> None:
    for rank, known in zip(executor.ranks, expected, strict=True):
        for cache in rank.plans[bucket].caches:
            rank.write(bucket, cache, _with_pages(rank.read(bucket, cache), known[str(cache.key)]))


def _with_pages(pool: Array, pages: Array) -> Array:
    """The pool with its first pages replaced."""
    assert len(pages) <= len(pool), f"the expected values fill {len(pages)} pages, the executor has {len(pool)}"
    return np.concatenate((pages, pool[len(pages):]))
