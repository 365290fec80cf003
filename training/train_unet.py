"""Train the UNet on cached latents and cached hidden states of the frozen text encoder.

    python -m training.train_unet [--work FOLDER] [--scenes] [--minutes 60] [--resume] [--device cuda]

v-prediction (https://arxiv.org/abs/2202.00512): at high noise the target is nearly the picture itself, which is
what a network trained for minutes must learn first; epsilon would be nearly its input.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from training import networks
from training.latents import EVEN, Cache, Emphasis
from training.loop import Plan, Trainer, averaged
from training.scene_latents import SceneCache, load_cache
from training.tokenizer import Encoder
from training.train_text import Regressor
from training.workspace import add_scenes_argument, add_training_arguments

NOISE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}
"""The noise schedule of Stable Diffusion (https://arxiv.org/abs/2112.10752)."""


def stratified_times(count: int, generator: torch.Generator) -> Tensor:
    """Timesteps (count,) that cover the whole range of noise evenly, so that a batch's loss is far less noisy."""
    return ((torch.arange(count) + torch.rand(count, generator=generator)) / count * 1000).long().clamp(0, 999)


@dataclass(frozen=True)
class Noise:
    """The forward process: alpha and sigma at every timestep."""

    alphas: Tensor

    @staticmethod
    def on(device: str) -> Noise:
        """The noise of `NOISE`."""
        return Noise(DDPMScheduler(**NOISE).alphas_cumprod.to(device))

    def at(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of picture and noise at the timesteps (B,): (B, 1, 1, 1) each."""
        alphas = self.alphas[times][:, None, None, None]
        return alphas.sqrt(), (1 - alphas).sqrt()

    def add(self, z: Tensor, times: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents with noise at the timesteps, and the v that belongs to them."""
        noise = torch.randn(z.shape, generator=generator).to(z.device)
        a, s = self.at(times)
        return a * z + s * noise, a * noise - s * z


@dataclass(frozen=True)
class Pool:
    """Captions drawn and encoded once: their pictures' latents (N, 4, 16, 16), and what the text encoders make of them.

    `whole` (N,) is true where a caption says all that makes the picture, its background too.
    """

    captions: list[str]
    latents: Tensor
    whole: Tensor
    encoded: tuple[Tensor, ...]

    @staticmethod
    @torch.no_grad()
    def draw(
        cache: Cache | SceneCache,
        tokens: Encoder,
        encode: Callable[[Tensor], tuple[Tensor, ...]],
        size: int,
        device: str,
        emphasis: Emphasis = EVEN,
    ) -> Pool:
        """The same for every run, and unlike what `train_text` drew. `encode` takes ids (B, 77); float16 is kept."""
        captions, latents, whole, encoded = [], [], [], []
        for start in range(0, size, 256):
            texts, z, means = cache.draw(
                min(256, size - start), torch.Generator().manual_seed(7_000_000 + start), emphasis
            )
            captions += texts
            latents.append(z)
            whole.append((z == means).flatten(1).all(1))
            encoded.append([each.half() for each in encode(torch.tensor(tokens(texts), device=device))])
        print(f"{size} captions encoded", flush=True)
        return Pool(
            captions, torch.cat(latents).to(device), torch.cat(whole), tuple(map(torch.cat, zip(*encoded, strict=True)))
        )


def load_text(work: Path, tokens: Encoder, device: str, scenes: bool = False) -> Regressor:
    """The trained text encoder of `train_text`."""
    text = Regressor(tokens, scenes).eval()
    text.load_state_dict(averaged(work / "text.pt"))
    return text.to(device)


def main() -> None:
    """Train and keep `unet.pt` in the work folder."""
    parser = add_training_arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0]), 60, 64, 1e-3)
    parser.add_argument("--pool", type=int, default=24_576, help="captions encoded in advance (30 KB each)")
    Emphasis.add_arguments(add_scenes_argument(parser))
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokens, cache = Encoder(args.work / "tokenizer"), load_cache(args.work, args.scenes)
    text = load_text(args.work, tokens, args.device, args.scenes)
    pool = Pool.draw(cache, tokens, text.encode, args.pool, args.device, Emphasis.asked(args))
    (hidden,) = pool.encoded
    unet = (networks.unet_256() if args.scenes else networks.unet()).to(args.device, memory_format=torch.channels_last)
    trainer = Trainer(unet, Plan.of(args, average=0.998), args.work / "unet.pt")
    if args.resume:
        trainer.load()
    noise = Noise.on(args.device)
    forward = torch.compile(unet) if args.compile else unet

    def loss(step: int, progress: float, generator: torch.Generator) -> Tensor:
        which = torch.randint(len(hidden), (args.batch,), generator=generator).to(args.device)
        times = stratified_times(args.batch, generator).to(args.device)
        noisy, target = noise.add(pool.latents[which], times, generator)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16 or args.device != "cpu"):
            out = forward(noisy.contiguous(memory_format=torch.channels_last), times, hidden[which].float()).sample
        return (out.float() - target).square().mean()

    trainer.run(loss)


if __name__ == "__main__":
    main()
