"""`gptoss-compile tune`: measures what kernels leave to choose, inside whole steps on the GPU here. See docs/tuning.md."""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_compile.artifact import Artifact
from gptoss_compile.checkpoint import Checkpoint
from gptoss_compile.compiler import CompileError, Job, Progress, Request, compile_checkpoint, default_buckets, tool_versions
from gptoss_compile.config import Bucket
from gptoss_compile.kernels.common import cdiv
from gptoss_compile.kernels.spec import AnySource
from gptoss_compile.kernels.tuned import Choice, Entry, Name, table
from gptoss_compile.launch_plan import Operand, Step
from gptoss_compile.runtime.check import LIMITS, errors_of
from gptoss_compile.runtime.cuda_driver import CudaError, Device
from gptoss_compile.runtime.executor_cuda import CudaExecutor
from gptoss_compile.runtime.graphs import RankGraphs
from gptoss_compile.runtime.timing import (
    STEPS,
    Timing,
    fill_caches,
    fits,
    replays_for,
    step_inputs,
    time_in_turns,
    time_replays,
    time_twice,
)
from gptoss_compile.variants import Kernels, Variants

Array = np.ndarray[Any, Any]

SLOWER = 1.02  # of the incumbent's time in a short look: not worth a longer one
LEAST_GAIN = 1e-3  # of a step's time


@dataclass(frozen=True)
class Race:
    """Milliseconds of a step with the incumbent and with a rival, and how much their difference varies."""

    before: float
    after: float
    noise: float

    @property
    def won(self) -> bool:
        return self.before - self.after > max(self.noise, LEAST_GAIN * self.before)

    @classmethod
    def of(cls, before: Timing, after: Timing) -> Race:
        """By the groups, which were timed in turns: noise is the distance of the quartiles of their differences."""
        gains = [a - b for a, b in zip(before.groups, after.groups, strict=True)]
        low, _, high = statistics.quantiles(gains, n=4)
        return cls(before.ms, before.ms - statistics.median(gains), high - low)


def rounded(race: Race) -> dict[str, float]:
    return {f"{name}_ms": round(value, 5) for name, value in asdict(race).items()}


@dataclass(frozen=True)
class Tuned:
    """What came of one choice. share: of the step, what made it; before and after: milliseconds of the step."""

    choice: Choice
    share: float
    best: Any
    before: float
    after: float
    measured: int
    skipped: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        choice, (kernel, key) = self.choice, self.choice.name
        return {"kernel": kernel, "key": key, "share": round(self.share, 4), "rule": choice.entry(choice.rule),
                "best": choice.entry(self.best), "before_ms": round(self.before, 5), "after_ms": round(self.after, 5),
                "measured": self.measured, "skipped": self.skipped}


class Contest:
    """A bucket's step on the GPU. Between challenges the executor holds the incumbent, which `taken` describes."""

    def __init__(self, executor: CudaExecutor, variants: Variants, taken: Mapping[Name, Any], files: Mapping[str, bytes],
                 context: int) -> None:
        self._executor, self._variants, self._bucket, self._files = executor, variants, variants.bucket, files
        self._inputs = step_inputs(executor, self._bucket, context)
        self.taken, self._first = dict(taken), dict(taken)
        self._plans, before = variants.plans(taken), executor.graphs[self._bucket]
        executor.install(self._bucket, self._plans, self._files)
        before.close()
        executor.upload(self._bucket, self._inputs)
        self.ms = time_replays(executor, executor.graphs[self._bucket].replay, 2, 1).ms

    def shares(self, names: Iterable[Name]) -> dict[Name, float]:
        """Of each choice, what the steps that make it take of the whole."""
        whole, steps = time_twice(self._executor, self._bucket, ()), self._variants.steps
        return {name: time_twice(self._executor, self._bucket, steps[name]) / whole - 1 for name in names}

    def results(self, number: int) -> tuple[list[Array], Array]:
        """(what a step of the plans gives, rank by rank; the logits) of a run whose memory was poisoned before."""
        found: list[Array] = []

        def watch(rank: int, at: int, step: Step) -> None:
            if at == number:
                found.extend(self._executor.read(self._bucket, o, rank) for o in new_outputs(step))

        return found, self._executor.run_steps(self._bucket, self._inputs, watch)

    def challenge(self, name: Name, candidate: Any, wanted: tuple[list[Array], Array]) -> Race | str:
        """A candidate against the incumbent, whose place it takes if it wins; what is wrong with it, if that is why not.

        wanted: `results` of the first step that the choice changes. Up to there both have the same bits.
        """
        executor, bucket, incumbent = self._executor, self._bucket, self._executor.graphs[self._bucket]
        taken = {**self.taken, name: candidate}
        plans = self._variants.plans(taken)
        try:
            rival = executor.install(bucket, plans, self._files)
        except CudaError as error:
            return str(error)
        number = self._variants.steps[name][0]
        found = self.results(number)
        fault = difference([plan.steps[number] for plan in plans], found, wanted)
        if not fault and not np.array_equal(executor.run(bucket, self._inputs), found[1]):
            fault = "gives other logits as a graph than kernel by kernel"
        race = None if fault else self._race(incumbent, rival)
        if race and race.won:
            incumbent.close()
            self._plans, self.taken = plans, taken
        else:
            rival.close()
            executor.install(bucket, self._plans, self._files)
            incumbent.close()
        return race or fault or ""

    def against_first(self) -> Race:
        """The step as it was at first against what it is now."""
        now = self._executor.graphs[self._bucket]
        first = self._executor.install(self._bucket, self._variants.plans(self._first), self._files)
        race = Race.of(*self._time(first, now, 0.05, 9))
        first.close()
        self._executor.install(self._bucket, self._plans, self._files)
        now.close()
        return race

    def _race(self, incumbent: RankGraphs, rival: RankGraphs) -> Race:
        short = Race.of(*self._time(incumbent, rival, 0.02, 3))
        if short.after > SLOWER * short.before:
            return short
        return Race.of(*self._time(incumbent, rival, 0.05, 9))

    def _time(self, incumbent: RankGraphs, rival: RankGraphs, seconds: float, groups: int) -> list[Timing]:
        return time_in_turns(self._executor, [incumbent.replay, rival.replay], replays_for(self.ms, STEPS, seconds), groups)


