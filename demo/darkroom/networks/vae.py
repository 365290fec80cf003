"""A variational autoencoder (Kingma and Welling 2014): scale and shift of its latents are inside the graph.

Outside, latents are always as the denoiser has them: (z - shift) * scale, where z are the autoencoder's own.
"""

import torch
from torch import Tensor, nn

from darkroom.contract import Stage


def decoder(stage: Stage, network: nn.Module) -> nn.Module:
    """The module of a decoder's stage."""
    return VaeDecoder(network)


def encoder(stage: Stage, network: nn.Module) -> nn.Module:
    """The module of an encoder's stage."""
    return VaeEncoder(network) if len(stage.outputs) == 2 else TinyEncoder(network)


class VaeDecoder(nn.Module):
    """Latents as the denoiser has them -> (B, 3, H, W) images in [-1, 1]."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae
        self.scale = vae.config.scaling_factor
        self.shift = vae.config.get("shift_factor") or 0.0

    def forward(self, latents: Tensor) -> Tensor:
        own = latents / self.scale
        if self.shift:
            own = own + self.shift
        return self.vae.decode(own.to(self.vae.dtype)).sample.float()


class VaeEncoder(VaeDecoder):
    """(B, 3, H, W) images in [-1, 1] -> mean and deviation (B, C, h, w) of the latents, as the denoiser has them."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        moments = self.vae.encode(images.to(self.vae.dtype)).latent_dist.parameters.float()
        mean, log_variance = moments.chunk(2, dim=1)
        deviation = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
        return (mean - self.shift) * self.scale, deviation * self.scale


class TinyEncoder(VaeDecoder):
    """(B, 3, H, W) images in [-1, 1] -> (B, C, h, w) latents, as the denoiser has them."""

    def forward(self, images: Tensor) -> Tensor:
        return (self.vae.encode(images.to(self.vae.dtype)).latents.float() - self.shift) * self.scale
