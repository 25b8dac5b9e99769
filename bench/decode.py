"""How fast artifacts decode on the GPU here, beside what must move and what a pure read of as many bytes takes.

    python bench/decode.py ARTIFACT... [--tp N] [--batches 1,8,32,128] [--contexts 1024,8192,65536] [--read build/bench/read]

Steps follow one another on the device, each fed with the likeliest tokens of the one before, so nothing waits for the host.
Their position stays, so that all cost the same. Caches hold random values, sequences differ, and the experts that are
counted are those that were chosen. Three yardsticks, of kernels that only read (see read_kernel.py): `chain`, one for each
kernel of the step, experts read behind the router; `early`, the same but no weights wait; `bytes`, one kernel for all. Of an
artifact of several ranks, bytes are those of the GPU that moves most, and the chains exchange partial sums as the step does;
`alone` is `chain` without that, every GPU for itself. Tables, then one JSON line. Needs neither PyTorch nor Triton.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gpu import Read, Yardstick, open_artifact, seen_experts, step_bytes, touched_experts

from gptoss_compile.artifact import Artifact
from gptoss_compile.config import Bucket
from gptoss_compile.gumbel import words
from gptoss_compile.runtime.cuda_driver import CudaError
from gptoss_compile.runtime.executor_cuda import CudaExecutor
from gptoss_compile.runtime.timing import STEPS, Inputs, decode_inputs, fill_caches, fits, replays_for, time_replays


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", type=Path, nargs="+", metavar="ARTIFACT")
    parser.add_argument("--tp", type=int, metavar="N", help="refuse artifacts of other than N ranks")
    parser.add_argument("--batches", type=numbers, default=numbers("1,8,32,128"))
    parser.add_argument("--contexts", type=numbers, default=numbers("1024,8192,65536"))
    parser.add_argument("--read", type=Path, default=Path("build/bench/read"), metavar="DIR", help="kernels that read")
    options = parser.parse_args()
    results = []
    for path in options.artifacts:
        try:
            results.append(measure(open_artifact(path, options.tp), options.batches, options.contexts, options.read))
        except (ValueError, OSError) as error:
            print(f"decode: error: {path}: {error}", file=sys.stderr)
            results.append({"artifact": path.name, "error": str(error)})
    imported = sorted({"torch", "triton"} & set(sys.modules))
    print(json.dumps({"bench": "decode", "imported": imported, "artifacts": results}))
    return int(any("error" in r for r in results))


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def measure(artifact: Artifact, batches: Sequence[int], contexts: Sequence[int], read: Path) -> dict[str, Any]:
    """Every batch and context that the artifact has and the memory holds."""
    start, path = time.perf_counter(), artifact.path
    executor = CudaExecutor.load(artifact, num_pages=None, max_num_seqs=max(batches))
    load = time.perf_counter() - start
    result: dict[str, Any] = {"artifact": path.name, "gpu": executor.device_name, "ranks": artifact.ranks,
                              "load_s": round(load, 2), "rows": [], "left_out": []}
    try:
        print(f"\n{path.name} on {executor.device_name}: loaded in {load:.1f} s, {executor.num_pages - 1} KV pages")
        fill_caches(executor, artifact)
        yardstick = Yardstick(executor, read)
        print(f"  {'batch':>5} {'context':>7} {'ms':>8} {'tok/s':>8} {'GB':>7} {'TB/s':>5}  {'experts':>11}"
              f"  {'chain':>13}  {'early':>13}  {'bytes':>13}" + ("" if artifact.ranks == 1 else f"  {'alone':>13}") +
              f"  {'host us':>7}")
        for bucket in (b for b in artifact.buckets if b.kind == "decode" and b.tokens in batches):
            for context in contexts:
                if not fits(executor, bucket.tokens, context, STEPS):
                    result["left_out"].append([bucket.tokens, context])
                    continue
                try:
                    row = one_row(executor, yardstick, bucket, context)
                except CudaError as error:
                    raise CudaError(f"batch {bucket.tokens}, context {context}: {error}") from None
                result["rows"].append(row)
                show_row(row)
        for batch, context in result["left_out"]:
            print(f"  {batch:5} {context:7} left out: the KV pages do not suffice")
    except CudaError as error:
        print(f"decode: error: {path}: {error}", file=sys.stderr)
        result["error"] = str(error)
    finally:
        executor.close()
    return result


def one_row(executor: CudaExecutor, yardstick: Yardstick, bucket: Bucket, context: int) -> dict[str, Any]:
    inputs = decode_inputs(executor, bucket, context, STEPS)
    graph, greedy = executor.graphs[bucket], words(0, executor.config.vocab_size, 0)
    inputs["words"] = np.stack([greedy] * bucket.rows)
    executor.run(bucket, inputs)  # the first tokens
    inputs["source"] = np.arange(bucket.tokens, dtype=np.int32)
    executor.upload(bucket, inputs)
    once = time_replays(executor, graph.replay, 2, 1).ms
    timing = time_replays(executor, graph.replay, replays_for(once, STEPS), 5)
    inputs["tokens"] = executor.read(bucket, next(o for o in executor.plans[bucket].inputs if o.key == "tokens"))
    experts, config = seen_experts(executor, bucket, inputs), executor.config
    reads = [[Read(step_bytes(config, step, context, experts), step.op.startswith("moe_gate_up"), step)
              for step in rank.plans[bucket].steps] for rank in executor.ranks]
    totals = [sum(read.size for read in own) for own in reads]
    total = max(totals)

    def changed(**fields: Any) -> list[list[Read]]:
        return [[replace(read, **fields) for read in own] for own in reads]

    chains = {"chain": reads, "early": changed(late=False), "bytes": [[Read(own)] for own in totals],
              **({"alone": changed(step=None)} if len(executor.ranks) > 1 else {})}
    whole = {name: yardstick.chain(bucket, chain) for name, chain in chains.items()}
    return {"batch": bucket.tokens, "context": context, "ms": round(timing.ms, 4), "best_ms": round(timing.best, 4),
            "tok_s": round(bucket.tokens / timing.ms * 1e3, 1), "bytes": total, "gpu_bytes": totals,
            "tb_s": round(total / timing.ms / 1e9, 3),
            "experts": round(experts, 1),
            "experts_expected": round(touched_experts(config.num_experts, bucket.tokens * config.experts_per_token), 1),
            "yardsticks": whole, "ratio": {name: round(found["ms"] / timing.ms, 3) for name, found in whole.items()},
            "host_us": host_microseconds(executor, bucket, inputs, replays_for(timing.ms, 60, 0.2))}


def host_microseconds(executor: CudaExecutor, bucket: Bucket, inputs: Inputs, times: int) -> dict[str, float]:
    """What a served step costs the host: submitting it (page tables unchanged, and all of them) and taking its result, the
    graph launch in it, and what is left. The GPU is idle."""
    rows, columns = inputs["full_table"].shape

    def step(rows: int) -> None:
        executor.inputs(bucket)
        executor.submit(bucket, rows, columns)

    executor.upload(bucket, inputs)
    calls: dict[str, Callable[[], None]] = {
        "submit": lambda: step(0), "submit tables": lambda: step(rows), "replay": executor.graphs[bucket].replay}
    found = {}
    for name, call in calls.items():
        seconds = []
        for _ in range(times):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
            executor.synchronize("timing the host")
            if call is not calls["replay"]:
                executor.result()
        found[name] = round(statistics.median(seconds) * 1e6, 1)
    return {**found, "outside": round(found["submit"] - found["replay"], 1)}


def show_row(row: dict[str, Any]) -> None:
    yardsticks = "  ".join(f"{found['ms']:7.3f} {row['ratio'][name]:5.3f}" for name, found in row["yardsticks"].items())
    print(f"  {row['batch']:5} {row['context']:7} {row['ms']:8.3f} {row['tok_s']:8.0f} {row['bytes'] / 1e9:7.2f}"
          f" {row['tb_s']:5.2f}  {row['experts']:5.1f}/{row['experts_expected']:5.1f}  {yardsticks}"
          f"  {row['host_us']['outside']:7.1f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
