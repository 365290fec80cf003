"""Flux.1 (Black Forest Labs, 2024): a transformer that predicts velocities on patches of 16-channel latents.

CLIP gives the prompt's gist, T5 its words. The dev kind is given a guidance scale; the schnell kind makes a picture in
a few steps without any.
"""

from dataclasses import replace
from typing import ClassVar

from darkroom.contract import DENOISER, TEXT, Stage, Tensor
from darkroom.families.family import Family, Model, Part, Traits, denoiser_inputs
from darkroom.families.stable_diffusion import VAE, StableDiffusion
from darkroom.schedule import LINEAR_SIGMAS, Chosen, shift_mu

PATCH = 2
"""Latents of a token, along each side."""

SIZE_IN_LATENTS = 128
"""Of a picture as diffusers' pipeline makes it by default."""

WORDS = {True: 512, False: 256}
"""Tokens of T5 that the kinds with and without embedded guidance were trained on, as BFL's own code has it."""


class Flux(Family):
    name = "flux"
    title = "Flux.1"
    pipelines = ("FluxPipeline", "FluxImg2ImgPipeline")
    parts: ClassVar = {
        "text_encoder": replace(
            StableDiffusion.parts["text_encoder"], original=(("text_encoders.clip_l.transformer.", "clip"),)
        ),
        "text_encoder_2": Part(
            "transformers:T5EncoderModel",
            {"d_model": 512, "vocab_size": 32128},
            "model",
            "tokenizer_2",
            original=(("text_encoders.t5xxl.transformer.", "t5"),),
        ),
        "transformer": Part(
            "diffusers:FluxTransformer2DModel",
            {"in_channels": 64, "num_attention_heads": 24, "attention_head_dim": 128},
            lora=("transformer.", "lora_transformer_", "lora_unet_", "lycoris_", "diffusion_model."),
            original=(("model.diffusion_model.", "bfl"),),
        ),
        "vae": replace(VAE, original=(("vae.", "vae"), *VAE.original)),
    }
    denoiser = "transformer"
    multiple = 16

    def check(self, model: Model) -> None:
        transformer, latents = model.config("transformer"), model.config("vae")["latent_channels"]
        taken = transformer["in_channels"]
        if taken != latents * PATCH**2 or transformer.get("out_channels") not in (None, taken):
            raise ValueError(
                f"its transformer takes {taken} channels, not the {latents * PATCH**2} of its VAE's latents: Flux Fill "
                f"and the control kinds are not supported"
            )
        if transformer.get("patch_size", 1) != 1:
            raise ValueError(f"its transformer has patch_size {transformer['patch_size']}, which is not supported")

    def free_multiple(self, model: Model) -> int:
        return PATCH * self.vae_factor(model)

    def default_sizes(self, model: Model) -> tuple[int, int]:
        side = SIZE_IN_LATENTS * self.vae_factor(model)
        return side, side

    def longest_text(self, model: Model) -> int:
        return WORDS[self.embeds_guidance(model)]

    def context(self, model: Model, part: str) -> int:
        words = super().context(model, part)
        if part != "text_encoder_2":
            return words
        return model.text_length or min(words, self.longest_text(model))

    def scheduler(self, model: Model, choice: Chosen, height: int, width: int) -> Chosen:
        side = self.free_multiple(model)
        tokens = (height // side) * (width // side)
        return replace(choice, mu=shift_mu(choice.config, tokens), sigmas=LINEAR_SIGMAS)

    def steps_left(self, steps: int, strength: float) -> int:
        return steps - int(steps - min(steps * strength, steps))

    def embeds_guidance(self, model: Model) -> bool:
        return bool(model.config("transformer").get("guidance_embeds"))

    def traits(self, model: Model) -> Traits:
        return Traits(
            family=self.name,
            texts=("clip", "t5"),
            latent_channels=model.config("vae")["latent_channels"],
            vae_factor=self.vae_factor(model),
            embeds_guidance=self.embeds_guidance(model),
            rows=("Text", "Transformer"),
        )

    def stages(self, model: Model, guided: bool, clip_skip: int) -> dict[str, Stage]:
        """
        clip:         input_ids (B, 77) int32 -> pooled_embeddings (B, P)
        t5:           input_ids (B, L) int32 -> text_embeddings (B, L, D)
        transformer:  latents (B, C, h, w), timestep (B,), pooled_embeddings (B, P), text_embeddings (B, L, D) ->
                      output (B, C, h, w); guidance_scale (B,) where it is embedded; else guided, also
                      negative_pooled_embeddings, negative_text_embeddings and guidance_scale
        vae:          latents (B, C, h, w), scaled and shifted -> images (B, 3, H, W) in [-1, 1]
        vae_encoder:  images (B, 3, H, W) in [-1, 1] -> mean, deviation (B, C, h, w), scaled and shifted
        """
        pooled = Tensor("pooled_embeddings", ("B", model.config("text_encoder")["hidden_size"]))
        words = self.context(model, "text_encoder_2")
        text = Tensor("text_embeddings", ("B", words, model.config("text_encoder_2")["d_model"]))
        every = {}
        for name, part, output, module in (
            ("clip", "text_encoder", pooled, "darkroom.networks.clip:pooled"),
            ("t5", "text_encoder_2", text, "darkroom.networks.t5:encoder"),
        ):
            ids = Tensor("input_ids", ("B", self.context(model, part)), "int32", model.config(part)["vocab_size"])
            every[name] = Stage(name, (ids,), (output,), (self.network(part),), module, TEXT)
        latents = Tensor("latents", ("B", model.config("vae")["latent_channels"], "h", "w"))
        inputs, steady = denoiser_inputs(latents, (pooled, text), guided, self.embeds_guidance(model))
        output, networks = Tensor("output", latents.shape), (self.network("transformer"),)
        module, options = "darkroom.networks.flux:denoiser", {"guided": guided}
        every["transformer"] = Stage("transformer", inputs, (output,), networks, module, DENOISER, options, steady)
        return every | self.vae_stages(model)
