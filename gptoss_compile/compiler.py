"""One compilation from checkpoint to artifact: every bucket traced, rewritten and planned; machine code; weights."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import fx

from gptoss_compile import __version__, library
from gptoss_compile.artifact import Artifact, ArtifactWriter, canonical_json, plan_file, rank_suffix
from gptoss_compile.checkpoint import Checkpoint
from gptoss_compile.config import Bucket, ModelConfig
from gptoss_compile.exchange_area import check_equal
from gptoss_compile.ir import Dumper, print_graph
from gptoss_compile.kernels.spec import Launch, LibrarySource
from gptoss_compile.launch_plan import LARGEST_SCALE, LaunchPlan, Weight
from gptoss_compile.pack import add_weights, check_mode
from gptoss_compile.passes.base import Context, Extern
from gptoss_compile.passes.select_kernels import calls
from gptoss_compile.paths import atomic_directory, cache_dir
from gptoss_compile.pipeline import Options, Record, run_passes
from gptoss_compile.plan import kernel_launches, make_plan
from gptoss_compile.sharding import rank_config, rank_plan
from gptoss_compile.target import Target
from gptoss_compile.tokenizer import o200k_base
from gptoss_compile.trace import DTYPES, Geometry, trace_model
from gptoss_compile.verify import verify

PAGE_SIZE = 16  # tokens a page of the KV cache
EXCHANGE_TARGETS = ("sm90",)  # GPUs with kernels for what ranks exchange
# The largest prompt step has room for 255 sequences that generate, and a prompt beside them.
GPU_BUCKETS = (*(Bucket.decode(b) for b in (1, 2, 4, 8, 16, 32, 64, 128, 256)),
               Bucket.extend(512, 64), Bucket.extend(1024, 64), Bucket.extend(2048, 256))
CPU_BUCKETS = (Bucket.decode(1), Bucket.decode(8), Bucket.extend(64, 9, 16), Bucket.extend(256, 1, 16))


def default_buckets(target: Target) -> tuple[Bucket, ...]:
    return GPU_BUCKETS if target.is_gpu else CPU_BUCKETS


class CompileError(ValueError):
    """A request that cannot be compiled; the message says why and what to do."""


class Progress(Protocol):
    """Shows long work: a label, then (done, total) calls while the context is open."""

    def __call__(self, label: str) -> AbstractContextManager[Callable[[int, int], None]]: ...


def silent(label: str) -> AbstractContextManager[Callable[[int, int], None]]:
    return nullcontext(lambda done, total: None)


@dataclass(frozen=True)
class Request:
    """What to compile. weights: `pack`, `link` or `random:SEED`; dtype: None = the target's own (cpu fp32, else bf16);
    max_context: None = the model's, on cpu at most 4,096; extern: see `passes.base.Context`."""

    target: Target
    weights: str = "pack"
    buckets: tuple[Bucket, ...] = ()
    max_context: int | None = None
    dtype: str | None = None
    ranks: int = 1
    options: Options = field(default_factory=Options)
    dump_ir: Path | None = None
    verify: bool = False
    extern: Extern = "never"


@dataclass(frozen=True)
class Compiled:
    """One bucket's result: each rank's plan, what the passes did, the final graph by the first rank that has it, and the
    machine code it needs."""

    plans: tuple[LaunchPlan, ...]
    records: tuple[Record, ...]
    irs: dict[int, str]
    files: tuple[tuple[str, bytes], ...]


