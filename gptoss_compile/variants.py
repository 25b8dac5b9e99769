"""A bucket's plans, one a rank, with other choices than usual, and the machine code of them all: what `tune` measures."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx

from gptoss_compile.artifact import canonical_json
from gptoss_compile.beside import serving_launches, with_serving
from gptoss_compile.build import Binary, BuildError, build_all, key_of
from gptoss_compile.compiler import Job, Progress
from gptoss_compile.config import Bucket
from gptoss_compile.kernels.spec import AnySource, Launch
from gptoss_compile.kernels.tuned import Choice, Name, trying
from gptoss_compile.launch_plan import LaunchPlan
from gptoss_compile.passes.base import Context
from gptoss_compile.passes.select_kernels import calls
from gptoss_compile.pipeline import run_passes
from gptoss_compile.plan import kernel_launches, make_plan
from gptoss_compile.sharding import rank_plan
from gptoss_compile.target import Target
from gptoss_compile.trace import trace_model

Call = tuple[fx.Node, Context]


class Kernels:
    """The machine code of everything that is measured."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._keys: dict[AnySource, str] = {}
        self._binaries: dict[str, Binary] = {}
        self._failed: dict[str, str] = {}

    def build(self, sources: Iterable[AnySource], progress: Progress) -> None:
        """Compile them all in parallel, those included that do not compile."""
        with progress("kernels") as report:
            self._binaries = build_all(sources, self._target, processes=os.cpu_count() or 1, progress=report,
                                       failed=lambda key, error: self._failed.update({key: _cause(error)}))

    def stem(self, launch: Launch) -> str:
        return self._binaries[self._key(launch.source)].stem

    def fault(self, source: AnySource) -> str | None:
        """Why it is not to be measured."""
        key = self._key(source)
        if key in self._failed:
            return f"does not compile: {self._failed[key]}"
        spilled = self._binaries[key].spilled
        return f"spills: {spilled} bytes of a thread" if spilled else None

    def files(self) -> dict[str, bytes]:
        """As in an artifact's kernels/."""
        return {name: data for b in self._binaries.values()
                for name, data in ((f"{b.stem}.{b.suffix}", b.code), (f"{b.stem}.json", canonical_json(b.metadata())))}

    def _key(self, source: AnySource) -> str:
        if source not in self._keys:
            self._keys[source] = key_of(source, self._target)
        return self._keys[source]


def _cause(error: BuildError) -> str:
    """The first line of the compiler's own, which comes behind the constants."""
    return str(error).rpartition("}: ")[2].strip().partition("\n")[0]


class Variants:
    """The plans of one bucket, by what is chosen in them. steps: for each choice the numbers of those that make it, on one
    rank or all."""

    def __init__(self, job: Job, bucket: Bucket, kernels: Kernels) -> None:
        self.bucket, self._kernels, self._config = bucket, kernels, job.config
        whole = Context(job.config, bucket, job.request.target, job.geometry, job.dtype, job.request.ranks)
        self._ranks = whole.of_ranks()
        self._graphs: dict[Context, fx.Graph] = {}
        for ctx in dict.fromkeys(self._ranks):
            module = trace_model(ctx.config, bucket, job.geometry, job.dtype, ctx.ranks, rank=ctx.rank)
            run_passes(module, ctx)
            self._graphs[ctx] = module.graph
        self._around = serving_launches(whole)
        self.choices: dict[Name, Choice] = {}
        made: dict[Name, dict[int, list[Call]]] = {}
        for ctx, graph in self._graphs.items():
            for number, node in enumerate(calls(graph)):
                with trying({}) as seen:
                    kernel_launches(node, ctx)
                for name, choice in seen.items():
                    self.choices.setdefault(name, choice)
                    made.setdefault(name, {}).setdefault(number, []).append((node, ctx))
        self.steps = {name: sorted(numbers) for name, numbers in made.items()}
        self._makers = {name: [call for same in numbers.values() for call in same] for name, numbers in made.items()}

    def sources(self, names: Iterable[Name]) -> set[AnySource]:
        """Those of the step as it is now and of all candidates of these choices."""
        now = {launch.source for ctx, graph in self._graphs.items() for node in calls(graph)
               for launch in kernel_launches(node, ctx)}
        return now.union({launch.source for launch in self._around.values()},
                         *(self._of(name, candidate) for name in names for candidate in self.choices[name].candidates))

    def fault(self, name: Name, candidate: Any) -> str | None:
        """Why a candidate is not to be measured."""
        return next(filter(None, map(self._kernels.fault, self._of(name, candidate))), None)

    def plans(self, taken: Mapping[Name, Any]) -> list[LaunchPlan]:
        """Each rank's."""
        stem = self._kernels.stem
        with trying(taken):
            made = {ctx: with_serving(make_plan(graph, ctx, binary_of=stem), self._around, stem, ctx.target)
                    for ctx, graph in self._graphs.items()}
        return [rank_plan(made[ctx], self._config, rank, ctx.ranks) for rank, ctx in enumerate(self._ranks)]

    def _of(self, name: Name, candidate: Any) -> set[AnySource]:
        with trying({name: candidate}):
            return {launch.source for node, ctx in self._makers[name] for launch in kernel_launches(node, ctx)}
