"""The torch side of each stage: networks of diffusers and transformers, wrapped to the stage's contract.

These modules are what graphs are exported from, what every runtime is checked against, and what the torch runtime
runs.
"""

import importlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.utils.parametrize
from torch import Tensor, nn

from darkroom.contract import Network, Stage
from darkroom.errors import InvalidRequest
from darkroom.networks.examples import example_arrays

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

WORTH_HALVING = 100_000
"""Numbers in a weight from which on it is kept in float16, where a network's are."""


class _Widen(nn.Module):
    """float16 -> float32, each time a weight is used."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.float()


def widen_when_used(network: nn.Module) -> None:
    """Lets a float16 network compute in float32, without ever holding all of its weights so.

    Small ones become float32 for good. In an exported graph the others are float16 with a cast behind them.
    """
    for module in list(network.modules()):
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.numel() < WORTH_HALVING:
                weight.data = weight.data.float()
            else:
                nn.utils.parametrize.register_parametrization(module, name, _Widen(), unsafe=True)


def load_module(stage: Stage, folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The stage's module with the weights in a diffusers folder, ready to be called without gradients."""
    halve = stage.half_weights and dtype == torch.float32
    loaded = {}
    for network in stage.networks:
        loaded[network.part] = module = _load_network(network, folder, torch.float16 if halve else dtype)
        for lora in stage.loras:
            if network.part in lora.networks:
                from darkroom.networks.lora import fuse

                fuse(module, network.part, lora)
        for inversion in stage.inversions:
            from darkroom.networks.inversion import learn

            learn(module, network.part, inversion)
        module.eval().requires_grad_(False)
        if halve:
            widen_when_used(module)
    return wrapped(stage, *loaded.values())


def wrapped(stage: Stage, *networks: nn.Module) -> nn.Module:
    """The stage's module over networks that are there."""
    return named(stage.module)(stage, *networks).eval()


def named(path: str) -> Any:
    """What "package.module:name" means."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def example_inputs(stage: Stage, sizes: dict[str, int], seed: int = 0) -> dict[str, Tensor]:
    """`example_arrays` as torch has them."""
    return {name: torch.from_numpy(value) for name, value in example_arrays(stage, sizes, seed).items()}


def outputs_of(module: nn.Module, stage: Stage, inputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """What torch makes of inputs, in the contract's order."""
    with torch.no_grad():
        made = module(*inputs.values())
    outputs = made if isinstance(made, tuple) else (made,)
    return {tensor.name: value.numpy() for tensor, value in zip(stage.outputs, outputs, strict=True)}


def _load_network(network: Network, folder: Path, dtype: torch.dtype) -> Any:
    silence()
    from transformers import PreTrainedModel

    cls = named(network.cls)
    part = folder / network.part
    of_transformers = issubclass(cls, PreTrainedModel)
    stem = "model" if of_transformers else "diffusion_pytorch_model"
    plain = [f"{stem}.safetensors", f"{stem}.safetensors.index.json"]
    variant = None if any((part / name).exists() for name in plain) else "fp16"
    options: dict[str, Any] = {
        "subfolder": network.part,
        "use_safetensors": True,
        "local_files_only": True,
        "variant": variant,
        "output_loading_info": True,
    }
    if of_transformers:
        # Eager attention: the fused kernel leaks a float32 mask into half-precision graphs, and traces larger.
        options |= {"dtype": dtype, "attn_implementation": "eager"}
    else:
        options |= {"torch_dtype": dtype}
    try:
        module, found = cls.from_pretrained(folder, **options)
    # The libraries' ways of saying that weights do not fit, or that a configuration makes no network.
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InvalidRequest(f"the weights in {part} do not fit its config.json: {reason}") from None
    if missing := sorted(found["missing_keys"]):  # else they would be random numbers
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InvalidRequest(f"the weights in {part} lack {missing[0]}{more}, which its config.json implies.")
    return module


def silence() -> None:
    """The libraries' notices and progress bars are about them, not about what the user is doing."""
    for library in ("torchao", "torch.utils._pytree"):  # of kernels that it does not find, while diffusers imports it
        logging.getLogger(library).setLevel(logging.ERROR)
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
