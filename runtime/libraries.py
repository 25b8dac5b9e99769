"""Libraries of other projects' kernels: loaded and called through apache-tvm-ffi, which is imported when there is one.

A call is made while a graph is captured. It gets its tensors as DLPack views of their places, and puts its kernels into the
stream that it is told to use.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gptoss_compile.launch_plan import Operand
from gptoss_compile.runtime.cuda_driver import CudaError, Device

_CUDA = 2  # DLPack's device type
_DTYPES = {"bf16": (4, 16), "fp32": (2, 32), "i32": (0, 32), "u8": (1, 8)}  # DLPack's (code, bits)


class _Tensor(ctypes.Structure):
    """DLPack's DLManagedTensor, whose memory nobody is to free."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device", ctypes.c_int32), ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16), ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p), ("offset", ctypes.c_uint64), ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p))


@dataclass(frozen=True)
class View:
    """A tensor at an address of the device's memory, as apache-tvm-ffi takes it. keep: what it is described by."""

    tensor: Any
    keep: Any


@dataclass(frozen=True)
class Call:
    """One call of a library's function with its arguments in place; see `graphs.Launch`."""

    label: str
    function: Callable[..., Any]
    arguments: Sequence[View | int | float]
    pdl: bool = False

    def enqueue(self, device: Device) -> None:
        """Put its kernels into the device's stream. Raises CudaError."""
        ffi = _ffi()
        values = [value.tensor if isinstance(value, View) else value for value in self.arguments]
        try:
            with ffi.use_raw_stream(ffi.device("cuda", device.ordinal), int(device.stream)):
                self.function(*values)
        except Exception as error:  # whatever the other project throws
            raise CudaError(f"launching {self.label} failed: {error}") from error


def load_function(name: str, code: bytes, meta: dict[str, Any]) -> Callable[..., Any]:
    """The function of a library in an artifact's kernels/; meta: what its builder noted. Raises CudaError."""
    ffi = _ffi()
    with tempfile.NamedTemporaryFile(prefix=name, suffix=".so") as file:
        file.write(code)
        file.flush()
        try:
            function: Callable[..., Any] = ffi.load_module(file.name)[meta["symbol"]]
        except Exception as error:  # of the loader, or of what the library needs
            raise CudaError(f"loading library {name} failed: {error}") from error
    return function


def view(operand: Operand, address: int, device: Device) -> View:
    """A row-major tensor of an operand's shape."""
    extents = operand.shape
    strides = [1] * len(extents)
    for axis in range(len(extents) - 1, 0, -1):
        strides[axis - 1] = strides[axis] * extents[axis]
    numbers = (ctypes.c_int64 * (2 * len(extents)))(*extents, *strides)
    start, (code, bits) = ctypes.addressof(numbers), _DTYPES[operand.dtype]
    tensor = _Tensor(address, _CUDA, device.ordinal, len(extents), code, bits, 1, start, start + 8 * len(extents), 0)
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return View(_ffi().from_dlpack(capsule(ctypes.addressof(tensor), b"dltensor", None)), (tensor, numbers))


def _ffi() -> Any:
    """The module tvm_ffi. Raises CudaError if it is not installed."""
    try:
        with _without_torch():
            import tvm_ffi
    except ImportError:
        raise CudaError("this artifact holds a library of another project's kernels, which is called through the package "
                        "apache-tvm-ffi, and that is not installed: pip install 'gptoss-compile[extern]', or compile the "
                        "model without --extern") from None
    return tvm_ffi


@contextmanager
def _without_torch() -> Iterator[None]:
    """In it PyTorch is not found, unless it is imported already: tvm_ffi would import it wherever it is installed."""
    os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")
    if "torch" in sys.modules or "tvm_ffi" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]
