"""The CUDA driver API in the executor's words: a device, memory with a purpose, kernels, errors that say what to do.

cuda.bindings is imported when a device is opened, so importing this needs neither a driver nor the package.
"""

from __future__ import annotations

import ctypes
import json
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import numpy.typing as npt

from gptoss_compile.artifact import Artifact

Bytes = npt.NDArray[np.uint8]

MIN_DRIVER = 12080  # CUDA 12.8, the first whose machine code covers every target; programmatic edges need 12.3
_OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"


class CudaError(ValueError):
    """The GPU, its driver or its memory cannot do what was asked; the message says what was and why not."""


@dataclass(frozen=True)
class Kernel:
    """A loaded kernel. threads: of a block; shared: dynamic shared memory in bytes."""

    name: str
    function: Any
    threads: int
    shared: int


def bindings() -> Any:
    """The module cuda.bindings.driver. Raises CudaError if it is not installed."""
    try:
        from cuda.bindings import driver
    except ImportError:
        raise CudaError("artifacts for NVIDIA GPUs are run through the package cuda-bindings, which is not installed: "
                        "pip install cuda-bindings") from None
    return driver


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.2f} MiB"


class Device:
    """A visible GPU, its primary context and one stream. `use` makes it current in each thread that calls."""

    def __init__(self, api: Any, target: str, wanted: str, ordinal: int = 0) -> None:
        self.api, self.ordinal = api, ordinal
        self._handle = self.check(api.cuDeviceGet(ordinal), f"opening GPU {ordinal}")
        name: bytes = self.check(api.cuDeviceGetName(128, self._handle), "asking the GPU's name")
        self.name = name.split(b"\0")[0].decode()
        self._require_architecture(target, wanted)
        self._context = self.check(api.cuDevicePrimaryCtxRetain(self._handle), f"opening {self.name}")
        self._held: dict[int, tuple[int, str]] = {}
        self._pinned: list[int] = []
        self._modules: list[Any] = []
        self._events: list[Any] = []
        self.use()
        self.stream = self.new_stream()

    @classmethod
    def open(cls, target: str, purpose: str = "this artifact was compiled for") -> Device:
        """The first GPU, of that target. Raises CudaError for each reason why there is none, which begins with `purpose`."""
        return cls.open_all(target, 1, purpose)[0]

    @classmethod
    def open_all(cls, target: str, count: int, purpose: str = "this artifact was compiled for") -> list[Device]:
        """The first `count` GPUs, each with access to the others' memory. Raises CudaError as `open` does, and if there are
        too few or two of them do not reach each other."""
        api, wanted = bindings(), f"{purpose} {target}"
        visible = _count(api, target, wanted)
        if visible < count:
            raise CudaError(f"{purpose} {count} GPUs, one a rank, but {visible} {'is' if visible == 1 else 'are'} visible: "
                            "make more visible with CUDA_VISIBLE_DEVICES, or compile with a smaller --tp")
        with ExitStack() as stack:
            devices = []
            for ordinal in range(count):
                devices.append(cls(api, target, wanted, ordinal))
                stack.callback(devices[-1].close)
            for device, peer in permutations(devices, 2):
                device.reach(peer)
            stack.pop_all()
        return devices

    def reach(self, peer: Device) -> None:
        """Let this GPU's kernels read and write the peer's memory. Raises CudaError if they cannot."""
        doing = f"asking whether GPU {self.ordinal} reaches GPU {peer.ordinal}"
        if not self.check(self.api.cuDeviceCanAccessPeer(self._handle, peer._handle), doing):
            raise CudaError(f"GPU {self.ordinal} ({self.name}) has no access to the memory of GPU {peer.ordinal} "
                            f"({peer.name}), through which ranks exchange; choose GPUs that have (CUDA_VISIBLE_DEVICES; see "
                            "nvidia-smi topo -p2p r), or compile with a smaller --tp")
        self.use()
        result = self.api.cuCtxEnablePeerAccess(peer._context, 0)
        if result[0].name != "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED":
            self.check(result, f"giving GPU {self.ordinal} access to the memory of GPU {peer.ordinal}")

    def __str__(self) -> str:
        return f"{self.name}, GPU {self.ordinal}"

    def check(self, result: tuple[Any, ...], doing: str) -> Any:
        """What a driver call returned behind its status. Raises CudaError: `doing` failed, and the driver's reason."""
        if result[0] != self.api.CUresult.CUDA_SUCCESS:
            raise CudaError(f"{doing} failed: {self.reason(result[0])}")
        return result[1] if len(result) == 2 else result[1:]

    def reason(self, status: Any) -> str:
        """CUDA_ERROR_X (in words)."""
        _, text = self.api.cuGetErrorString(status)
        return f"{status.name} ({text.decode() if text else 'unknown to this driver'})"

    def use(self) -> None:
        """Make the context current in this thread, which every thread that calls the driver must do."""
        self.check(self.api.cuCtxSetCurrent(self._context), "using the GPU's context")

    def new_stream(self) -> Any:
        flags = self.api.CUstream_flags.CU_STREAM_NON_BLOCKING
        return self.check(self.api.cuStreamCreate(flags), "creating a stream")

    def new_event(self) -> Any:
        """An event of this device, which keeps the time at which the stream passes it."""
        self.use()
        event = self.check(self.api.cuEventCreate(0), "creating an event")
        self._events.append(event)
        return event

    def record(self, event: Any) -> None:
        """Put an event into the stream."""
        self.check(self.api.cuEventRecord(event, self.stream), "recording an event")

    def wait_for(self, event: Any, doing: str) -> None:
        """Wait until the stream has passed an event; at once if it was never recorded."""
        self.check(self.api.cuEventSynchronize(event), doing)

    def passed(self, event: Any, doing: str) -> bool:
        """Whether the stream has passed an event. Raises CudaError if anything in it has failed."""
        return self._ready(self.api.cuEventQuery(event), doing)

    def idle(self, doing: str) -> bool:
        """Whether all is done that was put into the stream. Raises CudaError if anything in it has failed."""
        return self._ready(self.api.cuStreamQuery(self.stream), doing)

    def _ready(self, result: tuple[Any, ...], doing: str) -> bool:
        if result[0] == self.api.CUresult.CUDA_ERROR_NOT_READY:
            return False
        self.check(result, doing)
        return True

    def milliseconds(self, start: Any, end: Any) -> float:
        """The time between two events that have passed."""
        return float(self.check(self.api.cuEventElapsedTime(start, end), "reading the time between events"))

    # Memory -------------------------------------------------------------------------------------------------

    def free_bytes(self) -> int:
        self.use()
        return int(self.check(self.api.cuMemGetInfo(), "asking for free memory")[0])

    def allocate(self, size: int, purpose: str) -> int:
        """The address of `size` zeroed bytes, aligned to 256. Raises CudaError if there are not so many."""
        self.use()
        result = self.api.cuMemAlloc(max(size, 1))
        if result[0].name == _OUT_OF_MEMORY:
            free, total = self.check(self.api.cuMemGetInfo(), "asking for free memory")
            held = ", ".join(f"{purpose} {gib(held)}" for held, purpose in self._held.values()) or "nothing"
            raise CudaError(f"out of GPU memory: {purpose} need {gib(size)}, and {gib(free)} of the {gib(total)} of "
                            f"{self.name} are free (held so far: {held}); free the GPU, use a larger one, or lower "
                            "--kv-pages or --max-num-seqs")
        address = int(self.check(result, f"allocating {gib(size)} for {purpose}"))
        self._held[address] = size, purpose
        self.fill(address, size, 0)
        return address

    def allocate_pinned(self, size: int, purpose: str) -> Bytes:
        """Host memory that every GPU copies from and to at full speed, as an array of bytes."""
        self.use()
        doing = f"pinning {gib(size)} of host memory for {purpose}"
        flags = self.api.CU_MEMHOSTALLOC_PORTABLE | self.api.CU_MEMHOSTALLOC_DEVICEMAP
        address = int(self.check(self.api.cuMemHostAlloc(max(size, 1), flags), doing))
        self._pinned.append(address)
        memory: Any = (ctypes.c_uint8 * size).from_address(address)
        block: Bytes = np.frombuffer(memory, np.uint8)
        return block

    def mapped(self, array: Bytes) -> int:
        """Where this GPU's kernels find pinned host memory."""
        self.use()
        return int(self.check(self.api.cuMemHostGetDevicePointer(array.ctypes.data, 0), "mapping host memory"))

    def release(self, address: int) -> None:
        """Give device memory back."""
        self.use()
        del self._held[address]
        self.check(self.api.cuMemFree(address), "freeing memory")

    def release_pinned(self, array: Bytes) -> None:
        address = array.ctypes.data
        self._pinned.remove(address)
        self.check(self.api.cuMemFreeHost(address), "unpinning host memory")

    def fill(self, address: int, size: int, byte: int) -> None:
        """Set every byte, in the stream's order."""
        if size:
            self.check(self.api.cuMemsetD8Async(address, byte, size, self.stream), f"filling {gib(size)}")

    def upload(self, address: int, source: Bytes, stream: Any) -> None:
        """Copy pinned host memory to the device, in the stream's order."""
        self.check(self.api.cuMemcpyHtoDAsync(address, source.ctypes.data, source.nbytes, stream), "copying to the GPU")

    def upload_rows(self, address: int, source: int, rows: int, size: int, pitch: int) -> None:
        """Copy the first `size` bytes of rows that lie `pitch` bytes apart, from pinned memory, in the stream's order."""
        copy = self.api.CUDA_MEMCPY2D()
        copy.srcMemoryType, copy.srcHost = self.api.CUmemorytype.CU_MEMORYTYPE_HOST, source
        copy.dstMemoryType, copy.dstDevice = self.api.CUmemorytype.CU_MEMORYTYPE_DEVICE, address
        copy.srcPitch = copy.dstPitch = pitch
        copy.WidthInBytes, copy.Height = size, rows
        self.check(self.api.cuMemcpy2DAsync(copy, self.stream), "copying to the GPU")

    def download(self, target: Bytes, address: int, stream: Any) -> None:
        """Copy device memory to pinned host memory, in the stream's order."""
        result = self.api.cuMemcpyDtoHAsync(target.ctypes.data, address, target.nbytes, stream)
        self.check(result, "copying from the GPU")

    def synchronize(self, doing: str) -> None:
        """Wait for the stream. Raises CudaError if anything in it has failed."""
        self.check(self.api.cuStreamSynchronize(self.stream), doing)

    # Kernels ------------------------------------------------------------------------------------------------

    def load_kernel(self, name: str, code: bytes, meta: dict[str, Any], carveout: int = -1) -> Kernel:
        """The kernel of a cubin; `meta` is what its builder noted, carveout: see `kernels.spec.Launch`. Raises CudaError if
        this GPU cannot run it."""
        for unsupported in ("global_scratch_size", "profile_scratch_size"):
            assert meta[unsupported] == 0, f"kernel {name} wants a {unsupported}, for which the executor has no memory"
        assert meta["num_ctas"] == 1, f"kernel {name} is made for clusters"
        self.use()
        module = self.check(self.api.cuModuleLoadData(code), f"loading kernel {name} on {self.name}")
        self._modules.append(module)
        function = self.check(self.api.cuModuleGetFunction(module, meta["symbol"].encode()), f"finding kernel {name}")
        attribute = self.api.CUfunction_attribute
        if meta["shared"]:  # 48 KiB, static ones included, are all that a kernel gets without asking
            most = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self.check(self.api.cuFuncSetAttribute(function, most, meta["shared"]),
                       f"giving kernel {name} {meta['shared']} bytes of shared memory")
        if carveout >= 0:
            preferred = attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
            self.check(self.api.cuFuncSetAttribute(function, preferred, carveout),
                       f"setting the shared memory carve-out of kernel {name}")
        return Kernel(name, function, meta["threads"], meta["shared"])

    def close(self) -> None:
        """Give everything back. The device cannot be used afterwards."""
        self.api.cuCtxSetCurrent(self._context)  # whatever it says: the context may have failed
        self.api.cuStreamSynchronize(self.stream)
        for event in self._events:
            self.api.cuEventDestroy(event)
        for module in self._modules:
            self.api.cuModuleUnload(module)
        for address in self._held:
            self.api.cuMemFree(address)
        for address in self._pinned:
            self.api.cuMemFreeHost(address)
        self.api.cuStreamDestroy(self.stream)
        self.api.cuDevicePrimaryCtxRelease(self._handle)

    def _require_architecture(self, target: str, wanted: str) -> None:
        attribute = self.api.CUdevice_attribute
        major, minor = (self.check(self.api.cuDeviceGetAttribute(a, self._handle), "asking the GPU's architecture")
                        for a in (attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                                  attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR))
        if target != f"sm{major}{minor}":
            raise CudaError(f"{wanted}, but the GPU here, {self.name}, is "
                            f"sm{major}{minor}: compile with --target sm{major}{minor}, or choose another GPU with "
                            "CUDA_VISIBLE_DEVICES")


