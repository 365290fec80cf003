"""What a server answers: images with their seeds, recipes and times."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from darkroom.triton.prompts import Prompt

PIXELS, ENCODED, SEED, RECIPE, TIMES = "generated_image", "encoded_image", "used_seed", "recipe", "stage_times"
OUTPUTS = (PIXELS, ENCODED, SEED, RECIPE, TIMES)
"""The outputs that are requested of a model that has them: one of the first two, and the others."""


class NoAnswer(Exception):
    """One request was not answered with pictures; says why in one line."""


@dataclass(frozen=True, eq=False)
class Image:
    """One image of an answer: its pixels, (H, W, 3) uint8, or a whole file; what the model does not return is None."""

    prompt: str
    pixels: np.ndarray | None
    encoded: bytes | None
    seed: int | None
    recipe: dict[str, Any] | None
    milliseconds: dict[str, float]
    """Of the server's stages, by name."""


def read_images(prompts: list[Prompt], outputs: dict[str, np.ndarray | None]) -> list[Image]:
    """The images of an answer to `prompts`. Raises `NoAnswer` for outputs that do not fit these or one another."""
    pixels, encoded, seeds, recipes, times = (outputs.get(name) for name in OUTPUTS)
    pictures = encoded if pixels is None else pixels
    if pictures is None:
        raise NoAnswer("the server answered without images")
    if pixels is not None and (pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3):
        raise NoAnswer(f"the server answered {pixels.dtype} {pixels.shape} for images, not uint8 (N, H, W, 3)")
    count = len(pictures)
    for name, column in {ENCODED: encoded, SEED: seeds, RECIPE: recipes, TIMES: times}.items():
        if column is None:
            continue
        kinds, words = ("iu", "integers") if name == SEED else ("O", "bytes")
        if column.dtype.kind not in kinds:
            raise NoAnswer(f"the server answered {column.dtype} for {name}, not {words}")
        if column.size != count:
            raise NoAnswer(f"the server answered {count} images with {column.size} of {name}")
    if not count or count % len(prompts):
        raise NoAnswer(f"the server answered {count} images for {len(prompts)} prompts")
    return [
        Image(
            prompt=prompts[index * len(prompts) // count].fields["prompt"],
            pixels=None if pixels is None else pixels[index],
            encoded=encoded.flat[index] if pixels is None else None,
            seed=None if seeds is None else int(seeds.flat[index]),
            recipe=None if recipes is None else _json_object(RECIPE, recipes.flat[index]),
            milliseconds={} if times is None else _numbers(_json_object(TIMES, times.flat[index])),
        )
        for index in range(count)
    ]


def _json_object(name: str, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise NoAnswer(f"the server answered a {name} that cannot be read: {text[:60]!r}")
    return value


def _numbers(times: dict[str, Any]) -> dict[str, float]:
    if not all(isinstance(value, int | float) for value in times.values()):
        raise NoAnswer(f"the server answered {TIMES} that are no numbers: {times}")
    return times
