"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022), and what was distilled from them.

All stages speak of the user's batch: classifier-free guidance happens inside the UNet's graph, with a timestep and a
guidance scale for each image, so the doubled batch is the graph's alone.
"""

import re
from typing import Any, ClassVar

from darkroom.contract import (
    CONTROL_FROM,
    CONTROL_SCALES,
    CONTROL_UNTIL,
    CONTROLS,
    DENOISER,
    MASK,
    MASKED,
    Stage,
    Tensor,
)
from darkroom.families.family import TINY_VAE, Family, Model, Part, Traits, denoiser_inputs

CLIP_DEFAULTS = {
    "max_position_embeddings": 77,
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "projection_dim": 512,
    "num_attention_heads": 8,
    "vocab_size": 49408,
}
UNET = Part(
    "diffusers:UNet2DConditionModel",
    {"block_out_channels": [320, 640, 1280, 1280], "in_channels": 4, "sample_size": None},
    lora=("unet.", "lora_unet_", "lycoris_", "diffusion_model."),
    original=(("model.diffusion_model.", "compvis"),),
)
VAE = Part(
    "diffusers:AutoencoderKL",
    {"block_out_channels": [64], "latent_channels": 4, "scaling_factor": 0.18215},
    original=(("first_stage_model.", "vae"),),
)

CONTROLNETS = {
    name: Part(
        "diffusers:ControlNetModel",
        UNET.defaults | {"conditioning_embedding_out_channels": [16, 32, 96, 256]},
    )
    for name in ("controlnet", "controlnet_2", "controlnet_3")
}
"""The parts of a model's folder that hold ControlNets (Zhang et al. 2023), as many as it has."""

ALIKE = ("block_out_channels", "cross_attention_dim", "addition_embed_type", "layers_per_block", "in_channels")
"""Settings that a ControlNet shares with the UNet that it is for."""

ONLY = {"controlnet_conditioning_channel_order": "rgb", "global_pool_conditions": False, "conditioning_channels": 3}
"""Settings of ControlNets of which one value is supported."""

UNSUPPORTED = {"vae": ("latents_mean", "latents_std"), "unet": ("class_embed_type", "encoder_hid_dim_type")}
"""Settings of other families' networks: without them pictures would come out wrong, without a word."""


class UnetFamily(Family):
    """What Stable Diffusion and SDXL share: a UNet on four-channel latents, and a VAE."""

    denoiser = "unet"
    controlnets = tuple(CONTROLNETS)
    added_conditions: str | None = None
    """The kind of conditions that the UNet takes beside text: its `addition_embed_type`."""

    def parts_of(self, index: dict[str, Any]) -> dict[str, Part]:
        return {name: part for name, part in self.parts.items() if name not in CONTROLNETS or index.get(name)}

    def controlnets_of(self, model: Model) -> list[str]:
        """The parts that hold a model's ControlNets."""
        return [name for name in self.parts_of(model.index) if name in CONTROLNETS]

    def check(self, model: Model) -> None:
        unet, vae = model.config("unet"), model.config("vae")
        for part in self.controlnets_of(model):
            self._check_controlnet(model, part)
        if len(contexts := {self.context(model, part) for part in self.texts(model)}) > 1:
            raise ValueError(f"its text encoders read {' and '.join(map(str, sorted(contexts)))} tokens")
        latents = vae["latent_channels"]
        if (channels := unet["in_channels"]) not in (latents, _with_mask(latents)):
            raise ValueError(f"its UNet takes {channels} channels, not the VAE's {latents}, nor a mask beside them")
        if (kind := vae.get("_class_name", "AutoencoderKL")) not in ("AutoencoderKL", TINY_VAE):
            raise ValueError(f"its VAE is a {kind}, which Darkroom does not support")
        if (added := unet.get("addition_embed_type")) != self.added_conditions:
            raise ValueError(f"its UNet takes the added conditions {added!r}, which {self.title} does not support")
        for part, names in UNSUPPORTED.items():
            for name in names:
                if model.config(part).get(name) is not None:
                    raise ValueError(f"its {part} has {name} in its configuration, which Darkroom does not support")

    def _check_controlnet(self, model: Model, part: str) -> None:
        unet, own = model.config("unet"), model.config(part)
        for name in ALIKE:
            wanted = model.config("vae")["latent_channels"] if name == "in_channels" else unet.get(name)
            if own.get(name) != wanted:
                raise ValueError(
                    f"its {part} is for another kind of model: its {name} is {own.get(name)}, not {wanted}"
                )
        for name, value in ONLY.items():
            if own.get(name, value) != value:
                raise ValueError(f"its {part} has {name}={own[name]}, which Darkroom does not support")
        factor = 2 ** (len(own["conditioning_embedding_out_channels"]) - 1)
        if factor != self.vae_factor(model):
            raise ValueError(f"its {part} takes maps {factor} times as large as its latents, not as pictures are")

    def free_multiple(self, model: Model) -> int:
        """Latents must halve at every level of the UNet."""
        return self.vae_factor(model) * 2 ** (len(model.config("unet")["block_out_channels"]) - 1)

    def default_sizes(self, model: Model) -> tuple[int, int]:
        """Before its version 0.9 diffusers wrote less than the UNet was trained for; its pipeline puts that right."""
        unet = model.config("unet")
        size = unet["sample_size"] or 64
        if isinstance(size, int) and self.corrects(model) and _before_0_9(unet):
            size = max(size, 64)
        height, width = (size, size) if isinstance(size, int) else size
        factor = self.vae_factor(model)
        return height * factor, width * factor

    def layers_to_skip(self, model: Model) -> int:
        return min(model.config(part)["num_hidden_layers"] for part in self.texts(model))

    def traits(self, model: Model) -> Traits:
        return Traits(
            family=self.name,
            texts=tuple(self.text_stages[part] for part in self.texts(model)),
            latent_channels=model.config("vae")["latent_channels"],
            vae_factor=self.vae_factor(model),
            embeds_guidance=model.config("unet").get("time_cond_proj_dim") is not None,
            controls=len(self.controlnets_of(model)),
            inpaints=model.config("unet")["in_channels"] == _with_mask(model.config("vae")["latent_channels"]),
        )

    def unet_stage(self, model: Model, guided: bool, conditions: tuple[Tensor, ...]) -> dict[str, Stage]:
        """The UNet's contract, with what the text encoders and the family condition it on. Embeddings of tokens may be
        those of several chunks."""
        conditions = tuple(
            Tensor(each.name, (each.shape[0], "T", each.shape[2])) if len(each.shape) == 3 else each
            for each in conditions
        )
        latents = Tensor("latents", ("B", model.config("vae")["latent_channels"], "h", "w"))
        traits = self.traits(model)
        given = (Tensor(MASK, ("B", 1, "h", "w")), Tensor(MASKED, latents.shape)) if traits.inpaints else ()
        controlnets = self.controlnets_of(model)
        if controlnets:
            given += tuple(Tensor(name, ("B", 3, "H", "W")) for name in CONTROLS[: len(controlnets)])
            own = ("B", len(controlnets))
            given += tuple(Tensor(name, own) for name in (CONTROL_SCALES, CONTROL_FROM, CONTROL_UNTIL))
        inputs, steady = denoiser_inputs(latents, conditions, guided, traits.embeds_guidance, given)
        output, options = Tensor("output", latents.shape), {"guided": guided}
        networks = tuple(self.network(part) for part in ("unet", *controlnets))
        module = "darkroom.networks.unet:denoiser"
        return {"unet": Stage("unet", inputs, (output,), networks, module, DENOISER, options, steady)}


