"""The published architectures, at full size, with random weights: what speed and memory can be measured with.

No hub is asked: the configurations are those that these names' repositories publish, the weights have the spread of
freshly made ones, and the tokenizer is the embedded model's, whose ids are among those that the encoders know.
"""

import importlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

from darkroom.checkpoint.catalog import EMBEDDED, SD, SDXL

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_L |= {"vocab_size": 49408, "projection_dim": 768, "bos_token_id": 49406, "eos_token_id": 49407}
CLIP_H = CLIP_L | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
CLIP_H |= {"projection_dim": 512, "hidden_act": "gelu"}
CLIP_G = CLIP_L | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
CLIP_G |= {"projection_dim": 1280, "hidden_act": "gelu"}
DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
DDIM |= {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"


def _unet(channels: tuple[int, ...], blocks: tuple[str, ...], **more: Any) -> dict[str, Any]:
    return {
        "block_out_channels": channels,
        "down_block_types": tuple(block.format("Down") for block in blocks),
        "up_block_types": tuple(block.format("Up") for block in reversed(blocks)),
        "layers_per_block": 2,
        **more,
    }


SDXL_UNET = {"use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256}
SD_BLOCKS = (CROSS, CROSS, CROSS, PLAIN)
SD_2_UNET = _unet(
    (320, 640, 1280, 1280),
    SD_BLOCKS,
    cross_attention_dim=1024,
    attention_head_dim=(5, 10, 20, 20),
    use_linear_projection=True,
)
SDXL_BASE_UNET = _unet(
    (320, 640, 1280),
    (PLAIN, CROSS, CROSS),
    cross_attention_dim=2048,
    attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10),
    projection_class_embeddings_input_dim=2816,
    sample_size=128,
    **SDXL_UNET,
)
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
VAE |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
MODELS: dict[str, dict[str, Any]] = {
    "sd-1.5": {
        "text_encoder": CLIP_L,
        "unet": _unet((320, 640, 1280, 1280), SD_BLOCKS, cross_attention_dim=768, attention_head_dim=8, sample_size=64),
        "scaling_factor": 0.18215,
    },
    "sd-2.1": {
        "text_encoder": CLIP_H,
        "unet": SD_2_UNET | {"upcast_attention": True, "sample_size": 96},
        "scaling_factor": 0.18215,
        "prediction_type": "v_prediction",
    },
    "sd-turbo": {
        "text_encoder": CLIP_H,
        "unet": SD_2_UNET | {"sample_size": 64},
        "scaling_factor": 0.18215,
        "scheduler": {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"},
    },
    "xl-1.0": {
        "text_encoder": CLIP_L,
        "text_encoder_2": CLIP_G,
        "unet": SDXL_BASE_UNET,
        "scaling_factor": 0.13025,
        "scheduler": {"_class_name": "EulerDiscreteScheduler"},
    },
    "sdxl-turbo": {
        "text_encoder": CLIP_L,
        "text_encoder_2": CLIP_G,
        "unet": SDXL_BASE_UNET | {"sample_size": 64},
        "scaling_factor": 0.13025,
        "scheduler": {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
    },
    "xl-refiner-1.0": {
        "text_encoder_2": CLIP_G,
        "unet": _unet(
            (384, 768, 1536, 1536),
            (PLAIN, CROSS, CROSS, PLAIN),
            cross_attention_dim=1280,
            attention_head_dim=(6, 12, 24, 24),
            transformer_layers_per_block=4,
            projection_class_embeddings_input_dim=2560,
            sample_size=128,
            **SDXL_UNET,
        ),
        "scaling_factor": 0.13025,
    },
}
"""As published on the hub under these names' repositories."""

TINY = {
    "text_encoder": CLIP_L
    | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "unet": _unet((32, 64), (CROSS, PLAIN), cross_attention_dim=32, attention_head_dim=4, sample_size=8)
    | {"layers_per_block": 1, "norm_num_groups": 8},
    "vae": {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4},
    "scaling_factor": 0.18215,
    "scheduler": {"_class_name": "EulerAncestralDiscreteScheduler"},
}
ARCHITECTURES = MODELS | {"tiny": TINY}
"""Those, and one that no one publishes, to try out on any machine what measures them."""


CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
}


def family_of(name: str) -> str:
    """The name of a model's family."""
    return SDXL if "text_encoder_2" in ARCHITECTURES[name] else SD


def pixels_of(name: str) -> int:
    """The pixels that a model makes pictures of, along each side."""
    vae = VAE | ARCHITECTURES[name].get("vae", {})
    return ARCHITECTURES[name]["unet"]["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)


def _network(name: str, part: str) -> Any:
    """A network of a model without its weights."""
    import torch
    from transformers import CLIPTextConfig

    from darkroom.networks.load import silence

    silence()
    library, kind = CLASSES[part]
    described = ARCHITECTURES[name].get(part, {})
    if part == "vae":
        described = VAE | described | {"scaling_factor": ARCHITECTURES[name]["scaling_factor"]}
    with torch.device("meta"):
        made = getattr(importlib.import_module(library), kind)
        return made(CLIPTextConfig(**described)) if library == "transformers" else made(**described)


def write_model(name: str, folder: Path, networks: list[str] | None = None) -> Path:
    """A model of the published architecture with random weights, in float16 files, in the layout of the hub.

    Networks that are not asked for get their configuration and an empty weight file.
    """
    import torch
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts = [part for part in CLASSES if part in {**ARCHITECTURES[name], "vae": VAE}]
    for part in parts:
        if (folder / part / "config.json").exists():
            continue
        network = _network(name, part)
        (folder / part).mkdir(parents=True, exist_ok=True)
        text = (network.config if part.startswith("text") else network).to_json_string()
        generator = torch.Generator(device).manual_seed(0)
        weights = {}
        for key, tensor in network.state_dict().items() if networks is None or part in networks else ():
            weight = torch.empty(tensor.shape, dtype=torch.float16, device=device)
            if weight.dim() > 1:  # the spread of a freshly made one
                weight.normal_(0, 1 / math.sqrt(weight[0].numel()), generator=generator)
            else:
                weight.fill_(float(key.endswith("weight")))
            weights[key] = weight.cpu()
        stem = "model" if part.startswith("text") else "diffusion_pytorch_model"
        save_file(weights, folder / part / f"{stem}.safetensors", {"format": "pt"})
        (folder / part / "config.json").write_text(text)  # last: what stands here is whole
    tokenizers = {part: part.replace("text_encoder", "tokenizer") for part in parts if "text" in part}
    for tokenizer in tokenizers.values():
        shutil.copytree(EMBEDDED / "emoji" / "tokenizer", folder / tokenizer, dirs_exist_ok=True)
    published = ARCHITECTURES[name]
    scheduler = DDIM | {"prediction_type": published.get("prediction_type", "epsilon")} | published.get("scheduler", {})
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = {part: CLASSES[part] for part in parts} | {"scheduler": ("diffusers", scheduler["_class_name"])}
    index |= {tokenizer: ("transformers", "CLIPTokenizer") for tokenizer in tokenizers.values()}
    if "text_encoder_2" in parts:
        index |= {"_class_name": "StableDiffusionXLPipeline", "requires_aesthetics_score": "refiner" in name}
    else:
        index |= {"_class_name": "StableDiffusionPipeline"} | dict.fromkeys(
            ("safety_checker", "feature_extractor"), (None, None)
        )
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
