"""What serving adds to a decode step on the GPU here: the engine's steps beside bare replays of the last one's graph.

    python bench/steps.py ARTIFACT [--tp N] [--batches 1,32] [--context 1000] [--steps 500] [--temperature 0]

Requests run in the engine as under the API, each with a consumer in an event loop. When all generate, `--steps` steps are
timed; then they are aborted, and the graph that the last step replayed is replayed on the inputs it left, over and over.
Prints a table, then one JSON line: milliseconds a step, and the share of it that is not the graph's. Needs neither PyTorch
nor Triton.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from gpu import open_artifact

from gptoss_compile.runtime.engine import Engine
from gptoss_compile.runtime.executor_cuda import CudaExecutor
from gptoss_compile.runtime.outputs import RequestHandle
from gptoss_compile.runtime.sampling_params import SamplingParams
from gptoss_compile.runtime.timing import time_replays

WARM = 20  # tokens of each answer before the clock starts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--tp", type=int, metavar="N", help="refuse artifacts of other than N ranks")
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[1, 32])
    parser.add_argument("--context", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--temperature", type=float, default=0.0)
    options = parser.parse_args()
    artifact = open_artifact(options.artifact, options.tp)
    sequences = max(options.batches)
    executor = CudaExecutor.load(artifact, num_pages=None, max_num_seqs=sequences)
    engine = Engine(executor, max_num_seqs=sequences, max_num_batched_tokens=max(b.tokens for b in artifact.buckets))
    engine.start()
    print(f"{artifact.path.name} on {executor.device_name}, context {options.context}, temperature {options.temperature:g}")
    print(f"  {'batch':>5} {'served ms':>10} {'bare ms':>10} {'added':>7}")
    rows = []
    for batch in options.batches:
        rows.append(measure(engine, executor, batch, options))
        print("  {batch:5} {served_ms:10.4f} {bare_ms:10.4f} {added:7.1%}".format(**rows[-1]), flush=True)
    engine.shutdown(drain=False)
    print(json.dumps({"bench": "steps", "artifact": artifact.path.name, "gpu": executor.device_name, "ranks": artifact.ranks,
                      "context": options.context, "temperature": options.temperature, "rows": rows}))
    return 0


def measure(engine: Engine, executor: CudaExecutor, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """All `batch` requests generating, and what the same graph takes by itself."""
    rng = np.random.default_rng(batch)
    params = SamplingParams(max_tokens=None, ignore_eos=True, temperature=options.temperature, seed=0)
    prompts = rng.integers(0, executor.config.vocab_size, (batch, options.context)).tolist()
    handles = [engine.submit(prompt, params) for prompt in prompts]
    counts = [0] * batch
    consumer = threading.Thread(target=lambda: asyncio.run(consume(handles, counts)))
    consumer.start()
    while min(counts) < WARM:
        time.sleep(0.005)
    start, first = time.perf_counter(), engine.stats().steps
    while (steps := engine.stats().steps - first) < options.steps:
        time.sleep(0.005)
    served = (time.perf_counter() - start) / steps * 1e3
    engine._inbox.put(engine._abort_all)  # all at once, so that the last step had all of them
    consumer.join()
    bucket = min((b for b in executor.buckets if b.kind == "decode" and b.sequences >= batch), key=lambda b: b.tokens)
    bare = time_replays(executor, executor.graphs[bucket].replay, 50, 5).ms
    return {"batch": batch, "served_ms": round(served, 4), "bare_ms": round(bare, 4), "added": round(served / bare - 1, 4)}


async def consume(handles: list[RequestHandle], counts: list[int]) -> None:
    async def one(number: int) -> None:
        async for output in handles[number]:
            counts[number] += len(output.token_ids)

    await asyncio.gather(*map(one, range(len(handles))))


if __name__ == "__main__":
    sys.exit(main())
