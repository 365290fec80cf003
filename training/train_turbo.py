"""Distil the UNet into one that needs 1 to 8 steps, for the LCM scheduler.

    python -m training.train_turbo [--work FOLDER] [--minutes 20] [--resume] [--device cuda]

A consistency model (Song et al. 2023, https://arxiv.org/abs/2303.01469; Luo et al. 2023 for latents,
https://arxiv.org/abs/2310.04378) maps every point of a path from noise to picture to the picture at its end. Here the
paths are walked to the end in advance, by the teacher with guidance, so that nothing has to be learned from the
student's own guesses. The student starts as the teacher, is given a point of a path or the end with fresh noise on it
(what LCM's sampler makes between steps), and predicts the end. Where a caption names all that makes a picture, the
picture itself is the end of every path, and serves as well.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import Tensor

from training import networks
from training.latents import Cache, Emphasis
from training.loop import Plan, Trainer, averaged
from training.tokenizer import Encoder
from training.train_unet import NOISE, Noise, Pool, load_text
from training.workspace import add_training_arguments

GUIDANCE, PATH_STEPS = 4.0, 12
"""How the teacher walks: its own guidance scale, and steps of DPM-Solver++."""
GRID = torch.arange(19, 1000, 20)
"""The 50 timesteps that LCM's sampler chooses from."""
FIRST, LATER = 999, torch.tensor([759, 499, 259])
"""The timesteps of its four steps."""
SOFT = 0.03
"""Where the pseudo-Huber loss turns from squared to absolute."""


@dataclass(frozen=True)
class Paths:
    """Paths of the teacher: points (N, S, 4, 16, 16) at timesteps (S,), their ends (N, 4, 16, 16), their captions'
    hidden states (N, 77, WIDTH)."""

    points: Tensor
    times: Tensor
    ends: Tensor
    hidden: Tensor


@torch.no_grad()
def walk(teacher: UNet2DConditionModel, hidden: Tensor, empty: Tensor, batch: int = 32) -> Paths:
    """The teacher's guided paths from fixed noise, for captions' hidden states (N, 77, WIDTH)."""
    points, ends = [], []
    for start in range(0, len(hidden), batch):
        text = hidden[start : start + batch].float()
        scheduler = DPMSolverMultistepScheduler(**NOISE, prediction_type="v_prediction")
        scheduler.set_timesteps(PATH_STEPS)
        generator = torch.Generator().manual_seed(8_000_000 + start)
        x = torch.randn(len(text), 4, 16, 16, generator=generator).to(text.device)
        both = torch.cat([empty.float().expand_as(text), text])
        path = []
        for time in scheduler.timesteps:
            path.append(x)
            out = teacher(torch.cat([x, x]), time.to(text.device), both).sample
            unguided, guided = out.chunk(2)
            x = scheduler.step(unguided + GUIDANCE * (guided - unguided), time, x).prev_sample
        points.append(torch.stack(path, 1))
        ends.append(x)
        if start % 256 == 0:
            print(f"{start + len(text)} of {len(hidden)} paths", flush=True)
    return Paths(torch.cat(points), scheduler.timesteps.to(hidden.device), torch.cat(ends), hidden)


def draw_times(count: int, generator: torch.Generator) -> Tensor:
    """Timesteps (count,) of LCM's grid: a third the first of all, a third those of four steps, a third any."""
    kind = torch.randint(3, (count,), generator=generator)
    later = LATER[torch.randint(len(LATER), (count,), generator=generator)]
    any_of_them = GRID[torch.randint(len(GRID), (count,), generator=generator)]
    return torch.where(kind == 0, FIRST, torch.where(kind == 1, later, any_of_them))


def main() -> None:
    """Distil and keep `turbo.pt` in the work folder."""
    parser = add_training_arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0]), 20, 32, 4e-4)
    parser.add_argument("--pool", type=int, default=16_384, help="captions encoded in advance (30 KB each)")
    parser.add_argument("--paths", type=int, default=1_536, help="paths that the teacher walks in advance")
    Emphasis.add_arguments(parser)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokens, cache = Encoder(args.work / "tokenizer"), Cache.load(args.work)
    text = load_text(args.work, tokens, args.device)
    pool = Pool.draw(cache, tokens, text.encode, args.pool, args.device, Emphasis.asked(args))
    (hidden,) = pool.encoded
    student = networks.unet().to(args.device, memory_format=torch.channels_last)
    student.load_state_dict(averaged(args.work / "unet.pt"))
    with torch.no_grad():
        (empty,) = text.encode(torch.tensor(tokens([""]), device=args.device))
    said = [index for index, caption in enumerate(pool.captions) if caption]
    paths = walk(student.eval(), hidden[said[: args.paths]], empty)
    whole = pool.whole.nonzero().flatten()
    trainer = Trainer(student.train(), Plan.of(args, average=0.995), args.work / "turbo.pt")
    if args.resume:
        trainer.load()
    noise = Noise.on(args.device)
    forward = torch.compile(student) if args.compile else student

    def loss(step: int, progress: float, generator: torch.Generator) -> Tensor:
        quarter = args.batch // 4
        picture = whole[torch.randint(len(whole), (2 * quarter,), generator=generator)].to(args.device)
        path = torch.randint(len(paths.ends), (args.batch - 2 * quarter,), generator=generator).to(args.device)
        point = torch.randint(len(paths.times), (quarter,), generator=generator).to(args.device)
        ends = torch.cat([paths.ends[path], pool.latents[picture]])
        times = draw_times(args.batch - quarter, generator).to(args.device)
        times = torch.cat([paths.times[point], times])
        noisy, _ = noise.add(ends, times, generator)
        noisy[:quarter] = paths.points[path[:quarter], point]
        words = torch.cat([paths.hidden[path], hidden[picture]]).float()
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device != "cpu"):
            out = forward(noisy.contiguous(memory_format=torch.channels_last), times, words).sample
        a, s = noise.at(times)
        error = (a * noisy - s * out.float() - ends).square()
        return ((error + SOFT**2).sqrt() - SOFT).mean()

    trainer.run(loss)


if __name__ == "__main__":
    main()
