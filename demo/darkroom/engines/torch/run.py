"""Running torch modules as engines, on the CPU or a CUDA device: inputs and the loop's samples keep their addresses.

On CUDA every engine has a stream of its own, so that stages of neighbouring batches overlap. Work that comes again is
captured there as a CUDA graph and replayed from then on: a call of a network, or the whole denoising loop with the
schedule's arithmetic in it. Without one the same code runs step by step.
"""

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from darkroom.contract import Stage
from darkroom.engines.cuda import GIB
from darkroom.engines.runtime import Engine
from darkroom.errors import Failed, gist
from darkroom.schedule.step import start_of
from darkroom.schedule.table import TIMESTEP, State, Table, advance, network_input

SETTLING = threading.RLock()
"""Held while a graph is captured, and wherever one is still to come: what is done for the first time waits for the
whole device, by which the capture of another thread would end."""


KEPT_SIZES, KEPT_LOOPS = 16, 4
"""Sizes of inputs that an engine keeps buffers and captured calls for, and captured loops: those used last."""

ABANDONED: list[Any] = []
"""Graphs whose capture failed. torch's allocator of host memory goes on asking them which stream they capture."""


class Buffers:
    """Tensors on a device by name and shape, which keep their addresses: of one that is given again, as often as sizes
    change in between."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors: dict[str, dict[torch.Size, torch.Tensor]] = {}

    def give(self, name: str, array: np.ndarray) -> torch.Tensor:
        """The tensor of this name and shape, filled."""
        value = torch.from_numpy(np.ascontiguousarray(array))
        of_name = self._tensors.setdefault(name, {})
        tensor = of_name.pop(value.shape, None)
        if tensor is None:
            tensor = torch.empty_like(value, device=self._device)
            while len(of_name) >= KEPT_SIZES:
                del of_name[next(iter(of_name))]
        of_name[value.shape] = tensor  # which makes it the last to go
        return tensor.copy_(value)


class Captures:
    """Work by what it does and the tensors that it reads: its graph is captured when it has been done twice.

    Up to `most` graphs are kept, each with the tensors that it was captured with, whose addresses it holds.
    """

    def __init__(self, wanted: bool, most: int, stream: Any) -> None:
        self._wanted, self._most, self._stream = wanted, most, stream
        self._done: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, tuple[Callable[[], None], Any, Any]] = {}
        # Of each engine's own: what one replays must not overwrite what another has made, and nobody has fetched yet.
        self._pool: Any = None

    def get(self, name: Hashable) -> tuple[Callable[[], None], Any] | None:
        """What replays the work, and what it returned: tensors that every replay fills anew. None without a graph."""
        if (found := self._graphs.pop(name, None)) is None:
            return None
        self._graphs[name] = found  # which makes it the last to go
        return found[:2]

    def done(self, name: Hashable, work: Callable[[], Any], reads: Any) -> None:
        """The work was done without a graph. Captures it when that comes again, which does not do it.

        `reads` are its tensors, by whose `addresses` it is named. What cannot be captured is reported once, and goes on
        being launched: the pictures are the same.
        """
        if not self._wanted:
            return
        self._done[name] += 1
        if self._done[name] < 2:
            return
        self._done.clear()  # of what comes no more
        while len(self._graphs) >= self._most:
            del self._graphs[next(iter(self._graphs))]
        try:
            self._graphs[name] = (*self._captured(work), reads)
        except RuntimeError as error:
            self._wanted = False
            warnings.warn(
                f"no CUDA graph of this could be captured, so it is launched step by step: {gist(error)}", stacklevel=2
            )

    def _captured(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        if not self._graphs:  # torch takes no more into a pool of which every graph is gone
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # What other threads replay meanwhile, with stages of other batches, is none of the capture's business.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                made = work()
        except BaseException:
            _end_allocating(graph, self._pool)
            raise
        return graph.replay, made


def _end_allocating(graph: Any, pool: Any) -> None:
    """Brings torch's allocator back from a capture that failed.

    `CUDAGraph.capture_end` raises as soon as CUDA has refused the capture, before it tells the allocator that it is
    over: which would keep what is freed from then on, and ask a graph that is gone.
    """
    device = torch.cuda.current_device()
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:  # it was told
        return
    torch._C._cuda_releasePool(device, pool)
    ABANDONED.append(graph)


def addresses(tensors: Iterable[torch.Tensor]) -> tuple[int, ...]:
    """Where tensors lie, in their order."""
    return tuple(tensor.data_ptr() for tensor in tensors)


class TorchEngine(Engine):
    """A stage's module, compiled or not, that is called with arrays. `graphs`: whether CUDA graphs are wanted;
    `stream`: where it computes on CUDA."""

    def __init__(
        self, module: Callable[..., Any], stage: Stage, device: torch.device, graphs: bool, stream: Any = None
    ) -> None:
        self._module = module
        self._stage = stage
        self._device = device
        self._graphs = graphs
        self._stream = stream
        self._buffers = Buffers(device)
        self._captures = Captures(graphs, KEPT_SIZES, stream)

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with self._computing():
            start = self._mark()
            given = [self._buffers.give(tensor.name, inputs[tensor.name]) for tensor in self._stage.inputs]
            name = addresses(given)
            if captured := self._captures.get(name):
                replay, made = captured
                replay()
                outputs = self._all_fetched(made, start)
            else:
                with self._settling():
                    outputs = self._all_fetched(self._module(*given), start)
                    self._captures.done(name, lambda: self._module(*given), given)
        return {tensor.name: value.numpy() for tensor, value in zip(self._stage.outputs, outputs, strict=True)}

    def _all_fetched(self, made: Any, start: Any) -> list[torch.Tensor]:
        """What a module gave, on the host; `start` is when it was called."""
        outputs = [self._fetched(value) for value in (made if isinstance(made, tuple) else (made,))]
        self._wait(start)
        return outputs

    def _settling(self) -> AbstractContextManager[Any]:
        """For what is done without a graph: see `SETTLING`."""
        return SETTLING if self._graphs else nullcontext()

    def _fetched(self, value: torch.Tensor) -> torch.Tensor:
        """A copy on the host, whole after `_wait`, in memory that the device writes to while the host goes on."""
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=self._device.type == "cuda")
        return host.copy_(value, non_blocking=True)

    def _mark(self) -> Any:
        """A mark in the device's stream; None on the CPU, where the host's clock tells."""
        if self._device.type != "cuda":
            return None
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def _wait(self, start: Any) -> None:
        """Until the device has done all that it was given, and adds what that took since `start`."""
        if start is None:
            return
        end = self._mark()
        end.synchronize()
        self.milliseconds = (self.milliseconds or 0.0) + start.elapsed_time(end)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """In the engine's stream, without gradients. Raises `Failed` where the device's memory is full, and for what
        torch refuses else: the host's memory, or a size that a network cannot halve."""
        try:
            with torch.inference_mode(), torch.cuda.stream(self._stream) if self._stream else nullcontext():
                yield
        except torch.OutOfMemoryError:
            raise out_of_memory(self._stage, self._device) from None
        except RuntimeError as error:
            if type(error) is not RuntimeError:  # a compiler's, or the GPU's: a fault, which keeps its trace
                raise
            raise Failed(f"torch cannot run the {self._stage.name} for this size and batch: {gist(error)}.") from error


