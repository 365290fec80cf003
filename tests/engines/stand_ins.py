"""Stand-ins for CUDA's runtime and TensorRT's, on a machine without a GPU: strict where the real ones are treacherous.

Work that is given to a stream is done when someone waits for that stream, in order: who reads results without waiting
reads garbage. Memory is real and begins as NaN, so pointers are really followed. "Plans" are ONNX graphs, which ONNX
Runtime computes; their weights, contexts and scratch take the device's memory. Misuse raises at once: addresses that
are freed or were never given, copies from memory that is not pinned, memory that two streams work with at a time,
allocating while a graph is captured, waiting for the stream that captures, launching what was never instantiated or has
gone stale.
"""

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime


class Misuse(AssertionError):
    """What the real thing would answer with a crash, or a wrong picture."""


@dataclass
class Work:
    """Something in the stream: what it does, which memory it touches, and a check that a replay must pass."""

    name: str
    do: Callable[[], None]
    touches: list[tuple[int, int]]
    still_so: Callable[[], bool] = lambda: True


class Status(Enum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100


class CudaStandIn:
    """In place of `cuda.bindings.runtime`. `capability` and `memory` are the device's; `calls` is what was called."""

    cudaError_t = Status
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=0, cudaDevAttrComputeCapabilityMinor=1)

    def __init__(self, capability: tuple[int, int] = (8, 9), memory: int = 1 << 33, devices: int = 1) -> None:
        self.capability, self.memory, self.devices = capability, memory, devices
        self.driver = 13000
        self.calls: list[str] = []
        self.launched = 0
        self._blocks: dict[int, tuple[np.ndarray, str]] = {}
        self._queues: dict[int, list[Work]] = {}
        self._captures: dict[int, tuple[list[Work], int]] = {}
        """What is captured, by stream, and by which thread."""
        self.taken = 0
        """Bytes that TensorRT has allocated for itself."""
        self._graphs: dict[int, list[Work]] = {}
        self._executables: dict[int, list[Work]] = {}
        self._events: dict[int, bool] = {}
        self._handle = 1000

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name.startswith("cuda") and callable(value) and not isinstance(value, type):
            self.calls.append(name)
        return value

    # The driver and the device.

    def cudaDriverGetVersion(self) -> tuple:
        return Status.cudaSuccess, self.driver

    def cudaGetDeviceCount(self) -> tuple:
        return (Status.cudaSuccess, self.devices) if self.devices else (Status.cudaErrorNoDevice, 0)

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> tuple:
        return Status.cudaSuccess, self.capability[attribute]

    def cudaMemGetInfo(self) -> tuple:
        used = sum(block.nbytes for block, kind in self._blocks.values() if kind == "device")
        return Status.cudaSuccess, self.memory - used - self.taken, self.memory

    @property
    def blocks(self) -> int:
        """How many are allocated."""
        return len(self._blocks)

    @property
    def graphs(self) -> int:
        """How many are held, instantiated or not."""
        return len(self._graphs) + len(self._executables)

    def pending(self, stream: int) -> int:
        """How much a stream has left to do."""
        return len(self._queues[stream])

    def cudaGetDeviceProperties(self, device: int) -> tuple:
        return Status.cudaSuccess, SimpleNamespace(name=b"Stand-In 9000")

    def cudaGetErrorString(self, status: Status) -> tuple:
        return Status.cudaSuccess, status.name.removeprefix("cudaError").encode()

    def cudaGetErrorName(self, status: Status) -> tuple:
        return Status.cudaSuccess, status.name.encode()

    # Memory.

    def _take(self, size: int, kind: str) -> tuple:
        self._not_while_capturing("allocated")
        block = np.full(size, 0xFF, np.uint8)  # NaN, as float32
        self._blocks[block.ctypes.data] = block, kind
        return Status.cudaSuccess, block.ctypes.data

    def cudaMalloc(self, size: int) -> tuple:
        if size > self.cudaMemGetInfo()[1]:
            return Status.cudaErrorMemoryAllocation, None
        return self._take(size, "device")

    def cudaMallocHost(self, size: int) -> tuple:
        return self._take(size, "pinned")

    def _give_back(self, address: int, kind: str) -> tuple:
        self._not_while_capturing("freed")
        if self._blocks.get(address, (None, ""))[1] != kind:
            raise Misuse(f"freed an address that {kind} memory does not begin at")
        size = self._blocks[address][0].nbytes
        for queue in self._queues.values():
            self._not_in(queue, [(address, size)], "freed")
        del self._blocks[address]
        return (Status.cudaSuccess,)

    def cudaFree(self, address: int) -> tuple:
        return self._give_back(address, "device")

    def cudaFreeHost(self, address: int) -> tuple:
        return self._give_back(address, "pinned")

    def check(self, address: int, size: int, kind: str) -> None:
        for start, (block, found) in self._blocks.items():
            if found == kind and start <= address and address + size <= start + block.nbytes:
                return
        raise Misuse(f"{size} bytes at {address} are not {kind} memory, or not any more")

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: int) -> tuple:
        self.check(address, size, "device")
        return self.give(Work("memset", lambda: ctypes.memset(address, value, size), [(address, size)]), stream)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple:
        self.check(target, size, "pinned" if kind == 2 else "device")
        self.check(source, size, "pinned" if kind == 1 else "device")
        if abs(target - source) < size:
            raise Misuse("copied between places that overlap")
        touches = [(target, size), (source, size)]
        return self.give(Work("copy", lambda: ctypes.memmove(target, source, size), touches), stream)

    # The stream.

    def give(self, work: Work, stream: int) -> tuple:
        """Takes work into the stream, or into the graph that is being captured of it."""
        if stream in self._captures:
            held, thread = self._captures[stream]
            if thread != threading.get_ident():
                raise Misuse(f"{work.name} of another thread got into a capture")
            held.append(work)
        else:
            self._beside(stream, work)
            self._queues[stream].append(work)
        return (Status.cudaSuccess,)

    def _beside(self, stream: int, work: Work) -> None:
        """No other stream may be at work with the same memory: nothing says which of them is first."""
        for other, queue in self._queues.items():
            if other != stream:
                self._not_in(queue, work.touches, f"{work.name} of another stream works with")

    @staticmethod
    def _not_in(queue: list[Work], places: list[tuple[int, int]], what: str) -> None:
        for work in queue:
            for start, length in work.touches:
                if any(start < address + size and address < start + length for address, size in places):
                    raise Misuse(f"{what} what {work.name} in the stream still needs")

    cudaStreamNonBlocking = 1

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple:
        if flags != self.cudaStreamNonBlocking:
            raise Misuse("a stream that waits for the default one")
        self._queues[stream := self._new()] = []
        return Status.cudaSuccess, stream

    def cudaStreamSynchronize(self, stream: int) -> tuple:
        if stream in self._captures:
            raise Misuse("waited while a graph is captured")
        while self._queues[stream]:
            self._queues[stream].pop(0).do()
        return (Status.cudaSuccess,)

    def _not_while_capturing(self, what: str) -> None:
        if self._captures:
            raise Misuse(f"{what} while a graph is captured")

    # Graphs.

    def _new(self) -> int:
        self._handle += 1
        return self._handle

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple:
        self._not_while_capturing("captured")
        if mode != self.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal:
            raise Misuse("other threads would end this capture")
        self._captures[stream] = [], threading.get_ident()
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple:
        if stream not in self._captures:
            raise Misuse("ended a capture that never began")
        self._graphs[graph := self._new()] = self._captures.pop(stream)[0]
        return Status.cudaSuccess, graph

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple:
        executable = self._new()
        self._executables[executable] = self._graphs[graph]
        return Status.cudaSuccess, executable

    def cudaGraphDestroy(self, graph: int) -> tuple:
        del self._graphs[graph]
        return (Status.cudaSuccess,)

    def cudaGraphExecDestroy(self, executable: int) -> tuple:
        for queue in self._queues.values():
            if any(work in queue for work in self._executables[executable]):
                raise Misuse("destroyed a graph that is running")
        del self._executables[executable]
        return (Status.cudaSuccess,)

    def cudaGraphLaunch(self, executable: int, stream: int) -> tuple:
        if stream in self._captures:
            raise Misuse("launched while a graph is captured")
        if executable not in self._executables:
            raise Misuse("launched a graph that is not instantiated")
        for work in self._executables[executable]:
            for address, size in work.touches:
                if not any(
                    start <= address and address + size <= start + block.nbytes
                    for start, (block, _) in self._blocks.items()
                ):
                    raise Misuse(f"a captured {work.name} touches memory that was freed")
            if not work.still_so():
                raise Misuse(f"a captured {work.name} has other addresses or shapes by now")
            self._beside(stream, work)
        self._queues[stream] += self._executables[executable]
        self.launched += 1
        return (Status.cudaSuccess,)

    # Events.

    def cudaEventCreate(self) -> tuple:
        event = self._new()
        self._events[event] = False
        return Status.cudaSuccess, event

    def cudaEventDestroy(self, event: int) -> tuple:
        del self._events[event]
        return (Status.cudaSuccess,)

    def cudaEventRecord(self, event: int, stream: int) -> tuple:
        self._events[event] = False
        return self.give(Work("event", lambda: self._events.update({event: True}), []), stream)

    def cudaEventElapsedTime(self, start: int, end: int) -> tuple:
        if not (self._events[start] and self._events[end]):
            raise Misuse("read a clock that the stream has not passed")
        return Status.cudaSuccess, 1.5


