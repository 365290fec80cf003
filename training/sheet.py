"""Draw the contact sheet: one seed for each prompt, from 0, nothing picked.

A model of 256 pixels draws the first twenty strangers' prompts of `questions.py`, chosen by the rule that stands there;
one of 128 pixels twelve of ours.

python -m training.sheet [--model FOLDER] [--output FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

from training import questions
from training.evaluate import generate
from training.export import OUTPUT

PROMPTS = (
    "a red apple, noto style, blue background",
    "a cat on a yellow background",
    "a smiling face with sunglasses",
    "a rocket, fluent style, black background",
    "pizza",
    "a red heart on a white background",
    "a dog, twemoji style, green background",
    "a car on a light blue background",
    "sunflower emoji, purple background",
    "a penguin, fluent style, orange background",
    "a guitar on a pink background",
    "a ghost, noto style, teal background",
)
COLUMNS, SIDE, LABEL, GAP = 4, 128, 26, 8


def strangers(count: int) -> tuple[str, ...]:
    """The first strangers' prompts of the evaluation."""
    rows = map(json.loads, questions.PATH.read_text("utf-8").splitlines())
    return tuple(itertools.islice((row["prompt"] for row in rows if row["kind"] == "stranger"), count))


def lines(text: str, font: ImageFont.ImageFont) -> list[str]:
    """The prompt broken into lines as wide as a picture."""
    rows = [""]
    for word in text.split():
        longer = f"{rows[-1]} {word}".strip()
        if font.getlength(longer) <= SIDE + GAP:
            rows[-1] = longer
        else:
            rows.append(word)
    return rows


def draw(pictures: list[Image.Image], texts: tuple[str, ...]) -> Image.Image:
    """Pictures in a grid, each over its prompt."""
    rows = -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (SIDE + GAP) + GAP, rows * (SIDE + LABEL + GAP) + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(9)
    for index, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        x, y = GAP + index % COLUMNS * (SIDE + GAP), GAP + index // COLUMNS * (SIDE + LABEL + GAP)
        sheet.paste(picture.resize((SIDE, SIDE)), (x, y))
        pen.multiline_text((x, y + SIDE + 2), "\n".join(lines(text, font)), fill="black", font=font, spacing=1)
    return sheet


def main() -> None:
    """Generate and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=OUTPUT)
    parser.add_argument("--output", type=Path, help="default: sheet.png in the model's folder")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    pipe = DiffusionPipeline.from_pretrained(args.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompts = strangers(20) if pipe.vae.config.sample_size == 256 else PROMPTS
    made = generate(pipe, list(prompts), list(range(len(prompts))), args.guidance, args.steps)
    draw([Image.fromarray(picture) for picture in made], prompts).save(
        args.output or args.model / "sheet.png", optimize=True
    )


if __name__ == "__main__":
    main()
