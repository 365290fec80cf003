"""Train the UNet on cached latents and cached hidden states of the frozen text encoder.

    python -m training.train_unet [--work FOLDER] [--minutes 60] [--resume] [--device cuda]

v-prediction (https://arxiv.org/abs/2202.00512): at high noise the target is nearly the picture itself, which is
what a network trained for minutes must learn first; epsilon would be nearly its input.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from training import networks
from training.latents import Cache
from training.loop import Plan, Trainer, averaged
from training.tokenizer import Encoder
from training.train_text import Regressor
from training.workspace import add_training_arguments

NOISE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}
"""The noise schedule of Stable Diffusion (https://arxiv.org/abs/2112.10752)."""


@torch.no_grad()
def encode_pool(cache: Cache, tokens: Encoder, model: Regressor, size: int, device: str) -> tuple[Tensor, Tensor]:
    """Captions drawn and encoded once: hidden states (size, 77, WIDTH) float16, latents (size, 4, 16, 16)."""
    hidden, latents = [], []
    for start in range(0, size, 256):
        texts, z, _ = cache.draw(min(256, size - start), torch.Generator().manual_seed(7_000_000 + start))
        hidden.append(model.text(input_ids=torch.tensor(tokens(texts), device=device)).last_hidden_state.half())
        latents.append(z)
    return torch.cat(hidden), torch.cat(latents).to(device)


def main() -> None:
    """Train and keep `unet.pt` in the work folder."""
    parser = add_training_arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0]), 60, 64, 1e-3)
    parser.add_argument("--pool", type=int, default=24_576, help="captions encoded in advance (30 KB each)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokens, cache = Encoder(args.work / "tokenizer"), Cache.load(args.work)
    text = Regressor(tokens).eval()
    text.load_state_dict(averaged(args.work / "text.pt"))
    hidden, latents = encode_pool(cache, tokens, text.to(args.device), args.pool, args.device)
    print(f"{len(hidden)} captions encoded", flush=True)
    unet = networks.unet().to(args.device, memory_format=torch.channels_last)
    trainer = Trainer(unet, Plan.of(args, average=0.998), args.work / "unet.pt")
    if args.resume:
        trainer.load()
    alphas = DDPMScheduler(**NOISE).alphas_cumprod.to(args.device)
    forward = torch.compile(unet) if args.compile else unet

    def loss(step: int, progress: float, generator: torch.Generator) -> Tensor:
        which = torch.randint(len(hidden), (args.batch,), generator=generator).to(args.device)
        # Stratified: every batch covers the whole range of noise evenly, so its loss is far less noisy.
        offset = torch.rand(args.batch, generator=generator)
        times = ((torch.arange(args.batch) + offset) / args.batch * 1000).long().clamp(0, 999).to(args.device)
        z = latents[which]
        noise = torch.randn(z.shape, generator=generator).to(args.device)
        a, s = (alpha[:, None, None, None].sqrt() for alpha in (alphas[times], 1 - alphas[times]))
        noisy, target = a * z + s * noise, a * noise - s * z
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device != "cpu"):
            out = forward(noisy.contiguous(memory_format=torch.channels_last), times, hidden[which].float()).sample
        return (out.float() - target).square().mean()

    trainer.run(loss)


if __name__ == "__main__":
    main()