def new_outputs(step: Step) -> list[Operand]:
    """What a step makes, but for what it updates."""
    return [operand for operand in step.outputs if operand.place in ("arena", "exchange", "slots")]


def difference(steps: Sequence[Step], found: tuple[list[Array], Array], wanted: tuple[list[Array], Array]) -> str | None:
    """What is wrong with results of the ranks' steps, if anything. Limits are those that the plan interpreter's are compared
    within.

    A step's are compared element by element. The logits need only be numbers: behind layers of random weights, where routers
    often all but tie, sums in another order send a token elsewhere.
    """
    outputs = [operand for step in steps for operand in new_outputs(step)]
    for operand, mine, theirs in zip(outputs, found[0], wanted[0], strict=True):
        if not all(a <= b for a, b in zip(errors_of(mine, theirs, operand.dtype), LIMITS[operand.dtype], strict=True)):
            return f"gives other results in {steps[0].op}"
    return None if np.isfinite(found[1]).all() else "gives logits that are no numbers"


def tune_bucket(contest: Contest, variants: Variants, names: Iterable[Name]) -> list[Tuned]:
    """Coordinate descent: each choice in turn, the one that takes most of the step first, on top of what was kept before."""
    shares = contest.shares(names)
    return [tune_choice(contest, variants, name, shares[name]) for name in sorted(names, key=lambda name: -shares[name])]


def tune_choice(contest: Contest, variants: Variants, name: Name, share: float) -> Tuned:
    choice, wanted = variants.choices[name], contest.results(variants.steps[name][0])
    best, measured, before, ratio = choice.taken, 0, contest.ms, 1.0
    skipped: list[str] = []
    for candidate in choice.candidates:
        if candidate == choice.taken:
            continue
        race = variants.fault(name, candidate) or contest.challenge(name, candidate, wanted)
        if isinstance(race, str):
            skipped.append(f"{describe(choice, candidate)} {race}")
            continue
        if not measured:
            before = race.before
        measured += 1
        if race.won:
            best, ratio = candidate, ratio * race.after / race.before
    return Tuned(choice, share, best, before, before * ratio, measured, tuple(skipped))


def describe(choice: Choice, candidate: Any) -> str:
    return " ".join(f"{name}={value}" for name, value in choice.entry(candidate).items())


# The command --------------------------------------------------------------------------------------------------------


