"""SDXL (Podell et al. 2023): two text encoders, and a UNet that is given sizes and the prompt's gist."""

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from darkroom.contract import Stage, Tensor
from darkroom.families.family import Model, Part, Traits
from darkroom.families.stable_diffusion import CLIP_DEFAULTS, CONTROLNETS, UNET, VAE, StableDiffusion, UnetFamily
from darkroom.request import Request

SIZES, SIZES_AND_SCORE = 6, 5
"""Original height and width, top and left of the crop; then target height and width, or an aesthetic score."""

AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5
"""What diffusers tells SDXL's refiner that the picture is rated, and what guidance leads away from."""

SCORED = "wants_aesthetic_score"
"""SDXL's refiner was trained on ratings of its pictures, and is given one."""


class StableDiffusionXl(UnetFamily):
    """The refiner has the second text encoder alone."""

    name = "sdxl"
    title = "SDXL"
    pipelines = (
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
    )
    switches = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")
    parts: ClassVar = {
        "text_encoder": replace(
            StableDiffusion.parts["text_encoder"], original=(("conditioner.embedders.0.transformer.", "clip"),)
        ),
        "text_encoder_2": Part(
            "transformers:CLIPTextModelWithProjection",
            CLIP_DEFAULTS,
            "model",
            "tokenizer_2",
            ("text_encoder_2.", "lora_te2_", "clip_g.transformer."),
            (("conditioner.embedders.1.model.", "open_clip"), ("conditioner.embedders.0.model.", "open_clip")),
            inversion="clip_g",
        ),
        "unet": UNET,
        "vae": VAE,
    } | CONTROLNETS
    text_stages: ClassVar = {"text_encoder": "clip", "text_encoder_2": "clip_2"}
    added_conditions = "text_time"

    def parts_of(self, index: dict[str, Any]) -> dict[str, Part]:
        first = (index.get("text_encoder") or [None])[0]
        return {name: part for name, part in super().parts_of(index).items() if first or name != "text_encoder"}

    def layers_to_skip(self, model: Model) -> int:
        """The last layer is left out as it is."""
        return super().layers_to_skip(model) - 1

    def precision(self, model: Model, stage: Stage, asked: str) -> str:
        """The VAE overflows in float16, unless its configuration says otherwise."""
        overflows = stage.networks[0].part == "vae" and model.config("vae").get("force_upcast", True)
        return "fp32" if overflows and asked == "fp16" else asked

    def traits(self, model: Model) -> Traits:
        traits = super().traits(model)
        return Traits(
            **vars(traits)
            | {
                "zeros_for_empty_prompt": bool(model.index.get("force_zeros_for_empty_prompt", True)),
                "facts": {SCORED: bool(model.index.get("requires_aesthetics_score"))},
            }
        )

    def conditions(self, traits: Traits, request: Request, negative: bool = False) -> dict[str, np.ndarray]:
        """Sizes: of the picture that it is to look like a part of, the part's place, and the part's own; or a score."""
        size = (request.height, request.width)
        score = (NEGATIVE_AESTHETIC_SCORE if negative else AESTHETIC_SCORE,)
        last = score if traits.facts[SCORED] else size
        sizes = {"time_ids": np.array([*size, 0, 0, *last], np.float32)}
        return super().conditions(traits, request, negative) | sizes

    def stages(self, model: Model, guided: bool, clip_skip: int) -> dict[str, Stage]:
        """
        clip:    input_ids (B, 77) int32 -> text_embeddings (B, 77, D1), of the layer before the last
        clip_2:  input_ids (B, 77) int32 -> text_embeddings_2 (B, 77, D2), pooled_embeddings (B, P)
        unet:    as for Stable Diffusion, on text_embeddings (B, T, D1), text_embeddings_2 (B, T, D2),
                 pooled_embeddings (B, P) and time_ids (B, 6), or (B, 5) for the refiner; guided, also on all of them
                 with the prefix negative_
        """
        every: dict[str, Stage] = {}
        conditions: tuple[Tensor, ...] = ()
        for part in self.texts(model):
            text, second = model.config(part), part == "text_encoder_2"
            shape = ("B", self.context(model, part), text["hidden_size"])
            outputs = (Tensor("text_embeddings_2" if second else "text_embeddings", shape),)
            if second:
                outputs += (Tensor("pooled_embeddings", ("B", text["projection_dim"])),)
            every |= self.text_stage(model, part, outputs, {"clip_skip": clip_skip, "penultimate": True}, guided)
            conditions += outputs
        scored = self.traits(model).facts[SCORED]
        conditions += (Tensor("time_ids", ("B", SIZES_AND_SCORE if scored else SIZES)),)
        return every | self.unet_stage(model, guided, conditions) | self.vae_stages(model)
