"""An artifact of several ranks against one of one rank, of the same model and weights, block by block on the GPUs here.

    python bench/against_one_rank.py ONE SEVERAL [--tokens 256] [--new 64] [--replays 1000]

The one rank runs a random prompt through an extend bucket and then decodes greedily; the several run the same tokens, launch
by launch, each block (attention, or mixture of experts) on what the one rank computed before it, so that an error is seen in
the block that makes it: behind every block the residual stream is overwritten, and so is the routing of tokens that several
ranks route otherwise. Only what an exchange's own kernel makes of the new stream, QKV or the routing, is made of the stream
that the ranks hold, which must be the same bits on all.

Printed are, for each block, the mean and least cosine of its tokens' streams, and how many tokens are routed otherwise, with
the largest gap between the logits of an expert that only one rank chose and one that only several did (a near tie, or a
fault). The last layer's experts, which several ranks add in the head's kernel, show in the logits. Where a greedy token is
another, the two candidates must be no more than TIE times the root mean square of the logits' difference apart. Last, the
graph of decode-1 over and over, whose logits must not change by a bit. A table, then one JSON line; exits with 1 on a fault.
Needs neither PyTorch nor Triton.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from gpu import NEAR_TIE, cosines

from gptoss_compile.artifact import Artifact
from gptoss_compile.config import Bucket
from gptoss_compile.launch_plan import Operand, Step
from gptoss_compile.random_weights import widen_bf16
from gptoss_compile.runtime.executor_cuda import CudaExecutor
from gptoss_compile.runtime.timing import Inputs, place_pages, prompt_chunks

Array = np.ndarray[Any, Any]
Run = list[Array]  # of a step, by token: what KINDS names, layer by layer; the logits in place of the last experts' stream
KINDS = ("attention", "router's weights", "router's choice", "experts")
STREAMS = ("linear_residual", "reduce_norm_linear", "moe_down", "moe_grouped", "moe_grouped_mx")  # they give the new stream
DECODE = Bucket.decode(1)
LEAST = 0.9999  # of the cosines' mean over a block's tokens
TIE = 6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("one", type=Path, metavar="ONE")
    parser.add_argument("several", type=Path, metavar="SEVERAL")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--replays", type=int, default=1000)
    options = parser.parse_args()
    try:
        result = compare(options)
    except (ValueError, OSError) as error:
        print(f"against_one_rank: error: {error}", file=sys.stderr)
        return 2
    show(result, options.one.name)
    print(json.dumps({"bench": "against_one_rank", **result}))
    return int(bool(result["faults"]))


def compare(options: argparse.Namespace) -> dict[str, Any]:
    faults: list[str] = []
    one, several = open_pair(options)
    with closing(load(one, options)) as executor:
        wanted = run_all(executor, options, [], faults)
    with closing(load(several, options)) as executor:
        found = run_all(executor, options, wanted, faults)
        last = decode_inputs(executor, greedy(wanted[-2]), options.tokens + options.new - 1)
        faults += replay(executor, last, options.replays)
        gpu = executor.device_name
    rows = [*block_rows("prompt", wanted[0], found[0]), *block_rows("decoded", joined(wanted[1:]), joined(found[1:]))]
    parted = [parting(at, mine[-1][0], theirs[-1][0]) for at, (mine, theirs) in enumerate(zip(wanted, found, strict=True))
              if greedy(mine) != greedy(theirs)]
    return {"artifact": options.several.name, "gpu": gpu, "tokens": options.tokens, "rows": rows,
            "greedy": {"tokens": len(found), "same": len(found) - len(parted), "parted": parted},
            "replays": options.replays, "faults": [*faults, *judge(rows, parted)]}


# Running --------------------------------------------------------------------------------------------------------------


def open_pair(options: argparse.Namespace) -> tuple[Artifact, Artifact]:
    one, several = Artifact.open(options.one), Artifact.open(options.several)
    if one.ranks > 1 or several.ranks == 1:
        raise ValueError(f"ONE is to have one rank and SEVERAL more; they have {one.ranks} and {several.ranks}")
    if one.config != several.config:
        raise ValueError(f"{options.one} and {options.several} are of different models")
    if min(options.tokens, options.new) < 1:
        raise ValueError("--tokens and --new are 1 or more")
    for artifact in (one, several):
        if options.tokens + options.new > artifact.max_context:
            raise ValueError(f"{artifact.path} holds {artifact.max_context} tokens, fewer than --tokens and --new")
        if DECODE not in artifact.buckets or not extend_buckets(artifact.buckets, options.tokens):
            raise ValueError(f"{artifact.path} needs an extend bucket of {options.tokens} tokens, and decode-1")
    return one, several


def extend_buckets(buckets: Sequence[Bucket], count: int) -> list[Bucket]:
    """Those that take so many tokens at once, the smallest first."""
    return sorted((b for b in buckets if b.kind == "extend" and b.tokens >= count), key=lambda b: b.tokens)


def load(artifact: Artifact, options: argparse.Namespace) -> CudaExecutor:
    pages = -(-(options.tokens + options.new) // artifact.page_size) + 1
    return CudaExecutor.load(artifact, num_pages=pages, max_num_seqs=1)


def run_all(executor: CudaExecutor, options: argparse.Namespace, wanted: Sequence[Run], faults: list[str]) -> list[Run]:
    """The prompt, then each token that the one rank chooses: by what it `wanted`, or if that is empty, here and now."""
    count = options.tokens
    ((bucket, inputs),) = prompt_chunks(executor, count, extend_buckets(executor.buckets, count)[:1])
    found = [run(executor, bucket, inputs, count, wanted[0] if wanted else [], faults)]
    for at in range(1, options.new + 1):
        inputs = decode_inputs(executor, greedy((wanted or found)[at - 1]), count + at - 1)
        found.append(run(executor, DECODE, inputs, 1, wanted[at] if wanted else [], faults))
    return found


def greedy(run: Run) -> int:
    return int(run[-1][0].argmax())


def decode_inputs(executor: CudaExecutor, token: int, position: int) -> Inputs:
    inputs = {str(o.key): np.zeros(o.shape, np.int32) for o in executor.plans[DECODE].inputs}
    inputs["tokens"][0], inputs["positions"][0] = token, position
    place_pages(executor, inputs, 0, position + 1, executor.max_context)
    return inputs


def run(executor: CudaExecutor, bucket: Bucket, inputs: Inputs, count: int, wanted: Run, faults: list[str]) -> Run:
    """What a step of `count` tokens computes; if anything is `wanted`, then each block on that."""
    found: Run = []

    def watch(rank: int, number: int, step: Step) -> None:
        places = kept(step)
        values = [executor.read(bucket, place, rank) for place in places]
        if rank == 0:
            found.extend(value[:count].copy() for value in values)
        first = len(found) - len(places)
        for at, value in enumerate(values, first):
            fault = f"{bucket.name}, {name(at)}: rank {rank} holds other bits than rank 0"
            if value[:count].tobytes() != found[at].tobytes() and fault not in faults:
                faults.append(fault)
        if wanted and places:
            overwrite(values, wanted[first : first + len(places)], count)
            for place, value in zip(places, values, strict=True):
                executor.write(bucket, place, value, rank)

    logits = executor.run_steps(bucket, inputs, watch)[:1].copy()
    last = len(KINDS) * executor.config.num_layers - 1
    assert len(found) == last + (len(executor.ranks) == 1), f"{bucket.name} has other operators than are known here"
    return [*found[:last], logits]


def kept(step: Step) -> Sequence[Operand]:
    """The residual stream and the router's weights and choice, whichever a step gives."""
    if step.op.endswith("norm_route"):
        return step.outputs
    return step.outputs[:1] if step.op in STREAMS else ()


