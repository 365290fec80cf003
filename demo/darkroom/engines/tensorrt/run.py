"""Running TensorRT engines: a stream for each kind of stage, memory allocated once, and a denoising loop of launches.

The samples stay on the device from the first step to the last. There, the engine of `darkroom.schedule.step` gathers
its row of the schedule by a step index that it moves on itself, so each step is the same launch, and a captured one
can be replayed. The host waits once, for the last sample.
"""

import json
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any
from weakref import finalize

import numpy as np

from darkroom.contract import DRAWS, ENCODER, TEXT, Job, Profile, Stage, Tensor
from darkroom.engines.cuda import GIB, Cuda, nvtx_range
from darkroom.engines.runtime import Engine, Options
from darkroom.engines.tensorrt.log import make_log
from darkroom.errors import Failed
from darkroom.schedule.step import NEXT, first_call, start_of, step_stage
from darkroom.schedule.table import Table
from darkroom.store.store import MANIFEST

ITEM = 4
"""Bytes: whatever goes in and out is float32 or int32."""


KEPT_GRAPHS = 8
"""Captured graphs that an engine keeps, those that were launched last: each holds memory of the device."""


HEADROOM = GIB // 2
"""Bytes of the device that streamed weights leave to contexts, the kernels that they load, and the screen."""


class Session:
    """The device as all engines of a run share it.

    Whoever allocates, or works for the first time, holds `settling`: the device does such things at its own time, and
    they end the capture of another thread.
    """

    def __init__(self, trt: Any, cuda_api: Any, options: Options) -> None:
        self.trt = trt
        self.options = options
        self.log = make_log(trt)
        self.runtime = trt.Runtime(self.log)
        self.settling = threading.Lock()
        self._cuda_api = cuda_api
        self._lanes: dict[str, Lane] = {}

    def load(self, job: Job, plan: Path, step_plan: Path) -> Engine:
        """The engine in `plan`; a UNet's goes with that of the schedule's step."""
        lane = self._lane(job.stage)
        network = self.network(lane, job.stage, job.profile, plan)
        if not job.stage.denoises:
            return TensorRtEngine(self, lane, network)
        step = self.network(lane, step_stage(job.stage.latents), job.profile, step_plan)
        return TensorRtUnet(self, lane, network, step)

    def network(self, lane: "Lane", stage: Stage, profile: Profile, plan: Path) -> "_Network":
        with self.settling:
            network = _Network(self, lane, stage, profile, plan)
        lane.networks.append(network)
        return network

    def _lane(self, stage: Stage) -> "Lane":
        """Where a stage computes: the steps of a batch, what comes before those of the next and what comes after those
        of the last overlap. With streamed weights one lane's scratch memory serves all: memory is short then."""
        role = TEXT if stage.role == ENCODER else stage.role
        role = "" if self.options.ws else role
        if role not in self._lanes:
            self._lanes[role] = Lane(self, Cuda(self._cuda_api))
        return self._lanes[role]

    def range(self, name: str) -> Any:
        return nvtx_range(name, self.options.nvtx_profile)

    def failed(self, doing: str) -> Failed:
        reason = self.log.errors[-1] if self.log.errors else "TensorRT gives no reason"
        self.log.errors.clear()
        return Failed(f"{doing}: {reason.rstrip('.')}.")


