"""Running torch modules as engines, on the CPU or a CUDA device: inputs and the loop's samples keep their addresses.

On CUDA, work that comes again is captured as a CUDA graph and replayed from then on: a call of a network, or the whole
denoising loop with the schedule's arithmetic in it. Without one the same code runs step by step.
"""

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
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


class Buffers:
    """Tensors on a device by name, which keep their addresses for as long as their shapes stay the same.

    `layout` counts the changes of addresses: a graph that was captured before one is stale.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors: dict[str, torch.Tensor] = {}
        self.layout = 0

    def give(self, name: str, array: np.ndarray) -> torch.Tensor:
        """The tensor of this name, filled."""
        value = torch.from_numpy(np.ascontiguousarray(array))
        tensor = self._tensors.get(name)
        if tensor is None or tensor.shape != value.shape:
            tensor = self._tensors[name] = torch.empty_like(value, device=self._device)
            self.layout += 1
        return tensor.copy_(value)


class Captures:
    """Work by name: its graph is captured when it has been done twice, and stands until an address changes."""

    def __init__(self, wanted: bool, buffers: Buffers) -> None:
        self._wanted = wanted
        self._buffers = buffers
        self._done: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, tuple[Callable[[], None], Any]] = {}
        self._layout = 0
        # Of each engine's own: what one replays must not overwrite what another has made, and nobody has fetched yet.
        self._pool: Any = None
        self._stream: Any = None

    def get(self, name: Hashable) -> tuple[Callable[[], None], Any] | None:
        """What replays the work, and what it returned: tensors that every replay fills anew. None without a graph."""
        if self._layout != self._buffers.layout:
            self._graphs.clear()
            self._done.clear()
            self._layout = self._buffers.layout
        return self._graphs.get(name)

    def done(self, name: Hashable, work: Callable[[], Any]) -> None:
        """The work was done without a graph. Captures it when that comes again, which does not do it.

        What cannot be captured is reported once, and goes on being launched: the pictures are the same.
        """
        self._done[name] += 1
        if not self._wanted or self._done[name] < 2:
            return
        try:
            self._graphs[name] = self._captured(work)
        except RuntimeError as error:
            self._wanted = False
            warnings.warn(
                f"no CUDA graph of this could be captured, so it is launched step by step: {gist(error)}", stacklevel=2
            )

    def _captured(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        if self._pool is None:
            # A stream of their own, too: the workspaces of a stream's graphs lie in the pool of the first.
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # What other threads replay meanwhile, with stages of other batches, is none of the capture's business.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                made = work()
        finally:
            torch.cuda.set_stream(before)  # which a capture that fails at its end does not
        return graph.replay, made


class TorchEngine(Engine):
    """A stage's module, compiled or not, that is called with arrays. `graphs`: whether CUDA graphs are wanted."""

    def __init__(self, module: Callable[..., Any], stage: Stage, device: torch.device, graphs: bool) -> None:
        self._module = module
        self._stage = stage
        self._device = device
        self._graphs = graphs
        self._buffers = Buffers(device)
        self._captures = Captures(graphs, self._buffers)

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with self._computing():
            start = self._mark()
            given = [self._buffers.give(tensor.name, inputs[tensor.name]) for tensor in self._stage.inputs]
            if captured := self._captures.get("call"):
                replay, made = captured
                replay()
                outputs = self._all_fetched(made, start)
            else:
                with self._settling():
                    outputs = self._all_fetched(self._module(*given), start)
                    self._captures.done("call", lambda: self._module(*given))
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
        """Without gradients. Raises `Failed` where the device's memory is full, and for what torch refuses else: the
        host's memory, or a size that a network cannot halve."""
        try:
            with torch.inference_mode():
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
        self, module: Callable[..., Any], step: nn.Module, stage: Stage, device: torch.device, graphs: bool
    ) -> None:
        super().__init__(module, stage, device, graphs)
        self._step = step
        self._state = Buffers(device)
        self._loops = Captures(graphs, self._state)

    def denoise(
        self, table: Table, sample: np.ndarray, noises: list[np.ndarray], conditions: dict[str, np.ndarray]
    ) -> Iterator[np.ndarray | None]:
        """See `Denoiser`. With CUDA graphs, a loop that came twice is captured whole, and from then on one launch."""
        kind = tuple(table.noise_drawn)
        with self._computing():
            start = self._mark()
            turns, samples = self._begun(table, sample, noises, conditions)
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
                    self._loops.done(kind, lambda: [self._step(*turn) for turn in turns])  # on nobody's clock
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
