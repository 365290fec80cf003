"""Stable Diffusion 3's transformer (Esser et al. 2024, MMDiT): latents in, velocities out, with guidance inside."""

import torch
from torch import Tensor, nn

from darkroom.contract import GUIDANCE_SCALE, NEGATIVE, Stage
from darkroom.networks.guidance import Guided


def denoiser(stage: Stage, network: nn.Module) -> nn.Module:
    """The module of a transformer's stage."""
    own = tuple(name for name in stage.steady if not name.startswith(NEGATIVE) and name != GUIDANCE_SCALE.name)
    mmdit = MmDit(network, own, int(stage.options.get("words_of_zeros", 0)))
    return Guided(mmdit) if stage.options["guided"] else mmdit


class MmDit(nn.Module):
    """One network call: the velocity (B, C, h, w) of each image at its own timestep, from 0 to 1000.

    `conditions` names what it takes beside latents and timestep: text_embeddings (B, 77, D1) and pooled_embeddings
    (B, P1) of a first CLIP, those of a second with the suffix _2, and text_embeddings_3 (B, L, D) of T5, in the place
    of which without one are as many `words_of_zeros`.
    """

    def __init__(self, transformer: nn.Module, conditions: tuple[str, ...], words_of_zeros: int) -> None:
        super().__init__()
        self.transformer = transformer
        self.conditions = conditions
        self.words_of_zeros = words_of_zeros
        self.levels = 2  # a token is a patch of 2x2 latents
        # diffusers' fused attention leaves out second attentions, and the norms of queries and keys.
        transformer.fuse_qkv_projections = None

    def forward(self, latents: Tensor, timestep: Tensor, *conditions: Tensor) -> Tensor:
        given = dict(zip(self.conditions, conditions, strict=True))
        dtype = self.transformer.proj_out.bias.dtype  # of what is computed; large weights may be kept in another
        pooled = torch.cat([given["pooled_embeddings"], given["pooled_embeddings_2"]], dim=-1)
        output = self.transformer(
            hidden_states=latents.to(dtype),
            timestep=timestep,
            encoder_hidden_states=self._text(given).to(dtype),
            pooled_projections=pooled.to(dtype),
        )
        return output.sample.float()

    def _text(self, given: dict[str, Tensor]) -> Tensor:
        """(B, 77 + L, D): the CLIPs side by side, filled up with zeros to T5's width, and T5 behind them."""
        clips = torch.cat([given["text_embeddings"], given["text_embeddings_2"]], dim=-1)
        clips = nn.functional.pad(clips, (0, self.transformer.config.joint_attention_dim - clips.shape[-1]))
        if "text_embeddings_3" in given:
            return torch.cat([clips, given["text_embeddings_3"]], dim=1)
        return nn.functional.pad(clips, (0, 0, 0, self.words_of_zeros))
