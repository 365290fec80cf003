"""Train the 256-pixel autoencoder on the artwork over random backgrounds.

    python -m training.train_vae [--work FOLDER] [--minutes 90] [--crop 128] [--from FOLDER] [--resume]

Most of a picture is flat, and the network is convolutional: so `--crop 128` trains on windows a quarter as large, as
random in place and scale as in colour. Group normalisation sees other statistics there than in whole pictures, so the
last part of the training, with `--resume --crop 256`, is on those.

`--decoder-only` leaves the encoder as it is in `vae.pt`, so that cached latents and the UNet stay good, and keeps the
whole in `decoder.pt`, which the export prefers.

`--from` starts from a trained autoencoder of one level less (`grow.py`), which it also imitates in the first steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from training import networks
from training.colours import TABLE
from training.grow import Elder, grow
from training.loop import Plan, Trainer, averaged
from training.workspace import add_training_arguments

KL_WEIGHT = 2e-5
"""Just enough to keep the latents' spread bounded; reconstruction is what counts."""
EDGE_WEIGHT = 1.0
"""Of the error in the differences between neighbours, where blur and ripples show."""
IMITATION = 400
"""Steps in which the elder's latents and features count, less and less."""


def start(vae: AutoencoderKL) -> AutoencoderKL:
    """Make it begin as a plain autoencoder: with noise of e^0 it learns nothing for hundreds of steps."""
    channels = vae.config.latent_channels
    with torch.no_grad():
        vae.quant_conv.weight[channels:] *= 0.01
        vae.quant_conv.bias[channels:] = -6.0
    return vae


class Pictures:
    """Windows of the artwork, at random scales, in random hues, over random backgrounds.

    `rgba` (N, H, W, 4) uint8 with straight alpha may be a memory map.
    """

    def __init__(self, rgba: np.ndarray, device: str) -> None:
        self.rgba, self.device = rgba, device
        self.table = torch.from_numpy(TABLE).float() / 255

    def batch(self, size: int, side: int, generator: torch.Generator) -> Tensor:
        """(size, 3, side, side) float32 in -1..1, channels last."""
        made = torch.stack([self._one(side, generator) for _ in range(size)])
        return (made * 2 - 1).to(self.device).contiguous(memory_format=torch.channels_last)

    def _one(self, side: int, generator: torch.Generator) -> Tensor:
        def chance() -> float:
            return torch.rand((), generator=generator).item()

        def whole(below: int) -> int:
            return int(torch.randint(below, (), generator=generator))

        picture = self._background(side, chance, whole)
        for _ in range(1 + (chance() < 0.2)):
            rgba = torch.from_numpy(np.array(self.rgba[whole(len(self.rgba))])).permute(2, 0, 1).float() / 255
            if chance() < 0.15:
                rgba = torch.cat([rgba[:3][torch.randperm(3, generator=generator)], rgba[3:]])
            if chance() < 0.4:
                rgba = shrink(rgba, int(rgba.shape[1] * (0.35 + 0.65 * chance())))
            picture = lay(rgba, picture, chance)
        return picture

    def _background(self, side: int, chance: Callable[[], float], whole: Callable[[int], int]) -> Tensor:
        """One of the named colours, any colour, or a passage between two: (3, side, side) in 0..1."""
        kind = chance()
        first, second = (self.table[whole(len(TABLE))] for _ in range(2))
        if kind > 0.5:
            first, second = (torch.tensor([chance(), chance(), chance()]) for _ in range(2))
        if chance() < 0.8:
            return first[:, None, None].expand(3, side, side)
        part = torch.linspace(0, 1, side)[None, :, None]
        return (first[:, None, None] * (1 - part) + second[:, None, None] * part).expand(3, side, side)


def shrink(rgba: Tensor, side: int) -> Tensor:
    """A smaller picture (4, side, side), its colours weighed by their alpha."""
    weighed = torch.cat([rgba[:3] * rgba[3:], rgba[3:]])
    small = F.interpolate(weighed[None], (side, side), mode="bilinear", antialias=True)[0]
    return torch.cat([small[:3] / small[3:].clamp(min=1e-3), small[3:]]).clamp(0, 1)


