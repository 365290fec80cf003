"""The contract of the schedule's step, for devices that keep the samples between two calls of the UNet.

It reads the row of the table that a step index on the device points to, and moves the index on: so the same launch
serves every step, and a captured one may be replayed. The formula is that of `schedule.table`.
"""

import numpy as np

from darkroom.contract import DRAWS, Stage, Tensor
from darkroom.schedule.table import OUTPUT_WINDOW, SAMPLE_WINDOW, Table

ROWS = 2048
"""Calls that a table has room for, and one more: Heun makes 1,999 of the 1,000 steps that a model may have."""

NEXT = "next_"
"""What begins the names of the outputs that the next call takes as inputs."""


def step_stage(latents: Tensor) -> Stage:
    """The contract: all float32 but the indices. `latents` are those of the UNet: (B, C, h, w).

    step (1,) and the table's columns, ROWS long, with the index of each step's noise; samples (4, B, C, h, w) and
    outputs (4, B, C, h, w), newest first; the UNet's output (B, C, h, w); noises (N, B, C, h, w)
    -> the next samples, outputs and step; the next latents (B, C, h, w) and timestep (B,), to call the UNet with.
    """
    batch, *rest = latents.shape
    state = (
        Tensor("step", (1,), "int32"),
        Tensor("samples", (SAMPLE_WINDOW, batch, *rest)),
        Tensor("outputs", (OUTPUT_WINDOW, batch, *rest)),
    )
    table = (
        Tensor("timesteps", (ROWS,)),
        Tensor("input_scale", (ROWS,)),
        Tensor("sample_weights", (ROWS, SAMPLE_WINDOW)),
        Tensor("output_weights", (ROWS, OUTPUT_WINDOW)),
        Tensor("noise_weights", (ROWS,)),
        Tensor("noise_index", (ROWS,), "int32"),
    )
    given = (Tensor("output", latents.shape), Tensor("noises", (DRAWS, *latents.shape)))
    made = (*state, latents, Tensor("timestep", (batch,)))
    outputs = tuple(Tensor(NEXT + each.name, each.shape, each.dtype) for each in made)
    return Stage("step", (*state, *table, *given), outputs, "")


def start_of(table: Table, sample: np.ndarray, noises: list[np.ndarray]) -> dict[str, np.ndarray]:
    """What the step is given before its first call, by the contract's names: all but the UNet's output.

    sample: (B, C, h, w), the first one; noises: (B, C, h, w) each, those that the schedule draws, in its order.
    """
    columns = {
        "timesteps": table.timesteps,
        "input_scale": table.input_scale,
        "sample_weights": table.sample_weights,
        "output_weights": table.output_weights,
        "noise_weights": np.where(table.noise_drawn, table.noise_weights, 0),
        "noise_index": np.clip(np.cumsum(table.noise_drawn) - 1, 0, None),
    }
    given = {"step": np.zeros(1, np.int32)}
    for name, column in columns.items():
        given[name] = np.zeros((ROWS, *column.shape[1:]), np.int32 if name == "noise_index" else np.float32)
        given[name][: len(column)] = column
    given["samples"] = np.zeros((SAMPLE_WINDOW, *sample.shape), np.float32)
    given["samples"][0] = sample
    given["outputs"] = np.zeros((OUTPUT_WINDOW, *sample.shape), np.float32)
    given["noises"] = np.stack(noises) if noises else np.zeros((1, *sample.shape), np.float32)
    return given
