"""What evaluation counts: retrieval, background colour, PSNR. Plain NumPy on uint8 pictures.

Retrieval compares pictures in a feature space of its own, not the VAE's loss: (1) colour, the picture averaged
down to 16x16 RGB; (2) shape, histograms of oriented gradients (Dalal and Triggs 2005; 8 orientations in
16x16-pixel cells of the luminance, each picture's vector set to unit length). Each part is divided by its
standard deviation over the gallery, and both weigh the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from training.colours import border_colour, nearest

CELLS, ORIENTATIONS = 8, 8


def colour_features(pictures: np.ndarray) -> np.ndarray:
    """(N, H, W, 3) uint8 -> (N, 16 * 16 * 3) float32 in 0..1."""
    n, h, w, _ = pictures.shape
    small = pictures.reshape(n, 16, h // 16, 16, w // 16, 3).mean((2, 4), dtype=np.float32)
    return small.reshape(n, -1) / 255


def shape_features(pictures: np.ndarray) -> np.ndarray:
    """(N, H, W, 3) uint8 -> (N, CELLS * CELLS * ORIENTATIONS) float32 of unit length."""
    n, h, w, _ = pictures.shape
    grey = pictures.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32) / 255
    dy, dx = np.gradient(grey, axis=(1, 2))
    strength = np.hypot(dx, dy)
    bins = (np.arctan2(dy, dx) % np.pi / np.pi * ORIENTATIONS).astype(np.int64) % ORIENTATIONS
    cells = np.empty((n, CELLS, CELLS, ORIENTATIONS), np.float32)
    for orientation in range(ORIENTATIONS):
        part = np.where(bins == orientation, strength, 0)
        cells[..., orientation] = part.reshape(n, CELLS, h // CELLS, CELLS, w // CELLS).sum((2, 4))
    flat = np.sqrt(cells.reshape(n, -1))
    return flat / (np.linalg.norm(flat, axis=1, keepdims=True) + 1e-6)


def features(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both parts of the feature space. (N, H, W, 3) uint8, sides divisible by 16."""
    return colour_features(pictures), shape_features(pictures)


def ranks_of(made: Sequence[np.ndarray], gallery: Sequence[np.ndarray], right: np.ndarray) -> np.ndarray:
    """`ranks` of pictures whose `features` are there already."""
    distance = np.zeros((len(made[0]), len(gallery[0])), np.float32)
    for ours, theirs in zip(made, gallery, strict=True):
        spread = np.sqrt(theirs.var(0).mean()) + 1e-6
        for row, one in enumerate(ours):
            distance[row] += (((one - theirs) / spread) ** 2).mean(-1)
    return (distance < distance[np.arange(len(distance)), right][:, None]).sum(1)


def ranks(made: np.ndarray, gallery: np.ndarray, right: np.ndarray) -> np.ndarray:
    """How many gallery pictures are nearer to each picture than the right one: 0 is a top-1 hit.

    made: (M, H, W, 3), gallery: (N, H, W, 3), both uint8; right: (M,) indices into it; returns (M,) int.
    """
    return ranks_of(features(made), features(gallery), right)


def backgrounds_right(made: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Whether the mean border colour is nearest the named one. colours: (M,) indices into `NAMES`."""
    return nearest(border_colour(made)) == colours


def gradient_ratio(made: np.ndarray, right: np.ndarray) -> float:
    """Mean gradient magnitude in parts of the right pictures': below 1 detail is lost, above it there are ripples.

    Both (N, H, W, 3) uint8.
    """

    def mean(pictures: np.ndarray) -> float:
        return float(np.hypot(*np.gradient(pictures.mean(-1, dtype=np.float32), axis=(1, 2))).mean())

    return mean(made) / mean(right)


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each pair in dB. (N, H, W, 3) uint8 twice; returns (N,)."""
    error = ((a.astype(np.float32) - b.astype(np.float32)) ** 2).mean((1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 1e-6))
