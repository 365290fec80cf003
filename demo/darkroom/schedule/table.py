"""A compiled schedule: for each network call, the coefficients that make the next sample.

A step of every scheduler in common use is linear in the samples, the network's outputs and the noise. So

    input_i      = input_scale[i] * sample_i
    sample_{i+1} =   sum over k < 4 of sample_weights[i, k] * sample_{i-k}
                   + sum over k < 4 of output_weights[i, k] * output_{i-k}
                   + noise_weights[i] * noise_i

with sample_0 = initial_scale * the initial noise + image_scale * the latents of a picture to start from, if any.
The windows have fixed widths, so the state of any schedule fits any buffer.
"""

from collections import deque
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

SAMPLE_WINDOW = 4
OUTPUT_WINDOW = 4


@dataclass(frozen=True)
class Table:
    """N network calls. Weights are float32; `timesteps` (N,) may be fractional. `image_scale` is 0 without a picture.

    `sample_weights`: (N, 4), `output_weights`: (N, 4), `noise_weights`: (N,), newest first. `noise_drawn`: (N,)
    bool, whether the scheduler draws noise in that step: a draw moves the random stream even where its weight is 0.
    """

    initial_scale: float
    image_scale: float
    timesteps: np.ndarray
    input_scale: np.ndarray
    sample_weights: np.ndarray
    output_weights: np.ndarray
    noise_weights: np.ndarray
    noise_drawn: np.ndarray

    def __len__(self) -> int:
        return len(self.timesteps)

    def save(self, path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, **{field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, path: Path) -> "Table":
        with np.load(path, allow_pickle=False) as arrays:
            values = {field.name: arrays[field.name] for field in fields(cls)}
        return cls(**values | {name: float(values[name]) for name in ("initial_scale", "image_scale")})


class Trajectory:
    """A batch of samples on its way through a table: all of them at the same step.

    `noise` of the constructor: (B, C, h, w) standard normal, the schedule's start; `image`: the same shape, latents
    as the UNet has them, for a schedule that starts from a picture.
    """

    def __init__(self, table: Table, noise: np.ndarray, image: np.ndarray | None = None) -> None:
        self._table = table
        start = noise * np.float32(table.initial_scale)
        if image is not None:
            start += image * np.float32(table.image_scale)
        self._samples = deque([start], maxlen=SAMPLE_WINDOW)
        self._outputs: deque[np.ndarray] = deque(maxlen=OUTPUT_WINDOW)

    @property
    def sample(self) -> np.ndarray:
        return self._samples[0]

    def network_input(self, call: int) -> np.ndarray:
        """What the network is shown in this call: (B, C, h, w) float32."""
        return self.sample * np.float32(self._table.input_scale[call])

    def advance(self, call: int, output: np.ndarray, noise: np.ndarray | None) -> None:
        """Takes the network's output, and noise where the table says it is drawn, to the next sample."""
        self._outputs.appendleft(output)
        terms = [*zip(self._table.sample_weights[call], self._samples, strict=False)]
        terms += zip(self._table.output_weights[call], self._outputs, strict=False)
        if noise is not None:
            terms.append((self._table.noise_weights[call], noise))
        following = np.zeros_like(self.sample)
        for weight, array in terms:
            if weight:
                following += np.float32(weight) * array
        self._samples.appendleft(following)
