"""CUDA's runtime through cuda-python: every status is checked, and becomes one clear line."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from darkroom.errors import Failed

GIB = 1 << 30
LOWER = "lower --batch-size or the size, take --precision fp16, or stream the weights with --ws"


class Cuda:
    """One device and one stream, on which everything happens in order.

    `api` is `cuda.bindings.runtime`, or what stands in for it. Raises `Failed` where there is no driver or no device.
    """

    def __init__(self, api: Any = None) -> None:
        self._api = api or runtime_api()
        if reason := missing(self._api):
            raise Failed(reason)
        self.stream = self._checked(self._api.cudaStreamCreateWithFlags(self._api.cudaStreamNonBlocking))
        self._held: dict[int, Callable[[int], Any]] = {}
        """Addresses that were taken, and what gives them back."""

    @property
    def capability(self) -> str:
        """The device's compute capability: "8.9"."""
        return capability(self._api)

    def free_memory(self) -> int:
        """Bytes of the device that nobody has."""
        return int(self._checked(self._api.cudaMemGetInfo())[0])

    def allocate(self, size: int, purpose: str) -> int:
        """Device memory, zeroed: its address. `purpose` is named in an error."""
        status, address = self._api.cudaMalloc(max(size, 1))
        if status == self._api.cudaError_t.cudaErrorMemoryAllocation:
            free, total = self._checked(self._api.cudaMemGetInfo())
            raise Failed(
                f"the GPU's memory is full: {purpose} needs {size / GIB:.2f} GiB, and {free / GIB:.2f} of "
                f"{total / GIB:.2f} GiB are free; {LOWER}."
            )
        self._check(status)
        self._held[int(address)] = self._api.cudaFree
        self._check(*self._api.cudaMemsetAsync(address, 0, max(size, 1), self.stream))
        return int(address)

    def pinned(self, size: int) -> np.ndarray:
        """Bytes (size,) uint8 of host memory that the device can copy from and to while the host goes on."""
        address = self._checked(self._api.cudaMallocHost(max(size, 1)))
        self._held[int(address)] = self._api.cudaFreeHost
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(address)))

    def free(self, address: int) -> None:
        """Gives back what `allocate` or `pinned` took, once the stream has no more use for it."""
        self.wait()
        self._check(*self._held.pop(address)(address))

    def upload(self, address: int, pinned: np.ndarray) -> None:
        """Pinned memory -> device, in the stream's order."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._check(*self._api.cudaMemcpyAsync(address, pinned.ctypes.data, pinned.nbytes, kind, self.stream))

    def download(self, pinned: np.ndarray, address: int) -> None:
        """Device -> pinned memory, in the stream's order: there after `wait`."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._check(*self._api.cudaMemcpyAsync(pinned.ctypes.data, address, pinned.nbytes, kind, self.stream))

    def copy(self, target: int, source: int, size: int) -> None:
        """Device -> device, in the stream's order."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._check(*self._api.cudaMemcpyAsync(target, source, size, kind, self.stream))

    def clear(self, address: int, size: int) -> None:
        """Zeros, in the stream's order."""
        self._check(*self._api.cudaMemsetAsync(address, 0, size, self.stream))

    def wait(self) -> None:
        """Until the stream has done all that it was given."""
        self._check(*self._api.cudaStreamSynchronize(self.stream))

    def capture(self, work: Callable[[], None]) -> Any:
        """A graph of what `work` gives to the stream, which does not run: see `launch`."""
        # What other threads of the process do meanwhile, compiling kernels say, is none of the capture's business.
        mode = self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._check(*self._api.cudaStreamBeginCapture(self.stream, mode))
        try:
            work()
        except BaseException:
            _, graph = self._api.cudaStreamEndCapture(self.stream)
            if graph:
                self._api.cudaGraphDestroy(graph)
            raise
        graph = self._checked(self._api.cudaStreamEndCapture(self.stream))
        try:
            return self._checked(self._api.cudaGraphInstantiate(graph, 0))
        finally:
            self._check(*self._api.cudaGraphDestroy(graph))

    def launch(self, graph: Any) -> None:
        """Gives a captured graph to the stream."""
        self._check(*self._api.cudaGraphLaunch(graph, self.stream))

    def drop(self, graph: Any) -> None:
        """Gives a graph back. The stream must not have it before it any more."""
        self._check(*self._api.cudaGraphExecDestroy(graph))

    def event(self) -> Any:
        """A mark to put into the stream."""
        return self._checked(self._api.cudaEventCreate())

    def forget(self, event: Any) -> None:
        """Gives a mark back."""
        self._check(*self._api.cudaEventDestroy(event))

    def record(self, event: Any) -> None:
        """Puts the mark behind all that the stream was given so far."""
        self._check(*self._api.cudaEventRecord(event, self.stream))

    def milliseconds(self, start: Any, end: Any) -> float:
        """Between two marks that the stream has passed."""
        return float(self._checked(self._api.cudaEventElapsedTime(start, end)))

    def _checked(self, results: tuple) -> Any:
        return _checked(self._api, results)

    def _check(self, status: Any) -> None:
        _checked(self._api, (status,))


