"""Kernels to machine code, for a GPU that need not be there, behind a cache keyed by content.

A binary is a function of the kernel's source (with that of every helper it calls), its constants, signature and options,
the target, and the compiler's version (Triton's, NVRTC's for CUDA C++, nvcc's and the other project's for a library); these
and nothing else make its key. So the same key names the same bytes on every machine, and a warm build is a file read per
kernel that leaves the compilers unimported.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from gptoss_compile import library, nvrtc
from gptoss_compile.kernels.spec import AnySource, CudaSource, LibrarySource, Source
from gptoss_compile.paths import cache_dir as cache_root
from gptoss_compile.target import Target

FORMAT = 3  # of a cache entry
ALIGNMENT = 16  # bytes; every pointer a kernel gets is at least so aligned


class BuildError(RuntimeError):
    """A kernel that does not compile: a defect of this project, not of its user. Names kernel, target and cause."""


@dataclass(frozen=True)
class Binary:
    """One kernel's machine code and what its launch must know.

    code: a cubin or an hsaco, or a shared library, whose `symbol` is its function and which has no threads; assembly: AMD's
    listing (empty for NVIDIA, whose listing cuobjdump makes from the code).
    threads: of a block. shared: dynamic shared memory in bytes. registers: of a thread (gfx: vector registers); spilled: a
    thread's bytes in local memory, which ought to be none. A launch's parameters are its pointers; Triton's kernels have two
    scratch pointers more (null where the scratch size is 0), whose buffers have `…_size` bytes for each block of the grid.
    """

    key: str
    symbol: str
    target: str
    num_warps: int
    num_ctas: int
    threads: int
    shared: int
    tensor_memory: int
    global_scratch_size: int
    global_scratch_align: int
    profile_scratch_size: int
    profile_scratch_align: int
    launch_pdl: bool
    registers: int
    spilled: int
    compiler: str
    code: bytes
    assembly: bytes

    @property
    def stem(self) -> str:
        """A file name: what it is, then which."""
        return f"{self.symbol}-{self.key[:16]}"

    @property
    def suffix(self) -> str:
        if not self.threads:
            return "so"
        return "hsaco" if self.target.startswith("gfx") else "cubin"

    def metadata(self) -> dict[str, Any]:
        """Everything but the code, for the artifact."""
        return {k: v for k, v in asdict(self).items() if k not in ("code", "assembly")}


def key_of(source: AnySource, target: Target) -> str:
    """The content key of a kernel on a target, hex sha256."""
    content: dict[str, Any] = {"format": FORMAT, "target": target.name}
    if isinstance(source, CudaSource):
        content |= {**asdict(source), "texts": nvrtc.texts(source, target), "compiler": nvrtc.compiler()}
    elif isinstance(source, LibrarySource):
        content |= {**asdict(source), "text": library.text(source, target), "flags": library.FLAGS,
                    "versions": library.versions()}
    else:
        content |= {"kernel": source.function.cache_key, "signature": source.signature,
                    "constexprs": [(k, repr(v)) for k, v in source.constexprs], "warps": source.num_warps,
                    "stages": source.num_stages, "triton": version("triton")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def build(source: AnySource, target: Target, cache_dir: Path | None = None) -> Binary:
    """The kernel's binary, from the cache or compiled into it. Raises BuildError."""
    directory, key = cache_dir or cache_root() / "kernels", key_of(source, target)
    found = _load(directory, key)
    if found is None:
        found = _compile(source, target, key)
        _store(directory, found)
    return found


