"""The torch side of each stage: diffusers' networks wrapped to the contract of `stages`.

These modules are what graphs are exported from, what every runtime is checked against, and what the torch runtime
runs.
"""

import logging
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.utils.parametrize
from torch import Tensor, nn

from darkroom.checkpoint.folder import NETWORKS
from darkroom.contract import Stage
from darkroom.errors import InvalidRequest
from darkroom.networks.sharing import share_until_text

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

WORTH_HALVING = 100_000
"""Numbers in a weight from which on it is kept in float16, where a network's are."""

BYTE_TOKENS = 256
"""Every byte-level vocabulary begins with one token a byte: ids below this exist in all of them."""


class Clip(nn.Module):
    """(B, 77) token ids -> (B, 77, D) hidden states, `clip_skip` layers before the last, normalised."""

    def __init__(self, encoder: nn.Module, clip_skip: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.clip_skip = clip_skip

    def forward(self, input_ids: Tensor) -> Tensor:
        if not self.clip_skip:
            return self.encoder(input_ids=input_ids.long()).last_hidden_state.float()
        states = self.encoder(input_ids=input_ids.long(), output_hidden_states=True).hidden_states
        inner = getattr(self.encoder, "text_model", self.encoder)
        return inner.final_layer_norm(states[-(self.clip_skip + 1)]).float()


class PenultimateClip(Clip):
    """(B, 77) token ids -> (B, 77, D) hidden states of the layer before the last, as they are.

    `clip_skip` leaves out more layers. An encoder with a projection also gives its pooled output (B, P).
    """

    def forward(self, input_ids: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        output = self.encoder(input_ids=input_ids.long(), output_hidden_states=True)
        hidden = output.hidden_states[-(self.clip_skip + 2)].float()
        return (hidden, output.text_embeds.float()) if hasattr(output, "text_embeds") else hidden


class Unet(nn.Module):
    """One network call without guidance: the output for each image at its own timestep."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.dtype = unet.conv_in.bias.dtype  # of what is computed; large weights may be kept in another

    def forward(self, latents: Tensor, timestep: Tensor, *conditions: Tensor) -> Tensor:
        """`conditions`: text_embeddings (B, 77, D); for SDXL also pooled_embeddings (B, P), time_ids (B, 6 or 5)."""
        return self.call(latents, timestep, *conditions)

    # Not in `forward`: the exporter hands over the defaults of its parameters as if they were given.
    def call(
        self,
        latents: Tensor,
        timestep: Tensor,
        text_embeddings: Tensor,
        *added: Tensor,
        time_condition: Tensor | None = None,
    ) -> Tensor:
        dtype = self.dtype
        conditions = dict(zip(("text_embeds", "time_ids"), (each.to(dtype) for each in added), strict=False))
        output = self.unet(
            latents.to(dtype),
            timestep,
            encoder_hidden_states=text_embeddings.to(dtype),
            timestep_cond=None if time_condition is None else time_condition.to(dtype),
            added_cond_kwargs=conditions or None,
        )
        return output.sample.float()


class GuidanceEmbeddingUnet(Unet):
    """One network call of a UNet that was distilled to follow a guidance scale it is told (Meng et al. 2022).

    The scale is embedded as diffusers embeds it: sines and cosines of 1000 times what it is above 1.
    """

    def forward(self, latents: Tensor, timestep: Tensor, *conditions: Tensor) -> Tensor:
        """`conditions`: what `Unet` takes, then the guidance scales (B,)."""
        *conditions, guidance_scale = conditions
        half = self.unet.config.time_cond_proj_dim // 2
        index = torch.arange(half, device=guidance_scale.device)
        frequencies = torch.exp(index * (-math.log(10000) / (half - 1)))
        angles = 1000 * (guidance_scale - 1)[:, None] * frequencies
        embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
        return self.call(latents, timestep, *conditions, time_condition=embedding)


class GuidedUnet(Unet):
    """Classifier-free guidance (Ho and Salimans 2022) inside the graph, with a scale for each image.

    A scale of 1 or less means no guidance, as in diffusers: it enters as 1.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__(unet)
        self.shares = share_until_text(unet)

    def forward(self, latents: Tensor, timestep: Tensor, *conditions: Tensor) -> Tensor:
        """`conditions`: what `Unet` takes, then the same for the negative prompt, then the guidance scales (B,)."""
        *both, guidance_scale = conditions
        positive, negative = both[: len(both) // 2], both[len(both) // 2 :]
        if not self.shares:
            latents, timestep = torch.cat([latents, latents]), torch.cat([timestep, timestep])
        output = self.call(latents, timestep, *map(torch.cat, zip(negative, positive, strict=True)))
        unconditional, conditional = output.chunk(2)
        return unconditional + guidance_scale.clamp(min=1).reshape(-1, 1, 1, 1) * (conditional - unconditional)


class VaeDecoder(nn.Module):
    """Latents as the UNet has them -> (B, 3, H, W) images in [-1, 1]."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample.float()


class VaeEncoder(nn.Module):
    """(B, 3, H, W) images -> (B, 8, h, w): mean and log-variance of the posterior, unscaled."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor) -> Tensor:
        return self.vae.encode(images.to(self.vae.dtype)).latent_dist.parameters.float()


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
    network = _load_network(stage.network, folder, torch.float16 if halve else dtype)
    if stage.loras:
        from darkroom.networks.lora import fuse

        for lora in stage.loras:
            fuse(network, stage.network, lora, folder)
    network.eval().requires_grad_(False)
    if halve:
        widen_when_used(network)
    return wrapped(stage, network)


def wrapped(stage: Stage, network: nn.Module) -> nn.Module:
    """The stage's module over a network that is there."""
    match stage.name:
        case "clip" | "clip_2":
            wrapper = PenultimateClip if stage.options.get("penultimate") else Clip
            return wrapper(network, int(stage.options["clip_skip"])).eval()
        case "unet":
            if network.config.time_cond_proj_dim is not None:
                return GuidanceEmbeddingUnet(network).eval()
            return (GuidedUnet if stage.options["guided"] else Unet)(network).eval()
        case "vae":
            return VaeDecoder(network).eval()
        case "vae_encoder":
            return VaeEncoder(network).eval()
    raise ValueError(f"no module for the stage {stage.name}")


def example_inputs(stage: Stage, sizes: dict[str, int], seed: int = 0) -> dict[str, Tensor]:
    """Random inputs that keep to the contract, on the given sizes: what graphs are traced and checked with."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for tensor in stage.inputs:
        shape = [sizes[size] if isinstance(size, str) else size for size in tensor.shape]
        if tensor.dtype == "int32":
            value = torch.randint(0, BYTE_TOKENS, shape, generator=generator, dtype=torch.int32)
        elif tensor.name == "timestep":
            value = torch.rand(shape, generator=generator) * 999
        elif tensor.name.endswith("time_ids"):
            value = torch.randint(0, 1024, shape, generator=generator).float()
        elif tensor.name == "guidance_scale":
            value = 1 + 7 * torch.rand(shape, generator=generator)
        else:
            value = torch.randn(shape, generator=generator)
        inputs[tensor.name] = value
    return inputs


def _load_network(network: str, folder: Path, dtype: torch.dtype) -> Any:
    silence()
    stem = NETWORKS[network]
    plain = [f"{stem}.safetensors", f"{stem}.safetensors.index.json"]
    variant = None if any((folder / network / name).exists() for name in plain) else "fp16"
    options: dict[str, Any] = {
        "subfolder": network,
        "use_safetensors": True,
        "local_files_only": True,
        "variant": variant,
        "output_loading_info": True,
    }
    cls: Any
    if stem == "model":
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        cls = CLIPTextModelWithProjection if network == "text_encoder_2" else CLIPTextModel
        # Eager attention: the fused kernel leaks a float32 mask into half-precision graphs, and traces larger.
        options |= {"dtype": dtype, "attn_implementation": "eager"}
    else:
        from diffusers import AutoencoderKL, UNet2DConditionModel

        cls = UNet2DConditionModel if network == "unet" else AutoencoderKL
        options |= {"torch_dtype": dtype}
    try:
        module, found = cls.from_pretrained(folder, **options)
    # The libraries' ways of saying that weights do not fit, or that a configuration makes no network.
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InvalidRequest(f"the weights in {folder / network} do not fit its config.json: {reason}") from None
    if missing := sorted(found["missing_keys"]):  # else they would be random numbers
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InvalidRequest(
            f"the weights in {folder / network} lack {missing[0]}{more}, which its config.json implies."
        )
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
