"""Does what was cross-compiled run? Compares artifacts on the GPU here with the interpreter's numbers, buffer by buffer.

    python bench/gpu_check.py CASE... [--replays 1000] [--verbose]

A CASE is a folder with an `artifact` and what `python -m gptoss_compile.expected` wrote for it, `expected`; gpu_cases.py
makes some. Needs neither PyTorch nor Triton. Prints tables, then one JSON line; exits with 1 on a fault, with 2
if nothing can be run here.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_compile.artifact import Artifact, rank_suffix
from gptoss_compile.runtime.check import Report, check_bucket
from gptoss_compile.runtime.executor_cuda import CudaExecutor

KV_PAGES, SEQUENCES = 4096, 256  # room for whatever the expected values hold


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path, nargs="+", metavar="CASE")
    parser.add_argument("--replays", type=int, default=1000)
    parser.add_argument("--verbose", action="store_true", help="list every buffer")
    options = parser.parse_args()
    try:
        results = [check(case, options.replays, options.verbose) for case in options.cases]
    except (ValueError, OSError) as error:
        print(f"gpu_check: error: {error}", file=sys.stderr)
        return 2
    imported = sorted({"torch", "triton"} & set(sys.modules))
    good = all(result["good"] for result in results) and not imported
    print(json.dumps({"bench": "gpu_check", "good": good, "imported": imported, "cases": results}))
    return 0 if good else 1


def check(case: Path, replays: int, verbose: bool) -> dict[str, Any]:
    """Every bucket of a case."""
    start = time.perf_counter()
    artifact = Artifact.open(case / "artifact")
    executor = CudaExecutor.load(artifact, num_pages=KV_PAGES, max_num_seqs=SEQUENCES)
    load = time.perf_counter() - start
    print(f"\n{case.name}: {artifact.target}, {artifact.config.expert_format} experts, {artifact.ranks} ranks, on "
          f"{executor.device_name}, loaded in {load:.2f} s")
    reports = []
    try:
        for bucket in artifact.buckets:
            names = (f"{bucket.name}{rank_suffix(rank)}.npz" for rank in range(artifact.ranks))
            expected = [dict(np.load(case / "expected" / name)) for name in names]
            reports.append(check_bucket(executor, bucket, expected, replays))
            show(reports[-1], verbose)
    finally:
        executor.close()
    return {"case": case.name, "good": all(r.good for r in reports), "gpu": executor.device_name,
            "target": artifact.target, "load_s": round(load, 3), "buckets": [summary(r) for r in reports],
            "faults": [f"{r.bucket}: {fault}" for r in reports for fault in r.faults]}


def show(report: Report, verbose: bool) -> None:
    """The worst buffer of each operator, or all of them."""
    print(f"\n{report.bucket}: {report.launches} launches, {report.programmatic} programmatic edges, "
          f"{report.replays} replays of {report.replay_seconds * 1e6:.0f} us, whole step off by {report.chain:.1e}: "
          f"{'good' if report.good else 'FAULTY'}")
    print(f"  {'step':>4} {'rank':>4}  {'operator':22} {'buffer':32} {'element':>8} {'norm':>8}")
    rows = report.comparisons
    if not verbose:
        worst = {(c.rank, c.op, c.buffer.split()[0].split(".")[0]): c
                 for c in sorted(rows, key=lambda c: (not c.good, c.element))}
        rows = sorted(worst.values(), key=lambda c: (c.number, c.rank))
    for c in rows:
        print(f"  {c.number:>4} {c.rank:>4}  {c.op:22} {c.buffer:32} {c.element:8.1e} {c.norm:8.1e}"
              f"  {'' if c.good else 'OFF'}")
    for fault in report.faults:
        print(f"  FAULT {fault}")


def summary(report: Report) -> dict[str, object]:
    worst = max(report.comparisons, key=lambda c: (not c.good, c.norm))
    return {"bucket": report.bucket, "launches": report.launches, "programmatic_edges": report.programmatic,
            "buffers": len(report.comparisons), "worst_op": worst.op, "worst_norm": worst.norm, "chain": report.chain,
            "replays": report.replays, "replay_us": round(report.replay_seconds * 1e6, 1), "good": report.good}


if __name__ == "__main__":
    sys.exit(main())
