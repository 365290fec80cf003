"""Classifier-free guidance (Ho and Salimans 2022) inside the graph, with a scale for each image."""

import torch
from torch import Tensor, nn


class Guided(nn.Module):
    """A denoiser that is called once for 2B images: guided and led away from.

    A scale of 1 or less means no guidance, as in diffusers: it enters as 1. `shares` denoisers take the latents and
    timesteps of B images with the conditions of 2B; and so the first conditions, `common` of them, which both halves
    have.
    """

    def __init__(self, denoiser: nn.Module, shares: bool = False, common: int = 0) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.shares = shares
        self.common = common
        self.levels = getattr(denoiser, "levels", 1)

    def forward(self, latents: Tensor, timestep: Tensor, *conditions: Tensor) -> Tensor:
        """`conditions`: those of both halves, what else the denoiser takes, then the same for the negative prompt, then
        the scales (B,)."""
        common, (*both, guidance_scale) = conditions[: self.common], conditions[self.common :]
        positive, negative = both[: len(both) // 2], both[len(both) // 2 :]
        shared = (latents, timestep, *common)
        if not self.shares:
            shared = tuple(torch.cat([each, each]) for each in shared)
        output = self.denoiser(*shared, *map(torch.cat, zip(negative, positive, strict=True)))
        unconditional, conditional = output.chunk(2)
        return unconditional + guidance_scale.clamp(min=1).reshape(-1, 1, 1, 1) * (conditional - unconditional)
