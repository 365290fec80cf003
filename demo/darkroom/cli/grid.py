"""`--grid`: a picture for every combination of values, and one labelled sheet of all of them."""

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from darkroom.checkpoint.catalog import Script
from darkroom.cli.console import Console
from darkroom.cli.flags import given
from darkroom.cli.from_flags import refuse_flags_beside_prompts
from darkroom.cli.prompt_file import make_all
from darkroom.cli.settings import make_folder, output_folder
from darkroom.errors import InvalidRequest, check_known
from darkroom.files import written
from darkroom.flags import NUM_IMAGES, OF_ROW, option
from darkroom.prompts.journal import Record
from darkroom.request import draw_seed
from darkroom.store.fingerprints import hash_json

NAMES = {
    word.replace("_", "-"): row
    for row, flag in OF_ROW.items()
    if row not in ("prompt", NUM_IMAGES)
    for word in (row, flag.name)
}
"""What an axis may be called: as a flag is, or a field of prompt files."""

HASH_DIGITS = 8
SHEET = "sheet.png"

MARGIN, LETTERS, LABEL = 8, 16, 40
"""Pixels around pictures and of letters; characters of a prompt that a label shows."""


@dataclass(frozen=True)
class Axis:
    """One flag of the grid: its field in rows of prompts, and its values."""

    word: str
    field: str
    values: tuple[Any, ...]

    def label(self, value: Any) -> str:
        return f"{self.word} {value}"


def make_grid(script: Script, flags: argparse.Namespace, console: Console) -> None:
    """Runs a script with --grid: as a file of prompts, which is written beside the pictures' folder.

    Raises `InvalidRequest` for axes that are none.
    """
    axes = tuple(map(_axis, flags.grid))
    fields = [axis.field for axis in axes]
    for axis in axes:
        if fields.count(axis.field) > 1:
            raise InvalidRequest(f"--grid has {axis.word} twice: give it all values at once, with commas between.")
        if given(flags, OF_ROW[axis.field].name):
            raise InvalidRequest(f"{option(OF_ROW[axis.field].name)} cannot be given beside --grid {axis.word}=...")
    if not flags.prompt:
        raise InvalidRequest("--grid needs a prompt: say what the pictures should show.")
    if "seed" not in fields and flags.seed is None:
        flags.seed = draw_seed()
        console.say(f"seed: {flags.seed}")
    common = {} if "seed" in fields else {"seed": flags.seed}
    rows = [
        {"prompt": prompt} | common | dict(zip(fields, values, strict=True))
        for prompt in flags.prompt
        for values in itertools.product(*(axis.values for axis in axes))
    ]
    prompts, flags.prompt, flags.grid = flags.prompt, [], None
    refuse_flags_beside_prompts(flags, "--grid")
    folder = make_folder(output_folder(flags.output_dir))
    file = folder / f"grid-{hash_json(rows)[:HASH_DIGITS]}.jsonl"
    there = file.exists()
    with written(file) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags.prompts = str(file)

    def sheet(folder: Path, records: Sequence[Record]) -> Path:
        pictures = {record.line - 1: folder / record.file for record in records}
        return draw_sheet(folder / SHEET, prompts, axes, [pictures.get(line) for line in range(len(rows))])

    try:
        make_all(script, flags, console, sheet)
    except InvalidRequest:
        if not there:
            file.unlink()
        raise


def _axis(text: str) -> Axis:
    word, equals, values = text.partition("=")
    word = word.removeprefix("--").replace("_", "-")
    if not equals or not values:
        raise InvalidRequest(f"--grid {text!r}: write a flag and its values, as steps=10,20,30.")
    check_known("--grid", word, list(NAMES))
    flag = OF_ROW[NAMES[word]]
    try:
        read = tuple(flag.kind(value) for value in values.split(","))
    except ValueError:
        raise InvalidRequest(f"--grid {text}: {option(flag.name)} takes numbers.") from None
    for value in read:
        if wrong := flag.wrong(value):
            raise InvalidRequest(f"--grid {text}: {option(flag.name)} {wrong}")
        if read.count(value) > 1:
            raise InvalidRequest(f"--grid {text}: {value} stands there twice.")
    return Axis(word, NAMES[word], read)


def draw_sheet(path: Path, prompts: Sequence[str], axes: Sequence[Axis], pictures: Sequence[Path | None]) -> Path:
    """Writes a sheet of the pictures, row by row: the last axis goes to the right, and prompts and other axes down.

    Places of pictures that were not made stay empty.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(LETTERS)
    across = axes[-1]
    heads = [across.label(value) for value in across.values]
    sides = [
        "\n".join([*([_short(prompt)] if len(prompts) > 1 else []), *map(Axis.label, axes, values)])
        for prompt in prompts
        for values in itertools.product(*(axis.values for axis in axes[:-1]))
    ]
    opened = [None if picture is None else np.asarray(Image.open(picture).convert("RGB")) for picture in pictures]
    high, wide = (max((each.shape[side] for each in opened if each is not None), default=1) for side in (0, 1))
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [ruler.multiline_textbbox((0, 0), label, font=font) for label in (*sides, *heads)]
    left = max(box[2] for box in boxes[: len(sides)]) + 2 * MARGIN if any(sides) else MARGIN
    wide = max(wide, *(box[2] for box in boxes[len(sides) :]))
    high = max(high, *(box[3] for box in boxes[: len(sides)]))
    top = LETTERS + 3 * MARGIN
    size = (int(left + len(heads) * (wide + MARGIN)), int(top + len(sides) * (high + MARGIN)))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, head in enumerate(heads):
        draw.text((left + column * (wide + MARGIN), MARGIN), head, "black", font)
    for row, side in enumerate(sides):
        y = top + row * (high + MARGIN)
        draw.multiline_text((MARGIN, y), side, "black", font)
        for column, pixels in enumerate(opened[row * len(heads) : (row + 1) * len(heads)]):
            if pixels is not None:
                sheet.paste(Image.fromarray(pixels), (int(left + column * (wide + MARGIN)), int(y)))
    with written(path) as temporary:
        sheet.save(temporary, format="PNG")
    return path


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= LABEL else f"{prompt[: LABEL - 1]}…"