def name(at: int) -> str:
    layer, kind = divmod(at, len(KINDS))
    return f"{KINDS[kind]} of layer {layer}"


def overwrite(values: Sequence[Array], wanted: Sequence[Array], count: int) -> None:
    """Put what is wanted in the place of a step's stream, and of the routing of tokens that are routed otherwise."""
    values[0][:count] = wanted[0]
    if len(values) > 1:
        tokens = routed_otherwise(wanted[2], values[2][:count])
        for value, right in zip(values[1:], wanted[1:], strict=True):
            value[tokens] = right[tokens]


def replay(executor: CudaExecutor, inputs: Inputs, times: int) -> list[str]:
    """The graph on the ranks' own values, so held against its first replay."""
    first = b""
    for number in range(times):
        logits = executor.run(DECODE, inputs)[0].tobytes()
        first = first or logits
        if logits != first:
            return [f"replay {number} gives other logits"]
    return []


# Comparing ------------------------------------------------------------------------------------------------------------


def joined(runs: Sequence[Run]) -> Run:
    return [np.concatenate(values) for values in zip(*runs, strict=True)]


def block_rows(tokens: str, one: Run, several: Run) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for at in range(0, len(one), len(KINDS)):
        mine, theirs = one[at : at + len(KINDS)], several[at : at + len(KINDS)]
        differ = routed_otherwise(mine[2], theirs[2])
        gaps = [gap(mine[1][t], mine[2][t], theirs[1][t], theirs[2][t]) for t in differ]
        rows.append({"tokens": tokens, "block": name(at), **likeness(mine[0], theirs[0])})
        rows.append({"tokens": tokens, "block": name(at + 3), **likeness(mine[3], theirs[3]),
                     "differ": len(differ), "gap": float(np.max([0, *gaps]))})
    rows[-1]["block"] += " and head"
    return rows