class _Logger:
    ERROR, INTERNAL_ERROR, WARNING = "error", "internal", "warning"

    def __init__(self) -> None:
        pass


@dataclass
class TensorRtStandIn:
    """In place of `tensorrt_rtx`, as far as running goes: the plans that it reads are ONNX graphs, whose weights are
    said to be of `weights` bytes. See `PlainTensorRtStandIn`."""

    cuda: CudaStandIn
    scratch: int = 4096
    weights: int = 0
    contexts: list["_Context"] = field(default_factory=list)
    engines: list["_Engine"] = field(default_factory=list)
    name: str = "stand_in"
    version: str = "1.0"
    ILogger = _Logger
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="by user")

    def __post_init__(self) -> None:
        self.__name__, self.__version__ = self.name, self.version
        self.ComputeCapability = SimpleNamespace(__members__={"NONE": 0, "SM80": 80, "SM89": 89, "SM120": 120})
        self.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")

    @property
    def rtx(self) -> bool:
        return hasattr(self, "ComputeCapability")

    def Runtime(self, log: Any) -> Any:
        def deserialize_cuda_engine(plan: bytes) -> "_Engine | None":
            try:
                self.engines.append(engine := _Engine(self, plan))
                return engine
            except Exception as error:
                log.log(_Logger.ERROR, f"stand-in: {type(error).__name__}")
                return None

        return SimpleNamespace(deserialize_cuda_engine=deserialize_cuda_engine)


