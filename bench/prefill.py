"""How fast artifacts take prompts in on the GPU here, in chunks of their extend buckets.

    python bench/prefill.py ARTIFACT... [--tp N] [--lengths 512,2048,8192,32768] [--rest 0.3]

One prompt at a time, inputs and the copy of the logits included, host and GPU in turn as a server does without overlap.
`rested`: pauses between prompts; `sustained`: one after the other, which a power-bound card feels. TFLOP/s count the real
tokens' products and attention, a GPU. `matmul`: cuBLAS through PyTorch, 8192³ in bf16, in a process of its own before the
rest, where PyTorch is installed. Tables, then one JSON line. This process needs neither PyTorch nor Triton.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu import open_artifact

from gptoss_compile.artifact import Artifact
from gptoss_compile.config import Bucket
from gptoss_compile.runtime.cuda_driver import CudaError
from gptoss_compile.runtime.executor_cuda import CudaExecutor
from gptoss_compile.runtime.timing import fill_caches, prompt_chunks

SUSTAINED = 2.0  # seconds of prompts without a pause; the second half counts
MATMUL = """
import json, time, torch
a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in "ab")
def run(seconds):
    start = time.perf_counter(); count = 0
    while time.perf_counter() - start < seconds:
        for _ in range(10): a @ b
        count += 10; torch.cuda.synchronize()
    return round(2 * 8192**3 * count / (time.perf_counter() - start) / 1e12, 1)
run(0.05); time.sleep(1)
print(json.dumps({"rested": run(0.05), "sustained": run(2.0)}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", type=Path, nargs="+", metavar="ARTIFACT")
    parser.add_argument("--tp", type=int, metavar="N", help="refuse artifacts of other than N ranks")
    parser.add_argument("--lengths", default="512,2048,8192,32768")
    parser.add_argument("--rest", type=float, default=0.3, metavar="SECONDS")
    options = parser.parse_args()
    lengths = tuple(int(part) for part in options.lengths.split(","))
    ceiling = matmul()
    print(f"matmul: {ceiling}")
    results = []
    for path in options.artifacts:
        try:
            results.append(measure(open_artifact(path, options.tp), lengths, options.rest, ceiling))
        except (ValueError, OSError) as error:
            print(f"prefill: error: {path}: {error}", file=sys.stderr)
            results.append({"artifact": path.name, "error": str(error)})
    imported = sorted({"torch", "triton"} & set(sys.modules))
    print(json.dumps({"bench": "prefill", "imported": imported, "matmul_tflop_s": ceiling, "artifacts": results}))
    return int(any("error" in r for r in results))


def matmul() -> dict[str, float] | None:
    """TFLOP/s of cuBLAS, if PyTorch is here."""
    done = subprocess.run([sys.executable, "-c", MATMUL], capture_output=True, text=True)
    return dict(json.loads(done.stdout)) if done.returncode == 0 else None


def measure(artifact: Artifact, lengths: Sequence[int], rest: float, ceiling: dict[str, float] | None) -> dict[str, Any]:
    path = artifact.path
    executor = CudaExecutor.load(artifact, num_pages=-(-max(lengths) // artifact.page_size) + 1, max_num_seqs=16)
    result: dict[str, Any] = {"artifact": path.name, "gpu": executor.device_name, "ranks": artifact.ranks, "rows": []}
    try:
        fill_caches(executor, artifact)
        print(f"\n{path.name} on {executor.device_name}")
        print(f"  {'tokens':>7} {'chunks':>24}  {'rested ms':>9} {'tok/s':>8} {'TFLOP/s':>7}  "
              f"{'sustained ms':>12} {'tok/s':>8} {'TFLOP/s':>7}")
        for length in (n for n in lengths if n <= executor.max_context):
            row = one_row(executor, length, rest, ceiling)
            result["rows"].append(row)
            a, b = row["rested"], row["sustained"]
            print(f"  {length:7} {row['chunks']:>24}  {a['ms']:9.2f} {a['tok_s']:8.0f} {a['tflop_s']:7.1f}  "
                  f"{b['ms']:12.2f} {b['tok_s']:8.0f} {b['tflop_s']:7.1f}", flush=True)
    except CudaError as error:
        print(f"prefill: error: {path}: {error}", file=sys.stderr)
        result["error"] = str(error)
    finally:
        executor.close()
    return result


def one_row(executor: CudaExecutor, length: int, rest: float, ceiling: dict[str, float] | None) -> dict[str, Any]:
    steps = prompt_chunks(executor, length, [b for b in executor.buckets if b.kind == "extend"])

    def prompt() -> float:
        start = time.perf_counter()
        for bucket, inputs in steps:
            executor.run(bucket, inputs)
        return time.perf_counter() - start

    once = min(prompt(), prompt())
    count = max(3, round(SUSTAINED / once))
    rested = []
    for _ in range(5):
        time.sleep(rest)
        rested.append(prompt())
    sustained = [prompt() for _ in range(count)]
    flops = prompt_flops(executor, steps[0][0], length)
    found: dict[str, Any] = {"tokens": length, "chunks": " ".join(b.name for b, _ in steps[:1]) + f" x {len(steps)}",
                             "gflop_a_token": round(flops / length / 1e9, 2)}
    for name, seconds in (("rested", statistics.median(rested)), ("sustained", statistics.median(sustained[count // 2:]))):
        speed = flops / seconds / 1e12 / len(executor.ranks)
        found[name] = {"ms": round(seconds * 1e3, 3), "tok_s": round(length / seconds), "tflop_s": round(speed, 1),
                       "of_matmul": round(speed / ceiling[name], 3) if ceiling else None}
    return found


def prompt_flops(executor: CudaExecutor, bucket: Bucket, length: int) -> float:
    """Operations of a prompt: every token's products, without the head's, and causal attention."""
    config = executor.config
    plans = [rank.plans[bucket] for rank in executor.ranks]
    products = sum(s.flops for plan in plans for s in plan.steps
                   if "attention" not in s.op and not s.op.endswith("norm_head")) / bucket.tokens
    attention = 0.0
    for windowed in config.windowed:
        seen = min(config.sliding_window, length) if windowed else (length + 1) / 2
        attention += 4 * seen * config.num_heads * config.head_dim
    return (products + attention) * length


if __name__ == "__main__":
    sys.exit(main())
