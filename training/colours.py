"""The named background colours: what a caption may say, and which name a measured colour is nearest to."""

from __future__ import annotations

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (20, 20, 20),
    "red": (220, 50, 50),
    "orange": (245, 140, 40),
    "yellow": (255, 235, 110),  # paler than the yellow of many emoji, which would vanish on it
    "green": (70, 160, 80),
    "teal": (40, 160, 160),
    "light blue": (130, 195, 240),
    "blue": (50, 100, 210),
    "purple": (130, 70, 180),
    "pink": (245, 150, 190),
    "brown": (140, 95, 60),
}
NAMES = list(COLOURS)
TABLE = np.array(list(COLOURS.values()), dtype=np.uint8)

BORDER = 4
"""Pixels from each edge that the artwork never reaches: see `artwork.MARGIN`."""


def nearest(rgb: np.ndarray) -> np.ndarray:
    """Index into `NAMES` of the nearest named colour. rgb: (..., 3) in 0..255; returns (...) int."""
    distance = np.asarray(rgb, np.float32)[..., None, :] - TABLE.astype(np.float32)
    return (distance**2).sum(-1).argmin(-1)


def border_colour(pictures: np.ndarray) -> np.ndarray:
    """Mean colour of the outermost pixels. pictures: (N, H, W, 3) uint8; returns (N, 3) float32."""
    mask = np.ones(pictures.shape[1:3], bool)
    mask[BORDER:-BORDER, BORDER:-BORDER] = False
    return pictures[:, mask].astype(np.float32).mean(1)