class PlainTensorRtStandIn(TensorRtStandIn):
    """In place of `tensorrt`, without what TensorRT-RTX alone has."""

    def __post_init__(self) -> None:
        self.__name__, self.__version__ = "tensorrt", "11.4"


class _Engine:
    STREAMING = 512
    """What it has of weights on the device, and of scratch memory, for those that it streams."""

    def __init__(self, trt: TensorRtStandIn, plan: bytes) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.trt = trt
        self.session = onnxruntime.InferenceSession(plan, options, providers=["CPUExecutionProvider"])
        self.activations = trt.scratch = trt.scratch * 2  # each needs more than the last
        self.streamable_weights_size = self._budget = trt.weights
        self.in_use = 0
        """Its contexts."""

    @property
    def device_memory_size_v2(self) -> int:
        return self.activations + self.STREAMING * (self._budget < self.streamable_weights_size)

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        if self.in_use:
            raise Misuse("a budget was set beside a context")
        if not 0 <= budget <= self.streamable_weights_size:
            raise Misuse(f"a budget of {budget} for {self.streamable_weights_size} bytes of weights")
        self._budget = budget

    def get_weight_streaming_automatic_budget(self) -> int:
        """All that is free now, and no more than it has weights: who asks early is told of what others will need."""
        return min(self.streamable_weights_size, max(0, self.trt.cuda.cudaMemGetInfo()[1] - _Context.OWN))

    def create_runtime_config(self) -> Any:
        if not self.trt.rtx:
            raise Misuse("plain TensorRT takes no such configuration from us")
        config = SimpleNamespace(strategy=None, dynamic_shapes_kernel_specialization_strategy="lazy")
        config.set_execution_context_allocation_strategy = lambda strategy: vars(config).update(strategy=strategy)
        return config

    def create_execution_context(self, config: Any) -> "_Context | None":
        if self.trt.rtx:
            assert config.strategy == "by user"
            assert config.dynamic_shapes_kernel_specialization_strategy == "eager", "captures would hold makeshifts"
        else:
            assert config == "by user"
        self.trt.cuda._not_while_capturing("made a context")
        needed = self._budget + _Context.OWN
        if needed > self.trt.cuda.cudaMemGetInfo()[1]:
            return None
        self.trt.cuda.taken += needed
        self.trt.contexts.append(context := _Context(self, needed))
        return context