def compile_checkpoint(checkpoint: Checkpoint, folder: Path | None, request: Request, output: Path,
                       progress: Progress = silent) -> Artifact:
    """Compile a checkpoint and write the artifact to `output`.

    Raises CompileError, PassError, VerifyError, CheckpointError or ArtifactError; then nothing is written.
    """
    config = checkpoint.config
    job = Job(config, request)
    with ArtifactWriter(output) as writer:
        compiled = []
        with progress("compiling") as report:
            for i, bucket in enumerate(job.buckets):
                report(i, len(job.buckets))
                compiled.append(job.compile(bucket))
            report(len(job.buckets), len(job.buckets))
        for bucket, each in zip(job.buckets, compiled, strict=True):
            for plan in each.plans:
                writer.write(plan_file(bucket, plan.rank), plan.dumps().encode())
            for rank, text in each.irs.items():
                writer.write(f"ir/{bucket.name}{rank_suffix(rank)}.py", text.encode())
        for name, data in sorted({name: data for each in compiled for name, data in each.files}.items()):
            writer.write(f"kernels/{name}", data)
        if request.target.is_gpu:
            for name, data in _files_beside(request, compiled):
                writer.write(name, data)
        tokenizer, note = o200k_base(folder, config.vocab_size)
        if tokenizer is not None:
            writer.write("tokenizer/o200k_base.tiktoken", tokenizer)
        writer.describe(
            target=request.target.name, config=config, buckets=job.buckets, page_size=PAGE_SIZE,
            max_context=job.geometry.max_context, window_ring=job.geometry.window_ring,
            passes=[{"bucket": each.plans[0].bucket, **_log(r)} for each in compiled for r in each.records],
            tools=tool_versions(request.target, request.extern), tokenizer_note=note)
        with progress("weights") as report:
            add_weights(request.weights, checkpoint, [_recipes(checkpoint, compiled, rank) for rank in range(request.ranks)],
                        writer, report)
    return Artifact.open(output)


class Job:
    """What is common to the buckets of one compilation."""

    def __init__(self, config: ModelConfig, request: Request) -> None:
        _check_ranks(config, request)
        check_mode(request.weights)
        target = request.target
        self.config, self.request = config, request
        self.dtype = DTYPES[request.dtype or ("bf16" if target.is_gpu else "fp32")]
        limit = request.max_context or (config.max_position if target.is_gpu else min(config.max_position, 4096))
        if not 1 <= limit <= config.max_position:
            raise CompileError(f"--max-context {limit} is not within 1 and the model's {config.max_position} positions")
        self.buckets = request.buckets or default_buckets(target)
        if {b.kind for b in self.buckets} != {"decode", "extend"}:
            raise CompileError("--buckets must name at least one decode and one extend bucket: a server needs both")
        self.geometry = Geometry.of(config, self.buckets, PAGE_SIZE, limit)

    def compile(self, bucket: Bucket) -> Compiled:
        """From the cache, or by tracing, passes, plans and machine code. Dumping (rank 0) and verifying always compile."""
        if self.request.verify:
            verify(self.config, bucket, self.request.target, ranks=self.request.ranks)
        key = self._key(bucket)
        if self.request.dump_ir is None and (cached := _load(key)):
            return cached
        whole = Context(self.config, bucket, self.request.target, self.geometry, self.dtype, self.request.ranks,
                        extern=self.request.extern)
        ranks, graphs, records = whole.of_ranks(), {}, {}
        dumper = Dumper(self.request.dump_ir / bucket.name, ranks[0]) if self.request.dump_ir else None
        for ctx in dict.fromkeys(ranks):
            module = trace_model(ctx.config, bucket, self.geometry, self.dtype, ctx.ranks, rank=ctx.rank)
            observers = [dumper] if dumper and ctx.rank == 0 else []
            records[ctx] = run_passes(module, ctx, options=self.request.options, observe=observers)
            graphs[ctx] = module.graph
        made, files = generate(graphs, ranks)
        plans = tuple(rank_plan(made[ctx], self.config, rank, ctx.ranks) for rank, ctx in enumerate(ranks))
        check_equal(plans)
        if dumper:
            dumper.write("plan.txt", plans[0].dumps())
        irs = {ctx.rank: print_graph(graph, ctx, bucket.name) for ctx, graph in graphs.items()}
        compiled = Compiled(plans, tuple(records[ranks[0]]), irs, tuple(files))
        _store(key, compiled)
        return compiled

    def _key(self, bucket: Bucket) -> str:
        """Everything a compiled bucket depends on: its shape, the target, this package's source and its tools."""
        options = {"skip": sorted(self.request.options.skip), "limit": dict(self.request.options.limit)}
        parts = [self.config.to_json(), asdict(bucket), asdict(self.geometry), self.request.target.name, str(self.dtype),
                 self.request.ranks, self.request.extern, options,
                 tool_versions(self.request.target, self.request.extern), source_digest()]
        return hashlib.sha256(canonical_json(parts)).hexdigest()