class StableDiffusion(UnetFamily):
    name = "sd"
    title = "Stable Diffusion 1.x or 2.x"
    pipelines = (
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "LatentConsistencyModelPipeline",
        "LatentConsistencyModelImg2ImgPipeline",
    )
    parts: ClassVar = {
        "text_encoder": Part(
            "transformers:CLIPTextModel",
            CLIP_DEFAULTS,
            "model",
            "tokenizer",
            ("text_encoder.", "lora_te_", "lora_te1_", "clip_l.transformer."),
            (("cond_stage_model.transformer.", "clip"), ("cond_stage_model.model.", "open_clip")),
            inversion="clip_l",
        ),
        "unet": UNET,
        "vae": VAE,
    } | CONTROLNETS
    text_stages: ClassVar = {"text_encoder": "clip"}

    def check(self, model: Model) -> None:
        super().check(model)
        if model.config("text_encoder").get("use_attention_mask"):
            raise ValueError("its text_encoder has use_attention_mask, which Darkroom does not support")

    def corrects(self, model: Model) -> bool:
        """As diffusers 0.42 does in these pipelines alone."""
        return model.index["_class_name"] in self.pipelines[:3]

    def spreads_steps(self, model: Model) -> bool:
        """As in diffusers' pipelines for latent consistency models."""
        return str(model.index.get("_class_name")).startswith("LatentConsistencyModel")

    def stages(self, model: Model, guided: bool, clip_skip: int) -> dict[str, Stage]:
        """
        clip:         input_ids (B, 77) int32 -> text_embeddings (B, 77, D)
        unet:         latents (B, 4, h, w), timestep (B,), text_embeddings (B, T, D) -> output (B, 4, h, w);
                      guided, also negative_text_embeddings (B, T, D) and guidance_scale (B,);
                      where guidance is embedded, guidance_scale (B,) alone;
                      of an inpainting model, also mask (B, 1, h, w) and masked_latents (B, 4, h, w); with K
                      ControlNets, also control (B, 3, H, W), control_2 and so on, and (B, K) each control_scales,
                      control_from and control_until
        vae:          latents (B, 4, h, w), scaled as the UNet has them -> images (B, 3, H, W) in [-1, 1]
        vae_encoder:  images (B, 3, H, W) in [-1, 1] -> mean, deviation (B, 4, h, w), scaled as the UNet has them
        """
        width = model.config("text_encoder")["hidden_size"]
        embeddings = (Tensor("text_embeddings", ("B", self.context(model, "text_encoder"), width)),)
        text = self.text_stage(model, "text_encoder", embeddings, {"clip_skip": clip_skip}, guided)
        return text | self.unet_stage(model, guided, embeddings) | self.vae_stages(model)


def _with_mask(channels: int) -> int:
    """The channels of latents, a mask, and the latents of what it leaves of a picture."""
    return 2 * channels + 1


def _before_0_9(config: dict[str, Any]) -> bool:
    """Whether diffusers wrote a configuration before its version 0.9."""
    numbers = re.match(r"(\d+)(?:\.(\d+))?", str(config.get("_diffusers_version", "")))
    return numbers is not None and (int(numbers[1]), int(numbers[2] or 0)) < (0, 9)
