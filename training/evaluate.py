"""Measure an exported model on fixed prompts.

    python -m training.evaluate [--work FOLDER] [--model FOLDER] [--guidance 4] [--steps 20] [--json FILE]

A model of 256 pixels is asked what `questions.py` wrote down, each prompt with a seed of its own; `answers.py` says
what is right. `--kinds` takes some kinds of questions alone, `--prompts` the first so many of each. The VAE's PSNR and
gradient ratio are those of the right pictures of the first kind.

For one of 128 pixels, 200 prompts are drawn from `concepts.txt`. Prints top-1 and top-5 retrieval among all artwork of
the same style on the same background (`measure.py` says in which feature space), background accuracy, and the VAE's
reconstruction PSNR; and, as the ceiling, the same retrieval for the VAE's reconstructions of the right pictures.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from training import answers, artwork, captions, concepts, drawings, measure, questions, vocabulary
from training.check_vae import reconstruct
from training.colours import NAMES, TABLE
from training.drawings import Drawings
from training.export import OUTPUT
from training.workspace import add_work_argument

PROMPTS, FIRST_SEED = 200, 90_000
"""Training draws from torch streams of its own; these seeds make initial latents that it never saw."""
Prompt = tuple[int, int, int]
"""(style, concept, colour) as indices."""


def fixed_prompts(styles: int, count: int, number: int = PROMPTS) -> list[Prompt]:
    """The same prompts for ever: different concepts, styles and colours at random."""
    rng = random.Random("darkroom")
    chosen = rng.sample(range(count), number)
    return [(rng.randrange(styles), concept, rng.randrange(len(NAMES))) for concept in chosen]


def generate(
    pipe: DiffusionPipeline, texts: list[str], seeds: list[int], guidance: float, steps: int, batch: int = 25
) -> np.ndarray:
    """Pictures (N, H, W, 3) uint8; picture i has its own generator seeded with seeds[i]."""
    made = []
    for start in range(0, len(texts), batch):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch]]
        out = pipe(
            texts[start : start + batch],
            generator=generators,
            guidance_scale=guidance,
            num_inference_steps=steps,
            output_type="np",
        )
        made.append((out.images * 255).round().astype(np.uint8))
    return np.concatenate(made)


def retrieve(rgba: np.ndarray, prompts: list[Prompt], made: np.ndarray) -> np.ndarray:
    """Rank of the right picture for each made one. rgba: (styles, concepts, H, W, 4); returns (M,) int."""
    groups = defaultdict(list)
    for index, (style, _, colour) in enumerate(prompts):
        groups[style, colour].append(index)
    found = np.empty(len(prompts), int)
    for (style, colour), members in groups.items():
        gallery = artwork.composite(rgba[style], np.repeat(TABLE[colour][None], rgba.shape[1], 0))
        found[members] = measure.ranks(made[members], gallery, np.array([prompts[i][1] for i in members]))
    return found


def evaluate(pipe: DiffusionPipeline, rgba: np.ndarray, guidance: float, steps: int, number: int) -> dict:
    """Everything that is printed, as a dictionary ready for JSON."""
    names, styles = concepts.load(), list(artwork.STYLES)
    prompts = fixed_prompts(len(styles), len(names), number)
    texts = [captions.full(names[c].name, styles[s], NAMES[b]) for s, c, b in prompts]
    made = generate(pipe, texts, [FIRST_SEED + i for i in range(number)], guidance, steps)
    colours = np.array([b for _, _, b in prompts])
    right = artwork.composite(np.stack([rgba[s, c] for s, c, _ in prompts]), TABLE[colours])
    again = reconstruct(pipe.vae, right)
    rank, ceiling = retrieve(rgba, prompts, made), retrieve(rgba, prompts, again)
    return {
        "prompts": number,
        "guidance": guidance,
        "steps": steps,
        "scheduler": type(pipe.scheduler).__name__,
        "top1": float((rank == 0).mean()),
        "top5": float((rank < 5).mean()),
        "ceiling_top1": float((ceiling == 0).mean()),
        "ceiling_top5": float((ceiling < 5).mean()),
        "background": float(measure.backgrounds_right(made, colours).mean()),
        "vae_psnr": float(measure.psnr(again, right).mean()),
        "missed": [f"{t}: rank {r + 1}" for t, r in zip(texts, rank, strict=True) if r >= 5],
    }


def evaluate_256(
    pipe: DiffusionPipeline, work: Path, guidance: float, steps: int, number: int, kinds: list[str], folder: Path | None
) -> dict:
    """The measures of `answers.py` for the model, and for right pictures (`ceiling`); strangers' go to the folder."""
    things, artworks = vocabulary.load(work), Drawings.load(work)
    asked = [(i, question) for i, question in enumerate(questions.load(things)) if question.kind in kinds]
    asked = [pair for kind in kinds for pair in [each for each in asked if each[1].kind == kind][:number]]
    these = [question for _, question in asked]
    made = generate(pipe, [q.prompt for q in these], [FIRST_SEED + i for i, _ in asked], guidance, steps)
    right = np.stack([answers.shown(question, artworks) for question in these])
    again = reconstruct(pipe.vae, first := right[[question.kind == kinds[0] for question in these]])
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        for (index, _), picture in zip(asked, made, strict=True):
            Image.fromarray(picture).save(folder / f"{index:04d}.png")
    return {
        "prompts": len(these),
        "guidance": guidance,
        "steps": steps,
        "scheduler": type(pipe.scheduler).__name__,
        **answers.measured(made, these, things, artworks),
        "ceiling": answers.measured(right, these, things, artworks),
        "vae_psnr": float(measure.psnr(again, first).mean()),
        "vae_gradient_ratio": measure.gradient_ratio(again, first),
    }


def main() -> None:
    """Evaluate and print."""
    parser = add_work_argument(argparse.ArgumentParser(description=__doc__.splitlines()[0]))
    parser.add_argument("--model", type=Path, default=OUTPUT)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the result here too")
    parser.add_argument("--kinds", nargs="+", choices=questions.KINDS, default=questions.KINDS, help="at 256 pixels")
    parser.add_argument("--pictures", type=Path, help="folder to keep the pictures in, at 256 pixels")
    args = parser.parse_args()
    pipe = DiffusionPipeline.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    if pipe.vae.config.sample_size == drawings.SIZE:
        result = evaluate_256(pipe, args.work, args.guidance, args.steps, args.prompts, list(args.kinds), args.pictures)
        if args.json:
            args.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
        print(json.dumps(result, indent=2))
        return
    result = evaluate(pipe, artwork.load(args.work), args.guidance, args.steps, args.prompts)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    print(f"{result['prompts']} prompts, {result['scheduler']}, {args.steps} steps, guidance {args.guidance}")
    print("retrieval compares   16x16 RGB together with histograms of oriented gradients")
    print(f"retrieval            top-1 {result['top1']:.1%}   top-5 {result['top5']:.1%}")
    print(f"ceiling (VAE alone)  top-1 {result['ceiling_top1']:.1%}   top-5 {result['ceiling_top5']:.1%}")
    print(f"background right     {result['background']:.1%}")
    print(f"VAE PSNR             {result['vae_psnr']:.2f} dB")


if __name__ == "__main__":
    main()
