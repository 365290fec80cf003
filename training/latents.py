"""Encode every picture on several backgrounds once, so that the later stages never touch pixels.

    python -m training.latents [--work FOLDER] [--backgrounds 12] [--scale FACTOR]

Makes `latents.pt`: `latents` (P, K, 4, 16, 16) float16, scaled to unit spread; `colours` (P, K) int64,
indices into `colours.NAMES`; `scale` float, the VAE's scaling factor; `contrast` (P, K) float32, how far each picture
stands out from its background. P counts pictures style by style.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training import artwork, captions, concepts, networks
from training.colours import NAMES, TABLE
from training.loop import averaged
from training.workspace import add_work_argument


@dataclass(frozen=True)
class Emphasis:
    """How many times as often as others some pictures are drawn."""

    favourites: float = 1.0
    """What people ask for first."""
    faint: float = 1.0
    """What stands out less from its background than most do: up to so often."""
    icons: tuple[str, ...] = ()
    """Concepts to be learnt anew, because their words meant something else before."""
    anew: float = 20.0
    """How often those."""

    def __post_init__(self) -> None:
        if unknown := set(self.icons) - {each.icon for each in concepts.load()}:
            raise ValueError(f"no concept is drawn as {', '.join(sorted(unknown))}")

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Gives a training script the flags that `asked` reads."""
        parser.add_argument("--favour", type=float, default=1.0, help="how often what people ask for first is drawn")
        parser.add_argument("--favour-faint", type=float, default=1.0, help="the same for what hardly shows, at most")
        parser.add_argument("--anew", nargs="+", default=(), metavar="ICON", help="concepts whose words have changed")

    @staticmethod
    def asked(args: argparse.Namespace) -> Emphasis:
        """What the flags say."""
        return Emphasis(args.favour, args.favour_faint, tuple(args.anew))

    def of(self, concept: concepts.Concept) -> float:
        """For a concept, whatever its background."""
        return self.anew if concept.icon in self.icons else self.favourites if concept.favourite else 1.0


EVEN = Emphasis()
"""All alike."""


@dataclass
class Cache:
    """Latents with what is needed to caption them."""

    latents: Tensor
    colours: Tensor
    scale: float
    contrast: Tensor

    @staticmethod
    def load(work: Path) -> Cache:
        """Read what `main` wrote."""
        return Cache(**torch.load(work / "latents.pt", weights_only=True))

    def __post_init__(self) -> None:
        self.concepts = concepts.load()
        self.styles = list(artwork.STYLES)
        self.mean = self.latents.float().mean((0, 1))

    def draw(
        self, size: int, generator: torch.Generator, emphasis: Emphasis = EVEN
    ) -> tuple[list[str], Tensor, Tensor]:
        """Random captions; the latents of one picture each; and the mean of all pictures that each may mean.

        Both are (size, 4, 16, 16) float32.
        """
        often = torch.tensor([emphasis.of(each) for each in self.concepts] * len(self.styles))
        faintness = (self.contrast.median() / self.contrast.clamp(min=1e-3)).square().clamp(1, emphasis.faint)
        drawn = torch.multinomial((often[:, None] * faintness).flatten(), size, replacement=True, generator=generator)
        picture, which = drawn // self.latents.shape[1], drawn % self.latents.shape[1]
        rng = random.Random(int(torch.randint(2**31, (1,), generator=generator)))
        latents = self.latents[picture, which].float()
        texts, means = [], latents.clone()
        for i, (p, k) in enumerate(zip(picture.tolist(), which.tolist(), strict=True)):
            style, concept = divmod(p, len(self.concepts))
            colour = NAMES[self.colours[p, k]]
            caption = captions.caption(self.concepts[concept], self.styles[style], colour, rng)
            texts.append(caption.text)
            if not caption.says_colour:
                means[i] = self.latents[p].float().mean(0) if caption.text else self.mean
        return texts, latents, means


def contrast(rgba: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Root mean square distance of what is drawn from the background's colour, 0..1.

    rgba: (N, H, W, 4), background: (N, 3), both uint8; returns (N,) float32.
    """
    alpha = rgba[..., 3].astype(np.float32) / 255
    distance = (rgba[..., :3].astype(np.float32) - background[:, None, None]) / 255
    mean = (distance**2).mean(-1) * alpha
    return np.sqrt(mean.sum((1, 2)) / np.maximum(alpha.sum((1, 2)), 1))


@torch.no_grad()
def main() -> None:
    """Encode with the averaged weights of the VAE."""
    parser = add_work_argument(argparse.ArgumentParser(description=__doc__.splitlines()[0]))
    parser.add_argument("--backgrounds", type=int, default=12, help="backgrounds per picture, of the twelve")
    parser.add_argument("--scale", type=float, help="scaling factor to keep, where networks were trained with it")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    vae = networks.vae().eval().to(args.device, memory_format=torch.channels_last)
    vae.load_state_dict(averaged(args.work / "vae.pt"))
    rgba = artwork.load(args.work).reshape(-1, artwork.SIZE, artwork.SIZE, 4)
    generator = torch.Generator().manual_seed(0)
    colours = torch.stack([torch.randperm(len(NAMES), generator=generator)[: args.backgrounds] for _ in rgba])
    latents, contrasts = [], []
    for p in range(0, len(rgba), 8):
        rows = colours[p : p + 8]
        pictures = rgba[p : p + 8].repeat(args.backgrounds, axis=0)
        behind = TABLE[rows.flatten()]
        contrasts.append(torch.from_numpy(contrast(pictures, behind)).reshape(rows.shape))
        pixels = torch.from_numpy(artwork.composite(pictures, behind)).to(args.device)
        mean = vae.encode(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist.mean
        latents.append(mean.cpu().reshape(*rows.shape, *mean.shape[1:]))
    stacked = torch.cat(latents)
    scale = args.scale or 1 / stacked.std().item()
    print(f"mean {stacked.mean(dim=(0, 1, 3, 4)).tolist()} scaling factor {scale:.5f}")
    kept = {"latents": (stacked * scale).half(), "colours": colours, "scale": scale, "contrast": torch.cat(contrasts)}
    torch.save(kept, args.work / "latents.pt")


if __name__ == "__main__":
    main()
