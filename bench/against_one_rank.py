"""An artifact of several ranks against one of one rank, of the same model and random weights, on the GPUs here.

    python bench/against_one_rank.py ONE SEVERAL [--tokens 256] [--new 64] [--replays 1000]

A random prompt through an extend bucket: the residual stream behind every attention and every mixture of experts but the
last, token by token, as cosines; on all ranks it must hold the same bits. Then tokens are chosen greedily by decode-1 until
they part, with how far apart the two candidates' logits are: a near tie if that is no more than TIE times the root mean
square of the difference of the artifacts' logits. Last, the step of decode-1 over and over, whose logits must not change by
a bit. A table, then one JSON line; exits with 1 on a fault. Needs neither PyTorch nor Triton.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gpu import open_artifact

from gptoss_compile.config import Bucket
from gptoss_compile.launch_plan import Step
from gptoss_compile.random_weights import widen_bf16
from gptoss_compile.runtime.executor_cuda import CudaExecutor
from gptoss_compile.runtime.timing import place_pages, prompt_chunks

Array = np.ndarray[Any, Any]
LEAST = 0.9999  # of the cosines' mean over a step's tokens
TIE = 6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("one", type=Path, metavar="ONE")
    parser.add_argument("several", type=Path, metavar="SEVERAL")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--replays", type=int, default=1000)
    options = parser.parse_args()
    one, several = Run(options.one, options, 0), Run(options.several, options, options.replays)
    faults = several.faults
    rows = [row(at, a, b) for at, (a, b) in enumerate(zip(one.streams, several.streams, strict=False))]
    print(f"\n{options.several.name} on {several.name} against {options.one.name}, {options.tokens} tokens")
    print(f"  {'behind':>18} {'mean cosine':>12} {'least':>10}")
    for found in rows:
        print(f"  {found['behind']:>18} {found['mean']:12.7f} {found['least']:10.6f}")
        if not found["mean"] >= LEAST:
            faults.append(f"behind {found['behind']} the mean cosine is {found['mean']:.6f}")
    parted = part(one, several)
    print(f"  {parted['same']} of {options.new} tokens are the same, {options.replays} replays")
    if parted["same"] < options.new:
        print(f"  then candidates are {parted['gap']:.4f} apart with one rank, {parted['other_gap']:.4f} with several; "
              f"logits differ by {parted['rms']:.4f} (root mean square)")
        if max(parted["gap"], parted["other_gap"]) > TIE * parted["rms"]:
            faults.append("greedy tokens part without a near tie")
    for fault in faults:
        print(f"  FAULT {fault}")
    print(json.dumps({"bench": "against_one_rank", "artifact": options.several.name, "gpu": several.name, "rows": rows,
                      "greedy": parted, "replays": options.replays, "faults": faults}))
    return int(bool(faults))


class Run:
    """What an artifact makes of the prompt: streams, and greedily chosen tokens with the logits that they come from."""

    def __init__(self, path: Path, options: argparse.Namespace, replays: int) -> None:
        artifact = open_artifact(path, None)
        self.streams: list[Array] = []
        self.logits: list[Array] = []
        self.chosen: list[int] = []
        self.faults: list[str] = []
        length = options.tokens + options.new
        executor = CudaExecutor.load(artifact, num_pages=-(-length // artifact.page_size) + 1, max_num_seqs=1)
        try:
            self.name = executor.device_name
            buckets = [b for b in artifact.buckets if b.kind == "extend" and b.tokens >= options.tokens]
            if not buckets or Bucket.decode(1) not in artifact.buckets:
                raise ValueError(f"{path} needs an extend bucket of {options.tokens} tokens, and decode-1")
            self.prompt(executor, min(buckets, key=lambda b: b.tokens), options.tokens)
            self.decode(executor, options.tokens, options.new, replays)
        finally:
            executor.close()

    def prompt(self, executor: CudaExecutor, bucket: Bucket, count: int) -> None:
        ((_, inputs),) = prompt_chunks(executor, count, [bucket])

        def watch(rank: int, number: int, step: Step) -> None:
            if step.op in ("linear_residual", "reduce_norm_route", "reduce_norm_linear") or (
                    step.op in ("moe_down", "moe_grouped", "moe_combine")):
                stream = executor.read(bucket, step.outputs[0], rank)[:count]
                if rank == 0:
                    self.streams.append(stream)
                elif not np.array_equal(stream, self.streams[-1]):
                    self.faults.append(f"step {number} {step.op}: rank {rank} holds another residual stream than rank 0")

        self.logits.append(executor.run_steps(bucket, inputs, watch)[0].copy())

    def decode(self, executor: CudaExecutor, start: int, count: int, replays: int) -> None:
        bucket = Bucket.decode(1)
        inputs = {str(o.key): np.zeros(o.shape, np.int32) for o in executor.plans[bucket].inputs}
        for position in range(start, start + count):
            self.chosen.append(int(self.logits[-1].argmax()))
            inputs["tokens"][0], inputs["positions"][0] = self.chosen[-1], position
            place_pages(executor, inputs, 0, position + 1, executor.max_context)
            self.logits.append(executor.run(bucket, inputs)[0].copy())
        for replay in range(replays):
            if executor.run(bucket, inputs)[0].tobytes() != self.logits[-1].tobytes():
                self.faults.append(f"replay {replay} gives other logits")
                break


def row(at: int, a: Array, b: Array) -> dict[str, Any]:
    x, y = (widen_bf16(v).astype(np.float64) for v in (a, b))
    cosine = (x * y).sum(1) / np.maximum(np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1), 1e-30)
    return {"behind": f"{('attention', 'experts')[at % 2]} of layer {at // 2}", "mean": float(cosine.mean()),
            "least": float(cosine.min())}


def part(one: Run, several: Run) -> dict[str, Any]:
    """How many greedily chosen tokens are the same, and by how little the first that differ do."""
    same = next((i for i, (a, b) in enumerate(zip(one.chosen, several.chosen, strict=True)) if a != b), len(one.chosen))
    if same == len(one.chosen):
        return {"same": same}
    mine, theirs = one.logits[same], several.logits[same]
    a, b = one.chosen[same], several.chosen[same]
    return {"same": same, "gap": float(mine[a] - mine[b]), "other_gap": float(theirs[b] - theirs[a]),
            "rms": float(np.sqrt(np.mean((mine - theirs) ** 2)))}


if __name__ == "__main__":
    sys.exit(main())
