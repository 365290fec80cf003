"""FLUX.2's networks (Black Forest Labs, https://github.com/black-forest-labs/flux2), as the klein kinds have them.

Latents are the autoencoder's in patches of 2x2, normalised: (B, 4C, h, w) for everybody outside its graph. Text is what
three layers of a language model make of it.
"""

import torch
from torch import Tensor, nn

from darkroom.contract import Stage
from darkroom.networks.flux import attend, rotated, rotation_rates, rotations
from darkroom.networks.guidance import Guided

LAYERS = (9, 18, 27)
"""Whose hidden states are read, as Flux2KleinPipeline has it."""


def encoder(stage: Stage, network: nn.Module) -> nn.Module:
    """The module of a text stage."""
    return Qwen3(network, int(stage.options["padding"]))


def denoiser(stage: Stage, network: nn.Module) -> nn.Module:
    """The module of a transformer's stage."""
    if not stage.options["guided"]:
        return Flux2(network)
    return Guided(Flux2(network))


def decoder(stage: Stage, network: nn.Module) -> nn.Module:
    """The module of a decoder's stage."""
    return PatchDecoder(network)


class Qwen3(nn.Module):
    """(B, L) token ids, filled up with `padding` -> (B, L, 3 D) hidden states of three layers, side by side."""

    def __init__(self, model: nn.Module, padding: int) -> None:
        super().__init__()
        del model.layers[LAYERS[-1] :]  # nobody reads what they make
        self.model = model
        self.padding = padding

    def forward(self, input_ids: Tensor) -> Tensor:
        ids = input_ids.long()
        hidden = self.model.embed_tokens(ids)
        places = torch.arange(ids.shape[1], device=ids.device)
        hides = (places[None, :] > places[:, None])[None] | (ids == self.padding)[:, None]
        mask = torch.zeros(1, device=ids.device, dtype=hidden.dtype).masked_fill(hides, torch.finfo(hidden.dtype).min)
        rotation = self.model.rotary_emb(hidden, places[None])
        read = []
        for count, layer in enumerate(self.model.layers, start=1):
            hidden = layer(hidden, attention_mask=mask[:, None], position_embeddings=rotation)
            if count in LAYERS:
                read.append(hidden)
        return torch.cat(read, dim=-1).float()


class Flux2(nn.Module):
    """One network call: the velocity (B, C, h, w) of each image at its own timestep, from 0 to 1000, for
    text_embeddings (B, L, D)."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer
        for block in transformer.transformer_blocks:
            block.attn.set_processor(attend)
        for block in transformer.single_transformer_blocks:
            block.attn.set_processor(attend_in_parallel)
        rates = rotation_rates(transformer.config.axes_dims_rope, transformer.config.rope_theta)
        self.register_buffer("rates", rates, persistent=False)

    def forward(self, latents: Tensor, timestep: Tensor, text_embeddings: Tensor) -> Tensor:
        network, dtype = self.transformer, self.transformer.dtype
        embed = network.time_guidance_embed
        time = embed.timestep_embedder(embed.time_proj(timestep).to(dtype))
        image, text, both = (
            modulation(time)
            for modulation in (
                network.double_stream_modulation_img,
                network.double_stream_modulation_txt,
                network.single_stream_modulation,
            )
        )
        words = network.context_embedder(text_embeddings.to(dtype))
        tokens = network.x_embedder(latents.to(dtype).flatten(2).transpose(1, 2))
        places = torch.arange(words.shape[1], device=latents.device, dtype=torch.float32)[:, None]
        rotation = rotations(places, latents.shape[2], latents.shape[3], self.rates)
        for block in network.transformer_blocks:
            words, tokens = block(tokens, words, image, text, rotation)
        tokens = torch.cat([words, tokens], dim=1)
        for block in network.single_transformer_blocks:
            tokens = block(tokens, None, both, rotation)
        made = network.proj_out(network.norm_out(tokens[:, words.shape[1] :], time))
        return made.transpose(1, 2).reshape(latents.shape).float()


def attend_in_parallel(
    attention: nn.Module, tokens: Tensor, mask: None = None, rotation: tuple | None = None
) -> Tensor:
    """diffusers' `Flux2ParallelSelfAttnProcessor`, with sizes that stay free when it is traced: attention and a
    perceptron beside it, over tokens (B, S, D)."""
    mixed = attention.to_qkv_mlp_proj(tokens)
    query, key, value = (
        each.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for each in mixed[..., : 3 * attention.inner_dim].chunk(3, dim=-1)
    )
    query, key = rotated(attention.norm_q(query), rotation), rotated(attention.norm_k(key), rotation)
    made = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    beside = attention.mlp_act_fn(mixed[..., 3 * attention.inner_dim :])
    return attention.to_out(torch.cat([made, beside], dim=-1))


class PatchDecoder(nn.Module):
    """Latents as the denoiser has them, (B, 4C, h, w) -> (B, 3, H, W) images in [-1, 1]."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        variance = vae.bn.running_var.float() + vae.config.batch_norm_eps
        self.register_buffer("spread", variance.sqrt()[:, None, None], persistent=False)
        self.register_buffer("mean", vae.bn.running_mean.float()[:, None, None], persistent=False)
        del vae.bn
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        own = latents * self.spread + self.mean
        return self.vae.decode(nn.functional.pixel_shuffle(own, 2).to(self.vae.dtype)).sample.float()
