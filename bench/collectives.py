"""What it costs that several GPUs add their results: our exchange, inside the step's kernels, beside NCCL's all-reduce.

    python bench/collectives.py ARTIFACT [--tp N] [--buckets decode-1,extend-8192x64] [--context 1024] [--rows 1,8,32,512]

A bucket's captured step is timed as it is, and with headers that name one rank only in all sums, so that the same kernels
hand over to themselves and wait for nobody; the difference, shared among the sums, is `us in step`. `us alone`: where an
exchange is a launch of its own, all of the step's behind each other and nothing else. `nccl us`: all_reduce of bf16
[rows, hidden] through torch.distributed without multicast, twenty in a CUDA graph, one process a GPU, where PyTorch is
installed. A table, then one JSON line. This process needs neither PyTorch nor Triton.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gpu import open_artifact

from gptoss_compile.config import Bucket
from gptoss_compile.launch_plan import HEADER_BYTES, Operand
from gptoss_compile.runtime.exchange_cuda import HEADER
from gptoss_compile.runtime.executor_cuda import CudaExecutor
from gptoss_compile.runtime.graphs import AnyPrepared, prepare
from gptoss_compile.runtime.rank_cuda import Rank
from gptoss_compile.runtime.timing import STEPS, fill_caches, fits, replays_for, step_inputs, time_in_turns, time_replays

STEP = 1 << 22  # of the headers that name one rank, which nobody counts: far from those of the others
NCCL = """
import json, os, sys, torch, torch.distributed as dist
rank, hidden, rows = int(os.environ["RANK"]), int(sys.argv[1]), json.loads(sys.argv[2])
torch.cuda.set_device(rank)
dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
found = {}
for count in rows:
    x = torch.zeros(count, hidden, device="cuda", dtype=torch.bfloat16)
    for _ in range(3): dist.all_reduce(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20): dist.all_reduce(x)
    times = []
    for _ in range(6):
        graph.replay(); torch.cuda.synchronize(); dist.barrier(); torch.cuda.synchronize()
        a, b = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        a.record()
        for _ in range(10): graph.replay()
        b.record(); torch.cuda.synchronize()
        times.append(a.elapsed_time(b) * 1e3 / 200)
    found[count] = round(sorted(times[1:])[2], 2)
torch.cuda.synchronize(); dist.barrier()
if rank == 0: print(json.dumps(found), flush=True)
os._exit(0)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--tp", type=int, metavar="N", help="refuse artifacts of other than N ranks")
    parser.add_argument("--buckets", help="names, separated by commas (default: all)")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--rows", default="1,8,32,512,8192", help="of NCCL's messages")
    options = parser.parse_args()
    try:
        result = measure(options)
    except (ValueError, OSError) as error:
        print(f"collectives: error: {error}", file=sys.stderr)
        result = {"error": str(error)}
    imported = sorted({"torch", "triton"} & set(sys.modules))
    print(json.dumps({"bench": "collectives", "imported": imported, **result}))
    return int("error" in result)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    artifact = open_artifact(options.artifact, options.tp)
    if artifact.ranks == 1:
        raise ValueError(f"{options.artifact} has one rank, which exchanges nothing")
    wanted = options.buckets.split(",") if options.buckets else [b.name for b in artifact.buckets]
    buckets = [b for b in artifact.buckets if b.name in wanted]
    if len(buckets) < len(wanted):
        raise ValueError(f"its buckets are {', '.join(b.name for b in artifact.buckets)}")
    rival = nccl(artifact.ranks, artifact.config.hidden, [int(part) for part in options.rows.split(",")])
    executor = CudaExecutor.load(artifact, num_pages=None, max_num_seqs=max(b.sequences for b in artifact.buckets))
    result: dict[str, Any] = {"artifact": artifact.path.name, "gpu": executor.device_name, "ranks": artifact.ranks,
                              "context": options.context, "nccl_us": rival, "buckets": []}
    try:
        print(f"\n{artifact.path.name} on {executor.device_name}")
        print(f"  {'bucket':>16} {'rows':>6} {'step ms':>9} {'nobody waits':>12} {'sums':>9} {'us in step':>10}"
              f" {'us alone':>9} {'nccl us':>8}")
        fill_caches(executor, artifact)
        local = [local_header(rank) for rank in executor.ranks]
        for bucket in buckets:
            if bucket.kind == "decode" and not fits(executor, bucket.tokens, options.context, STEPS):
                print(f"  {bucket.name:>16} left out: the KV pages do not suffice")
                continue
            row = one_row(executor, bucket, options.context, local)
            result["buckets"].append(row)
            show(row, rival)
        for rows, us in rival.items():
            if rows not in {row["rows"] for row in result["buckets"]}:
                print(f"  {'':>16} {rows:6} {'':9} {'':12} {'':9} {'':10} {'':9} {us:8.2f}")
    finally:
        executor.close()
    return result


