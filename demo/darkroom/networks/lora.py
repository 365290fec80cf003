"""LoRA weights fused into a network, through diffusers and PEFT: W + strength * alpha / rank * up @ down."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.lora_base import fuse_text_encoder_lora
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from darkroom.checkpoint.folder import in_lower_case
from darkroom.contract import Lora
from darkroom.errors import InvalidRequest, gist


def fuse(network: nn.Module, part: str, lora: Lora, folder: Path) -> None:
    """Changes `network`, which is `part` of the model in `folder`, by what the LoRA holds for it.

    Raises `InvalidRequest` where the LoRA was made for another model.
    """
    if not lora.strength:
        return
    with _refusing(part, lora):
        changed = _load(network, part, lora, folder)
    layers = sum(isinstance(module, BaseTunerLayer) for module in network.modules())
    if not changed or layers != changed:
        raise InvalidRequest(
            f"the LoRA {lora.path} does not fit this model's {part}: of the {changed} layers that it changes, "
            f"{layers} are there."
        )
    with _refusing(part, lora):  # as where it adds biases to layers that have none
        fuse_text_encoder_lora(network, lora_scale=lora.strength)  # nothing in it is about text
    recurse_remove_peft_layers(network)
    del network.peft_config  # or the next one would be added to it
    network._hf_peft_config_loaded = False


@contextmanager
def _refusing(part: str, lora: Lora) -> Iterator[None]:
    """Turns the ways in which three libraries say that a file and a network do not fit into `InvalidRequest`."""
    try:
        yield
    except Exception as error:
        raise InvalidRequest(f"the LoRA {lora.path} does not fit this model's {part}: {gist(error)}.") from None


def _load(network: nn.Module, part: str, lora: Lora, folder: Path) -> int:
    """Puts PEFT's layers over those of the network that the LoRA changes; returns how many it says it changes."""
    unet = UNet2DConditionModel.load_config(folder / "unet")
    xl = unet.get("addition_embed_type") == "text_time"
    pipeline = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
    blocks = {"unet_config": SimpleNamespace(**unet)} if xl else {}  # kohya numbers SDXL's blocks in its own way
    kohya = _without_alphas(load_file(lora.path))
    with in_lower_case(lora.path) as file:
        state, _, metadata = pipeline.lora_state_dict(kohya or str(file), return_lora_metadata=True, **blocks)
    state = {name: value for name, value in state.items() if name.startswith(f"{part}.")}
    if not state:
        return 0
    more: dict[str, Any] = {"network_alphas": None, "metadata": metadata, "adapter_name": "lora"}
    if part == "unet":
        pipeline.load_lora_into_unet(state, unet=network, **more)
    else:
        pipeline.load_lora_into_text_encoder(state, text_encoder=network, prefix=part, **more)
    return sum(name.endswith(("up.weight", "lora_B.weight")) for name in state)


def _without_alphas(tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Tensors in kohya's layout with each layer's alpha / rank taken into its weights; None for another layout.

    diffusers 0.42 takes the commonest alpha of a file for all of its layers. What is multiplied becomes float32, in
    which the network is: a file's 16 bits would round the products, and cannot hold the smallest.
    """
    if not all(name.startswith("lora_") for name in tensors):
        return None
    made = {name: value for name, value in tensors.items() if not name.endswith(".alpha")}
    for name, value in tensors.items():
        if name.endswith(".alpha"):
            layer = name.removesuffix(".alpha")
            rank = tensors[f"{layer}.lora_down.weight"].shape[0]
            made[f"{layer}.lora_up.weight"] = made[f"{layer}.lora_up.weight"].float() * (value.item() / rank)
    return made