class Lane:
    """A stream, on which everything happens in order, and scratch memory as large as the largest of its engines needs.

    `lock` is held by the thread that works with the stream: what another thread gave it, or its waiting, would
    otherwise get into a capture.
    """

    def __init__(self, session: Session, cuda: Cuda) -> None:
        self.session, self.cuda = session, cuda
        self.lock = threading.Lock()
        self.networks: list[_Network] = []
        self._scratch: int | None = None
        self._size = 0
        self._left: deque[Callable[[], None]] = deque()
        """What frees the memory of engines that nobody has any more."""

    def settle(self) -> None:
        """Makes the contexts and gives them their scratch memory, once all engines and their buffers are there."""
        new = [network for network in self.networks if network.context is None]
        if not new and not self._left:
            return
        with self.session.settling:
            self.free_what_is_left()
            if not new:
                return
            for network in new:
                network.measure()
            # One after the other on one stream, no two of them ever compute at the same time.
            size = max(network.scratch_size for network in self.networks)
            if grows := self._scratch is None or size > self._size:
                if self._scratch is not None:
                    self.cuda.free(self._scratch)
                self._scratch, self._size = self.cuda.allocate(size, "the engines' scratch memory"), size
            self._make_contexts(new)
            for network in self.networks if grows else new:
                network.context.set_device_memory(self._scratch, self._size)
                network.layout += 1

    def _make_contexts(self, new: "list[_Network]") -> None:
        """With `--ws`, those that denoise come last, and get what memory is left: they are called at every step. Others
        keep their weights on the device only where all those to come have room for theirs beside them."""
        new = sorted(new, key=lambda network: network.stage.denoises)
        for turn, network in enumerate(new):
            if self.session.options.ws:
                own, to_come = network.streamable, sum(each.streamable for each in new[turn:])
                free = max(0, self.cuda.free_memory() - HEADROOM)
                share = free * own // to_come if to_come and network.stage.denoises else 0
                budget = own if free >= to_come else share
                # TensorRT knows of needs that nobody else does; but only now, when the others have theirs.
                budget = min(budget, network.engine.get_weight_streaming_automatic_budget())
                if (percentage := self.session.options.ws_percentage(network.stage.name)) is not None:
                    budget = own * percentage // 100
                network.engine.weight_streaming_budget_v2 = budget
            network.make_context()

    def leave(self, networks: "tuple[_Network, ...]", free: Callable[[], None]) -> None:
        """Nobody has an engine of these networks any more. Frees their memory, now or when the stream is next used: an
        engine may be collected anywhere, within a capture, too."""

        def all_of_it() -> None:
            self.cuda.wait()
            free()
            for network in networks:
                network.free()
                self.networks.remove(network)
            if not self.networks and self._scratch is not None:
                self.cuda.free(self._scratch)
                self._scratch = None

        self._left.append(all_of_it)
        if self.lock.acquire(blocking=False):
            try:
                if self.session.settling.acquire(blocking=False):
                    try:
                        self.free_what_is_left()
                    finally:
                        self.session.settling.release()
            finally:
                self.lock.release()

    def free_what_is_left(self) -> None:
        while self._left:
            with suppress(Failed):  # on a device that has failed nothing can be freed; it was reported
                self._left.popleft()()


@dataclass
class _Buffer:
    """One input or output: memory on the device and pinned memory, for its largest shape; and its shape now."""

    tensor: Tensor
    address: int
    pinned: np.ndarray
    shape: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        return ITEM * prod(self.shape)

    def host(self, shape: tuple[int, ...]) -> np.ndarray:
        """The pinned memory as an array of this shape."""
        return self.pinned[: ITEM * prod(shape)].view(self.tensor.dtype).reshape(shape)


