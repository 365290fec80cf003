"""Train the decoder further with the encoder frozen, so that cached latents and the UNet stay good.

    python -m training.train_decoder [--work FOLDER] [--minutes 10] [--resume] [--device cuda]

Starts from the averaged weights in `vae.pt`, keeps the whole autoencoder in `decoder.pt`, which the export prefers.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from training import artwork, networks
from training.colours import TABLE
from training.latents import Cache
from training.loop import Plan, Trainer, averaged
from training.workspace import add_training_arguments

NOISE = 0.02
"""Relative to the latents' spread: what the UNet hands over is never exact."""


def main() -> None:
    """Train and keep `decoder.pt` in the work folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args = add_training_arguments(parser, 10, 8, 1e-3).parse_args()
    cache, rgba = Cache.load(args.work), artwork.load(args.work)
    rgba = torch.from_numpy(rgba.reshape(-1, *rgba.shape[-3:]))
    table = torch.from_numpy(TABLE)
    vae = networks.vae().to(args.device, memory_format=torch.channels_last)
    vae.load_state_dict(averaged(args.work / "vae.pt"))
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    trainer = Trainer(vae, Plan.of(args, average=0.99), args.work / "decoder.pt")
    if args.resume:
        trainer.load()

    def loss(step: int, progress: float, generator: torch.Generator) -> Tensor:
        which = torch.randint(len(rgba), (args.batch,), generator=generator)
        back = torch.randint(cache.latents.shape[1], (args.batch,), generator=generator)
        latents = cache.latents[which, back].float()
        latents = (latents + NOISE * torch.randn(latents.shape, generator=generator)) / cache.scale
        picture = rgba[which].permute(0, 3, 1, 2).to(args.device).float() / 255
        colour = table[cache.colours[which, back]].to(args.device).float()[:, :, None, None] / 255
        picture = (picture[:, :3] * picture[:, 3:] + colour * (1 - picture[:, 3:])) * 2 - 1
        latents = latents.to(args.device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device != "cpu"):
            made = vae.decoder(vae.post_quant_conv(latents))
        error = made.float() - picture
        return error.abs().mean() + 4 * error.square().mean()

    trainer.run(loss)


if __name__ == "__main__":
    main()
