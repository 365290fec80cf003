"""A family that the package does not know, as somebody else would add it: in a file of its own, and its networks.

A transformer predicts velocities on 16 channels; CLIP reads words, a T5 sentences, and both stand one after the other;
the VAE's latents are scaled and shifted; and where the steps lie depends on the picture's size.
"""

from dataclasses import replace
from typing import ClassVar

from darkroom.checkpoint.catalog import Script, Version
from darkroom.contract import DECODER, DENOISER, ENCODER, TEXT, Stage, Tensor
from darkroom.families.family import Family, Model, Part, Traits, denoiser_inputs
from darkroom.schedule import Chosen, shift_mu

PATCH = 2
NETWORKS = "tests.families.networks"


class Stranger(Family):
    name = "stranger"
    title = "Stranger"
    pipelines = ("StrangerPipeline",)
    parts: ClassVar = {
        "words": Part("transformers:CLIPTextModel", stem="model", tokenizer="words_tokenizer"),
        "sentences": Part("transformers:T5EncoderModel", stem="model", tokenizer="sentences_tokenizer"),
        "flow": Part(f"{NETWORKS}:StrangerTransformer"),
        "pixels": Part("diffusers:AutoencoderKL"),
    }
    denoiser = "flow"
    vae = "pixels"

    def check(self, model: Model) -> None:
        if model.config("flow")["in_channels"] != model.config("pixels")["latent_channels"]:
            raise ValueError("its transformer does not take the latents of its VAE")

    def free_multiple(self, model: Model) -> int:
        return PATCH * self.vae_factor(model)

    def default_sizes(self, model: Model) -> tuple[int, int]:
        side = model.config("flow")["sample_size"] * self.vae_factor(model)
        return side, side

    def scheduler(self, model: Model, choice: Chosen, height: int, width: int) -> Chosen:
        side = PATCH * self.vae_factor(model)
        return replace(choice, mu=shift_mu(choice.config, (height // side) * (width // side)))

    def traits(self, model: Model) -> Traits:
        channels = model.config("pixels")["latent_channels"]
        return Traits(self.name, ("words", "sentences"), channels, self.vae_factor(model), rows=("Text", "Flow"))

    def stages(self, model: Model, guided: bool, clip_skip: int) -> dict[str, Stage]:
        every = {}
        for part, width in (("words", "hidden_size"), ("sentences", "d_model")):
            ids = Tensor("input_ids", ("B", self.context(model, part)), "int32", model.config(part)["vocab_size"])
            made = Tensor(f"{part}_read", ("B", self.context(model, part), model.config(part)[width]))
            networks = (self.network(part),)
            every[part] = Stage(part, (ids,), (made,), networks, f"{NETWORKS}:reader", TEXT)
        latents = Tensor("latents", ("B", model.config("pixels")["latent_channels"], "h", "w"))
        conditions = tuple(stage.outputs[0] for stage in every.values())
        inputs, steady = denoiser_inputs(latents, conditions, guided, embeds_guidance=False)
        output = Tensor("output", latents.shape)
        networks, options = (self.network("flow"),), {"guided": guided}
        every["flow"] = Stage("flow", inputs, (output,), networks, f"{NETWORKS}:velocity", DENOISER, options, steady)
        images = Tensor("images", ("B", 3, "H", "W"))
        moments = tuple(Tensor(name, latents.shape) for name in ("mean", "deviation"))
        pixels = (self.network("pixels"),)
        every["pixels"] = Stage("pixels", (latents,), (images,), pixels, "darkroom.networks.vae:decoder", DECODER)
        every["pixels_encoder"] = Stage(
            "pixels_encoder", (images,), moments, pixels, "darkroom.networks.vae:encoder", ENCODER
        )
        return every


SCRIPT = Script(
    "stranger.py",
    "stranger",
    ("stranger",),
    {"stranger-1": Version("stranger-1", "nobody/stranger-1", 64, steps=4, guidance_scale=3.0)},
    real="stranger-1",
    unnamed=Version("", "", 0, steps=4, guidance_scale=3.0),
)
"""What would be a page in demo/."""