def _check_ranks(config: ModelConfig, request: Request) -> None:
    """Raises CompileError or ConfigError if the model cannot be compiled for so many ranks."""
    if request.ranks < 1:
        raise CompileError(f"--tp {request.ranks}: the number of GPUs must be at least 1")
    rank_config(config, 0, request.ranks, request.target)
    if request.ranks == 1 or not request.target.is_gpu:
        return
    if request.target.name not in EXCHANGE_TARGETS:
        raise CompileError(f"--tp {request.ranks}: kernels that exchange are there for {', '.join(EXCHANGE_TARGETS)} alone, "
                           f"not for {request.target.name} yet; compile with --tp 1, or for the cpu target")


Generated = tuple[dict[Context, LaunchPlan], list[tuple[str, bytes]]]


def generate(graphs: Mapping[Context, fx.Graph], ranks: Sequence[Context]) -> Generated:
    """The plans of final graphs, weights still whole, and the ranks' machine code as (file name, bytes)."""
    if ranks[0].target.is_gpu:
        each = {ctx: _generate_gpu(graph, ctx) for ctx, graph in graphs.items()}
        files = {name: data for _, own in each.values() for name, data in own}
        return {ctx: plan for ctx, (plan, _) in each.items()}, list(files.items())
    from gptoss_compile.inductor import compile_graphs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{ranks[0].bucket.name}.pt2"
        compile_graphs([graphs[ctx] for ctx in ranks], str(path))
        return {ctx: make_plan(graph, ctx) for ctx, graph in graphs.items()}, [(path.name, path.read_bytes())]


def _generate_gpu(graph: fx.Graph, ctx: Context) -> tuple[LaunchPlan, list[tuple[str, bytes]]]:
    from gptoss_compile.beside import serving_launches, with_serving
    from gptoss_compile.build import build_all, key_of

    launches = [launch for node in calls(graph) for launch in kernel_launches(node, ctx)]
    around = serving_launches(ctx)
    if any(isinstance(launch.source, LibrarySource) for launch in launches):
        _check_library_tools()
    binaries = build_all([launch.source for launch in (*launches, *around.values())], ctx.target)

    def stem(launch: Launch) -> str:
        return binaries[key_of(launch.source, ctx.target)].stem

    plan = with_serving(make_plan(graph, ctx, binary_of=stem), around, stem, ctx.target)
    files = [file for b in binaries.values() for file in (
        (f"{b.stem}.{b.suffix}", b.code), (f"{b.stem}.json", canonical_json(b.metadata())))]
    return plan, files


def _check_library_tools() -> None:
    """Raises CompileError if a library of other projects' kernels cannot be made here."""
    if missing := library.missing():
        raise CompileError("--extern asks for a library of FlashInfer's kernels, and what makes it is not installed: "
                           f"{', '.join(missing)}; pip install 'gptoss-compile[extern-build]', or compile without --extern")