def nccl(ranks: int, hidden: int, rows: Sequence[int]) -> dict[int, float]:
    """Microseconds of NCCL's all-reduce of so many rows; empty where it does not run."""
    command = [sys.executable, "-c", NCCL, str(hidden), json.dumps(rows)]
    processes = []
    for rank in range(ranks):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "RANK": str(rank), "WORLD_SIZE": str(ranks)}
        environment = {**os.environ, **place, "NCCL_NVLS_ENABLE": "0"}
        processes.append(subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE,
                                          stderr=subprocess.PIPE if rank else None))
    try:
        said = [process.communicate(timeout=180)[0] for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
        return {}
    if any(process.returncode for process in processes):
        return {}
    return {int(count): us for count, us in json.loads(said[0].splitlines()[-1]).items()}


def local_header(rank: Rank) -> int:
    """The address of a header by which a rank exchanges with itself alone."""
    address = rank.device.allocate(HEADER_BYTES, "a header of one rank")
    (header,) = rank.read(next(iter(rank.plans)), Operand("exchange", 0, "u8", (HEADER.itemsize,))).view(HEADER)
    header["base"][:], header["base"][0] = 0, address
    header["step"], header["rank"], header["ranks"] = STEP, 0, 1
    rank.upload(address, np.frombuffer(header.tobytes(), np.uint8))
    return address


def one_row(executor: CudaExecutor, bucket: Bucket, context: int, local: Sequence[int]) -> dict[str, Any]:
    executor.upload(bucket, step_inputs(executor, bucket, context))
    sums = sum(step.op.startswith("reduce_") for step in executor.plans[bucket].steps)
    whole = executor.capture(f"{bucket}", [launches(rank, bucket, None) for rank in executor.ranks])
    alone = executor.capture(f"{bucket} by itself", [launches(*own) for own in zip(
        executor.ranks, [bucket] * len(local), local, strict=True)])
    once = time_replays(executor, whole.replay, 2, 1).ms
    a, b = time_in_turns(executor, [whole.replay, alone.replay], replays_for(once, STEPS), 5)
    whole.close()
    alone.close()
    return {"bucket": bucket.name, "rows": bucket.tokens, "ms": round(a.ms, 4), "local_ms": round(b.ms, 4),
            "sums": sums, "us_in_step": round((a.ms - b.ms) * 1e3 / sums, 3),
            "us_alone": chain(executor, bucket)}


def launches(rank: Rank, bucket: Bucket, header: int | None) -> list[list[AnyPrepared]]:
    """Those of a step, its sums with another header if one is given."""

    def place(operand: Operand) -> tuple[Operand, int]:
        there = operand.place == "exchange" and operand.key == 0
        return rank.true_shape(operand), header if there and header is not None else rank.address(bucket, operand)

    *steps, last = rank.plans[bucket].steps
    assert last.op == "all_gather"
    return prepare(rank.device, bucket.name, steps, rank.kernels, place) + rank.prepare(bucket, [last])


def chain(executor: CudaExecutor, bucket: Bucket) -> float | None:
    """Microseconds of a sum that is a launch of its own. Each has flags of its own, which would be up already in the next
    replay if the gathering of the logits, whose time is known, did not count the steps."""

    def some(rank: Rank, names: tuple[str, ...]) -> list[list[AnyPrepared]]:
        steps = rank.plans[bucket].steps
        return [[launch for launch, planned in zip(ready, step.launches, strict=True) if planned.binary.startswith(names)]
                for ready, step in zip(rank.launches[bucket], steps, strict=True)]

    planned = [launch for step in executor.plans[bucket].steps for launch in step.launches]
    count = sum(launch.binary.startswith("exchange_rows") for launch in planned)
    if not count:
        return None
    times = []
    for names in (("exchange_rows", "all_gather"), ("all_gather",)):
        graph = executor.capture(f"exchanges of {bucket}", [some(rank, names) for rank in executor.ranks])
        once = time_replays(executor, graph.replay, 2, 1).ms
        times.append(time_replays(executor, graph.replay, replays_for(once, STEPS, 0.06), 5).ms)
        graph.close()
    return round((times[0] - times[1]) * 1e3 / count, 3)


def show(row: Mapping[str, Any], rival: Mapping[int, float]) -> None:
    alone, theirs = row["us_alone"], rival.get(row["rows"])
    print(f"  {row['bucket']:>16} {row['rows']:6} {row['ms']:9.3f} {row['local_ms']:12.3f} {row['sums']:9}"
          f" {row['us_in_step']:10.2f} {'-' if alone is None else f'{alone:.2f}':>9}"
          f" {'-' if theirs is None else f'{theirs:.2f}':>8}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