def likeness(one: Array, several: Array) -> dict[str, float]:
    """The tokens' cosines, of streams in bf16 or of logits."""
    found = cosines(*(widen_bf16(v) if v.dtype == np.uint16 else v for v in (one, several)))
    return {"mean": float(found.mean()), "least": float(found.min())}


def routed_otherwise(one: Array, several: Array) -> Array:
    """The tokens that do not have the same experts in both choices [T, K], in whatever order."""
    return np.flatnonzero((np.sort(one, 1) != np.sort(several, 1)).any(1))


def gap(weights: Array, chosen: Array, other_weights: Array, other_chosen: Array) -> float:
    """The largest difference between the router's logits of an expert that only one rank chose and of one that only the
    several did. Weights are a softmax over those chosen, so logits are known but for a constant each: they are taken from
    the mean of the experts that both chose; without any there is no telling, and the gap is infinite."""
    one, several = (dict(zip(ids.tolist(), np.log(w.astype(np.float64)), strict=True))
                    for w, ids in ((weights, chosen), (other_weights, other_chosen)))
    common = one.keys() & several.keys()
    if not common:
        return float("inf")
    ours, theirs = ([found[e] for e in found if e not in common] - np.mean([found[e] for e in common])
                    for found in (one, several))
    return float(np.abs(np.subtract.outer(ours, theirs)).max())


def parting(at: int, one: Array, several: Array) -> dict[str, Any]:
    """How far apart the two candidates for token `at` are, of which logits [V] choose different ones."""
    a, b = one.argmax(), several.argmax()
    return {"token": at, "gap": float(one[a] - one[b]), "other_gap": float(several[b] - several[a]),
            "rms": float(np.sqrt(np.mean((one - several) ** 2)))}


def judge(rows: Sequence[dict[str, Any]], parted: Sequence[dict[str, Any]]) -> list[str]:
    """What is no rounding; a NaN is none."""
    low = [f"{r['tokens']}, {r['block']}: the mean cosine is {r['mean']:.6f}" for r in rows if not r["mean"] >= LEAST]
    far = [f"{r['tokens']}, {r['block']}: tokens are routed otherwise with logits {r['gap']:.4f} apart"
           for r in rows if "gap" in r and not r["gap"] <= NEAR_TIE]
    wide = [f"greedy token {p['token']} is another without a near tie" for p in parted
            if not max(p["gap"], p["other_gap"]) <= TIE * p["rms"]]
    return [*low, *far, *wide]


def show(result: dict[str, Any], one: str) -> None:
    print(f"\n{result['artifact']} on {result['gpu']} against {one}, {result['tokens']} tokens")
    print(f"  {'tokens':>7} {'block':>27} {'mean cosine':>11} {'least':>9} {'routed otherwise':>16} {'largest gap':>11}")
    for row in result["rows"]:
        routing = f" {row['differ']:16} {row['gap']:11.4f}" if "gap" in row else ""
        print(f"  {row['tokens']:>7} {row['block']:>27} {row['mean']:11.7f} {row['least']:9.6f}{routing}")
    greedy = result["greedy"]
    print(f"  {greedy['same']} of {greedy['tokens']} greedy tokens are the same, {result['replays']} replays")
    for row in greedy["parted"]:
        print(f"  token {row['token']}: candidates are {row['gap']:.4f} apart with one rank, {row['other_gap']:.4f} with "
              f"several; logits differ by {row['rms']:.4f} (root mean square)")
    for fault in result["faults"]:
        print(f"  FAULT {fault}")


if __name__ == "__main__":
    sys.exit(main())