class _Network:
    """A deserialized engine with its context, and buffers that keep their addresses.

    `layout` counts the changes of addresses and shapes: a graph that was captured before one is stale.
    """

    def __init__(self, session: Session, lane: Lane, stage: Stage, profile: Profile, plan: Path) -> None:
        self.session, self.cuda, self.stage, self.profile = session, lane.cuda, stage, profile
        self.layout = self.scratch_size = self.streamable = 0
        self.context: Any = None
        self.engine = session.runtime.deserialize_cuda_engine(plan.read_bytes())
        if self.engine is None:
            here = f"a GPU of {self.cuda.capability} with {session.trt.__name__} {session.trt.__version__}"
            raise session.failed(
                f"the {stage.name} engine in {plan.parent} cannot be loaded: it was {_origin(plan.parent)}; "
                f"here is {here} (if they differ, delete that folder, and it is built again)"
            )
        self.buffers: dict[str, _Buffer] = {}
        for tensor in (*stage.inputs, *stage.outputs):
            if DRAWS not in tensor.shape:  # the noises are as many as the schedule draws
                self.place(tensor, ITEM * prod(profile.bounds(tensor)[2]))

    def measure(self) -> None:
        """What its context will need. Without any weights of its own on the device: that is when it needs the most."""
        if self.session.options.ws:
            self.streamable = int(self.engine.streamable_weights_size)
            self.engine.weight_streaming_budget_v2 = 0
        self.scratch_size = int(self.engine.device_memory_size_v2)

    def make_context(self) -> None:
        """What computes. Streamed weights have their budget by then, which stands as long as there is a context."""
        trt, engine = self.session.trt, self.engine
        by_user = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            # TensorRT-RTX compiles kernels for the sizes it meets. Later, beside the work, it would do that while a
            # graph is captured, and leave the makeshift ones in it.
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(by_user)
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            self.context = engine.create_execution_context(config)
        else:
            self.context = engine.create_execution_context(by_user)
        if self.context is None:
            raise self.session.failed(f"the {self.stage.name} engine has no room on the GPU")
        for name, buffer in self.buffers.items():
            self._tell(name, buffer.address)

    def free(self) -> None:
        """Gives back all that it has. The stream must have no more use for it."""
        for buffer in self.buffers.values():
            self.cuda.free(buffer.address)
            self.cuda.free(buffer.pinned.ctypes.data)
        self.buffers.clear()
        self.context = self.engine = None  # in this order

    def place(self, tensor: Tensor, size: int) -> None:
        """Gives an input or output its memory, and takes back what it had."""
        cuda = self.cuda
        if old := self.buffers.pop(tensor.name, None):
            cuda.free(old.address)
            cuda.free(old.pinned.ctypes.data)
        address = cuda.allocate(size, f"the {self.stage.name}'s {tensor.name}")
        self.buffers[tensor.name] = _Buffer(tensor, address, cuda.pinned(size))
        if self.context is not None:
            self._tell(tensor.name, address)

    def _tell(self, name: str, address: int) -> None:
        if not self.context.set_tensor_address(name, address):
            raise self.session.failed(f"the {self.stage.name} engine has no {name}")
        self.layout += 1

    def give(self, name: str, value: np.ndarray) -> None:
        """Uploads an input, by way of pinned memory."""
        buffer = self.buffers[name]
        self.shape_input(name, value.shape)
        buffer.host(value.shape)[...] = value
        self.cuda.upload(buffer.address, buffer.pinned[: buffer.nbytes])

    def shape_input(self, name: str, shape: tuple[int, ...]) -> None:
        buffer = self.buffers[name]
        if buffer.shape == shape:
            return
        if not self.context.set_input_shape(name, shape):
            raise self.session.failed(f"the {self.stage.name} engine is not built for {name} of {shape}")
        buffer.shape = shape
        self.layout += 1

    def enqueue(self) -> None:
        """Gives the computation to the stream."""
        if not self.context.execute_async_v3(int(self.cuda.stream)):
            raise self.session.failed(f"the {self.stage.name} engine could not run")

    def fetch(self, name: str) -> np.ndarray:
        """Requests an output: pinned memory that holds it once the stream is through."""
        buffer = self.buffers[name]
        buffer.shape = tuple(self.context.get_tensor_shape(name))
        self.cuda.download(buffer.pinned[: buffer.nbytes], buffer.address)
        return buffer.host(buffer.shape)


def _origin(folder: Path) -> str:
    """What an engine was built for and by, as far as it records that."""
    try:
        key = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["key"]
        return f"built for {key['device']} with {key['version']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "built for an unknown device"


class _Captures:
    """Captured graphs by name, each for as long as no address and no shape of the networks in it has changed."""

    def __init__(self, cuda: Cuda, *networks: _Network) -> None:
        self._cuda = cuda
        self._networks = networks
        self._graphs: dict[Any, tuple[list[int], Any]] = {}

    def get(self, name: Any) -> Any:
        layouts, graph = self._graphs.pop(name, (None, None))
        if graph is None:
            return None
        if layouts != self._layouts():
            self._drop(graph)
            return None
        self._graphs[name] = layouts, graph  # which makes it the last to go
        return graph

    def capture(self, name: Any, work: Callable[[], Any]) -> None:
        while len(self._graphs) >= KEPT_GRAPHS:
            self._drop(self._graphs.pop(next(iter(self._graphs)))[1])
        try:
            self._graphs[name] = (self._layouts(), self._cuda.capture(work))
        except Failed as error:
            raise Failed(f"no CUDA graph could be captured ({error}): leave out --use-cuda-graph.") from None

    def clear(self) -> None:
        while self._graphs:
            self._drop(self._graphs.popitem()[1][1])

    def _drop(self, graph: Any) -> None:
        self._cuda.wait()  # it may be running still
        self._cuda.drop(graph)

    def _layouts(self) -> list[int]:
        return [network.layout for network in self._networks]


