"""The published architectures, at full size, with random weights: what speed and memory can be measured with.

No hub is asked: the configurations are those that these names' repositories publish, the weights have the spread of
freshly made ones, and the tokenizer is the embedded model's, whose ids are among those that the encoders know.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from darkroom.checkpoint.catalog import EMBEDDED

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_L |= {"vocab_size": 49408, "projection_dim": 768, "bos_token_id": 49406, "eos_token_id": 49407}
CLIP_H = CLIP_L | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
CLIP_H |= {"projection_dim": 512, "hidden_act": "gelu"}
CLIP_G = CLIP_L | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
CLIP_G |= {"projection_dim": 1280, "hidden_act": "gelu"}
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


def networks_of(name: str) -> dict[str, Callable[[], Any]]:
    """What makes each network of a model, with the weights that its libraries give a new one."""
    from darkroom.networks.load import silence

    silence()
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    described = ARCHITECTURES[name]
    vae = VAE | described.get("vae", {})
    made: dict[str, Callable[[], Any]] = {
        "unet": lambda: UNet2DConditionModel(**described["unet"]),
        "vae": lambda: AutoencoderKL(**vae, scaling_factor=described["scaling_factor"]),
    }
    if "text_encoder" in described:
        made["text_encoder"] = lambda: CLIPTextModel(CLIPTextConfig(**described["text_encoder"]))
    if "text_encoder_2" in described:
        made["text_encoder_2"] = lambda: CLIPTextModelWithProjection(CLIPTextConfig(**described["text_encoder_2"]))
    return made


def _fill(key: str, weight: Any, generator: Any) -> None:
    """Gives a weight the spread of a freshly made one."""
    if weight.dim() > 1:
        weight.normal_(0, 1 / math.sqrt(weight[0].numel()), generator=generator)
    else:
        weight.fill_(float(key.endswith("weight")))


def random_network(name: str, part: str, device: Any, dtype: Any) -> Any:
    """A network of a model with random weights, the same each time, made on the device that it is to run on."""
    import torch

    with torch.device(device):
        network = networks_of(name)[part]().eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for key, weight in network.named_parameters():
        _fill(key, weight, generator)
    return network.to(dtype)


def write_model(name: str, folder: Path, networks: list[str] | None = None) -> Path:
    """A model of the published architecture with random weights, in float16 files, in the layout of the hub.

    Networks that are not asked for get their configuration and an empty weight file.
    """
    import torch
    from safetensors.torch import save_file

    made = networks_of(name)
    for part, make in made.items():
        if (folder / part / "config.json").exists():
            continue
        with torch.device("meta"):
            network = make()
        config = network.config
        (folder / part).mkdir(parents=True, exist_ok=True)
        text = config.to_json_string() if part.startswith("text") else network.to_json_string()
        generator = torch.Generator().manual_seed(0)
        weights = {}
        if networks is None or part in networks:
            for key, tensor in network.state_dict().items():
                weights[key] = torch.empty(tensor.shape, dtype=torch.float16)
                _fill(key, weights[key], generator)
        stem = "model" if part.startswith("text") else "diffusion_pytorch_model"
        save_file(weights, folder / part / f"{stem}.safetensors", {"format": "pt"})
        (folder / part / "config.json").write_text(text)  # last: what stands here is whole
    tokenizers = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    for encoder, tokenizer in tokenizers.items():
        if encoder in made:
            shutil.copytree(EMBEDDED / "emoji" / "tokenizer", folder / tokenizer, dirs_exist_ok=True)
    _write_settings(folder, name, made.keys())
    return folder


def _write_settings(folder: Path, name: str, parts: Iterable[str]) -> None:
    """The scheduler's configuration, and which class each part is of."""
    published = ARCHITECTURES[name]
    xl = "text_encoder_2" in published
    (folder / "scheduler").mkdir(exist_ok=True)
    config = {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    config |= {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    config |= {"prediction_type": published.get("prediction_type", "epsilon")} | published.get("scheduler", {})
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    classes = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    }
    index: dict[str, Any] = {"_class_name": f"StableDiffusion{'XL' * xl}Pipeline"}
    index |= {part: classes[part] for part in parts} | {"scheduler": ["diffusers", config["_class_name"]]}
    index |= {
        part.replace("text_encoder", "tokenizer"): ["transformers", "CLIPTokenizer"] for part in parts if "text" in part
    }
    if xl:
        index["requires_aesthetics_score"] = "refiner" in name
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