def runtime_api() -> Any:
    """`cuda.bindings.runtime`. Raises `Failed` without the package."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        raise Failed("running on an NVIDIA GPU needs the package cuda-python: pip install cuda-python") from None
    return runtime


def missing(api: Any) -> str | None:
    """What keeps CUDA from being used here: no driver, one that is too old, no device. None where nothing does."""
    status, version = api.cudaDriverGetVersion()
    if status != api.cudaError_t.cudaSuccess or not version:
        return "there is no NVIDIA driver on this machine"
    status, count = api.cudaGetDeviceCount()
    if status == api.cudaError_t.cudaErrorInsufficientDriver:
        return f"the NVIDIA driver is too old: it knows CUDA {version // 1000}.{version % 1000 // 10}"
    if status == api.cudaError_t.cudaErrorNoDevice or not count:
        return "there is no NVIDIA GPU on this machine"
    return None if status == api.cudaError_t.cudaSuccess else f"CUDA cannot be used here: {describe(api, status)}"


def capability(api: Any) -> str:
    """The first device's compute capability: "8.9"."""
    attributes = api.cudaDeviceAttr
    numbers = (attributes.cudaDevAttrComputeCapabilityMajor, attributes.cudaDevAttrComputeCapabilityMinor)
    return ".".join(str(_checked(api, api.cudaDeviceGetAttribute(number, 0))) for number in numbers)


def device_name(api: Any) -> str:
    """What the first device is called: "NVIDIA GeForce RTX 4090"."""
    properties = _checked(api, api.cudaGetDeviceProperties(0))
    return properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)


def memory_taken(api: Any = None) -> int | None:
    """Bytes of the first device's memory that are taken, by whomever; None where there is no device."""
    api = api or runtime_api()
    if missing(api):
        return None
    status, free, total = api.cudaMemGetInfo()
    return total - free if status == api.cudaError_t.cudaSuccess else None


def _checked(api: Any, results: tuple) -> Any:
    """What a call gives beside its status. Raises `Failed` for one that is no success."""
    status, *values = results
    if status != api.cudaError_t.cudaSuccess:
        raise Failed(f"CUDA: {describe(api, status)}.")
    return values[0] if len(values) == 1 else tuple(values)


def describe(api: Any, status: Any) -> str:
    """A status in CUDA's own words, with its name."""
    texts = [value for _, value in (api.cudaGetErrorString(status), api.cudaGetErrorName(status))]
    text, name = (each.decode() if isinstance(each, bytes) else str(each) for each in texts)
    return f"{text} ({name})"


@contextmanager
def nvtx_range(name: str, wanted: bool) -> Iterator[None]:
    """Marks the block for NVIDIA's profilers."""
    if not wanted:
        yield
        return
    import nvtx

    with nvtx.annotate(name, domain="darkroom"):
        yield
