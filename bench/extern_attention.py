"""FlashInfer's attention for prompts against ours, inside whole steps on the GPU here.

    python bench/extern_attention.py OURS THEIRS [--lengths 2048,8192,32768]

OURS and THEIRS are artifacts of the same model and buckets with random weights, THEIRS compiled with --extern always. Of
each extend bucket the last chunk of a prompt of each length is run, with OURS' plan and then with THEIRS' in its place.
`ours` and `theirs` are microseconds a layer: of the captured step with its attention twice, less the step. `error` is the
relative norm of the difference of what the first layer of that kind gives, of the same input: all that OURS computed on the
way there stands in THEIRS' place too, so that no earlier attention, nor a router that chose otherwise for it, is in it. A
table, the entries of kernels/tables that follow, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_compile.artifact import Artifact, plan_file
from gptoss_compile.config import Bucket
from gptoss_compile.launch_plan import Extern, LaunchPlan, Operand, Step
from gptoss_compile.random_weights import widen_bf16
from gptoss_compile.runtime.executor_cuda import CudaExecutor
from gptoss_compile.runtime.timing import Inputs, fill_caches, prompt_chunks, time_twice

LARGEST_ERROR = 0.005  # both round probabilities and results to bf16, by up to 2^-9 of themselves
Row = dict[str, Any]
Kept = dict[int, list[np.ndarray[Any, Any]]]  # what steps gave, by number


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ours", type=Path, metavar="OURS")
    parser.add_argument("theirs", type=Path, metavar="THEIRS")
    parser.add_argument("--lengths", default="2048,8192,32768", help="of prompts in tokens (default: 2048,8192,32768)")
    options = parser.parse_args()
    try:
        ours, theirs = Artifact.open(options.ours), Artifact.open(options.theirs)
        executor = CudaExecutor.load(ours, num_pages=None, max_num_seqs=max(b.sequences for b in ours.buckets))
        try:
            fill_caches(executor, ours)
            rows = [row for bucket in ours.buckets if bucket.kind == "extend" and bucket in theirs.buckets
                    for row in compare(executor, theirs, bucket, [int(n) for n in options.lengths.split(",")])]
        finally:
            executor.close()
    except (ValueError, OSError) as error:
        print(f"extern_attention: error: {error}", file=sys.stderr)
        return 1
    show(rows)
    good = bool(rows) and all(row["error"] < LARGEST_ERROR for row in rows)
    imported = sorted({"torch", "triton"} & set(sys.modules))
    print(json.dumps({"bench": "extern_attention", "gpu": executor.device_name, "imported": imported, "good": good,
                      "rows": rows, "entries": entries(rows)}))
    return int(not good)


def compare(executor: CudaExecutor, theirs: Artifact, bucket: Bucket, lengths: list[int]) -> list[Row]:
    """A row for each length that fits, and for layers of each kind that call a library in THEIRS."""
    plans = executor.plans[bucket], LaunchPlan.loads(theirs.file(plan_file(bucket, 0)).read_text())
    if [step.op for step in plans[0].steps] != [step.op for step in plans[1].steps]:
        raise ValueError(f"{bucket.name} of {theirs.path} has other steps than OURS: they must be of the same model")
    if plans[0].inputs != plans[1].inputs:
        raise ValueError(f"{bucket.name} of {theirs.path} has other inputs than OURS: they must be compiled with the same"
                         " buckets and --max-context")
    kinds: dict[int, list[int]] = {}  # window: numbers of steps
    for number, step in enumerate(plans[1].steps):
        if any(isinstance(launch, Extern) for launch in step.launches):
            window = step.operands["window"]
            assert isinstance(window, int), window
            kinds.setdefault(window, []).append(number)
    files = {path.name: path.read_bytes() for path in (theirs.path / "kernels").iterdir()}
    rows = []
    for length in lengths:
        if not bucket.tokens <= length <= executor.max_context:
            continue
        chunk, inputs = prompt_chunks(executor, length, [bucket])[-1]
        found = []
        kept: Kept = {}
        for plan in plans:
            put(executor, bucket, plan, files)
            found.append((outputs(executor, chunk, inputs, kinds, kept), microseconds(executor, chunk, inputs, kinds)))
        (wanted, ours), (got, others) = found
        for window, numbers in kinds.items():
            difference = np.linalg.norm(got[window] - wanted[window]) / np.linalg.norm(wanted[window])
            rows.append({"bucket": bucket.name, "length": length, "window": window, "key": key(plans[1].steps[numbers[0]]),
                         "kernel": plans[1].steps[numbers[0]].kernel, "ours": round(ours[window], 1),
                         "theirs": round(others[window], 1), "error": round(float(difference), 5)})
    put(executor, bucket, plans[0], files)
    return rows


def put(executor: CudaExecutor, bucket: Bucket, plan: LaunchPlan, files: Mapping[str, bytes]) -> None:
    before = executor.graphs[bucket]
    executor.install(bucket, [plan], files)
    before.close()


def key(step: Step) -> str:
    """What kernels/tables calls the step's shapes."""
    shapes = {name: value.shape for name, value in step.operands.items() if isinstance(value, Operand)}
    return (f"tokens={shapes['q'][0]} sequences={shapes['table'][0]} heads={shapes['q'][1]} kv_heads={shapes['cache'][2]} "
            f"window={step.operands['window']}")


