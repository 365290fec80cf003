"""Train the autoencoder on the artwork over random named backgrounds.

python -m training.train_vae [--work FOLDER] [--minutes 30] [--resume] [--device cuda]
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from training import artwork, networks
from training.colours import TABLE
from training.loop import Plan, Trainer
from training.workspace import add_training_arguments

KL_WEIGHT = 2e-5
"""Just enough to keep the latents' spread bounded; reconstruction is what counts."""


def start(vae: AutoencoderKL) -> AutoencoderKL:
    """Make it begin as a plain autoencoder: with noise of e^0 it learns nothing for hundreds of steps."""
    with torch.no_grad():
        vae.quant_conv.weight[4:] *= 0.01
        vae.quant_conv.bias[4:] = -6.0
    return vae


class Pictures:
    """Random pictures on random backgrounds, composited on the device."""

    def __init__(self, rgba: np.ndarray, device: str) -> None:
        flat = torch.from_numpy(rgba.reshape(-1, *rgba.shape[-3:])).permute(0, 3, 1, 2)
        self.rgba, self.table, self.device = flat, torch.from_numpy(TABLE), device

    def batch(self, size: int, generator: torch.Generator) -> Tensor:
        """(size, 3, H, W) float32 in -1..1, channels last."""
        which = torch.randint(len(self.rgba), (size,), generator=generator)
        colour = self.table[torch.randint(len(self.table), (size,), generator=generator)]
        rgba = self.rgba[which].to(self.device).float() / 255
        alpha, back = rgba[:, 3:], colour.to(self.device).float()[:, :, None, None] / 255
        picture = (rgba[:, :3] * alpha + back * (1 - alpha)) * 2 - 1
        return picture.contiguous(memory_format=torch.channels_last)


def loss_of(vae: AutoencoderKL, picture: Tensor, noise: Tensor) -> Tensor:
    """L1 + L2 + a little KL. picture: (B, 3, H, W), noise: (B, 4, H/8, W/8) standard normal."""
    mean, log_variance = vae.quant_conv(vae.encoder(picture)).chunk(2, dim=1)
    log_variance = log_variance.clamp(-30, 20)
    latent = mean + noise * torch.exp(0.5 * log_variance)
    error = (vae.decoder(vae.post_quant_conv(latent)) - picture).float()
    kl = 0.5 * (mean.float() ** 2 + log_variance.float().exp() - 1 - log_variance.float()).mean()
    return error.abs().mean() + 2 * error.square().mean() + KL_WEIGHT * kl


def main() -> None:
    """Train and keep `vae.pt` in the work folder."""
    args = add_training_arguments(
        argparse.ArgumentParser(description=__doc__.splitlines()[0]), 30, 8, 1e-3
    ).parse_args()
    torch.manual_seed(args.seed)
    pictures = Pictures(artwork.load(args.work), args.device)
    vae = start(networks.vae()).to(args.device, memory_format=torch.channels_last)
    trainer = Trainer(vae, Plan.of(args, average=0.995), args.work / "vae.pt")
    if args.resume:
        trainer.load()
    compute = torch.compile(loss_of) if args.compile else loss_of

    def loss(step: int, progress: float, generator: torch.Generator) -> Tensor:
        picture = pictures.batch(args.batch, generator)
        side = artwork.SIZE // 8
        noise = torch.randn(args.batch, 4, side, side, generator=generator).to(args.device)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device != "cpu"):
            return compute(vae, picture, noise)

    trainer.run(loss)


if __name__ == "__main__":
    main()