def tune(checkpoint: Checkpoint, request: Request, context: int, output: Path, progress: Progress,
         only: Collection[str] = ()) -> dict[str, Any]:
    """Tune the request's buckets one after the other, writing the table behind each; what the JSON line says.

    A choice that several buckets make is measured in the first. only: kernels whose choices are measured; none: of all.
    Raises CompileError, CudaError or OSError.
    """
    target, wanted = request.target, request.buckets or default_buckets(request.target)
    job = Job(checkpoint.config, replace(request, buckets=with_both_kinds(wanted)))
    check(job, context)
    kernels = Kernels(target)
    work: list[tuple[Variants, set[Name]]] = []
    sources = set[AnySource]()
    with progress("tracing") as report:
        for number, bucket in enumerate(wanted):
            report(number, len(wanted))
            variants = Variants(job, bucket, kernels)
            names = {name for name in variants.choices if not only or name[0] in only}
            names -= {name for _, names in work for name in names}
            sources |= variants.sources(names)
            work.append((variants, names))
    choosing = sorted({kernel for variants, _ in work for kernel, _ in variants.choices})
    if not choosing:
        raise CompileError(f"the kernels of {', '.join(b.name for b in wanted)} leave nothing to choose on {target.name}")
    if unknown := sorted(set(only).difference(choosing)):
        raise CompileError(f"--kernels {','.join(unknown)}: what leaves something to choose is {', '.join(choosing)}")
    kernels.build(sources, progress)
    taken: dict[Name, Any] = {}
    result: dict[str, Any] = {"bench": "tune", "target": target.name, "context": context, "table": str(output),
                              "buckets": []}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        artifact = compile_checkpoint(checkpoint, None, job.request, Path(folder) / "artifact", progress)
        executor = load(artifact, wanted, context)
        stack.callback(executor.close)
        files, result["gpu"] = kernels.files(), executor.device_name
        for variants, names in work:
            bucket = variants.bucket
            if bucket.kind == "decode" and not fits(executor, bucket.tokens, context, STEPS):
                print(f"\n{bucket.name} left out: the KV pages do not suffice")
                continue
            contest = Contest(executor, variants, taken, files, context)
            tuned = tune_bucket(contest, variants, names)
            whole, taken = contest.against_first(), contest.taken
            write_table(output, executor.device_name, tool_versions(target), tuned)
            show(bucket, tuned, whole)
            result["buckets"].append({"bucket": bucket.name, **rounded(whole), "choices": [x.to_json() for x in tuned]})
    return result


def check(job: Job, context: int) -> None:
    """Raises CompileError or CudaError for what cannot be tuned, or not here."""
    target, most = job.request.target, job.geometry.max_context
    if target.backend != "cuda":
        raise CompileError(f"tuning measures on NVIDIA GPUs, and {target.name} is none")
    if not job.request.weights.startswith("random:"):
        raise CompileError(f"--weights {job.request.weights}: tuning takes random:SEED, for which it needs no checkpoint")
    if not STEPS < context <= most:
        raise CompileError(f"--context {context} is not within {STEPS + 1} and the {most} tokens of --max-context")
    for device in Device.open_all(target.name, job.request.ranks, "tuning was asked for"):
        device.close()


def load(artifact: Artifact, buckets: Sequence[Bucket], context: int) -> CudaExecutor:
    """The executor, with pages for each bucket's step and random keys and values in them."""
    pages = (b.tokens * cdiv(context, artifact.page_size) if b.kind == "decode" else cdiv(b.tokens, artifact.page_size)
             for b in buckets)
    executor = CudaExecutor.load(artifact, num_pages=max(pages) + 1, max_num_seqs=max(b.sequences for b in buckets))
    fill_caches(executor, artifact)
    return executor


def with_both_kinds(buckets: Sequence[Bucket]) -> tuple[Bucket, ...]:
    """An artifact has buckets of both kinds; a small one where there is none."""
    kinds = {bucket.kind for bucket in buckets}
    return (*buckets, *(b for b in (Bucket.decode(1), Bucket.extend(64, 1)) if b.kind not in kinds))


def write_table(output: Path, gpu: str, tools: Mapping[str, str], tuned: Sequence[Tuned]) -> None:
    """What beat the rules into the table, which appears whole or not at all; what it says of other choices stays.

    Raises CompileError if the file there is no table.
    """
    choices: dict[str, dict[str, Entry]] = {}
    if output.exists():
        try:
            choices = {kernel: dict(keys) for kernel, keys in json.loads(output.read_bytes())["choices"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CompileError(f"{output} is no table of choices; name another file with -o") from None
    for each in tuned:
        kernel, key = each.choice.name
        choices.setdefault(kernel, {}).pop(key, None)
        if each.best != each.choice.rule:
            choices[kernel][key] = each.choice.entry(each.best)
    text = json.dumps({"gpu": gpu, "tools": dict(tools), "choices": {k: v for k, v in choices.items() if v}}, indent=1,
                      sort_keys=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=output.parent, prefix=f".{output.name}.", delete=False) as file:
        try:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, output)
        except BaseException:
            os.unlink(file.name)
            raise
    table.cache_clear()


def show(bucket: Bucket, tuned: Sequence[Tuned], whole: Race) -> None:
    print(f"\n{bucket.name}: {whole.before:.4f} -> {whole.after:.4f} ms (noise {whole.noise:.4f})")
    print(f"  {'share':>6}  {'ms before':>9} {'after':>8}  choice: rule -> best")
    for each in tuned:
        choice, times = each.choice, f"{each.before:9.4f} {each.after:8.4f}"
        best = f" -> {describe(choice, each.best)}" if each.best != choice.rule else ""
        print(f"  {each.share:6.1%}  {times}  {' '.join(choice.name)}: {describe(choice, choice.rule)}{best}"
              f" ({each.measured} measured)")
        for reason in each.skipped:
            print(f"{'skipped':>20} {reason}")
    sys.stdout.flush()
