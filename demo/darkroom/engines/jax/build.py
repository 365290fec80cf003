"""The heavy half of the JAX engine: a torch module becomes a program in StableHLO, and its weights a file.

It runs in a child, on the CPU: an accelerator may belong to one process alone, and that is its parent.
"""

import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchax
from jax import export
from safetensors.numpy import save_file
from torch import nn
from torch.nn.utils import parametrize

from darkroom.contract import Job, Stage
from darkroom.engines.jax.run import EXPECTED, GIVEN, MADE, PROGRAM, WEIGHTS
from darkroom.engines.runtime import Progress
from darkroom.networks.load import DTYPES, example_inputs, load_module, outputs_of

PLATFORMS = ("cpu", "cuda", "tpu")
"""What a program is lowered for: which of them it is compiled for, its maker cannot see."""

Arrays = dict[str, Any]


def write_program(job: Job, model: Path, devices: int, folder: Path, progress: Progress) -> dict[str, Any]:
    """Writes into `folder` a stage's program for one device's share of the batch, its weights, and what torch makes of
    an image, in float32. `model` is a diffusers folder. Returns facts for the manifest: the versions of what made it.
    """
    jax.config.update("jax_platforms", "cpu")
    warnings.filterwarnings("ignore")  # torchax means no harm when it makes int32 of int64
    stage = job.stage
    progress("asking torch", 0, 3)
    module = load_module(stage, model)
    _save(_expected(stage, module, job.profile.sizes() | {"B": 1}), folder / EXPECTED)
    progress("reading the weights", 1, 3)
    if job.precision == "fp32":
        _bare(module)
    else:
        del module  # before the next is loaded: of the largest networks there is no room for two
        module = load_module(stage, model, DTYPES[job.precision])
    weights, function = torchax.extract_jax(module)
    progress("tracing the network", 2, 3)

    def network(weights: Arrays, inputs: Arrays) -> Arrays:
        if job.precision == "fp32":
            weights = {name: _widened(value) for name, value in weights.items()}
        made = function(weights, tuple(inputs[tensor.name] for tensor in stage.inputs))
        values = made if isinstance(made, tuple) else (made,)
        return {tensor.name: value for tensor, value in zip(stage.outputs, values, strict=True)}

    share = job.profile.batch // devices
    given = {
        tensor.name: jax.ShapeDtypeStruct((share, *job.profile.shape(tensor)[1:]), tensor.dtype)
        for tensor in stage.inputs
    }
    # Without a word TPUs multiply float32 in bfloat16, and GPUs in TF32.
    with jax.default_matmul_precision("highest" if job.precision == "fp32" else "default"):
        program = export.export(jax.jit(network), platforms=PLATFORMS)(weights, given)
    (folder / PROGRAM).write_bytes(program.serialize())
    _save({name: np.asarray(value) for name, value in weights.items()}, folder / WEIGHTS)
    return {"torch": torch.__version__, "torchax": torchax.__version__}


def _expected(stage: Stage, module: nn.Module, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """Inputs that keep to the contract, and what torch makes of them in float32."""
    inputs = example_inputs(stage, sizes, seed=1)
    known = {GIVEN + name: value.numpy() for name, value in inputs.items()}
    return known | {MADE + name: value for name, value in outputs_of(module, stage, inputs).items()}


def _bare(module: nn.Module) -> None:
    """Takes from half weights what widens them: torchax would take a widened one for a second weight."""
    for each in module.modules():
        if parametrize.is_parametrized(each):
            for name in list(each.parametrizations):
                parametrize.remove_parametrizations(each, name, leave_parametrized=False)


def _widened(weight: jax.Array) -> jax.Array:
    return weight.astype(jnp.float32) if weight.dtype == jnp.float16 else weight


def _save(arrays: dict[str, np.ndarray], path: Path) -> None:
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
    path.chmod(0o644)  # as all artefacts: a store may have other readers than its owner
