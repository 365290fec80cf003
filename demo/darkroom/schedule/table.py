"""A compiled schedule: for each network call, the coefficients that make the next sample.

A step of every scheduler in common use is linear in the samples, the network's outputs and the noise. So

    input_i      = input_scale[i] * sample_i
    sample_{i+1} =   sum over k < 4 of sample_weights[i, k] * sample_{i-k}
                   + sum over k < 5 of output_weights[i, k] * output_{i-k}
                   + noise_weights[i] * noise_i

with sample_0 = initial_scale * the initial noise + image_scale * the latents of a picture to start from, if any. Where
a mask (1 where the picture is painted anew) keeps the rest of that picture, this is blended into each sample:

    kept_{i+1}   = keep_image[i] * the picture's latents + keep_noise[i] * the initial noise
    sample_{i+1} = (1 - mask) * kept_{i+1} + mask * the sum above

The windows have fixed widths, so the state of any schedule fits any buffer.

`advance` is this formula, the only one: for arrays of NumPy, torch and JAX alike, and traced into a graph of ONNX.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

SAMPLE_WINDOW = 4
OUTPUT_WINDOW = 5
"""The newest output among them. The oldest has a weight only where PNDM's fourth step is blended with a picture."""

OUTPUTS_KEPT = OUTPUT_WINDOW - 1
"""How many of them are carried from call to call."""

TIMESTEP, INPUT_SCALE, NOISE, SAMPLES = range(4)
OUTPUTS = SAMPLES + SAMPLE_WINDOW
KEEP_IMAGE, KEEP_NOISE = OUTPUTS + OUTPUT_WINDOW, OUTPUTS + OUTPUT_WINDOW + 1
"""The columns of a row of `Table.rows`: the weights of samples and outputs begin at theirs, newest first."""

ROW = 16
"""Numbers in such a row: a multiple of the alignment that compiled kernels count on, with some left over."""


class State(NamedTuple):
    """What is carried from call to call: samples and network outputs (B, C, h, w), newest first, at most four each."""

    samples: Sequence[Any]
    outputs: Sequence[Any]


class Kept(NamedTuple):
    """What a picture keeps of another: `mask` (B, 1, h, w), 1 where it is painted anew, and that picture's latents and
    the initial noise (B, C, h, w)."""

    mask: Any
    image: Any
    noise: Any


def state_of(sample: np.ndarray) -> State:
    """Before the first call, at its full width: a sample (B, C, h, w), and zeros."""
    nothing = np.zeros(sample.shape, np.float32)
    return State((sample, *[nothing] * (SAMPLE_WINDOW - 1)), (nothing,) * OUTPUTS_KEPT)


def network_input(row: Any, state: State) -> Any:
    """What the network is shown, (B, C, h, w); `row` as for `advance`."""
    return state.samples[0] * _weight(row, INPUT_SCALE)


def advance(row: Any, state: State, output: Any, noise: Any = None, kept: Kept | None = None) -> State:
    """One step: the state after a call whose output was `output` (B, C, h, w), all float32.

    `row`: what the table says of the call, (ROW,), or (B, ROW) for images at steps of their own. `noise` (B, C, h, w)
    may be left out where none is drawn, and `kept` where nothing is. No matrix product: accelerators compute those in
    less than float32.
    """
    outputs = (output, *state.outputs)[:OUTPUT_WINDOW]
    terms = [_weight(row, SAMPLES + age) * sample for age, sample in enumerate(state.samples)]
    terms += [_weight(row, OUTPUTS + age) * each for age, each in enumerate(outputs)]
    if noise is not None:
        terms.append(_weight(row, NOISE) * noise)
    sample = reduce(add, terms)
    if kept is not None:
        rest = _weight(row, KEEP_IMAGE) * kept.image + _weight(row, KEEP_NOISE) * kept.noise
        sample = (1 - kept.mask) * rest + kept.mask * sample
    return State((sample, *state.samples)[:SAMPLE_WINDOW], outputs[:OUTPUTS_KEPT])


def _weight(row: Any, column: int) -> Any:
    return row[..., column].reshape(-1, 1, 1, 1)


