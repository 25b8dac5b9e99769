"""What an artifact's plans must compute, by the plan interpreter: numbers to hold a GPU's against.

    python -m gptoss_compile.expected ARTIFACT -o DIR [--seed N]

writes DIR/<bucket>.npz for every bucket, and DIR/<bucket>.rank<N>.npz for every rank behind the first: one step on random
inputs and caches with the artifact's own weights, all ranks in lockstep. In it are `input.<name>`, `cache.<layer>` and its
`.change` (the bits before and behind the step, xor), and `step.<number>.<output>` for every buffer that a step writes; bf16
as its bits, in uint16. `runtime.check` compares a GPU with it, on a machine that needs no PyTorch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptoss_compile.artifact import Artifact, plan_file, rank_suffix
from gptoss_compile.config import Bucket
from gptoss_compile.interpreter import MEMORY, PlanInterpreter, run_ranks
from gptoss_compile.launch_plan import LaunchPlan, Step
from gptoss_compile.passes.base import Context
from gptoss_compile.target import Target
from gptoss_compile.testing import random_step, shard
from gptoss_compile.trace import DTYPES, Geometry

Array = np.ndarray[Any, Any]


def expected_step(artifact: Artifact, bucket: Bucket, weights: Sequence[dict[str, Tensor]],
                  seed: int) -> list[dict[str, Array]]:
    """The arrays of one bucket's files, one a rank. weights: see `tensors_of`."""
    plans = [LaunchPlan.loads(artifact.file(plan_file(bucket, rank)).read_text()) for rank in range(artifact.ranks)]
    whole = random_step(_context(artifact, bucket, plans[0]), seed)
    if bucket.kind == "decode" and bucket.tokens > 1:
        whole["positions"][-1] = -1  # a padding row
    target = Target.parse(artifact.target)
    steps = [shard(whole, artifact.config, rank, artifact.ranks, target) for rank in range(artifact.ranks)]
    arrays = [{name if name.startswith("cache.") else f"input.{name}": _array(value) for name, value in step.items()}
              for step in steps]

    def watch(rank: int, number: int, done: Step, outputs: list[Tensor]) -> None:
        for index, (operand, value) in enumerate(zip(done.outputs, outputs, strict=True)):
            if operand.place in MEMORY:
                arrays[rank][f"step.{number}.{index}"] = _array(value)

    run_ranks([PlanInterpreter(plan, {**step, **{w.name: own[w.name].to(DTYPES[w.dtype]) for w in plan.weights}})
               for plan, step, own in zip(plans, steps, weights, strict=True)], watch)
    for step, known in zip(steps, arrays, strict=True):
        known |= {f"{name}.change": _bits(known[name]) ^ _bits(_array(value))
                  for name, value in step.items() if name.startswith("cache.")}
    return arrays


def tensors_of(artifact: Artifact) -> list[dict[str, Tensor]]:
    """Each rank's weights."""
    return [{name: _tensor(array) for name, array in artifact.open_weights(rank)} for rank in range(artifact.ranks)]


def _context(artifact: Artifact, bucket: Bucket, plan: LaunchPlan) -> Context:
    geometry = Geometry(artifact.page_size, artifact.max_context, artifact.window_ring)
    geometry = Geometry(artifact.page_size, artifact.max_context, artifact.window_ring,
                        bucket.sequences * geometry.table_width + 2, bucket.sequences * geometry.window_ring + 2)
    return Context(artifact.config, bucket, Target.parse(plan.target), geometry, DTYPES[plan.dtype], plan.ranks)


def _array(value: Tensor) -> Array:
    """A copy; bf16 as uint16."""
    array: Array = (value.view(torch.int16).numpy().view(np.uint16) if value.dtype == torch.bfloat16 else value.numpy())
    return array.copy()


def _bits(array: Array) -> Array:
    return array.view(f"u{array.itemsize}")


def _tensor(array: Array) -> Tensor:
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gptoss_compile.expected",
                                     description="Write what a GPU must compute from an artifact.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    try:
        artifact = Artifact.open(options.artifact)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    weights = tensors_of(artifact)
    for bucket in artifact.buckets:
        for rank, arrays in enumerate(expected_step(artifact, bucket, weights, options.seed)):
            path = options.output / f"{bucket.name}{rank_suffix(rank)}.npz"
            np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
            print(f"{path}: {len(arrays)} arrays, {path.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