class LoopStep(nn.Module):
    """A call of the UNet, guidance and all, and the schedule's step behind it: a compiler sees both as one.

    It changes the samples in place, so that every step reads and writes the same memory: it can be captured.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        row: torch.Tensor,
        samples: torch.Tensor,
        outputs: torch.Tensor,
        noise: torch.Tensor,
        *conditions: torch.Tensor,
    ) -> None:
        """`row` (ROW,) of `Table.rows`; `samples` (4, B, C, h, w) and `outputs` (4, B, C, h, w), newest first; `noise`
        (B, C, h, w); `conditions`: what the UNet takes beside latents and timesteps."""
        state = State(samples.unbind(), outputs.unbind())
        newest = self.unet(network_input(row, state), row[TIMESTEP].expand(samples.shape[1]), *conditions)
        following = advance(row, state, newest, noise)
        samples.copy_(torch.stack(following.samples))
        outputs.copy_(torch.stack(following.outputs))


class TorchUnet(TorchEngine):
    """The UNet with the schedule's step, which denoise without coming back to the host. `step` is a `LoopStep`."""

    def __init__(
        self,
        module: Callable[..., Any],
        step: nn.Module,
        stage: Stage,
        device: torch.device,
        graphs: bool,
        stream: Any = None,
    ) -> None:
        super().__init__(module, stage, device, graphs, stream)
        self._step = step
        self._state = Buffers(device)
        self._loops = Captures(graphs, KEPT_LOOPS, stream)

    def denoise(
        self, table: Table, sample: np.ndarray, noises: list[np.ndarray], conditions: dict[str, np.ndarray]
    ) -> Iterator[np.ndarray | None]:
        """See `Denoiser`. With CUDA graphs, a loop that came twice is captured whole, and from then on one launch."""
        with self._computing():
            start = self._mark()
            turns, samples = self._begun(table, sample, noises, conditions)
            kind = tuple(map(addresses, turns))
            captured = self._loops.get(kind)
            if captured:
                captured[0]()
        # No block is open while the generator stands: what it changes would hold for what runs then.
        for call, turn in enumerate(turns):
            if not captured:
                with self._computing(), self._settling():
                    self._step(*turn)
            if call < len(turns) - 1:
                yield None
        with self._computing():
            latest = self._fetched(samples[0])
            self._wait(start)
            if not captured:
                with self._settling():
                    self._loops.done(kind, lambda: [self._step(*turn) for turn in turns], turns)  # on nobody's clock
        yield latest.numpy()

    def _begun(
        self, table: Table, sample: np.ndarray, noises: list[np.ndarray], conditions: dict[str, np.ndarray]
    ) -> tuple[list[tuple[torch.Tensor, ...]], torch.Tensor]:
        """Everything that the loop needs, on the device: what each turn is called with, and the window of samples."""
        on_device = {name: self._state.give(name, value) for name, value in start_of(table, sample, noises).items()}
        rows, samples, outputs, noise_at = (on_device[name] for name in ("rows", "samples", "outputs", "noises"))
        steady = [self._state.give(name, conditions[name]) for name in self._stage.steady]
        turns = [(rows[call], samples, outputs, noise_at[n], *steady) for call, n in enumerate(table.noise_index())]
        return turns, samples


def out_of_memory(stage: Stage, device: torch.device) -> Failed:
    """One line for a device whose memory is full."""
    free, total = torch.cuda.mem_get_info(device)
    return Failed(
        f"the GPU's memory is full: the {stage.name} needs more than the {free / GIB:.2f} of {total / GIB:.2f} GiB "
        f"that are free; lower --batch-size or the size, or take --precision bf16."
    )
