"""CUDA C++ to a cubin through NVRTC, which needs neither a GPU, a driver nor CUDA's headers."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from gptoss_compile.kernels.spec import CudaSource
from gptoss_compile.target import Target

_SERIALISED = "instructions are serialized"  # in ptxas's warnings that it ran wgmmas one by one, which ruins a kernel


class NvrtcError(RuntimeError):
    """What the compiler said."""


def folder(target: Target) -> Path:
    """Where a target's CUDA C++ lies."""
    return Path(__file__).parent / "kernels" / target.name


def texts(source: CudaSource, target: Target) -> dict[str, str]:
    """A kernel's file and all headers beside it, by name: what its machine code depends on besides the defines."""
    headers = sorted(path.name for path in folder(target).glob("*.cuh"))
    return {name: (folder(target) / name).read_text() for name in (source.file, *headers)}


def compiler() -> str:
    return f"nvrtc {version('nvidia-cuda-nvrtc')}"


def compile_cuda(source: CudaSource, target: Target) -> bytes:
    """The cubin. Raises NvrtcError with the compiler's log."""
    from cuda.bindings import nvrtc

    (_, text), *headers = texts(source, target).items()
    status, program = nvrtc.nvrtcCreateProgram(text.encode(), source.file.encode(), len(headers),
                                               [content.encode() for _, content in headers],
                                               [name.encode() for name, _ in headers])
    _require(nvrtc, status)
    options = [f"--gpu-architecture=sm_{target.arch}a", "--std=c++17", "--device-as-default-execution-space",
               *(f"-D{name}={_literal(value)}" for name, value in source.defines)]
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = _fetch(nvrtc, program, "ProgramLog").rstrip(b"\0\n").decode()
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS or _SERIALISED in log:
            raise NvrtcError(log or status.name)
        cubin: bytes = _fetch(nvrtc, program, "CUBIN")
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _literal(value: int | float | str) -> str:
    return f"{value!r}f" if isinstance(value, float) else str(value)


def _fetch(nvrtc: Any, program: Any, what: str) -> bytes:
    buffer: bytes
    status, size = getattr(nvrtc, f"nvrtcGet{what}Size")(program)
    _require(nvrtc, status)
    buffer = b"\0" * size
    (status,) = getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    _require(nvrtc, status)
    return buffer


def _require(nvrtc: Any, status: Any) -> None:
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise NvrtcError(str(status))