class _Context:
    ITEM = 4
    OWN = 1024
    """Bytes of the device that it allocates for itself."""

    def __init__(self, engine: _Engine, taken: int) -> None:
        engine.in_use += 1
        self.engine, self.cuda = engine, engine.trt.cuda
        self.inputs = {each.name: each for each in engine.session.get_inputs()}
        self.outputs = {each.name: each for each in engine.session.get_outputs()}
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.scratch: tuple[int, int] | None = None
        self.inferred: dict[tuple, dict[str, tuple[int, ...]]] = {}

    def set_device_memory(self, address: int, size: int) -> None:
        self.cuda._not_while_capturing("gave scratch memory")
        self.cuda.check(address, size, "device")
        if size < self.engine.device_memory_size_v2:
            raise Misuse("the scratch memory is too small for this engine")
        self.scratch = address, size

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.inputs | self.outputs

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        declared = self.inputs[name].shape
        if len(shape) != len(declared):
            return False
        if any(isinstance(size, int) and size != given for size, given in zip(declared, shape, strict=True)):
            return False
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Found by computing once with zeros: exported graphs do not name all of their outputs' sizes."""
        key = tuple(sorted(self.shapes.items()))
        if key not in self.inferred:
            zeros = {each: np.zeros(shape, self._kind(each)) for each, shape in self.shapes.items()}
            made = self.engine.session.run(list(self.outputs), zeros)
            self.inferred[key] = {each: value.shape for each, value in zip(self.outputs, made, strict=True)}
        return self.inferred[key][name]

    def execute_async_v3(self, stream: int) -> bool:
        if self.scratch is None:
            raise Misuse("ran without scratch memory")
        if missing := (self.inputs | self.outputs).keys() - self.addresses.keys():
            raise Misuse(f"ran without an address for {missing}")
        if missing := self.inputs.keys() - self.shapes.keys():
            raise Misuse(f"ran without a shape for {missing}")
        shapes = self.shapes | {name: self.get_tensor_shape(name) for name in self.outputs}
        places = {name: (self.addresses[name], self.ITEM * int(np.prod(shape))) for name, shape in shapes.items()}
        for address, size in places.values():
            self.cuda.check(address, size, "device")
        for output in self.outputs:
            for name, (address, size) in places.items():
                if name != output and address < sum(places[output]) and places[output][0] < address + size:
                    raise Misuse(f"{output} shares memory with {name}")
        self.cuda.check(*self.scratch, "device")
        then = dict(self.addresses), dict(self.shapes), self.scratch

        def run() -> None:
            given = {name: self._array(name, places[name], shapes[name]) for name in self.inputs}
            made = self.engine.session.run(list(self.outputs), given)
            for name, value in zip(self.outputs, made, strict=True):
                self._array(name, places[name], shapes[name])[...] = value

        def still_so() -> bool:
            return then == (self.addresses, self.shapes, self.scratch)

        self.cuda.give(Work("engine", run, [*places.values(), self.scratch], still_so), stream)
        return True

    def _kind(self, name: str) -> Any:
        return np.int32 if "int32" in (self.inputs | self.outputs)[name].type else np.float32

    def _array(self, name: str, place: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
        memory = (ctypes.c_uint8 * place[1]).from_address(place[0])
        return np.ctypeslib.as_array(memory).view(self._kind(name)).reshape(shape)
