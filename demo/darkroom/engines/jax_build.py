"""The heavy half of the JAX engine: a torch module becomes a program in StableHLO, and its weights a file.

It runs in a child, on the CPU: an accelerator may belong to one process alone, and that is the one that asked.
"""

import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
import torch
import torchax
from jax import export

from darkroom.engines.jax_run import PROGRAM, WEIGHTS
from darkroom.engines.runtime import Job, Progress
from darkroom.errors import Failed
from darkroom.export.graph import TOLERANCES
from darkroom.export.modules import DTYPES, example_inputs, load_module
from darkroom.stages.contract import Stage

PLATFORMS = ("cpu", "cuda", "tpu")
"""What a program is lowered for: all of them, as it may be compiled on another machine than its maker's."""

Arrays = dict[str, Any]


def write_program(job: Job, model: Path, devices: int, folder: Path, progress: Progress) -> dict[str, Any]:
    """Writes the program of a stage for one device's share of the batch, and its weights, into `folder`.

    `model` is a diffusers folder. Raises `Failed` when the program disagrees with torch. Returns facts for the
    manifest: the error that was measured, and the versions of what made it.
    """
    jax.config.update("jax_platforms", "cpu")
    warnings.filterwarnings("ignore")  # torchax means no harm when it makes int32 of int64
    stage = job.stage
    progress("reading the weights", 0, 3)
    module = load_module(stage, model, DTYPES[job.precision])
    sizes = job.profile.sizes()
    inputs = example_inputs(stage, sizes | {"B": sizes["B"] // devices}, seed=1)
    weights, function = torchax.extract_jax(module)
    progress("tracing the network", 1, 3)
    program = _exported(stage, job.precision, weights, function, inputs)
    (folder / PROGRAM).write_bytes(program.serialize())
    safetensors.numpy.save_file({name: np.asarray(value) for name, value in weights.items()}, folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)  # as other artefacts: a store may have readers beside its owner
    progress("holding it against torch", 2, 3)
    if job.precision != "fp32":
        del module  # before the next is loaded: of the largest networks there is no room for two
        module = load_module(stage, model)
    error = _error_against_torch(stage, module, program, weights, inputs)
    if not error <= TOLERANCES[job.precision]:
        raise Failed(
            f"the {stage.name} program for JAX differs from torch by {error:.1e} (allowed: "
            f"{TOLERANCES[job.precision]:.0e}): it was not kept. Try --precision fp32, or another --engine."
        )
    return {"error_against_torch": error, "torch": torch.__version__, "torchax": torchax.__version__}


def _exported(stage: Stage, precision: str, weights: Arrays, function: Any, inputs: dict[str, torch.Tensor]) -> Any:
    """The network as (weights, inputs by name) -> outputs by name."""

    def network(weights: Arrays, inputs: Arrays) -> Arrays:
        made = function(weights, tuple(inputs[tensor.name] for tensor in stage.inputs))
        values = made if isinstance(made, tuple) else (made,)
        return {tensor.name: value for tensor, value in zip(stage.outputs, values, strict=True)}

    given = {name: jax.ShapeDtypeStruct(value.shape, value.numpy().dtype) for name, value in inputs.items()}
    # Without a word TPUs multiply float32 in bfloat16, and GPUs in TF32.
    with jax.default_matmul_precision("highest" if precision == "fp32" else "default"):
        return export.export(jax.jit(network), platforms=PLATFORMS)(weights, given)


def _error_against_torch(
    stage: Stage, module: Any, program: Any, weights: Arrays, inputs: dict[str, torch.Tensor]
) -> float:
    """Largest difference from torch in float32, relative to the largest value."""
    with torch.no_grad():
        made = module(*inputs.values())
    expected = made if isinstance(made, tuple) else (made,)
    found = jax.jit(program.call)(weights, {name: value.numpy() for name, value in inputs.items()})
    errors = []
    for tensor, value in zip(stage.outputs, (each.numpy() for each in expected), strict=True):
        errors.append(np.abs(np.asarray(found[tensor.name]) - value).max() / max(np.abs(value).max(), 1e-30))
    return float(np.max(errors))  # NaN if any is
