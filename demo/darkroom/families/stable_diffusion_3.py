"""Stable Diffusion 3 and 3.5 (Esser et al. 2024): a transformer that predicts velocities on 16-channel latents.

Two CLIPs and a T5 read the prompt, which a model can do without: what T5 would say is zeros then.
"""

from dataclasses import replace
from typing import Any, ClassVar

from darkroom.contract import DENOISER, Stage, Tensor
from darkroom.families.family import TINY_VAE, Family, Model, Part, Traits, denoiser_inputs
from darkroom.families.stable_diffusion import VAE, StableDiffusion
from darkroom.families.stable_diffusion_xl import StableDiffusionXl
from darkroom.schedule import Chosen, shift_mu

T5 = Part(
    "transformers:T5EncoderModel",
    {"d_model": 512, "vocab_size": 32128},
    "model",
    "tokenizer_3",
    ("text_encoder_3.", "lora_te3_", "t5xxl.transformer."),
    (("text_encoders.t5xxl.transformer.", "t5"),),
    optional=True,
)

USUAL_TEXT, LONGEST_TEXT = 256, 512
"""Tokens that T5 reads of a prompt by default, and at most, in diffusers' pipeline."""

TRANSFORMER = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 18,
    "num_attention_heads": 18,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 96,
}
"""What diffusers' `SD3Transformer2DModel` takes for what a configuration leaves out."""


