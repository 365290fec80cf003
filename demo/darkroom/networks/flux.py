"""Flux's transformer (Black Forest Labs, https://github.com/black-forest-labs/flux): latents in, velocities out.

It works on patches of 2x2 latents, each a token, and turns queries and keys by where a token lies (RoFormer, Su et al.
2021). Outside the graph latents stay (B, C, h, w), and timesteps go from 0 to 1000.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from darkroom.contract import GUIDANCE_SCALE, NEGATIVE, Stage
from darkroom.networks.guidance import Guided

PATCH = 2
"""Latents of a token, along each side."""

THETA = 10_000
"""The base of the rotations' wavelengths, as `FluxTransformer2DModel` has it."""


def denoiser(stage: Stage, network: nn.Module) -> nn.Module:
    """The module of a transformer's stage."""
    if network.config.guidance_embeds or not stage.options["guided"]:
        return Flux(network, stage.steady)
    own = tuple(name for name in stage.steady if not name.startswith(NEGATIVE) and name != GUIDANCE_SCALE.name)
    return Guided(Flux(network, own))


class Flux(nn.Module):
    """One network call: the velocity (B, C, h, w) of each image at its own timestep.

    `conditions` names what it takes beside latents and timestep: text_embeddings (B, L, D), pooled_embeddings (B, P),
    and guidance_scale (B,) where the network was distilled to follow a scale that it is given.
    """

    def __init__(self, transformer: nn.Module, conditions: tuple[str, ...]) -> None:
        super().__init__()
        self.transformer = transformer
        self.conditions = conditions
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            block.attn.set_processor(attend)
        self.register_buffer("rates", rotation_rates(transformer.config.axes_dims_rope, THETA), persistent=False)

    def forward(self, latents: Tensor, timestep: Tensor, *conditions: Tensor) -> Tensor:
        given = dict(zip(self.conditions, conditions, strict=True))
        network, dtype = self.transformer, self.transformer.dtype
        # Time and scale stay in float32 until they are embedded: bfloat16 knows one timestep in four.
        told = [timestep] if (scale := given.get(GUIDANCE_SCALE.name)) is None else [timestep, 1000 * scale]
        embedded = network.time_text_embed(*told, given["pooled_embeddings"].to(dtype))
        text = network.context_embedder(given["text_embeddings"].to(dtype))
        patches = nn.functional.pixel_unshuffle(latents.to(dtype), PATCH)
        tokens = network.x_embedder(patches.flatten(2).transpose(1, 2))
        places = torch.zeros(text.shape[1], 1, device=latents.device)
        rotation = rotations(places, patches.shape[2], patches.shape[3], self.rates)
        for block in network.transformer_blocks:
            text, tokens = block(tokens, text, embedded, rotation)
        for block in network.single_transformer_blocks:
            text, tokens = block(tokens, text, embedded, rotation)
        made = network.proj_out(network.norm_out(tokens, embedded))
        made = made.transpose(1, 2).reshape(made.shape[0], made.shape[2], patches.shape[2], patches.shape[3])
        return nn.functional.pixel_shuffle(made, PATCH).float()


def rotations(words: Tensor, rows: int, columns: int, rates: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (L + rows * columns, D) float32 of text, whose place along the last axis is `words` (L, 1), and
    of patches at (0, row, column, ...). diffusers computes them in float64, which some runtimes do not have; angles
    stay so small that it does not show."""
    row = torch.arange(rows, device=rates.device, dtype=torch.float32)[:, None, None] * rates[1]
    column = torch.arange(columns, device=rates.device, dtype=torch.float32)[None, :, None] * rates[2]
    angles = torch.cat([words * rates[-1], (row + column).flatten(0, 1)])
    return angles.cos(), angles.sin()


def attend(
    attention: nn.Module, tokens: Tensor, text: Tensor | None = None, mask: None = None, rotation: Any = None
) -> Any:
    """diffusers' `FluxAttnProcessor`, with sizes that stay free when it is traced: over tokens (B, S, D) alone, or over
    text (B, L, D) and tokens, both of which it returns then."""

    def heads(projected: Tensor, norm: nn.Module | None = None) -> Tensor:
        each = projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        return each if norm is None else norm(each)

    query = heads(attention.to_q(tokens), attention.norm_q)
    key = heads(attention.to_k(tokens), attention.norm_k)
    value = heads(attention.to_v(tokens))
    if text is not None:
        query = torch.cat([heads(attention.add_q_proj(text), attention.norm_added_q), query], dim=2)
        key = torch.cat([heads(attention.add_k_proj(text), attention.norm_added_k), key], dim=2)
        value = torch.cat([heads(attention.add_v_proj(text)), value], dim=2)
    query, key = rotated(query, rotation), rotated(key, rotation)
    made = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    if text is None:
        return made
    words = text.shape[1]
    return attention.to_out[0](made[:, words:]), attention.to_add_out(made[:, :words])


def rotated(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys (B, H, S, D), in which each pair of neighbours is turned by its angle, in float32."""
    cosines, sines = rotation
    real, imaginary = heads.unflatten(-1, (-1, 2)).unbind(-1)
    across = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (heads.float() * cosines + across.float() * sines).to(heads.dtype)


def rotation_rates(widths: Sequence[int], theta: float) -> Tensor:
    """Radians a position along each axis: (axes, D) float32, where an axis turns its own share of D alone."""
    shares = []
    for axis, width in enumerate(widths):
        share = torch.zeros(len(widths), width)
        share[axis] = (theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)).repeat_interleave(2).float()
        shares.append(share)
    return torch.cat(shares, dim=1)