def load_kernel(artifact: Artifact, device: Device, name: str, carveout: int = -1) -> Kernel:
    """A kernel of an artifact. Raises CudaError if it was compiled for another target than the artifact says."""
    meta = json.loads(artifact.file(f"kernels/{name}.json").read_bytes())
    if meta["target"] != artifact.target:
        raise CudaError(f"kernel {name} was compiled for {meta['target']}, the artifact for {artifact.target}")
    return device.load_kernel(name, artifact.file(f"kernels/{name}.cubin").read_bytes(), meta, carveout)


def _count(api: Any, target: str, wanted: str) -> int:
    """How many GPUs are visible, at least one, to a driver new enough. Raises CudaError."""
    wanted += ", an NVIDIA GPU"
    try:
        status, version = api.cuDriverGetVersion()
        if status == api.CUresult.CUDA_SUCCESS and 0 < version < MIN_DRIVER:
            raise CudaError(f"the NVIDIA driver is too old: it supports CUDA {_version(version)}, and artifacts for "
                            f"{target} need {_version(MIN_DRIVER)} (driver 570) or newer; update the driver")
        (status,) = api.cuInit(0)
    except RuntimeError as error:  # how cuda.bindings says that there is no libcuda
        raise CudaError(f"{wanted}, but no NVIDIA driver is installed here ({error}); run it on a machine with one, or "
                        "compile the model for cpu") from None
    count = api.cuDeviceGetCount()[1] if status == api.CUresult.CUDA_SUCCESS else 0
    if status == api.CUresult.CUDA_ERROR_NO_DEVICE or (status == api.CUresult.CUDA_SUCCESS and not count):
        raise CudaError(f"{wanted}, but the NVIDIA driver sees none; check nvidia-smi and CUDA_VISIBLE_DEVICES")
    if status != api.CUresult.CUDA_SUCCESS:
        raise CudaError(f"{wanted}, but the NVIDIA driver does not start: {status.name}; check nvidia-smi")
    return int(count)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