class StableDiffusion3(Family):
    name = "sd3"
    title = "Stable Diffusion 3 or 3.5"
    pipelines = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline")
    parts: ClassVar = {
        "text_encoder": replace(
            StableDiffusion.parts["text_encoder"],
            cls="transformers:CLIPTextModelWithProjection",
            original=(("text_encoders.clip_l.transformer.", "clip"),),
        ),
        "text_encoder_2": replace(
            StableDiffusionXl.parts["text_encoder_2"], original=(("text_encoders.clip_g.transformer.", "clip"),)
        ),
        "text_encoder_3": T5,
        "transformer": Part(
            "diffusers:SD3Transformer2DModel",
            TRANSFORMER,
            lora=("transformer.", "lora_transformer_", "lora_unet_", "lycoris_", "diffusion_model."),
            original=(("model.diffusion_model.", "mmdit"),),
        ),
        "vae": VAE,
    }
    denoiser = "transformer"
    multiple = 16
    text_stages: ClassVar = {"text_encoder": "clip", "text_encoder_2": "clip_2", "text_encoder_3": "t5"}

    def check(self, model: Model) -> None:
        transformer, vae = model.config("transformer"), model.config("vae")
        first, second = (model.config(part) for part in ("text_encoder", "text_encoder_2"))
        contexts = {self.context(model, part) for part in ("text_encoder", "text_encoder_2")}
        if len(contexts) > 1:
            raise ValueError(f"its CLIPs read {' and '.join(map(str, sorted(contexts)))} tokens")
        for what, taken, given in (
            ("channels", transformer["in_channels"], vae["latent_channels"]),
            ("numbers of a prompt's gist", transformer["pooled_projection_dim"], _sum(first, second, "projection_dim")),
            ("numbers of a word", transformer["joint_attention_dim"], self._word(model)),
        ):
            if taken != given:
                raise ValueError(f"its transformer takes {taken} {what}, where {given} are given")
        if (made := transformer.get("out_channels")) not in (None, transformer["in_channels"]):
            raise ValueError(f"its transformer makes {made} channels of {transformer['in_channels']}")
        if self.free_multiple(model) != self.multiple:
            raise ValueError(f"a token of its transformer covers {self.free_multiple(model)} pixels, not 16")
        if vae.get("latents_mean") is not None or vae.get("_class_name") not in (None, "AutoencoderKL", TINY_VAE):
            raise ValueError("its VAE is of a kind that Darkroom does not support here")

    def _word(self, model: Model) -> int:
        """How many numbers there are of each word: those of T5, or what the transformer takes where T5 is not there;
        those of the two CLIPs are filled up with zeros."""
        room = model.config("transformer")["joint_attention_dim"]
        if "text_encoder_3" in self.texts(model):
            room = model.config("text_encoder_3")["d_model"]
        return max(room, _sum(model.config("text_encoder"), model.config("text_encoder_2"), "hidden_size"))

    def scheduler(self, model: Model, choice: Chosen, height: int, width: int) -> Chosen:
        side = self.free_multiple(model)
        return replace(choice, mu=shift_mu(choice.config, (height // side) * (width // side)))

    def steps_left(self, steps: int, strength: float) -> int:
        return steps - int(steps - min(steps * strength, steps))

    def most_pixels(self, model: Model) -> int:
        """There is a place for each token of a square."""
        return self.free_multiple(model) * model.config("transformer")["pos_embed_max_size"]

    def free_multiple(self, model: Model) -> int:
        return model.config("transformer")["patch_size"] * self.vae_factor(model)

    def default_sizes(self, model: Model) -> tuple[int, int]:
        side = model.config("transformer")["sample_size"] * self.vae_factor(model)
        return side, side

    def context(self, model: Model, part: str) -> int:
        return self._words(model) if part == "text_encoder_3" else super().context(model, part)

    def _words(self, model: Model) -> int:
        return model.text_length or USUAL_TEXT

    def longest_text(self, model: Model) -> int:
        return LONGEST_TEXT

    def layers_to_skip(self, model: Model) -> int:
        """Of the CLIPs, whose last layers are left out as they are."""
        return min(model.config(part)["num_hidden_layers"] for part in ("text_encoder", "text_encoder_2")) - 1

    def traits(self, model: Model) -> Traits:
        return Traits(
            family=self.name,
            texts=tuple(self.text_stages[part] for part in self.texts(model)),
            latent_channels=model.config("vae")["latent_channels"],
            vae_factor=self.vae_factor(model),
            rows=("Text", "Transformer"),
        )

    def stages(self, model: Model, guided: bool, clip_skip: int) -> dict[str, Stage]:
        """
        clip:         input_ids (B, 77) int32 -> text_embeddings (B, 77, D1), of the layer before the last,
                      pooled_embeddings (B, P1)
        clip_2:       the same, as text_embeddings_2 (B, 77, D2) and pooled_embeddings_2 (B, P2)
        t5:           input_ids (B, L) int32 -> text_embeddings_3 (B, L, D3)
        transformer:  latents (B, 16, h, w), timestep (B,) and all of these -> output (B, 16, h, w); guided, also on all
                      of them with the prefix negative_, and on guidance_scale (B,)
        vae:          latents (B, 16, h, w), as the transformer has them -> images (B, 3, H, W) in [-1, 1]
        vae_encoder:  images (B, 3, H, W) in [-1, 1] -> mean, deviation (B, 16, h, w), as the transformer has them
        """
        every: dict[str, Stage] = {}
        conditions: tuple[Tensor, ...] = ()
        for part, suffix in (("text_encoder", ""), ("text_encoder_2", "_2")):
            text = model.config(part)
            outputs = (
                Tensor(f"text_embeddings{suffix}", ("B", self.context(model, part), text["hidden_size"])),
                Tensor(f"pooled_embeddings{suffix}", ("B", text["projection_dim"])),
            )
            every |= self.text_stage(model, part, outputs, {"clip_skip": clip_skip, "penultimate": True}, guided)
            conditions += outputs
        options: dict[str, int] = {"guided": guided}
        if "text_encoder_3" in self.texts(model):
            shape = ("B", self._words(model), model.config("text_encoder_3")["d_model"])
            outputs = (Tensor("text_embeddings_3", shape),)
            every |= self.text_stage(model, "text_encoder_3", outputs, {}, guided, "darkroom.networks.t5:encoder")
            conditions += outputs
        else:
            options["words_of_zeros"] = self._words(model)
        latents = Tensor("latents", ("B", model.config("vae")["latent_channels"], "h", "w"))
        inputs, steady = denoiser_inputs(latents, conditions, guided, embeds_guidance=False)
        output, networks = Tensor("output", latents.shape), (self.network("transformer"),)
        module = "darkroom.networks.mmdit:denoiser"
        every["transformer"] = Stage("transformer", inputs, (output,), networks, module, DENOISER, options, steady)
        return every | self.vae_stages(model)


def _sum(first: dict[str, Any], second: dict[str, Any], key: str) -> int:
    return int(first[key] + second[key])
