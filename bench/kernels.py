"""What each kernel costs in the step that it is part of, on the GPU here, beside cuBLAS at the dense shapes.

    python bench/kernels.py ARTIFACT... [--buckets decode-1,extend-2048x256] [--context 1024]

An operator's cost is the captured step with its kernels twice (first with another layer's weights), less the step: alone, a
kernel neither overlaps with its neighbours nor finds the caches as they leave them. Decode steps see `--context` tokens;
extend steps are the first chunk of a prompt. TB/s count what must move, TFLOP/s real operations. `cublas`: the same product
through PyTorch in a process of its own, over weights that no cache holds, where PyTorch is installed. Tables, then one JSON
line. This process needs neither PyTorch nor Triton.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu import step_bytes, touched_experts

from gptoss_compile.artifact import Artifact
from gptoss_compile.config import Bucket
from gptoss_compile.launch_plan import Operand, Step
from gptoss_compile.runtime.cuda_driver import CudaError
from gptoss_compile.runtime.executor_cuda import CudaExecutor
from gptoss_compile.runtime.timing import STEPS, fill_caches, fits, step_inputs, time_twice

DENSE = ("norm_linear", "linear_residual", "norm_head")
CUBLAS = """
import json, sys, torch
found = []
for T, N, K in json.loads(sys.argv[1]):
    count = max(1, (1 << 28) // (2 * N * K))
    x = torch.randn(T, K, device="cuda", dtype=torch.bfloat16)
    weights = torch.randn(count, N, K, device="cuda", dtype=torch.bfloat16)
    def run():
        for w in weights: x @ w.T
    run(); torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): run()
    times = []
    for _ in range(6):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        a.record(); graph.replay(); b.record(); torch.cuda.synchronize()
        times.append(a.elapsed_time(b) * 1e3 / count)
    found.append(round(sorted(times[1:])[2], 2))
    del weights, graph
print(json.dumps(found))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", type=Path, nargs="+", metavar="ARTIFACT")
    parser.add_argument("--buckets", help="names, separated by commas (default: all)")
    parser.add_argument("--context", type=int, default=1024)
    options = parser.parse_args()
    wanted = options.buckets.split(",") if options.buckets else None
    results = []
    for path in options.artifacts:
        try:
            results.append(measure(path, wanted, options.context))
        except (ValueError, OSError) as error:
            print(f"kernels: error: {path}: {error}", file=sys.stderr)
            results.append({"artifact": path.name, "error": str(error)})
    imported = sorted({"torch", "triton"} & set(sys.modules))
    print(json.dumps({"bench": "kernels", "imported": imported, "artifacts": results}))
    return int(any("error" in r for r in results))


def measure(path: Path, wanted: Sequence[str] | None, context: int) -> dict[str, Any]:
    artifact = Artifact.open(path)
    buckets = [b for b in artifact.buckets if wanted is None or b.name in wanted]
    if wanted and len(buckets) < len(wanted):
        raise ValueError(f"its buckets are {', '.join(b.name for b in artifact.buckets)}")
    plans = {b: artifact.file(f"plans/{b.name}.json") for b in buckets}
    rivals = cublas(sorted({shape for plan in plans.values() for shape in dense_shapes(json.loads(plan.read_bytes()))}))
    executor = CudaExecutor.load(artifact, num_pages=None, max_num_seqs=max(b.sequences for b in buckets))
    result: dict[str, Any] = {"artifact": path.name, "gpu": executor.device_name, "context": context, "buckets": []}
    try:
        print(f"\n{path.name} on {executor.device_name}")
        fill_caches(executor, artifact)
        for bucket in buckets:
            if bucket.kind == "decode" and not fits(executor, bucket.tokens, context, STEPS):
                print(f"  {bucket.name} left out: the KV pages do not suffice")
                continue
            result["buckets"].append(shares(executor, bucket, context, rivals))
            show(result["buckets"][-1])
    except CudaError as error:
        print(f"kernels: error: {path}: {error}", file=sys.stderr)
        result["error"] = str(error)
    finally:
        executor.close()
    return result


def dense_shapes(plan: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """(tokens, outputs, inputs) of the plan's dense products."""
    return [(step["outputs"][0]["shape"][0], *step["operands"]["weight"]["shape"]) for step in plan["steps"]
            if step["op"] in DENSE]


def cublas(shapes: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], float]:
    """Microseconds of each product; empty without PyTorch."""
    done = subprocess.run([sys.executable, "-c", CUBLAS, json.dumps(shapes)], capture_output=True, text=True)
    return dict(zip(shapes, json.loads(done.stdout), strict=True)) if done.returncode == 0 else {}


def shares(executor: CudaExecutor, bucket: Bucket, context: int,
           rivals: Mapping[tuple[int, ...], float]) -> dict[str, Any]:
    """What each operator's kernels cost in the bucket's step. Microseconds a call."""
    inputs = step_inputs(executor, bucket, context)
    config, steps = executor.config, executor.plans[bucket].steps
    experts = touched_experts(config.num_experts, bucket.tokens * config.experts_per_token)

    def timed(op: str | None) -> float:
        return time_twice(executor, bucket, {number for number, step in enumerate(steps) if step.op == op})

    executor.upload(bucket, inputs)
    whole = timed(None)
    found = []
    for op in dict.fromkeys(step.op for step in steps):
        calls = [step for step in steps if step.op == op]
        us = (timed(op) - whole) * 1e3
        moved = sum(step_bytes(config, step, context, experts) if bucket.kind == "decode" else step.moved for step in calls)
        flops = sum(step.flops for step in calls)
        shape = (calls[0].outputs[0].shape[0], *_shape(calls[0], "weight"))
        found.append({"op": op, "kernel": calls[0].kernel, "count": len(calls), "us": round(us / len(calls), 2),
                      "share": round(us / whole / 1e3, 4), "tb_s": round(moved / us / 1e6, 2) if us > 0 else None,
                      "tflop_s": round(flops / us / 1e6, 1) if us > 0 else None,
                      "cublas_us": rivals.get(shape) if op in DENSE else None})
    return {"bucket": bucket.name, "ms": round(whole, 4), "ops": found}


def _shape(step: Step, name: str) -> tuple[int, ...]:
    operand = step.operands.get(name)
    return operand.shape if isinstance(operand, Operand) else ()


def show(found: Mapping[str, Any]) -> None:
    print(f"\n  {found['bucket']}: {found['ms']:.3f} ms")
    print(f"  {'operator':20} {'kernel':24} {'calls':>5} {'us each':>8} {'share':>6} {'TB/s':>5} {'TFLOP/s':>7}"
          f" {'cublas':>8}")
    for op in sorted(found["ops"], key=lambda op: -op["share"]):
        cells = [f"{'-':>{width}}" if op[key] is None else f"{op[key]:{width}.{digits}f}"
                 for key, width, digits in (("tb_s", 5, 2), ("tflop_s", 7, 1), ("cublas_us", 8, 2))]
        print(f"  {op['op']:20} {op['kernel']:24} {op['count']:5} {op['us']:8.2f} {op['share']:6.1%} {' '.join(cells)}")
    print(f"  {'sum':20} {'':24} {'':5} {'':8} {sum(op['share'] for op in found['ops']):6.1%}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