class TensorRtEngine(Engine):
    """A stage that is called with arrays. With CUDA graphs, its second call is captured and replayed from then on."""

    def __init__(self, session: Session, lane: Lane, *networks: _Network) -> None:
        self._session, self._lane, self._network = session, lane, networks[0]
        self._captures = captures = _Captures(lane.cuda, *networks)
        self._start, self._end = start, end = lane.cuda.event(), lane.cuda.event()

        def free() -> None:
            captures.clear()
            lane.cuda.forget(start)
            lane.cuda.forget(end)

        # What the process's end gives back by itself is left to that.
        finalize(self, lane.leave, networks, free).atexit = False

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        cuda, network = self._lane.cuda, self._network
        with self._lane.lock, self._session.range(network.stage.name):
            self._lane.settle()
            cuda.record(self._start)
            for tensor in network.stage.inputs:
                network.give(tensor.name, inputs[tensor.name])
            self._launch("call", network.enqueue)
            outputs = {tensor.name: network.fetch(tensor.name) for tensor in network.stage.outputs}
            cuda.record(self._end)
            cuda.wait()
        self.milliseconds = (self.milliseconds or 0.0) + cuda.milliseconds(self._start, self._end)
        return {name: value.copy() for name, value in outputs.items()}

    def _launch(self, name: Any, work: Callable[[], None]) -> None:
        """Gives work to the stream: as a captured graph, if they are wanted and there is one."""
        if not self._session.options.use_cuda_graph:
            work()
        elif graph := self._captures.get(name):
            self._lane.cuda.launch(graph)
        else:
            with self._session.settling:
                work()  # TensorRT settles things in the first run at a shape, which cannot be captured
                self._captures.capture(name, work)


class TensorRtUnet(TensorRtEngine):
    """The UNet with the schedule's step, which denoise without coming back to the host."""

    def __init__(self, session: Session, lane: Lane, network: _Network, step: _Network) -> None:
        super().__init__(session, lane, network, step)
        self._step = step
        self._runs: Counter[tuple[int, int]] = Counter()

    def denoise(
        self, table: Table, sample: np.ndarray, noises: list[np.ndarray], conditions: dict[str, np.ndarray]
    ) -> Iterator[np.ndarray | None]:
        """See `Denoiser`. With CUDA graphs, a loop that came twice is captured whole, and from then on one launch."""
        cuda, calls, lock = self._lane.cuda, len(table), self._lane.lock
        kind = calls, len(noises)
        with self._session.range(self._network.stage.name):
            with lock:
                self._lane.settle()
                cuda.record(self._start)
                self._upload(table, sample, noises, conditions)
                if whole := self._captures.get(kind):
                    cuda.launch(whole)
            for call in range(calls):
                if not whole:
                    with lock:
                        self._launch("step", self._advance)
                if call < calls - 1:
                    yield None
            with lock:
                cuda.record(self._end)
                samples = self._step.buffers["samples"]
                cuda.download(samples.pinned[: sample.nbytes], samples.address)  # the newest stands first
                cuda.wait()
                self.milliseconds = (self.milliseconds or 0.0) + cuda.milliseconds(self._start, self._end)
                self._runs[kind] += 1
                if self._session.options.use_cuda_graph and not whole and self._runs[kind] > 1:
                    with self._session.settling:  # and on nobody's clock
                        self._captures.capture(kind, lambda: [self._advance() for _ in range(calls)])
        yield samples.host(sample.shape).copy()

    def _advance(self) -> None:
        """One call of the network, one step of the schedule, and what comes next into what goes in."""
        cuda, step = self._lane.cuda, self._step
        self._network.enqueue()
        output = self._network.buffers["output"]
        cuda.copy(step.buffers["output"].address, output.address, step.buffers["output"].nbytes)
        step.enqueue()
        # Copied, never shared: an engine may write an output before it has read all of its inputs.
        for tensor in step.stage.outputs:
            name = tensor.name.removeprefix(NEXT)
            target = (step if name in step.buffers else self._network).buffers[name]
            cuda.copy(target.address, step.buffers[tensor.name].address, target.nbytes)

    def _upload(
        self, table: Table, sample: np.ndarray, noises: list[np.ndarray], conditions: dict[str, np.ndarray]
    ) -> None:
        """Everything that the loop needs, before it begins."""
        unet, step = self._network, self._step
        given = conditions | first_call(table, sample)
        for tensor in unet.stage.inputs:
            unet.give(tensor.name, given[tensor.name])
        start = start_of(table, sample, noises)
        drawn = start["noises"]
        if "noises" not in step.buffers or step.buffers["noises"].pinned.nbytes < drawn.nbytes:
            with self._session.settling:
                step.place(next(tensor for tensor in step.stage.inputs if tensor.name == "noises"), drawn.nbytes)
        step.shape_input("outputs", start.pop("outputs").shape)
        self._lane.cuda.clear(step.buffers["outputs"].address, step.buffers["outputs"].nbytes)
        for name, value in start.items():
            step.give(name, value)
        step.shape_input("output", sample.shape)
