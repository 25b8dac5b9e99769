"""What serving adds to a decode step on the GPU here: the engine's steps beside bare replays of the last one's graph.

    python bench/steps.py ARTIFACT [--tp N] [--batches 1,32] [--context 1000] [--steps 500] [--temperature 0]

Requests run in the engine as under the API, each with a consumer in an event loop. When all generate, `--steps` steps are
timed; then they are aborted, and the graph that the last step replayed is replayed on the inputs it left, over and over.
An answer that ends before is an error. Prints a table, then one JSON line: milliseconds a step, and the share of it that is
not the graph's. Needs neither PyTorch nor Triton.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from gpu import open_artifact

from gptoss_compile.runtime.engine import Engine
from gptoss_compile.runtime.executor_cuda import CudaExecutor
from gptoss_compile.runtime.outputs import RequestHandle, RequestOutput
from gptoss_compile.runtime.sampling_params import SamplingParams
from gptoss_compile.runtime.scheduler import Step
from gptoss_compile.runtime.timing import time_replays

WARM = 20  # steps with all requests before the clock starts


class TimedEngine(Engine):
    """Notes in `ends` when the steps ended in which all of `batch` requests generate. Behind the last that is wanted it
    aborts all at once, so that the last step has all of them."""

    def expect(self, batch: int, steps: int) -> None:
        self.batch, self.steps = batch, steps
        self.ends: list[float] = []

    def _end_step(self, step: Step) -> None:
        super()._end_step(step)
        if step.bucket.kind == "decode" and len(step.chunks) == self.batch:
            self.ends.append(time.perf_counter())
            if len(self.ends) == self.steps:
                self._abort_all()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--tp", type=int, metavar="N", help="refuse artifacts of other than N ranks")
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[1, 32])
    parser.add_argument("--context", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--temperature", type=float, default=0.0)
    options = parser.parse_args()
    sequences = max(options.batches)
    try:
        artifact = open_artifact(options.artifact, options.tp)
        executor = CudaExecutor.load(artifact, num_pages=None, max_num_seqs=sequences)
    except (ValueError, OSError) as error:
        print(f"steps: error: {error}", file=sys.stderr)
        return 2
    engine = TimedEngine(executor, max_num_seqs=sequences, max_num_batched_tokens=max(b.tokens for b in artifact.buckets))
    engine.start()
    print(f"{artifact.path.name} on {executor.device_name}, context {options.context}, temperature {options.temperature:g}")
    print(f"  {'batch':>5} {'served ms':>10} {'bare ms':>10} {'added':>7}")
    rows = []
    try:
        for batch in options.batches:
            rows.append(measure(engine, executor, batch, options))
            print("  {batch:5} {served_ms:10.4f} {bare_ms:10.4f} {added:7.1%}".format(**rows[-1]), flush=True)
    finally:
        engine.shutdown(drain=False)
    print(json.dumps({"bench": "steps", "artifact": artifact.path.name, "gpu": executor.device_name, "ranks": artifact.ranks,
                      "context": options.context, "temperature": options.temperature, "rows": rows}))
    return 0


def measure(engine: TimedEngine, executor: CudaExecutor, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """All `batch` requests generating, and what the same graph takes by itself."""
    rng = np.random.default_rng(batch)
    params = SamplingParams(max_tokens=None, ignore_eos=True, temperature=options.temperature, seed=0)
    prompts = rng.integers(0, executor.config.vocab_size, (batch, options.context)).tolist()
    engine.expect(batch, WARM + options.steps)
    answers = asyncio.run(consume([engine.submit(prompt, params) for prompt in prompts]))
    ends = engine.ends
    if any(answer.finish_reason != "abort" for answer in answers):
        raise SystemExit(f"answers ended after {len(ends)} of {WARM} + {options.steps} steps: ask for fewer --steps or less "
                         f"--context, as there is room for {engine.max_model_len} tokens")
    served = (ends[WARM + options.steps - 1] - ends[WARM - 1]) / options.steps * 1e3
    bucket = min((b for b in executor.buckets if b.kind == "decode" and b.sequences >= batch), key=lambda b: b.tokens)
    bare = time_replays(executor, executor.graphs[bucket].replay, 50, 5).ms
    return {"batch": batch, "served_ms": round(served, 4), "bare_ms": round(bare, 4), "added": round(served / bare - 1, 4)}


async def consume(handles: list[RequestHandle]) -> list[RequestOutput]:
    return await asyncio.gather(*(handle.collect() for handle in handles))


if __name__ == "__main__":
    sys.exit(main())
