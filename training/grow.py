"""Start a larger autoencoder from a trained one with a level less, and teach it the elder's code.

What the elder makes of a picture twice as large as its own, 4 channels for every 8 x 8 pixels, are as many numbers as
16 channels for every 16 x 16: so its latents, each 2 x 2 of them packed into channels (as Flux packs its own), are a
good code for the first channels of the grown one to begin with. All levels down to the elder's last are copied; the one
below them is new, and learns in a few hundred steps to pass on what the elder passed on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn


def copy(source: nn.Module, target: nn.Module) -> None:
    """Copy weights of the same name; where the target's are larger, into their first channels."""
    theirs = source.state_dict()
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if (weight := theirs.get(name)) is not None:
                parameter[tuple(slice(n) for n in weight.shape)] = weight


def grow(elder: AutoencoderKL, vae: AutoencoderKL) -> None:
    """Copy every level of the elder; the new one is the deepest."""
    copy(elder.encoder.conv_in, vae.encoder.conv_in)
    for old, new in zip(elder.encoder.down_blocks, vae.encoder.down_blocks, strict=False):
        copy(old, new)
    for old, new in zip(elder.decoder.up_blocks, vae.decoder.up_blocks[1:], strict=True):
        copy(old, new)
    wider = vae.decoder.up_blocks[1].resnets[0]
    if wider.conv_shortcut is not None:
        nn.init.zeros_(wider.conv_shortcut.bias)
        nn.init.dirac_(wider.conv_shortcut.weight)
    copy(elder.decoder.conv_norm_out, vae.decoder.conv_norm_out)
    copy(elder.decoder.conv_out, vae.decoder.conv_out)


class Elder:
    """The autoencoder grown from, to be imitated: its latents, and its features where the new level ends."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae.eval().requires_grad_(False)

    def distance(self, vae: AutoencoderKL, picture: Tensor, mean: Tensor) -> Tensor:
        """Relative squared error of the means (B, C, H/16, W/16) and of the decoder's features (B, C, H/8, W/8)."""
        with torch.no_grad():
            latents = self.vae.encode(picture).latent_dist.mean
            features = self.vae.decoder.mid_block(self.vae.decoder.conv_in(self.vae.post_quant_conv(latents)))
        packed = F.pixel_unshuffle(latents, 2).float()
        grown = vae.decoder.up_blocks[0](vae.decoder.mid_block(vae.decoder.conv_in(vae.post_quant_conv(mean))))
        grown = grown[:, : features.shape[1]]
        return relative(mean[:, : packed.shape[1]], packed) + relative(grown.float(), features.float())


def relative(made: Tensor, right: Tensor) -> Tensor:
    """Mean squared error in parts of the right one's variance."""
    return (made - right).square().mean() / right.var()