def outputs(executor: CudaExecutor, bucket: Bucket, inputs: Inputs, kinds: Mapping[int, list[int]],
            kept: Kept) -> dict[int, Any]:
    """What the first layer of each kind gives, by window; rows of padding left out.

    The intermediate results that lead there are put into `kept`; where they are there already, they take the place of what
    the steps give.
    """
    found = {}
    wanted, used = {numbers[0]: window for window, numbers in kinds.items()}, inputs["positions"] >= 0
    last = max(wanted, default=0)

    def watch(rank: int, number: int, step: Step) -> None:
        if number in wanted:
            found[wanted[number]] = widen_bf16(executor.read(bucket, step.outputs[0]))[used]
        if number >= last:
            return
        places = [place for place in step.outputs if place.place == "arena"]
        if number not in kept:
            kept[number] = [executor.read(bucket, place) for place in places]
            return
        for place, values in zip(places, kept[number], strict=True):
            executor.write(bucket, place, values)

    executor.run_steps(bucket, inputs, watch)
    return found


def microseconds(executor: CudaExecutor, bucket: Bucket, inputs: Inputs, kinds: Mapping[int, list[int]]) -> dict[int, float]:
    """Of one layer's attention, by window."""
    executor.upload(bucket, inputs)
    whole = time_twice(executor, bucket, ())
    return {window: (time_twice(executor, bucket, set(numbers)) - whole) * 1e3 / len(numbers)
            for window, numbers in kinds.items()}


def entries(rows: list[Row]) -> dict[str, dict[str, str]]:
    """What kernels/tables/<target>.json should say of `attention`: where theirs is faster at every length."""
    keys = {row["key"]: row["kernel"] for row in rows}
    return {k: {"kernel": kernel} for k, kernel in keys.items()
            if all(row["theirs"] < row["ours"] for row in rows if row["key"] == k)}


def show(rows: list[Row]) -> None:
    print(f"{'bucket':16} {'length':>7} {'window':>7} {'ours':>9} {'theirs':>9} {'ratio':>6} {'error':>8}")
    for row in rows:
        print(f"{row['bucket']:16} {row['length']:7} {row['window']:7} {row['ours']:9.1f} {row['theirs']:9.1f}"
              f" {row['theirs'] / row['ours'] if row['ours'] > 0 else float('nan'):6.2f} {row['error']:8.5f}")
    print(f'"attention": {json.dumps(entries(rows), indent=1)}')


if __name__ == "__main__":
    sys.exit(main())
