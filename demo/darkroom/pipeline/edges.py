"""The edges of a picture (Canny 1986), as OpenCV draws them: the map that ControlNets of the type canny were trained
on."""

import numpy as np

LOW, HIGH = 100, 200
"""Sums of gradients: above the first an edge goes on, and above the second it begins."""

TANGENT = 0.4142135623730951
"""Of 22.5 degrees, where a gradient counts as level."""


def canny(picture: np.ndarray, low: int = LOW, high: int = HIGH) -> np.ndarray:
    """(H, W, 3) uint8 -> the same size, white edges on black."""
    padded = np.pad(picture.astype(np.int32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    columns = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    across, down = rows[:, 2:] - rows[:, :-2], columns[2:] - columns[:-2]
    size = np.abs(across) + np.abs(down)
    # Of three colours, the one that changes most.
    which = size.argmax(axis=2)[..., None]
    across, down, size = (np.take_along_axis(each, which, axis=2)[..., 0] for each in (across, down, size))
    around = np.pad(size, 1)
    height, width = size.shape

    def at(row: int, column: int) -> np.ndarray:
        return around[1 + row : 1 + row + height, 1 + column : 1 + column + width]

    slope, steep = np.abs(across), np.abs(down)
    level = steep < slope * TANGENT
    upright = steep > slope * (TANGENT + 2)
    falling = (across < 0) == (down < 0)
    thin = np.where(
        level,
        (size > at(0, -1)) & (size >= at(0, 1)),
        np.where(
            upright,
            (size > at(-1, 0)) & (size >= at(1, 0)),
            np.where(falling, (size > at(-1, -1)) & (size > at(1, 1)), (size > at(-1, 1)) & (size > at(1, -1))),
        ),
    )
    edges = thin & (size > low)
    drawn = edges & (size > high)
    while True:
        near = np.pad(drawn, 1)
        near = near[:-2] | near[1:-1] | near[2:]
        grown = edges & (near[:, :-2] | near[:, 1:-1] | near[:, 2:])
        if (grown == drawn).all():
            break
        drawn = grown
    return np.repeat((drawn * np.uint8(255))[..., None], 3, axis=2)
