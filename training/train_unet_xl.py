"""Train the UNet of the SDXL shape, from the trained one of Stable Diffusion's.

    python -m training.train_unet_xl [--work FOLDER] [--minutes 40] [--resume] [--device cuda]

What the two shapes have in common starts as it was trained; the second text encoder's part of the cross-attention and
the added conditions start at zero. As for SDXL (Podell et al. 2023, https://arxiv.org/abs/2307.01952), pictures are
sometimes cropped, and their crops told; and zeros stand for the empty prompt.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from training import networks
from training.latents import Cache, Emphasis
from training.loop import Plan, Trainer, averaged
from training.tokenizer import Encoder
from training.train_text_xl import load_encoders
from training.train_unet import Noise, Pool, stratified_times
from training.workspace import add_training_arguments

SIDE, FACTOR = 16, 8
CROPPED, FARTHEST = 0.15, 4
"""How many pictures are cropped, and by how many latents at most, from the top and from the left."""


@torch.no_grad()
def start_from(weights: dict[str, Tensor], unet: UNet2DConditionModel) -> None:
    """Fills an SDXL-shaped UNet from the weights of `networks.unet()`."""
    made = unet.state_dict()
    for name, value in made.items():
        if name.startswith("add_embedding.linear_2."):
            value.zero_()
        elif name in weights:
            old = weights[name]
            if "proj_in" in name or "proj_out" in name:
                old = old.reshape(value.shape)  # a 1x1 convolution there, a linear layer here
            if old.shape == value.shape:
                value.copy_(old)
            else:  # keys and values of text that is wider here
                value.zero_()[:, : old.shape[1]] = old
    unet.load_state_dict(made)


def crop(z: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Latents (B, 4, 16, 16) with rows (B,) cut off at the top and columns (B,) at the left; the far border repeats."""
    place = torch.arange(SIDE, device=z.device)
    rows = (place + down[:, None]).clamp(max=SIDE - 1)[:, None, :, None].expand_as(z)
    columns = (place + right[:, None]).clamp(max=SIDE - 1)[:, None, None, :].expand_as(z)
    return z.gather(2, rows).gather(3, columns)


def time_ids(down: Tensor, right: Tensor) -> Tensor:
    """SDXL's six sizes in pixels (B, 6): the whole picture's, where the crop begins, and the crop's."""
    side = torch.full_like(down, SIDE * FACTOR)
    return torch.stack([side, side, FACTOR * down, FACTOR * right, side, side], 1).float()


def main() -> None:
    """Train and keep `unet_xl.pt` in the work folder."""
    parser = add_training_arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0]), 40, 32, 8e-4)
    parser.add_argument("--pool", type=int, default=20_480, help="captions encoded in advance (39 KB each)")
    Emphasis.add_arguments(parser)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokens, cache = Encoder(args.work / "tokenizer"), Cache.load(args.work)
    encoders = load_encoders(args.work, tokens, args.device)
    pool = Pool.draw(cache, tokens, encoders.encode, args.pool, args.device, Emphasis.asked(args))
    hidden, pooled = pool.encoded
    empty = torch.tensor([not caption for caption in pool.captions], device=args.device)
    hidden[empty], pooled[empty] = 0, 0
    unet: nn.Module = networks.unet_xl()
    start_from(averaged(args.work / "unet.pt"), unet)
    trainer = Trainer(
        unet.to(args.device, memory_format=torch.channels_last),
        Plan.of(args, average=0.998),
        args.work / "unet_xl.pt",
    )
    if args.resume:
        trainer.load()
    noise = Noise.on(args.device)
    forward = torch.compile(unet) if args.compile else unet

    def loss(step: int, progress: float, generator: torch.Generator) -> Tensor:
        which = torch.randint(len(hidden), (args.batch,), generator=generator).to(args.device)
        times = stratified_times(args.batch, generator).to(args.device)
        shift = torch.randint(FARTHEST + 1, (2, args.batch), generator=generator)
        down, right = (shift * (torch.rand(args.batch, generator=generator) < CROPPED)).to(args.device)
        noisy, target = noise.add(crop(pool.latents[which], down, right), times, generator)
        added = {"text_embeds": pooled[which].float(), "time_ids": time_ids(down, right)}
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device != "cpu"):
            noisy = noisy.contiguous(memory_format=torch.channels_last)
            out = forward(noisy, times, hidden[which].float(), added_cond_kwargs=added).sample
        return (out.float() - target).square().mean()

    trainer.run(loss)


if __name__ == "__main__":
    main()
