"""`gptoss-inspect ARTIFACT`: what an artifact was made of and what a step of it costs. Needs no PyTorch."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptoss_compile.artifact import Artifact, ArtifactError, plan_file
from gptoss_compile.launch_plan import Extern, LaunchPlan
from gptoss_compile.sharding import rank_config, spans
from gptoss_compile.target import Target

if TYPE_CHECKING:
    from rich.console import Console


MEMORY = ("weights", "arena", "workspace", "exchange", "kv_cache_per_page")


def report(artifact: Artifact) -> dict[str, Any]:
    """Everything that the command shows, as JSON values. Bytes and FLOPs are of one step; floors in microseconds. With
    several ranks all of it is rank 0's, but for `shares`."""
    manifest, target = artifact.manifest, Target.parse(artifact.target)
    shares = [_share(artifact, rank) for rank in range(artifact.ranks)]
    plans = {b.name: LaunchPlan.loads(artifact.file(f"plans/{b.name}.json").read_text()) for b in artifact.buckets}
    first = plans[artifact.buckets[0].name]
    return {
        "target": artifact.target, "dtype": first.dtype, "ranks": artifact.ranks, "config": manifest["config"],
        "page_size": artifact.page_size, "max_context": artifact.max_context, "weights": artifact.weights,
        "tokenizer": artifact.tokenizer_note, "tools": manifest["tools"], "digest": manifest["digest"],
        "passes": manifest["passes"],
        "buckets": {name: _bucket(plan, target) for name, plan in plans.items()}, "shares": shares,
        "memory": {
            **{key: shares[0][key] for key in MEMORY},
            "machine_code": sum(f["bytes"] for rel, f in manifest["files"].items() if rel.startswith("kernels/"))},
        "files": manifest["files"]}


def _share(artifact: Artifact, rank: int) -> dict[str, int]:
    """What a rank computes, and the bytes that it holds."""
    plans = [LaunchPlan.loads(artifact.file(plan_file(b, rank)).read_text()) for b in artifact.buckets]
    config = rank_config(artifact.config, rank, artifact.ranks, Target.parse(artifact.target))
    start, stop = spans(config.vocab_size, artifact.ranks)[rank]
    return {"query_heads": config.num_heads, "kv_heads": config.num_kv_heads, "intermediate": config.intermediate,
            "vocabulary": stop - start, "weights": sum(map(_weight_bytes, artifact.recipes(rank))),
            "arena": max(plan.arena_bytes for plan in plans), "workspace": max(plan.workspace_bytes for plan in plans),
            "exchange": max(plan.exchange_bytes for plan in plans),
            "kv_cache_per_page": sum(c.bytes // c.shape[0] for c in plans[0].caches)}


def _bucket(plan: LaunchPlan, target: Target) -> dict[str, Any]:
    kernels: dict[str, dict[str, Any]] = {}
    for step in plan.steps:
        row = kernels.setdefault(step.kernel, {"op": step.op, "count": 0, "launches": 0, "bytes": 0, "flops": 0,
                                               "libraries": []})
        row["libraries"] = sorted({*row["libraries"], *(x.binary for x in step.launches if isinstance(x, Extern))})
        row["count"] += 1
        row["launches"] += len(step.launches)
        row["bytes"] += step.moved
        row["flops"] += step.flops
    for row in kernels.values():
        row["floor_us"] = round(1e6 * max(row["bytes"] / target.bandwidth, row["flops"] / target.bf16_flops), 3)
    return {"steps": len(plan.steps), "launches": sum(len(s.launches) for s in plan.steps), "kernels": kernels,
            "arena_bytes": plan.arena_bytes,
            **{key: sum(row[key] for row in kernels.values()) for key in ("bytes", "flops", "floor_us")}}


def _weight_bytes(recipe: dict[str, Any]) -> int:
    size = {"bf16": 2, "fp32": 4, "i32": 4, "u8": 1}[recipe["dtype"]]
    for extent in recipe["shape"]:
        size *= extent
    return size


def show(data: dict[str, Any]) -> None:
    """The report as tables."""
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    config, target = data["config"], Target.parse(data["target"])
    console.print(f"[bold]{config['num_layers']} layers[/], hidden {config['hidden']}, {config['num_experts']} experts "
                  f"({config['expert_format']}), top-{config['experts_per_token']}, vocabulary {config['vocab_size']}")
    console.print(f"target {data['target']} ({target.part}), {data['dtype']}, {data['ranks']} rank(s), context "
                  f"{data['max_context']}, pages of {data['page_size']} tokens, weights {data['weights']}")
    console.print(f"tokenizer: {data['tokenizer']}")
    console.print("tools: " + ", ".join(f"{k} {v}" for k, v in sorted(data["tools"].items())))
    console.print(f"digest {data['digest']}\n")

    columns = (Column("pass", no_wrap=True), Column("exactness"), *(Column(b, justify="right") for b in data["buckets"]))
    table = Table(*columns, title="matches of each pass, by bucket")
    counts = {(r["bucket"], r["name"]): r["matches"] for r in data["passes"]}
    exactness = {r["name"]: r["exactness"] for r in data["passes"]}
    for name, kind in exactness.items():
        table.add_row(name, kind, *(str(counts.get((b, name), "-")) for b in data["buckets"]))
    console.print(table)

    for name, bucket in data["buckets"].items():
        names = (Column("kernel", no_wrap=True), Column("op", no_wrap=True))
        table = Table(*names, "steps", "launches", "bytes", "FLOP", f"floor on {target.part}",
                      title=f"{name}: {bucket['steps']} steps, {bucket['launches']} launches")
        for kernel, row in bucket["kernels"].items():
            label = f"{kernel} ({', '.join(row['libraries'])})" if row["libraries"] else kernel
            table.add_row(label, row["op"], str(row["count"]), str(row["launches"]), _size(row["bytes"]),
                          f"{row['flops']:.3g}", f"{row['floor_us']:.1f} µs")
        table.add_row("all", "", str(bucket["steps"]), str(bucket["launches"]), _size(bucket["bytes"]),
                      f"{bucket['flops']:.3g}", f"{bucket['floor_us']:.1f} µs", style="bold")
        console.print(table)
    if data["ranks"] > 1:
        _show_shares(console, data["shares"])
    console.print("memory: " + ", ".join(f"{k.replace('_', ' ')} {_size(v)}" for k, v in data["memory"].items()))
    kinds = Counter(rel.split("/")[0] for rel in data["files"])
    console.print("files, all with their sha256 verified: " + ", ".join(f"{n} in {k}/" for k, n in sorted(kinds.items())))


def _show_shares(console: Console, shares: Sequence[dict[str, int]]) -> None:
    from rich.table import Table

    table = Table("rank", *(key.replace("_", " ") for key in shares[0]), title="what each rank has")
    for rank, share in enumerate(shares):
        table.add_row(str(rank), *(_size(value) if key in MEMORY else str(value) for key, value in share.items()))
    console.print(table)


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gptoss-inspect", description="Show what an artifact holds.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(arguments)
    try:
        data = report(Artifact.open(options.artifact))
    except ArtifactError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(data, indent=1))
    else:
        show(data)
    return 0
