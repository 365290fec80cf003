"""One call of a UNet and the schedule's step behind it, as one function that XLA compiles.

The formula is that of `schedule.table`, in float32 whatever the network computes in. Each image has its own weights:
so the network alone, with a timestep for each image, is a step whose weights make its output the next sample.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from darkroom.schedule.table import OUTPUT_WINDOW, SAMPLE_WINDOW, Table

Arrays = dict[str, Any]


class State(NamedTuple):
    """What is carried from call to call: for each of B images its samples (B, 4, C, h, w), and the network's outputs
    (B, 4, C, h, w), newest first, float32."""

    samples: Any
    outputs: Any

    @classmethod
    def of(cls, sample: np.ndarray) -> "State":
        """Before the first call: a sample (B, C, h, w), and nothing else."""
        samples = np.zeros((len(sample), SAMPLE_WINDOW, *sample.shape[1:]), np.float32)
        samples[:, 0] = sample
        return cls(samples, np.zeros((len(sample), OUTPUT_WINDOW, *sample.shape[1:]), np.float32))


class Row(NamedTuple):
    """What a table says of one call, for each of B images: timestep, input_scale and noise_weight (B,),
    sample_weights and output_weights (B, 4)."""

    timestep: np.ndarray
    input_scale: np.ndarray
    sample_weights: np.ndarray
    output_weights: np.ndarray
    noise_weight: np.ndarray

    @classmethod
    def of(cls, table: Table, call: int, images: int) -> "Row":
        """The same for all images."""
        columns = (table.timesteps, table.input_scale, table.sample_weights, table.output_weights, table.noise_weights)
        return cls(*(np.repeat(np.asarray(column[call : call + 1], np.float32), images, axis=0) for column in columns))

    @classmethod
    def of_the_network(cls, timestep: np.ndarray) -> "Row":
        """The one that makes the network's output the next sample, at a timestep (B,) for each image."""
        images = len(timestep)
        newest = np.eye(1, OUTPUT_WINDOW, dtype=np.float32)
        return cls(
            timestep=np.asarray(timestep, np.float32),
            input_scale=np.ones(images, np.float32),
            sample_weights=np.zeros((images, SAMPLE_WINDOW), np.float32),
            output_weights=np.repeat(newest, images, axis=0),
            noise_weight=np.zeros(images, np.float32),
        )


def step_of(
    network: Callable[[Arrays, Arrays], Arrays],
) -> Callable[[Arrays, State, Row, Any, Arrays], tuple[State, Any]]:
    """The function around a UNet: (weights, state, row, noise (B, C, h, w), conditions) -> the next state and sample.

    `network` is (weights, inputs by name) -> outputs by name.
    """

    def step(weights: Arrays, state: State, row: Row, noise: Any, conditions: Arrays) -> tuple[State, Any]:
        latents = state.samples[:, 0] * _for_pixels(row.input_scale)
        output = network(weights, {"latents": latents, "timestep": row.timestep} | conditions)["output"]
        outputs = _push(output, state.outputs)
        sample = _weighed(state.samples, row.sample_weights) + _weighed(outputs, row.output_weights)
        sample += _for_pixels(row.noise_weight) * noise
        return State(_push(sample, state.samples), outputs), sample

    return step


def _for_pixels(column: Any) -> Any:
    """(B,) -> (B, 1, 1, 1)."""
    return column[:, None, None, None]


def _push(newest: Any, window: Any) -> Any:
    """`newest` (B, C, h, w) in front of all of `window` (B, 4, C, h, w) but its oldest."""
    return jnp.concatenate([newest[:, None], window[:, :-1]], axis=1)


def _weighed(window: Any, weights: Any) -> Any:
    """The sum of a window by its weights (B, 4). No matrix product: accelerators compute those in less than float32."""
    return sum(_for_pixels(weights[:, index]) * window[:, index] for index in range(weights.shape[1]))
