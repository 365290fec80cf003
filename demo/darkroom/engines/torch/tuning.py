"""What is done to torch modules so that they run faster, and to the same result within rounding.

Projections that read the same input become one product; with `--quantization`, which costs quality, those of the
transformer blocks are computed in 8 bits, through torchao.
"""

import importlib.util
from typing import Any

import torch
from torch import nn

from darkroom.contract import Job
from darkroom.errors import InvalidRequest, check_known

QUANTIZATIONS = ("int8", "fp8")
"""What `--quantization` takes: weights and activations in 8 bits, scaled as the activations come."""

FP8_FROM = (8, 9)
"""The compute capability from which on GPUs multiply in fp8: Ada and Hopper."""

ALIGNED = 16
"""Products in 8 bits take sizes that are multiples."""


ROWS_OF_INT8 = 17
"""The least that CUDA's product of int8 matrices takes (`torch._int_mm`)."""


def least_rows(job: Job, levels: int) -> int | None:
    """Rows of the smallest products in a denoiser's transformer blocks, at its lowest of so many levels; None where
    sizes are free."""
    profile = job.profile
    if profile.height is None or profile.width is None:
        return None
    pixels = profile.vae_factor * 2 ** (levels - 1)
    calls = 2 if job.stage.options.get("guided") else 1
    return calls * (profile.batch or 1) * -(-profile.height // pixels) * -(-profile.width // pixels)


def fuse_projections(module: nn.Module) -> None:
    """Makes one product of query, key and value, and of key and value where the query reads something else.

    A network whose weights are widened as they are used stays as it is: fused, all of them would be wide for good.
    """
    if any(nn.utils.parametrize.is_parametrized(layer) for layer in module.modules()):
        return
    for network in list(module.modules()):
        if getattr(network, "fuse_qkv_projections", None):
            network.fuse_qkv_projections()
    for attention in module.modules():
        if getattr(attention, "fused_projections", False):
            # diffusers keeps what it has fused, for the way back.
            for name in ("to_q", "to_k", "to_v") if hasattr(attention, "to_qkv") else ("to_k", "to_v"):
                delattr(attention, name)


def check_quantization(kind: str, device: torch.device) -> None:
    """Raises `InvalidRequest` for a quantization that is not known, or that cannot be had here."""
    check_known("--quantization", kind, QUANTIZATIONS)
    if importlib.util.find_spec("torchao") is None:
        raise InvalidRequest(f"--quantization {kind} needs the package torchao: pip install torchao==0.18.0")
    if kind != "fp8":
        return
    if device.type != "cuda":
        raise InvalidRequest(
            "--quantization fp8 needs an NVIDIA GPU of compute capability 8.9 or later; int8 does not."
        )
    if torch.cuda.get_device_capability(device) < FP8_FROM:
        own = "{}.{}".format(*torch.cuda.get_device_capability(device))
        raise InvalidRequest(f"--quantization fp8 needs compute capability 8.9 or later, and this GPU has {own}; int8.")


def quantize(denoiser: nn.Module, kind: str) -> None:
    """Quantizes the linear layers of the transformer blocks, each row with a scale of its own.

    Others, as those that norms are shifted and scaled by, have the rows of a batch alone, for which products in 8 bits
    have no kernels, and embed the time, which all of the picture depends on.
    """
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    def is_meant(layer: Any, name: str) -> bool:
        return (
            isinstance(layer, nn.Linear)
            and "transformer_blocks." in name
            and ".norm" not in name
            and layer.in_features % ALIGNED == layer.out_features % ALIGNED == 0
        )

    for name, layer in denoiser.named_modules():
        if is_meant(layer, name) and nn.utils.parametrize.is_parametrized(layer, "weight"):
            wide = layer.weight.detach()  # once, and then in 8 bits
            nn.utils.parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
            layer.weight = nn.Parameter(wide, requires_grad=False)
    # What torchao would set in inductor holds for the whole process; the engine says itself how it is compiled.
    if kind == "int8":
        config: Any = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    else:
        config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    quantize_(denoiser, config, filter_fn=is_meant)