@dataclass(frozen=True)
class Table:
    """N network calls. Weights are float32; `timesteps` (N,) may be fractional. `image_scale` is 0 without a picture.

    `sample_weights`: (N, 4), `output_weights`: (N, 5), `noise_weights`: (N,), newest first. `noise_drawn`: (N,)
    bool, whether the scheduler draws noise in that step: a draw moves the random stream even where its weight is 0.
    `keep_image` and `keep_noise`: (N,), or a zero for a schedule that keeps nothing.
    """

    initial_scale: float
    image_scale: float
    timesteps: np.ndarray
    input_scale: np.ndarray
    sample_weights: np.ndarray
    output_weights: np.ndarray
    noise_weights: np.ndarray
    noise_drawn: np.ndarray
    keep_image: np.ndarray = field(default_factory=lambda: np.zeros(1, np.float32))
    keep_noise: np.ndarray = field(default_factory=lambda: np.zeros(1, np.float32))

    def __len__(self) -> int:
        return len(self.timesteps)

    def rows(self) -> np.ndarray:
        """The table as `advance` reads it: (N, ROW) float32, zeros behind the last column."""
        rows = np.zeros((len(self), ROW), np.float32)
        rows[:, TIMESTEP] = self.timesteps
        rows[:, INPUT_SCALE] = self.input_scale
        rows[:, NOISE] = np.where(self.noise_drawn, self.noise_weights, 0)
        rows[:, SAMPLES:OUTPUTS] = self.sample_weights
        rows[:, OUTPUTS : OUTPUTS + OUTPUT_WINDOW] = self.output_weights
        rows[:, KEEP_IMAGE], rows[:, KEEP_NOISE] = self.keep_image, self.keep_noise
        return rows

    def noise_index(self) -> np.ndarray:
        """Which of the noises that are drawn each row takes, (N,): any where its weight is 0."""
        return np.clip(np.cumsum(self.noise_drawn) - 1, 0, None)

    def save(self, file: Path | BinaryIO) -> None:
        np.savez(file, **{each.name: getattr(self, each.name) for each in fields(self)})

    @classmethod
    def load(cls, path: Path) -> "Table":
        with np.load(path, allow_pickle=False) as arrays:
            values = {each.name: arrays[each.name] for each in fields(cls)}
        return cls(**values | {name: float(values[name]) for name in ("initial_scale", "image_scale")})


class Trajectory:
    """A batch of samples on its way through a table: all of them at the same step.

    `noise` of the constructor: (B, C, h, w) standard normal, the schedule's start; `image`: the same shape, latents
    as the UNet has them, for a schedule that starts from a picture; `mask` (B, 1, h, w): what of it is painted anew.
    """

    def __init__(
        self, table: Table, noise: np.ndarray, image: np.ndarray | None = None, mask: np.ndarray | None = None
    ) -> None:
        self._rows = table.rows()
        self._kept = None if mask is None else Kept(mask, image, noise)
        start = noise * np.float32(table.initial_scale)
        if image is not None:
            start += image * np.float32(table.image_scale)
        self._state = State((start,), ())

    @property
    def sample(self) -> np.ndarray:
        return self._state.samples[0]

    def network_input(self, call: int) -> np.ndarray:
        """What the network is shown in this call: (B, C, h, w) float32."""
        return network_input(self._rows[call], self._state)

    def advance(self, call: int, output: np.ndarray, noise: np.ndarray | None) -> None:
        """Takes the network's output, and noise where the table says it is drawn, to the next sample."""
        self._state = advance(self._rows[call], self._state, output, noise, self._kept)

    def foreseen(self, call: int) -> np.ndarray:
        """The last sample, (B, C, h, w), if the network answers from this call on as it last did and no noise is drawn.

        It shows early what a picture becomes: for the schedules that follow an ordinary differential equation it is the
        denoised sample that the last output stands for.
        """
        state = self._state
        for row in self._rows[call:]:
            state = advance(row, state, state.outputs[0], kept=self._kept)
        return state.samples[0]