def _files_beside(request: Request, compiled: Sequence[Compiled]) -> list[tuple[str, bytes]]:
    """The files that a GPU needs to fill its weights. Raises CompileError if buckets want a weight laid out in two ways."""
    from gptoss_compile.beside import layout_files, random_weights_files

    first = compiled[0].plans
    for plan in (plan for each in compiled for plan in each.plans):
        if plan.layouts != first[plan.rank].layouts:
            raise CompileError(f"buckets {first[0].bucket} and {plan.bucket} want weights laid out in different ways")
    files = layout_files([plan for each in compiled for plan in each.plans], request.target)
    return files + (random_weights_files(request.target) if request.weights.startswith("random:") else [])


def tool_versions(target: Target, extern: Extern = "never") -> dict[str, str]:
    """Versions that the machine code depends on."""
    names = ["torch", "triton", "nvidia-cuda-nvrtc"] if target.is_gpu else ["torch"]
    versions = {name: importlib.metadata.version(name) for name in names}
    if not target.is_gpu:  # native code: of this processor and its compiler
        versions["machine"] = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    elif extern != "never":
        versions |= library.versions()
    return {"gptoss-compile": __version__, **versions}


def source_digest() -> str:
    """The hash of this package's source: a changed compiler must not find what an older one cached."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for folder, names, files in os.walk(root, followlinks=True):  # in a checkout, passes/ and kernels/ are links
        names[:] = sorted(set(names) - {"runtime", "__pycache__"})
        for path in (Path(folder, name) for name in sorted(files) if name.endswith((".py", ".cu", ".cuh", ".json"))):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _recipes(checkpoint: Checkpoint, compiled: Sequence[Compiled], rank: int) -> list[dict[str, Any]]:
    """The weights of all of a rank's plans, each once. On a target that computes wider than the checkpoint they are stored
    as they are in it: the executor widens them, which is exact."""
    weights: dict[str, Weight] = {w.name: w for each in compiled for w in each.plans[rank].weights}
    absorbed = {name for each in compiled for layout in each.plans[rank].layouts.values() for name in layout.sources[1:]}
    recipes = []
    for weight in weights.values():
        recipe = weight.to_json()
        if weight.dtype == "fp32" and weight.parts:
            stored = {checkpoint.logical[part].dtype for part in weight.parts}
            recipe["dtype"] = "bf16" if stored == {"bf16"} else "fp32"
        if weight.name in absorbed:
            recipe["largest"] = LARGEST_SCALE
        recipes.append(recipe)
    return recipes


def _log(record: Record) -> dict[str, Any]:
    return {k: v for k, v in asdict(record).items() if k != "seconds"}


def _folder(key: str) -> Path:
    return cache_dir() / "compiled" / key


def _load(key: str) -> Compiled | None:
    """A cached bucket, if it is there and whole."""
    folder = _folder(key)
    try:
        note = json.loads((folder / "note.json").read_bytes())
        files = tuple((name, (folder / name).read_bytes()) for name in note["files"])
        texts = (folder / "texts").read_bytes()
    except (OSError, ValueError, KeyError):
        return None
    if _checksum(texts, files) != note["checksum"]:
        return None
    plans, irs = json.loads(texts)
    return Compiled(tuple(map(LaunchPlan.loads, plans)), tuple(Record(**r) for r in note["records"]),
                    {int(rank): text for rank, text in irs.items()}, files)


def _store(key: str, compiled: Compiled) -> None:
    texts = json.dumps([[plan.dumps() for plan in compiled.plans], compiled.irs]).encode()
    note = {"files": [name for name, _ in compiled.files], "records": [asdict(r) for r in compiled.records],
            "checksum": _checksum(texts, compiled.files)}
    with atomic_directory(_folder(key)) as folder:
        for name, data in compiled.files:
            (folder / name).write_bytes(data)
        (folder / "texts").write_bytes(texts)
        (folder / "note.json").write_text(json.dumps(note))


def _checksum(texts: bytes, files: Iterable[tuple[str, bytes]]) -> str:
    digest = hashlib.sha256(texts)
    for name, data in files:
        digest.update(name.encode() + b"\0" + hashlib.sha256(data).digest())
    return digest.hexdigest()
