"""Running ONNX Runtime's sessions over bound arrays: nothing is copied that does not have to be.

From host memory a session reads the caller's own arrays and writes into those that it gets. On a GPU, inputs have
buffers that keep their addresses for as long as their shapes, which captured graphs need; what is steady is uploaded
when it changes. A loop of denoising stays there from its first sample to the last: the schedule's step writes into what
the UNet reads. On a GPU none of this has been run: no GPU was at hand. It is tested over host memory.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from onnxruntime import InferenceSession, OrtValue

from darkroom.contract import Job, Profile, Stage, Tensor
from darkroom.engines.runtime import Engine
from darkroom.schedule.step import NEXT, first_call, start_of, step_stage
from darkroom.schedule.table import Table

HOST = "cpu"
STATE = ("step", "samples", "outputs")
"""What a step of the schedule leaves to the next one."""


class HostEngine(Engine):
    """A stage on the CPU, or on a provider that takes its inputs from there."""

    def __init__(self, session: InferenceSession, job: Job) -> None:
        self._session, self._stage, self._profile = session, job.stage, job.profile
        self._binding = session.io_binding()
        self._bound: dict[str, np.ndarray] = {}

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for tensor in self._stage.inputs:
            # What is steady comes as the same array again; being read where it is, it may hold other numbers by now.
            if (given := inputs[tensor.name]) is not self._bound.get(tensor.name):
                value = np.ascontiguousarray(given, tensor.dtype)
                self._binding.bind_ortvalue_input(tensor.name, OrtValue.ortvalue_from_numpy(value))
                self._bound.pop(tensor.name, None)
                if value is given:
                    self._bound[tensor.name] = given
        sizes = _sizes(self._stage, self._profile, inputs)
        outputs = {}
        for tensor in self._stage.outputs:  # the caller's to keep, and so new each time
            outputs[tensor.name] = np.empty(_shape(tensor, sizes), tensor.dtype)
            self._binding.bind_ortvalue_output(tensor.name, OrtValue.ortvalue_from_numpy(outputs[tensor.name]))
        self._session.run_with_iobinding(self._binding)
        self._binding.clear_binding_outputs()
        return outputs

    def forget(self) -> None:
        self._bound.clear()


class DeviceEngine(Engine):
    """A stage on a device of its own memory: "cuda"."""

    def __init__(self, session: InferenceSession, job: Job, device: str) -> None:
        self._session, self._stage, self._profile = session, job.stage, job.profile
        self._binding = session.io_binding()
        self._buffers = _Buffers(device)
        self._seen: dict[str, np.ndarray] = {}

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self._give(inputs)
        self._session.run_with_iobinding(self._binding)
        return {tensor.name: self._buffers.read(tensor.name) for tensor in self._stage.outputs}

    def forget(self) -> None:
        self._seen.clear()

    def _give(self, inputs: dict[str, np.ndarray]) -> None:
        """Uploads the inputs, and binds them and the outputs where they have got other buffers."""
        for tensor in self._stage.inputs:
            name, value = tensor.name, inputs[tensor.name]
            steady = name in self._stage.steady
            # By value: an array of the caller's may hold other numbers the next time.
            if steady and name in self._seen and np.array_equal(self._seen[name], value):
                continue
            if self._buffers.place(tensor, value.shape):
                self._binding.bind_ortvalue_input(name, self._buffers[name])
            self._buffers.write(name, value)
            if steady:
                self._seen[name] = value.copy()
        sizes = _sizes(self._stage, self._profile, inputs)
        for tensor in self._stage.outputs:
            if self._buffers.place(tensor, _shape(tensor, sizes)):
                self._binding.bind_ortvalue_output(tensor.name, self._buffers[tensor.name])


class DeviceUnet(DeviceEngine):
    """The UNet with the schedule's step, which denoise without coming back to the host: see `Denoiser`."""

    def __init__(self, session: InferenceSession, job: Job, device: str, step: InferenceSession) -> None:
        super().__init__(session, job, device)
        self._step = step
        self._step_stage = step_stage(next(tensor for tensor in job.stage.inputs if tensor.name == "latents"))
        self._here, self._there = _Buffers(device), _Buffers(device)
        """The schedule's state, which goes from one to the other and back; what else its step reads is here."""

    def denoise(
        self, table: Table, sample: np.ndarray, noises: list[np.ndarray], conditions: dict[str, np.ndarray]
    ) -> Iterator[np.ndarray | None]:
        """See `Denoiser`."""
        calls = len(table)
        self._give(conditions | first_call(table, sample))
        turns = self._turns(start_of(table, sample, noises))
        for call in range(calls):
            self._session.run_with_iobinding(self._binding)
            self._step.run_with_iobinding(turns[call % 2])
            if call < calls - 1:
                yield None
        newest = (self._there if calls % 2 else self._here).read("samples")[0]
        yield newest.copy()

    def _turns(self, given: dict[str, np.ndarray]) -> list[Any]:
        """The bindings of the step, by turns: the state goes there, and then back. Uploads what it begins with."""
        for tensor in self._step_stage.inputs:
            if tensor.name != "output":  # which the UNet writes
                self._here.place(tensor, given[tensor.name].shape)
                self._here.write(tensor.name, given[tensor.name])
            if tensor.name in STATE:
                self._there.place(tensor, given[tensor.name].shape)
        turns = []
        for source, target in ((self._here, self._there), (self._there, self._here)):
            binding = self._step.io_binding()
            for tensor in self._step_stage.inputs:
                place = self._buffers if tensor.name == "output" else source if tensor.name in STATE else self._here
                binding.bind_ortvalue_input(tensor.name, place[tensor.name])
            for tensor in self._step_stage.outputs:
                name = tensor.name.removeprefix(NEXT)
                place = target if name in STATE else self._buffers
                binding.bind_ortvalue_output(tensor.name, place[name])
            turns.append(binding)
        return turns


class _Buffers:
    """Memory of a device by the names of what it holds."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._values: dict[str, OrtValue] = {}

    def __getitem__(self, name: str) -> OrtValue:
        return self._values[name]

    def place(self, tensor: Tensor, shape: tuple[int, ...]) -> bool:
        """Makes room for a tensor of this shape, if there is none yet. Returns whether it had to."""
        if tensor.name in self._values and tuple(self._values[tensor.name].shape()) == shape:
            return False
        self._values[tensor.name] = OrtValue.ortvalue_from_shape_and_type(shape, np.dtype(tensor.dtype), self._device)
        return True

    def write(self, name: str, value: np.ndarray) -> None:
        dtype = np.int32 if self._values[name].data_type() == "tensor(int32)" else np.float32
        self._values[name].update_inplace(np.ascontiguousarray(value, dtype))

    def read(self, name: str) -> np.ndarray:
        """A copy, on the host."""
        value = self._values[name].numpy()
        return value.copy() if self._device == HOST else value  # there it is the buffer itself


def _sizes(stage: Stage, profile: Profile, inputs: dict[str, np.ndarray]) -> dict[str, int]:
    """A number for every symbol of the stage's shapes, from those of its inputs."""
    sizes: dict[str, int] = {}
    for tensor in stage.inputs:
        for symbol, size in zip(tensor.shape, inputs[tensor.name].shape, strict=True):
            if isinstance(symbol, str):
                sizes[symbol] = size
    for latent, pixel in (("h", "H"), ("w", "W")):
        if latent in sizes:
            sizes[pixel] = sizes[latent] * profile.vae_factor
        elif pixel in sizes:
            sizes[latent] = sizes[pixel] // profile.vae_factor
    return sizes


def _shape(tensor: Tensor, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)