def build_all(sources: Iterable[AnySource], target: Target, cache_dir: Path | None = None, *, processes: int = 2,
              progress: Callable[[int, int], None] | None = None,
              failed: Callable[[str, BuildError], None] | None = None) -> dict[str, Binary]:
    """Binaries by key of all sources, each compiled once, the missing ones in parallel.

    progress(done, total) is called after each kernel. Raises BuildError; with `failed`, that is called instead with the key
    of each that does not compile.
    """
    directory = cache_dir or cache_root() / "kernels"
    jobs: dict[str, Callable[[], Binary]]
    wanted = {key_of(source, target): source for source in sources}
    built = {key: binary for key in wanted if (binary := _load(directory, key))}
    missing = {key: source for key, source in wanted.items() if key not in built}
    with ExitStack() as stack:
        if len(missing) < 2 or processes < 2:
            jobs = {key: partial(build, source, target, directory) for key, source in missing.items()}
        else:
            pool = stack.enter_context(ProcessPoolExecutor(processes, get_context("spawn")))
            jobs = {key: pool.submit(_build_portable, _portable(source), target.name, directory).result
                    for key, source in missing.items()}
        if progress:
            progress(len(built), len(wanted))
        for done, (key, job) in enumerate(jobs.items(), len(wanted) - len(missing) + 1):
            try:
                built[key] = job()
            except BuildError as error:
                if failed is None:
                    raise
                failed(key, error)
            if progress:
                progress(done, len(wanted))
    return built


_Portable = CudaSource | LibrarySource | tuple[str, str, dict[str, Any]]


def _portable(source: AnySource) -> _Portable:
    """What another process can be given: a Triton source as (module, function, the rest)."""
    if not isinstance(source, Source):
        return source
    rest = {f.name: getattr(source, f.name) for f in fields(source) if f.name != "function"}
    return source.function.fn.__module__, source.function.fn.__name__, rest


def _build_portable(portable: _Portable, target: str, directory: Path) -> Binary:
    if not isinstance(portable, tuple):
        return build(portable, Target.parse(target), directory)
    module, function, rest = portable
    return build(Source(getattr(import_module(module), function), **rest), Target.parse(target), directory)


def _compile(source: AnySource, target: Target, key: str) -> Binary:
    if isinstance(source, LibrarySource):
        return _compile_library(source, target, key)
    return _compile_cuda(source, target, key) if isinstance(source, CudaSource) else _compile_triton(source, target, key)


def _compile_library(source: LibrarySource, target: Target, key: str) -> Binary:
    try:
        code = library.compile_library(source, target)
    except library.LibraryError as error:
        raise BuildError(f"library {source.file} does not compile for {target.name}: {error}") from error
    return Binary(
        key=key, symbol=source.function, target=target.name, num_warps=0, num_ctas=1, threads=0, shared=0, tensor_memory=0,
        global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0, profile_scratch_align=1, launch_pdl=False,
        registers=0, spilled=0, compiler=", ".join(f"{name} {v}" for name, v in library.versions().items()), code=code,
        assembly=b"")


def _compile_cuda(source: CudaSource, target: Target, key: str) -> Binary:
    try:
        code = nvrtc.compile_cuda(source, target)
    except nvrtc.NvrtcError as error:
        raise BuildError(f"kernel {source.symbol} ({source.file}) does not compile for {target.name} with "
                         f"{dict(source.defines)}: {error}") from error
    registers, spilled = resources_nvidia(code)
    return Binary(
        key=key, symbol=source.symbol, target=target.name, num_warps=source.threads // target.warp, num_ctas=1,
        threads=source.threads, shared=source.shared, tensor_memory=0, global_scratch_size=0, global_scratch_align=1,
        profile_scratch_size=0, profile_scratch_align=1, launch_pdl=True, registers=registers,
        spilled=spilled, compiler=nvrtc.compiler(), code=code, assembly=b"")


