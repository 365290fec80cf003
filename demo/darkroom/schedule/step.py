"""The contract of the schedule's step, for devices that keep the samples between two calls of the UNet.

It reads the row of the table that a step index on the device points to, and moves the index on: so the same launch
serves every step, and a captured one may be replayed. `schedule.step_onnx` writes its graph.
"""

import numpy as np

from darkroom.contract import DRAWS, Stage, Tensor
from darkroom.schedule.table import OUTPUTS_KEPT, ROW, SAMPLE_WINDOW, State, Table, network_input, state_of

ROWS = 2048
"""Calls that a table has room for, and one more: Heun makes 1,999 of the 1,000 steps that a model may have."""

NEXT = "next_"
"""What begins the names of the outputs that the next call takes as inputs."""


def step_stage(latents: Tensor) -> Stage:
    """The contract: all float32 but the indices. `latents` are those of the UNet: (B, C, h, w).

    step (1,); samples (4, B, C, h, w) and outputs (4, B, C, h, w), newest first; the table's rows (ROWS, ROW) and the
    index of each one's noise; the UNet's output (B, C, h, w); noises (N, B, C, h, w)
    -> the next samples, outputs and step; the next latents (B, C, h, w) and timestep (B,), to call the UNet with.
    """
    batch, *rest = latents.shape
    state = (
        Tensor("step", (1,), "int32"),
        Tensor("samples", (SAMPLE_WINDOW, batch, *rest)),
        Tensor("outputs", (OUTPUTS_KEPT, batch, *rest)),
    )
    table = (Tensor("rows", (ROWS, ROW)), Tensor("noise_index", (ROWS,), "int32"))
    given = (Tensor("output", latents.shape), Tensor("noises", (DRAWS, *latents.shape)))
    made = (*state, latents, Tensor("timestep", (batch,)))
    outputs = tuple(Tensor(NEXT + each.name, each.shape, each.dtype) for each in made)
    return Stage("step", (*state, *table, *given), outputs)


def first_call(table: Table, sample: np.ndarray) -> dict[str, np.ndarray]:
    """What the UNet is called with before the first step, by the contract's names; `sample` (B, C, h, w)."""
    latents = network_input(table.rows()[0], State((sample,), ()))
    return {"latents": latents, "timestep": np.full(len(sample), table.timesteps[0], np.float32)}


def start_of(table: Table, sample: np.ndarray, noises: list[np.ndarray]) -> dict[str, np.ndarray]:
    """What the step is given before its first call, by the contract's names: all but the UNet's output.

    sample: (B, C, h, w), the first one; noises: (B, C, h, w) each, those that the schedule draws, in its order.
    """
    rows, noise_index = np.zeros((ROWS, ROW), np.float32), np.zeros(ROWS, np.int32)
    rows[: len(table)] = table.rows()
    noise_index[: len(table)] = table.noise_index()
    state = state_of(sample)
    return {
        "step": np.zeros(1, np.int32),
        "samples": np.stack(state.samples),
        "outputs": np.stack(state.outputs),
        "rows": rows,
        "noise_index": noise_index,
        "noises": np.stack(noises) if noises else np.zeros((1, *sample.shape), np.float32),
    }