def lay(rgba: Tensor, picture: Tensor, chance: Callable[[], float]) -> Tensor:
    """The artwork (4, H, W) somewhere over the picture (3, side, side), cut where it is larger.

    A larger one is cut where something is drawn: of two windows the one with more in it.
    """
    side, own = picture.shape[1], rgba.shape[1]
    if own > side:
        corners = [(int(chance() * (own - side + 1)), int(chance() * (own - side + 1))) for _ in range(2)]
        windows = [rgba[:, y : y + side, x : x + side] for y, x in corners]
        window = max(windows, key=lambda each: each[3].sum().item())
        return window[:3] * window[3:] + picture * (1 - window[3:])
    y, x = (int(chance() * (side - own + 1)) for _ in range(2))
    made = picture.clone()
    under = made[:, y : y + own, x : x + own]
    under[:] = rgba[:3] * rgba[3:] + under * (1 - rgba[3:])
    return made


def edges(error: Tensor) -> Tensor:
    """Mean absolute difference of neighbours, of the error (B, 3, H, W) at its own and at half its size."""
    half = F.avg_pool2d(error, 2)
    return sum(
        (each[..., 1:, :] - each[..., :-1, :]).abs().mean() + (each[..., 1:] - each[..., :-1]).abs().mean()
        for each in (error, half)
    )


def loss_of(vae: AutoencoderKL, picture: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """L1 + L2 + edges + a little KL, and the latents' means.

    picture: (B, 3, H, W), noise: (B, C, H/f, W/f) standard normal.
    """
    mean, log_variance = vae.quant_conv(vae.encoder(picture)).float().chunk(2, dim=1)
    log_variance = log_variance.clamp(-30, 20)
    latent = mean + noise * torch.exp(0.5 * log_variance)
    error = vae.decoder(vae.post_quant_conv(latent)).float() - picture
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    return error.abs().mean() + 2 * error.square().mean() + EDGE_WEIGHT * edges(error) + KL_WEIGHT * kl, mean


def main() -> None:
    """Train and keep `vae.pt` in the work folder."""
    parser = add_training_arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0]), 90, 8, 6e-4)
    parser.add_argument("--crop", type=int, default=128, help="side of the windows, in pixels")
    parser.add_argument("--decoder-only", action="store_true", help="with the encoder of vae.pt frozen")
    parser.add_argument("--from", dest="elder", type=Path, help="folder of an autoencoder to grow from")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    pictures = Pictures(np.load(args.work / "artwork.npy", mmap_mode="r"), args.device)
    vae, elder = start(networks.vae_256()), None
    if args.elder:
        elder = Elder(AutoencoderKL.from_pretrained(args.elder, dtype=torch.float32).to(args.device))
        grow(elder.vae, vae)
    vae = vae.to(args.device, memory_format=torch.channels_last)
    if args.decoder_only:
        vae.load_state_dict(averaged(args.work / "vae.pt"))
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    path = args.work / ("decoder.pt" if args.decoder_only else "vae.pt")
    trainer = Trainer(vae, Plan.of(args, average=0.995), path)
    if args.resume:
        trainer.load()
    side, factor = args.crop, 2 ** (len(vae.config.block_out_channels) - 1)

    def loss(step: int, progress: float, generator: torch.Generator) -> Tensor:
        picture = pictures.batch(args.batch, side, generator)
        shape = (args.batch, vae.config.latent_channels, side // factor, side // factor)
        noise = torch.randn(shape, generator=generator).to(args.device)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16 or args.device != "cpu"):
            error, mean = loss_of(vae, picture, noise)
            if elder and step < IMITATION:
                error = error + (1 - step / IMITATION) * elder.distance(vae, picture, mean)
        return error

    trainer.run(loss)


if __name__ == "__main__":
    main()