def _compile_triton(source: Source, target: Target, key: str) -> Binary:
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # else the binary holds this machine's paths
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = [i for i, (_, kind) in enumerate(source.signature) if kind.startswith("*")]
    kinds = {"*u8": "*u8", "*bf16": "*bf16", "*fp32": "*fp32", "*i32": "*i32", "constexpr": "constexpr"}
    options: dict[str, Any] = {"num_warps": source.num_warps, "num_stages": source.num_stages}
    if target.backend == "cuda":
        options["launch_pdl"] = target.has("pdl")
    with tempfile.TemporaryDirectory() as scratch:  # Triton's own cache is keyed by less than ours
        before = os.environ.get("TRITON_CACHE_DIR")
        os.environ["TRITON_CACHE_DIR"] = scratch
        try:
            compiled = triton.compile(
                ASTSource(source.function, signature={name: kinds[kind] for name, kind in source.signature},
                          constexprs=dict(source.constexprs),
                          attrs={(i,): [["tt.divisibility", ALIGNMENT]] for i in pointers}),
                target=GPUTarget(target.backend, target.arch, target.warp), options=options)
        except Exception as error:
            name = source.function.fn.__name__
            raise BuildError(f"kernel {name} does not compile for {target.name} with "
                             f"{dict(source.constexprs)}: {error}") from error
        finally:
            if before is None:
                del os.environ["TRITON_CACHE_DIR"]
            else:
                os.environ["TRITON_CACHE_DIR"] = before
    m = compiled.metadata
    cuda = target.backend == "cuda"
    code = compiled.asm["cubin" if cuda else "hsaco"]
    assembly = "" if cuda else compiled.asm["amdgcn"]
    registers, spilled = resources_nvidia(code) if cuda else resources_amd(assembly)
    return Binary(
        key=key, symbol=m.name, target=target.name, num_warps=m.num_warps, num_ctas=m.num_ctas,
        threads=m.num_warps * target.warp, shared=m.shared, tensor_memory=getattr(m, "tmem_size", None) or 0,
        global_scratch_size=getattr(m, "global_scratch_size", 0),  # AMD has none
        global_scratch_align=getattr(m, "global_scratch_align", 1),
        profile_scratch_size=m.profile_scratch_size, profile_scratch_align=m.profile_scratch_align,
        launch_pdl=bool(options.get("launch_pdl")), registers=registers, spilled=spilled,
        compiler=_compiler(target), code=code, assembly=assembly.encode())


def _compiler(target: Target) -> str:
    if target.backend != "cuda":
        return f"triton {version('triton')}"
    from triton.backends.nvidia.compiler import get_ptxas

    return f"triton {version('triton')}, ptxas {get_ptxas(target.arch).version}"


def nvidia_tool(name: str) -> Path:
    """A tool of NVIDIA's that Triton ships (cuobjdump, nvdisasm). Triton itself is not imported."""
    package = find_spec("triton")
    assert package is not None and package.origin is not None, "compiling needs triton"
    return Path(package.origin).parent / "backends" / "nvidia" / "bin" / name


def resources_nvidia(code: bytes) -> tuple[int, int]:
    """(registers, local bytes) of a thread of a cubin's kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        text = subprocess.run([nvidia_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True,
                              check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found is not None, f"cuobjdump says nothing about registers: {text!r}"
    return int(found[1]), int(found[2]) + int(found[3])


def resources_amd(assembly: str) -> tuple[int, int]:
    """(vector registers, private bytes) of a thread."""
    values = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", assembly))
    return int(values["vgpr_count"]), int(values["private_segment_fixed_size"])


def _store(directory: Path, binary: Binary) -> None:
    """One file: a line of JSON, then code and assembly. Renamed into place, so readers never see half of it."""
    directory.mkdir(parents=True, exist_ok=True)
    head = {**binary.metadata(), "code_bytes": len(binary.code),
            "sha256": hashlib.sha256(binary.code + binary.assembly).hexdigest()}
    with tempfile.NamedTemporaryFile(dir=directory, delete=False) as file:
        file.write(json.dumps(head).encode() + b"\n" + binary.code + binary.assembly)
    os.replace(file.name, directory / binary.key)


def _load(directory: Path, key: str) -> Binary | None:
    """The cached binary, or None if there is none or it is damaged."""
    try:
        line, _, rest = (directory / key).read_bytes().partition(b"\n")
        head = json.loads(line)
        size, digest = head.pop("code_bytes"), head.pop("sha256")
        if hashlib.sha256(rest).hexdigest() != digest:
            return None
        return Binary(code=rest[:size], assembly=rest[size:], **head)
    except (OSError, ValueError, KeyError, TypeError):
        return None
