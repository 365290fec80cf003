"""FLUX.2 klein (Black Forest Labs, 2025): a transformer that predicts velocities on patches of 32-channel latents.

A language model reads the prompt, as what its user says. The distilled kind makes a picture in four steps; the base
kind is guided.
"""

from dataclasses import replace
from typing import ClassVar

from darkroom.contract import DECODER, DENOISER, TEXT, Stage, Tensor
from darkroom.families.family import Family, Model, Part, Traits, denoiser_inputs
from darkroom.families.flux import PATCH, SIZE_IN_LATENTS
from darkroom.schedule import LINEAR_SIGMAS, Chosen

WORDS = 512
"""Tokens that are read of a prompt, and of what is put around it."""

LAYERS_READ = 27
"""Of the text encoder; that it has more is needed, as what transformers returns of its last is normalised."""

LONG = 4300
"""Tokens of a picture from which on the shift does not depend on the number of steps."""


class Flux2Klein(Family):
    name = "flux2-klein"
    title = "FLUX.2 klein"
    pipelines = ("Flux2KleinPipeline",)
    parts: ClassVar = {
        "text_encoder": Part(
            "transformers:Qwen3Model",
            {"hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 151936},
            "model",
            "tokenizer",
            chat=True,
        ),
        "transformer": Part(
            "diffusers:Flux2Transformer2DModel",
            {"in_channels": 128, "num_attention_heads": 48, "attention_head_dim": 128},
            lora=("transformer.", "lora_transformer_", "lycoris_", "diffusion_model."),
        ),
        "vae": Part(
            "diffusers:AutoencoderKLFlux2", {"block_out_channels": [128, 256, 512, 512], "latent_channels": 32}
        ),
    }
    denoiser = "transformer"
    multiple = 16

    def check(self, model: Model) -> None:
        transformer, text = model.config("transformer"), model.config("text_encoder")
        if transformer["in_channels"] != self._channels(model):
            raise ValueError(f"its transformer takes {transformer['in_channels']} channels, not its VAE's latents")
        if transformer.get("guidance_embeds", True):
            raise ValueError("its transformer is given a guidance scale, which klein is not")
        if text["num_hidden_layers"] <= LAYERS_READ:
            raise ValueError(
                f"its text encoder has {text['num_hidden_layers']} layers, where more than {LAYERS_READ} are needed"
            )
        if self._padding(model) is None:
            raise ValueError("its text encoder's configuration names no token that prompts are filled up with")

    def vae_factor(self, model: Model) -> int:
        return PATCH * super().vae_factor(model)

    def free_multiple(self, model: Model) -> int:
        return self.vae_factor(model)

    def default_sizes(self, model: Model) -> tuple[int, int]:
        side = SIZE_IN_LATENTS // PATCH * self.vae_factor(model)
        return side, side

    def longest_text(self, model: Model) -> int:
        return WORDS

    def context(self, model: Model, part: str) -> int:
        return model.text_length or min(super().context(model, part), WORDS)

    def scheduler(self, model: Model, choice: Chosen, height: int, width: int) -> Chosen:
        choice = replace(choice, sigmas=LINEAR_SIGMAS)
        if not choice.config.get("use_dynamic_shifting"):
            return choice
        factor = self.vae_factor(model)
        mu, mu_per_step = shift((height // factor) * (width // factor))
        return replace(choice, mu=mu, mu_per_step=mu_per_step)

    def traits(self, model: Model) -> Traits:
        rows = ("Text", "Transformer")
        return Traits(self.name, ("qwen3",), self._channels(model), self.vae_factor(model), rows=rows)

    def stages(self, model: Model, guided: bool, clip_skip: int) -> dict[str, Stage]:
        """
        qwen3:        input_ids (B, L) int32 -> text_embeddings (B, L, 3 D)
        transformer:  latents (B, 4C, h, w), timestep (B,), text_embeddings (B, L, 3 D) -> output (B, 4C, h, w); guided,
                      also negative_text_embeddings and guidance_scale (B,)
        vae:          latents (B, 4C, h, w), in normalised patches -> images (B, 3, H, W) in [-1, 1]
        """
        config, words = model.config("text_encoder"), self.context(model, "text_encoder")
        ids = Tensor("input_ids", ("B", words), "int32", config["vocab_size"])
        embeddings = Tensor("text_embeddings", ("B", words, 3 * config["hidden_size"]))
        latents = Tensor("latents", ("B", self._channels(model), "h", "w"))
        inputs, steady = denoiser_inputs(latents, (embeddings,), guided, embeds_guidance=False)
        output, images = Tensor("output", latents.shape), Tensor("images", ("B", 3, "H", "W"))

        module = "darkroom.networks.flux2:{}".format
        text, transformer, vae = ((self.network(part),) for part in self.parts)
        options = {"padding": self._padding(model)}
        every = (
            Stage("qwen3", (ids,), (embeddings,), text, module("encoder"), TEXT, options),
            Stage(
                "transformer", inputs, (output,), transformer, module("denoiser"), DENOISER, {"guided": guided}, steady
            ),
            Stage("vae", (latents,), (images,), vae, module("decoder"), DECODER),
        )
        return {stage.name: stage for stage in every}

    def _channels(self, model: Model) -> int:
        return PATCH**2 * model.config("vae")["latent_channels"]

    def _padding(self, model: Model) -> int | None:
        """Qwen's tokenizer fills up with what begins a text."""
        text = model.config("text_encoder")
        found = text.get("pad_token_id")
        return text.get("bos_token_id") if found is None else found


def shift(tokens: int) -> tuple[float, float]:
    """How far the steps for a picture of so many tokens are shifted towards its noise, for no step, and for each more.

    As `compute_empirical_mu` of diffusers' pipelines has it: a line between 10 and 200 steps, each of which lies on a
    line of its own through the tokens.
    """
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > LONG:
        return at_200, 0.0
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    per_step = (at_200 - at_10) / 190
    return at_200 - 200 * per_step, per_step
