"""All artwork at 256 pixels, and things in other colours than their own.

    python -m training.drawings [--work FOLDER]

Makes `artwork.npy`, (N, 256, 256, 4) uint8 with straight alpha, and `artwork.json`, the [style, code] of each row.
Some sets lack some things. A picture of 256 KB is read when it is drawn: the file is mapped into memory.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from training import artwork, vocabulary
from training.packages import read
from training.workspace import add_work_argument

SIZE = 256

HUES = {
    "red": (2, 0.80, 0.86),
    "orange": (28, 0.85, 0.97),
    "yellow": (50, 0.75, 0.99),
    "green": (122, 0.60, 0.66),
    "blue": (216, 0.75, 0.85),
    "purple": (276, 0.60, 0.72),
    "pink": (335, 0.42, 0.97),
    "brown": (24, 0.60, 0.50),
}
"""Hue in degrees, saturation and value that the main colour of a thing is moved to."""
GREYS = {"black": (0.0, 0.30), "grey": (0.32, 0.66), "white": (0.80, 1.0)}
"""Values that the darkest and the lightest of it are moved to, without saturation."""
NEAR, FAR = 40, 80
"""Degrees from the main hue up to which everything, and from which nothing, is recoloured."""
PALE = 0.18
"""Mean saturation below which a thing has no main hue: all of it is coloured."""


@dataclass
class Drawings:
    """The artwork, by style and code."""

    rgba: np.ndarray
    rows: dict[tuple[str, str], int]
    thumbnails: dict[tuple[str, str, int], np.ndarray] = field(default_factory=dict, repr=False)

    @staticmethod
    def load(work: Path) -> Drawings:
        """What `main` wrote, mapped."""
        index = json.loads((work / "artwork.json").read_text("utf-8"))
        rows = {(style, code): row for row, (style, code) in enumerate(index)}
        return Drawings(np.load(work / "artwork.npy", mmap_mode="r"), rows)

    def has(self, style: str, code: str) -> bool:
        """Whether the set has the thing."""
        return (style, code) in self.rows

    def get(self, style: str, code: str, colour: str | None = None) -> np.ndarray:
        """One picture (256, 256, 4) uint8, in its own colours or with the main one changed."""
        rgba = np.array(self.rgba[self.rows[style, code]])
        return recolour(rgba, colour) if colour else rgba

    def small(self, style: str, code: str, factor: int) -> np.ndarray:
        """The picture so many times smaller, (256 / factor, 256 / factor, 4) uint8; kept: measuring needs it often."""
        if (found := self.thumbnails.get((style, code, factor))) is None:
            found = np.asarray(Image.fromarray(self.get(style, code)).reduce(factor))
            self.thumbnails[style, code, factor] = found
        return found


def hsv(rgb: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> hue in degrees, saturation and value in 0..1: (H, W, 3) float32."""
    made = np.asarray(Image.fromarray(np.ascontiguousarray(rgb)).convert("HSV"), np.float32)
    return made * np.array([360 / 256, 1 / 255, 1 / 255], np.float32)


def rgb(colours: np.ndarray) -> np.ndarray:
    """The inverse of `hsv`."""
    scaled = colours * np.array([256 / 360, 255, 255], np.float32)
    scaled[..., 0] %= 256
    return np.asarray(Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8), "HSV").convert("RGB"))


def away(hue: np.ndarray, main: float) -> np.ndarray:
    """Distance on the circle of hues, 0..180 degrees."""
    return np.abs((hue - main + 180) % 360 - 180)


def main_hue(colours: np.ndarray, weight: np.ndarray) -> float | None:
    """The hue that most of a thing has, or None where it has hardly any. colours: `hsv`'s; weight: (H, W), its area."""
    chroma = colours[..., 1] * colours[..., 2] * weight
    if chroma.sum() < PALE * weight.sum():
        return None
    counts = np.bincount((colours[..., 0] / 10).astype(int).ravel() % 36, chroma.ravel(), 36)
    smooth = counts + (np.roll(counts, 1) + np.roll(counts, -1)) / 2
    return 10 * float(smooth.argmax()) + 5


