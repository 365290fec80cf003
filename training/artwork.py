"""Fetch the three artwork packages from npm and render every concept to RGBA.

    python -m training.artwork [--work FOLDER] [--npm FOLDER]

Makes `artwork.npz`: `rgba` (styles * concepts, 128, 128, 4) uint8 with straight alpha, style by style.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np

from training import concepts
from training.packages import read
from training.workspace import add_work_argument

STYLES = {"noto": "noto", "fluent": "fluent-emoji-flat", "twemoji": "twemoji"}
"""The word in captions -> the npm package, @iconify-json/..."""
SIZE = 128
MARGIN = 8
"""Pixels kept free on each side, so that the border shows the background and nothing else."""


def svg(icons: dict, name: str, size: int = SIZE) -> str:
    """The SVG of one icon of an Iconify collection, with a `MARGIN` in `SIZE` around it."""
    while name not in icons["icons"]:
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    left, top = icon.get("left", 0), icon.get("top", 0)
    side = max(width, height) * SIZE / (SIZE - 2 * MARGIN)
    box = f"{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}"
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'{head} width="{size}" height="{size}" viewBox="{box}">{icon["body"]}</svg>'


def render(text: str, size: int = SIZE) -> np.ndarray:
    """SVG text -> (size, size, 4) uint8, straight alpha."""
    import resvg_py
    from PIL import Image

    png = bytes(resvg_py.svg_to_bytes(svg_string=text, width=size, height=size))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def load(work: Path) -> np.ndarray:
    """The rendered artwork: (styles, concepts, SIZE, SIZE, 4) uint8."""
    rgba = np.load(work / "artwork.npz")["rgba"]
    return rgba.reshape(len(STYLES), -1, *rgba.shape[1:])


def composite(rgba: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Lay pictures over colours. rgba: (N, H, W, 4), background: (N, 3); returns (N, H, W, 3), all uint8."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    colour = background[:, None, None].astype(np.float32)
    return np.round(rgba[..., :3] * alpha + colour * (1 - alpha)).astype(np.uint8)


def main() -> None:
    """Render everything into the work folder."""
    parser = add_work_argument(argparse.ArgumentParser(description=__doc__.splitlines()[0]))
    parser.add_argument("--npm", type=Path, help="folder of unpacked packages (default: WORK/npm, fetched)")
    args = parser.parse_args()
    pictures = []
    for style in STYLES:
        icons = read(f"@iconify-json/{STYLES[style]}", "icons.json", args.npm or args.work / "npm")
        pictures += [render(svg(icons, concept.icon)) for concept in concepts.load()]
        print(f"{style}: {len(pictures)} pictures so far", flush=True)
    np.savez_compressed(args.work / "artwork.npz", rgba=np.stack(pictures))


if __name__ == "__main__":
    main()
