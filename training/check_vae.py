"""Measure the 256-pixel autoencoder while it trains, and draw what it makes of the first pictures.

    python -m training.check_vae [--work FOLDER] [--pictures 200] [--output FILE]

The pictures are those that the questions of kind `name` ask for. PSNR in dB, mean over pictures; the gradient ratio is
`measure.gradient_ratio`. The file shows originals above, reconstructions below.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from training import answers, measure, networks, questions, vocabulary
from training.drawings import Drawings
from training.loop import averaged
from training.workspace import add_work_argument


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: np.ndarray, batch: int = 16) -> np.ndarray:
    """Through the VAE and back, from the posterior's mean. (N, H, W, 3) uint8 both ways."""
    made = []
    for start in range(0, len(pictures), batch):
        pixels = torch.from_numpy(pictures[start : start + batch]).permute(0, 3, 1, 2).to(vae.device)
        out = vae.decode(vae.encode(pixels.float() / 127.5 - 1).latent_dist.mean).sample
        made.append(((out.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(made)


def main() -> None:
    """Measure `vae.pt` in the work folder, its averaged weights."""
    parser = add_work_argument(argparse.ArgumentParser(description=__doc__.splitlines()[0]))
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--output", type=Path, help="default: reconstructions.png in the work folder")
    args = parser.parse_args()
    drawings = Drawings.load(args.work)
    asked = [each for each in questions.load(vocabulary.load(args.work)) if each.kind == "name"][: args.pictures]
    right = np.stack([answers.shown(question, drawings) for question in asked])
    vae = networks.vae_256().eval().to(memory_format=torch.channels_last)
    vae.load_state_dict(averaged(args.work / "vae.pt"))
    made = reconstruct(vae, right)
    rows = [np.concatenate(list(pictures[:8]), 1) for pictures in (right, made)]
    Image.fromarray(np.concatenate(rows)).save(args.output or args.work / "reconstructions.png")
    print(f"PSNR {measure.psnr(made, right).mean():.2f} dB, gradient ratio {measure.gradient_ratio(made, right):.3f}")


if __name__ == "__main__":
    main()
