"""Other projects' kernels to a shared library, through nvcc: a function that the runtime calls by way of apache-tvm-ffi.

The source is a file of ours that includes the other project's headers. The library needs nothing but libstdc++ and
apache-tvm-ffi where it runs: CUDA's runtime is linked into it, and no host code of the other project is.
"""

from __future__ import annotations

import importlib.util
import subprocess
import tempfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from gptoss_compile.kernels.spec import LibrarySource
from gptoss_compile.nvrtc import folder
from gptoss_compile.target import Target

PACKAGES = ("flashinfer-python", "apache-tvm-ffi", "nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt",
            "nvidia-cuda-runtime", "nvidia-cuda-cccl", "nvidia-curand")
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "--shared", "--cudart=static", "--compiler-options=-fPIC", "--linker-options=-s",
         "--expt-relaxed-constexpr", "-static-global-template-stub=false", "-DCUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED")
HEADERS = ("cccl/libcudacxx/include", "cccl/cub", "cccl/thrust", "include", "cutlass/include", "cutlass/tools/util/include")


class LibraryError(RuntimeError):
    """What the compiler said."""


def versions() -> dict[str, str]:
    """Of what a library's machine code depends on besides its source, as far as it is installed."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def missing() -> list[str]:
    """What of it is not."""
    return [name for name in PACKAGES if name not in versions()]


def text(source: LibrarySource, target: Target) -> str:
    return (folder(target) / source.file).read_text()


def compile_library(source: LibrarySource, target: Target) -> bytes:
    """The shared library. Raises LibraryError with the compiler's log."""
    cuda = Path(str(distribution("nvidia-cuda-nvcc").locate_file("nvidia/cu13")))
    flashinfer = Path(str(distribution("flashinfer-python").locate_file("flashinfer")))
    ffi = Path(str(distribution("apache-tvm-ffi").locate_file("tvm_ffi/include")))
    includes = [*(flashinfer / "data" / part for part in HEADERS), cuda / "include", ffi]
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "attention_sink.inc").write_text(_attention_sink(flashinfer))
        Path(scratch, source.file).write_text(text(source, target))
        code = f"arch=compute_{target.arch}a,code=sm_{target.arch}a"
        command = [str(cuda / "bin" / "nvcc"), *FLAGS, f"-gencode={code}", *(f"-I{path}" for path in includes),
                   f"-L{cuda / 'lib'}", source.file, "-o", "library.so"]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
        if done.returncode:
            raise LibraryError(done.stderr.strip() or f"nvcc ended with status {done.returncode}")
        return Path(scratch, "library.so").read_bytes()


def _attention_sink(flashinfer: Path) -> str:
    """FlashInfer's variant of attention, C++ in a Python file that is read alone: the package would import PyTorch."""
    spec = importlib.util.spec_from_file_location("variants", flashinfer / "jit" / "attention" / "variants.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.attention_sink_decl["fa3"])
