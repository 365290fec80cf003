"""Draw scenes and encode them once, so that the later stages never touch pixels.

    python -m training.scene_latents [--work FOLDER] [--count 19340] [--device cuda]

Scene number i is the same for ever: even ones are each thing of each style in turn, as it is, so that 9,670 hold
every picture once; odd ones are of the other kinds. Makes `scenes/NUMBER.pt` with the latents of 512 scenes each,
(512, 32, 16, 16) float16 as the VAE gives them. Run again it goes on where it ended; where the VAE has been trained
since, delete the folder.
"""

from __future__ import annotations

import argparse
import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training import networks, scenes, vocabulary
from training.drawings import Drawings
from training.latents import EVEN, Cache, Emphasis
from training.loop import averaged
from training.scenes import Scene
from training.vocabulary import Thing
from training.workspace import add_work_argument

CHUNK, BATCH = 512, 8


class Numbered:
    """The scenes by number."""

    def __init__(self, things: list[Thing], drawings: Drawings) -> None:
        self.things, self.drawings = things, drawings
        by_code = {thing.code: thing for thing in things}
        self.single = [(by_code[code], style) for style, code in drawings.rows if code in by_code]

    def __call__(self, number: int) -> tuple[Scene, random.Random]:
        """A scene, and the stream that composes it."""
        rng = random.Random(f"scene {number}")
        if number % 2:
            return scenes.sample(self.things, self.drawings, rng, least=scenes.ALONE), rng
        return scenes.alone(*self.single[number // 2 % len(self.single)], rng), rng


@dataclass
class SceneCache:
    """Latents of scenes, scaled to unit spread, with the scenes to caption them by."""

    latents: Tensor
    scenes: list[Scene]
    scale: float

    @staticmethod
    def load(work: Path) -> SceneCache:
        """Read what `main` wrote."""
        numbered = Numbered(vocabulary.load(work), Drawings.load(work))
        latents = torch.cat([torch.load(path, weights_only=True) for path in sorted((work / "scenes").glob("*.pt"))])
        scale = 1 / latents[:4096].float().std().item()
        listed = [numbered(number)[0] for number in range(len(latents))]
        return SceneCache((latents.float() * scale).half(), listed, scale)

    def draw(
        self, size: int, generator: torch.Generator, emphasis: Emphasis = EVEN
    ) -> tuple[list[str], Tensor, Tensor]:
        """As `latents.Cache.draw`, all scenes alike: random captions, and twice the latents (size, 32, 16, 16) float32.

        What a caption leaves open is the mean of what is drawn for it in the long run.
        """
        which = torch.randint(len(self.scenes), (size,), generator=generator)
        rng = random.Random(int(torch.randint(2**31, (1,), generator=generator)))
        latents = self.latents[which].float()
        return [scenes.caption(self.scenes[i], rng).text for i in which.tolist()], latents, latents


def load_cache(work: Path, of_scenes: bool) -> Cache | SceneCache:
    """The latents of the model of 256 or of 128 pixels."""
    return SceneCache.load(work) if of_scenes else Cache.load(work)


@torch.no_grad()
def main() -> None:
    """Encode with the averaged weights of the VAE; the scale goes to `latents.pt`, where the export looks for it."""
    parser = add_work_argument(argparse.ArgumentParser(description=__doc__.splitlines()[0]))
    parser.add_argument("--count", type=int, default=2 * 9670)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    drawings = Drawings.load(args.work)
    numbered = Numbered(vocabulary.load(args.work), drawings)
    vae = networks.vae_256().eval().to(args.device, memory_format=torch.channels_last)
    vae.load_state_dict(averaged(args.work / "vae.pt"))
    folder = args.work / "scenes"
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, args.count, CHUNK):
        path = folder / f"{start:06d}.pt"
        if path.exists():
            continue
        made = []
        for first in range(start, start + CHUNK, BATCH):
            listed = [numbered(number) for number in range(first, first + BATCH)]
            pixels = np.stack([scenes.compose(scene, drawings, rng).pixels for scene, rng in listed])
            picture = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(args.device).float() / 127.5 - 1
            made.append(vae.encode(picture.contiguous(memory_format=torch.channels_last)).latent_dist.mean.cpu())
        torch.save(torch.cat(made).half(), path.with_suffix(".partial"))
        os.replace(path.with_suffix(".partial"), path)
        print(f"{start + CHUNK} of {args.count}", flush=True)
    torch.save({"scale": SceneCache.load(args.work).scale}, args.work / "latents.pt")


if __name__ == "__main__":
    main()
