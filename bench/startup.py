"""From nothing to the first token, phase by phase, each artifact in a process of its own.

    python bench/startup.py ARTIFACT... [--tp N] [--max-num-seqs 128]

The clock starts before the interpreter does. `verify` hashes every file of the artifact; `first token` is a prompt of eight
tokens through the smallest extend bucket. A table, then one JSON line. Needs neither PyTorch nor Triton.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gpu import open_artifact

from gptoss_compile.artifact import Artifact
from gptoss_compile.launch_plan import Operand, Weight
from gptoss_compile.logical import TensorInfo, logical_tensors
from gptoss_compile.random_weights import random_values
from gptoss_compile.runtime.cuda_driver import Device
from gptoss_compile.runtime.executor_cuda import CudaExecutor
from gptoss_compile.weights import constant, cut_rows

Array = np.ndarray[Any, Any]

PROMPT = 8  # tokens
CHECKED = 16 << 20  # bytes of a weight that are compared


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", type=Path, nargs="+", metavar="ARTIFACT")
    parser.add_argument("--tp", type=int, metavar="N", help="refuse artifacts of other than N ranks")
    parser.add_argument("--max-num-seqs", type=int, default=128)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)  # in the process that is measured
    options = parser.parse_args()
    if options.started is not None:
        try:
            print(json.dumps(measure(options.artifacts[0], options.tp, options.max_num_seqs, options.started)))
        except (ValueError, OSError) as error:
            print(f"startup: error: {error}", file=sys.stderr)
            return 2
        return 0
    results = []
    for path in options.artifacts:
        command = [sys.executable, __file__, str(path), f"--max-num-seqs={options.max_num_seqs}", f"--started={time.time()}"]
        command += [] if options.tp is None else [f"--tp={options.tp}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr.strip(), file=sys.stderr)
            results.append({"artifact": path.name, "error": done.stderr.strip().splitlines()[-1]})
            continue
        results.append(json.loads(done.stdout))
        show(results[-1])
    print(json.dumps({"bench": "startup", "artifacts": results}))
    return int(any("error" in r for r in results))


def measure(path: Path, ranks: int | None, max_num_seqs: int, started: float) -> dict[str, Any]:
    """Seconds of each phase, in order."""
    phases: dict[str, float] = {}
    last = started

    def phase(name: str) -> None:
        nonlocal last
        now = time.time()
        phases[name] = now - last
        last = now

    phase("interpreter and imports")
    artifact = open_artifact(path, ranks)
    phase("verify")
    devices = Device.open_all(artifact.target, artifact.ranks)
    phase("open the GPU")
    executor = CudaExecutor(artifact, devices, None, max_num_seqs)
    total = time.time() - last
    phases |= executor.seconds
    last += sum(executor.seconds.values())
    phase("plans and launches")
    bucket = min((b for b in artifact.buckets if b.kind == "extend"), key=lambda b: b.tokens)
    inputs = {str(o.key): np.zeros(o.shape, np.int32) for o in executor.plans[bucket].inputs}
    inputs["positions"][:] = -1
    inputs["positions"][:PROMPT], inputs["tokens"][:PROMPT], inputs["rows"][0] = range(PROMPT), range(PROMPT), PROMPT - 1
    inputs["full_table"][0, 0] = inputs["window_table"][0, 0] = 1
    last = time.time()
    token = int(executor.run(bucket, inputs)[0].argmax())
    phase("first token")
    checked = check_weights(executor, artifact)
    name, pages, graphs = executor.device_name, executor.num_pages - 1, len(executor.graphs)
    executor.close()
    captures = [seconds for phase, seconds in executor.seconds.items() if phase.startswith("capture")]
    return {"artifact": path.name, "gpu": name, "ranks": artifact.ranks, "weights": artifact.weights, "kv_pages": pages,
            "graphs": graphs, "seconds": {name: round(seconds, 4) for name, seconds in phases.items()},
            "load_s": round(total, 3),
            "worst_capture_ms": round(max(captures) * 1e3, 2), "token": token, "checked_weights": checked,
            "total_s": round(sum(phases.values()), 3), "imported": sorted({"torch", "triton"} & set(sys.modules))}


def check_weights(executor: CudaExecutor, artifact: Artifact) -> int:
    """Compares the start of every random weight of the last layer with its definition, but for those that are laid out. How
    many; 0 if they are stored."""
    if not artifact.weights.startswith("random:"):
        return 0
    tensors, seed = logical_tensors(artifact.config), artifact.manifest["weights"]["seed"]
    bucket, checked = artifact.buckets[0], 0
    last = f"layers.{artifact.config.num_layers - 1}."
    for rank in executor.ranks:
        plan = rank.plans[bucket]
        laid_out = {name for layout in plan.layouts.values() for name in layout.sources}
        for weight in (w for w in plan.weights if w.name.startswith(last) and w.name not in laid_out):
            operand = Operand("weight", weight.name, weight.dtype, weight.shape)
            part = weight_start(weight, tensors, seed, max(1, CHECKED * weight.shape[0] // operand.bytes))
            found = executor.read(bucket, replace(operand, shape=part.shape), rank.number)
            if not np.array_equal(found, part):
                raise ValueError(f"{weight.name} of rank {rank.number} is not what random_weights.py says")
            checked += 1
    return checked


def weight_start(weight: Weight, tensors: Mapping[str, TensorInfo], seed: int, rows: int) -> Array:
    """At most so many rows of a weight, from its first part."""
    if not weight.parts:
        return constant({"dtype": weight.dtype, "shape": [min(rows, weight.shape[0]), *weight.shape[1:]]})
    shape = tensors[weight.parts[0]].shape
    first, last, inner = cut_rows(shape, vars(weight.cuts[0]) if weight.cuts else None)
    values = random_values(weight.parts[0], shape, weight.dtype, seed, first, min(last, first + rows))
    return values[inner]


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['artifact']} ({result['weights']}) on {result['gpu']}: artifact to first token "
          f"{result['total_s']:.2f} s, {result['kv_pages']} KV pages")
    for name, seconds in result["seconds"].items():
        print(f"  {name:28} {seconds * 1e3:9.1f} ms")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