def recolour(rgba: np.ndarray, colour: str) -> np.ndarray:
    """Move the thing's main colour to the named one; light, shade and what has another hue stay as they are."""
    colours, area = hsv(rgba[..., :3]), rgba[..., 3] / np.float32(255)
    hue = main_hue(colours, area)
    part = area > 0.5 if hue is None else (area > 0.5) & (away(colours[..., 0], hue) < NEAR) & (colours[..., 1] > 0.15)
    if hue is None:
        share = np.ones_like(area)
    else:
        share = ((FAR - away(colours[..., 0], hue)) / (FAR - NEAR)).clip(0, 1) * (colours[..., 1] / 0.15).clip(0, 1)
    saturation, value = (float(np.median(colours[..., i][part])) if part.any() else 0.5 for i in (1, 2))
    moved = colours.copy()
    if colour in GREYS:
        low, high = GREYS[colour]
        moved[..., 1] *= 0.08
        moved[..., 2] = low + (high - low) * colours[..., 2]
    else:
        to_hue, to_saturation, to_value = HUES[colour]
        moved[..., 0] = to_hue + (0 if hue is None else 0.4 * ((colours[..., 0] - hue + 180) % 360 - 180))
        moved[..., 0] %= 360
        if hue is None:  # grey: dark stays dark, the rest takes the colour
            moved[..., 1] = to_saturation * (1 - 0.3 * colours[..., 2])
            moved[..., 2] = colours[..., 2] * min(1.0, to_value / max(value, 0.4))
        else:
            moved[..., 1] = (colours[..., 1] * to_saturation / max(saturation, 0.2)).clip(0, 1)
            moved[..., 2] = (colours[..., 2] * to_value / max(value, 0.3)).clip(0, 1)
    made = rgba[..., :3] * (1 - share[..., None]) + rgb(moved) * share[..., None]
    return np.concatenate([made.round().astype(np.uint8), rgba[..., 3:]], -1)


def colour_names(pixels: np.ndarray) -> np.ndarray:
    """The name of each pixel's colour, as an index into `NAMES`. pixels: (N, 3) uint8."""
    hue, saturation, value = hsv(pixels[None])[0].T
    names = np.select(
        [hue < 15, hue < 38, hue < 68, hue < 172, hue < 250, hue < 300],
        [NAMES.index(each) for each in ("red", "orange", "yellow", "green", "blue", "purple")],
        NAMES.index("red"),
    )
    pinkish = ((hue >= 300) | (hue < 12)) & (((saturation < 0.62) & (value > 0.7)) | ((hue >= 300) & (hue < 345)))
    names = np.where(pinkish, NAMES.index("pink"), names)
    brownish = (hue >= 8) & (hue < 45) & (value < 0.68)
    names = np.where(brownish, NAMES.index("brown"), names)
    grey = (saturation < 0.14) | (value < 0.18)
    greys = np.select([value < 0.36, value < 0.82], [NAMES.index("black"), NAMES.index("grey")], NAMES.index("white"))
    return np.where(grey, greys, names)


NAMES = [*HUES, *GREYS]


def main_colour(picture: np.ndarray, area: np.ndarray) -> str:
    """The colour that most of the area has. picture: (H, W, 3) uint8, area: (H, W) bool."""
    pixels = picture[area]
    if not len(pixels):
        return "none"
    return NAMES[int(np.bincount(colour_names(pixels), minlength=len(NAMES)).argmax())]


def takes(rgba: np.ndarray, colour: str) -> bool:
    """Whether the thing, recoloured, is mostly of that colour: a zebra hardly ever is."""
    made = recolour(rgba, colour)
    return main_colour(made[..., :3], made[..., 3] > 200) == colour


def main() -> None:
    """Render everything into the work folder."""
    args = add_work_argument(argparse.ArgumentParser(description=__doc__.splitlines()[0])).parse_args()
    things, folder = vocabulary.load(args.work), args.work / "npm"
    index, sources = [], []
    for style, package in artwork.STYLES.items():
        icons, codes = (read(f"@iconify-json/{package}", f"{file}.json", folder) for file in ("icons", "chars"))
        here = [thing.code for thing in things if thing.code in codes]
        index += [(style, code) for code in here]
        sources += [artwork.svg(icons, codes[code], SIZE) for code in here]
    made = np.lib.format.open_memmap(args.work / "artwork.npy", "w+", np.uint8, (len(sources), SIZE, SIZE, 4))
    for row, source in enumerate(sources):
        made[row] = artwork.render(source, SIZE)
        if row % 500 == 0:
            print(f"{row} of {len(sources)}", flush=True)
    made.flush()
    (args.work / "artwork.json").write_text(json.dumps(index), "utf-8")


if __name__ == "__main__":
    main()
