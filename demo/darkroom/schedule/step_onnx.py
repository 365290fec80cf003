"""The graph of the schedule's step, traced from the one formula: see `darkroom.schedule.step`."""

import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from darkroom import contract
from darkroom.errors import Failed
from darkroom.schedule.step import step_stage
from darkroom.schedule.table import TIMESTEP, State, advance, network_input

OPSET = 17
CLOSE_ENOUGH = 1e-5
"""Of the largest value: by how much the graph may differ from what was traced."""

EXAMPLES = {"B": (2, 1), "h": (4, 6), "w": (5, 3), contract.DRAWS: (3, 2)}
"""Sizes for what is free: those that are traced, and those that the graph is checked at."""


class Step(nn.Module):
    """`step_stage` in torch: its inputs and outputs, in its order."""

    def forward(
        self,
        step: Tensor,
        samples: Tensor,
        outputs: Tensor,
        rows: Tensor,
        noise_index: Tensor,
        output: Tensor,
        noises: Tensor,
    ) -> tuple[Tensor, ...]:
        noise = noises.index_select(0, noise_index.index_select(0, step))[0]
        row = rows.index_select(0, step)
        state = advance(row, State(samples.unbind(), outputs.unbind()), output, noise)
        next_step = step + 1
        row = rows.index_select(0, next_step)
        latents, timestep = network_input(row, state), row[:, TIMESTEP].expand(output.shape[0])
        return next_step, torch.stack(state.samples), torch.stack(state.outputs), latents, timestep


def write_step(latents: contract.Tensor, path: Path) -> None:
    """Writes the graph of `step_stage`; batch and size stay free where `latents` leave them so.

    Raises `Failed` when it does not compute what torch does.
    """
    stage = step_stage(latents)
    traced, checked = (_example(stage, which) for which in range(2))
    axes = {
        tensor.name: {axis: size for axis, size in enumerate(tensor.shape) if isinstance(size, str)}
        for tensor in (*stage.inputs, *stage.outputs)
    }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Step(),
            tuple(traced.values()),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            dynamic_axes=axes,
            input_names=list(traced),
            output_names=[tensor.name for tensor in stage.outputs],
        )
        expected = Step()(*checked.values())
    onnx.checker.check_model(str(path), full_check=True)
    found = ReferenceEvaluator(str(path)).run(None, {name: value.numpy() for name, value in checked.items()})
    for wanted, value, tensor in zip(expected, found, stage.outputs, strict=True):
        if not np.allclose(value, wanted.numpy(), rtol=0, atol=CLOSE_ENOUGH * float(wanted.abs().max())):
            raise Failed(f"the exported graph of the schedule's step differs from torch in {tensor.name}.")


def _example(stage: contract.Stage, which: int) -> dict[str, Tensor]:
    """Inputs of the stage by name; their indices point to a step in the middle, with the second noise."""
    generator = torch.Generator().manual_seed(which)

    def value(tensor: contract.Tensor) -> Tensor:
        shape = tuple(EXAMPLES[size][which] if isinstance(size, str) else size for size in tensor.shape)
        if tensor.dtype == "int32":
            return torch.ones(shape, dtype=torch.int32)
        return torch.randn(shape, generator=generator)

    return {tensor.name: value(tensor) for tensor in stage.inputs}
