"""LoRA weights fused into a network: W + strength * alpha / rank * up @ down, through diffusers and PEFT."""

from pathlib import Path
from types import SimpleNamespace

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.lora_base import fuse_text_encoder_lora
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from darkroom.errors import AskedWrongly
from darkroom.lora import Lora


def fuse(network: nn.Module, part: str, lora: Lora, folder: Path) -> None:
    """Changes `network`, which is `part` of the model in `folder`, by what the LoRA holds for it.

    Raises `AskedWrongly` where the LoRA was made for another model.
    """
    unet = UNet2DConditionModel.load_config(folder / "unet")
    xl = unet.get("addition_embed_type") == "text_time"
    pipeline = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
    blocks = {"unet_config": SimpleNamespace(**unet)} if xl else {}  # kohya numbers SDXL's blocks in its own way
    try:
        state, alphas, metadata = pipeline.lora_state_dict(str(lora.path), return_lora_metadata=True, **blocks)
        state = {name: value for name, value in state.items() if name.startswith(f"{part}.")}
        if not state or not lora.strength:
            return
        more = {"network_alphas": alphas, "metadata": metadata, "adapter_name": "lora"}
        if part == "unet":
            pipeline.load_lora_into_unet(state, unet=network, **more)
        else:
            pipeline.load_lora_into_text_encoder(state, text_encoder=network, prefix=part, **more)
    except (ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".:")
        raise AskedWrongly(f"the LoRA {lora.path} does not fit this model's {part}: {reason}.") from None
    layers = sum(isinstance(module, BaseTunerLayer) for module in network.modules())
    changed = sum(name.endswith(("up.weight", "lora_B.weight")) for name in state)
    if layers != changed:
        raise AskedWrongly(
            f"the LoRA {lora.path} does not fit this model's {part}: of the {changed} layers that it changes, "
            f"{layers} are there."
        )
    fuse_text_encoder_lora(network, lora_scale=lora.strength)  # nothing in it is about text
    recurse_remove_peft_layers(network)
    del network.peft_config  # or the next one would be added to it
    network._hf_peft_config_loaded = False
