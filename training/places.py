"""The six scenes that can be behind things, drawn as SVG: each from a seed, so that no two skies are alike."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from training.artwork import render

SIZE = 256
VARIANTS = 24
"""Seeds that pictures are made with."""


def _gradient(*stops: str) -> str:
    """A vertical passage over the whole picture."""
    marks = "".join(f'<stop offset="{i / (len(stops) - 1):.2f}" stop-color="{c}"/>' for i, c in enumerate(stops))
    return (
        f'<defs><linearGradient id="g" x1="0" y1="0" x2="0" y2="1">{marks}</linearGradient></defs>'
        '<rect width="256" height="256" fill="url(#g)"/>'
    )


def _band(top: float, colour: str) -> str:
    return f'<rect y="{top:.0f}" width="256" height="{256 - top:.0f}" fill="{colour}"/>'


def _cloud(x: float, y: float, scale: float) -> str:
    puffs = [(-22, 4, 15), (0, -6, 22), (24, 3, 16), (0, 8, 20)]
    circles = "".join(f'<circle cx="{a}" cy="{b}" r="{r}"/>' for a, b, r in puffs)
    return (
        f'<g transform="translate({x:.0f} {y:.0f}) scale({scale:.2f})" fill="#ffffff" fill-opacity="0.9">{circles}</g>'
    )


def _sky(rng: random.Random) -> str:
    clouds = [_cloud(rng.uniform(0, 256), rng.uniform(20, 236), rng.uniform(0.6, 1.3)) for _ in range(5)]
    return _gradient("#4fa3e8", "#bfe3fb") + "".join(clouds)


def _sea(rng: random.Random) -> str:
    top = rng.uniform(110, 140)
    waves = []
    for row in range(5):
        y, shift = top + 16 + row * 24, rng.uniform(0, 40)
        arcs = "".join("q10 -8 20 0 t20 0 " for _ in range(8))
        waves.append(f'<path d="M{-shift:.0f} {y:.0f} {arcs}" fill="none" stroke="#7cc4ee" stroke-width="3"/>')
    return _gradient("#a8dbf7", "#e3f4fd") + _band(top, "#2273b9") + "".join(waves)


def _grass(rng: random.Random) -> str:
    top = rng.uniform(130, 160)
    blades = []
    for _ in range(40):
        x, y = rng.uniform(0, 256), rng.uniform(top + 6, 256)
        blades.append(f"M{x:.0f} {y:.0f}l3 -12 l3 12z")
    hills = f'<ellipse cx="{rng.uniform(40, 216):.0f}" cy="{top + 6:.0f}" rx="190" ry="26" fill="#5fae4b"/>'
    return (
        _gradient("#8ccbf2", "#e6f5fd")
        + hills
        + _band(top, "#5fae4b")
        + f'<path d="{"".join(blades)}" fill="#3f8a38"/>'
    )


def _night(rng: random.Random) -> str:
    stars = "".join(
        f'<circle cx="{rng.uniform(0, 256):.0f}" cy="{rng.uniform(0, 256):.0f}" r="{rng.uniform(1, 2.6):.1f}"/>'
        for _ in range(45)
    )
    x, y = rng.uniform(30, 226), rng.uniform(28, 60)
    moon = f'<circle cx="{x:.0f}" cy="{y:.0f}" r="18" fill="#f6efc4"/>'
    return _gradient("#0c1238", "#2b3470") + f'<g fill="#f4f2dd">{stars}</g>' + moon


def _sunset(rng: random.Random) -> str:
    top, x = rng.uniform(165, 195), rng.uniform(60, 196)
    sun = f'<circle cx="{x:.0f}" cy="{top:.0f}" r="42" fill="#ffe08a"/>'
    return _gradient("#6b3f87", "#e8605a", "#fbb35a") + sun + _band(top, "#4a2a4f")


def _snow(rng: random.Random) -> str:
    top = rng.uniform(140, 170)
    flakes = "".join(
        f'<circle cx="{rng.uniform(0, 256):.0f}" cy="{rng.uniform(0, 256):.0f}" r="{rng.uniform(2, 4):.1f}"/>'
        for _ in range(40)
    )
    hill = f'<ellipse cx="{rng.uniform(40, 216):.0f}" cy="{top + 8:.0f}" rx="200" ry="30" fill="#f7fafc"/>'
    return _gradient("#8fa6bd", "#c9d8e4") + hill + _band(top, "#f7fafc") + f'<g fill="#ffffff">{flakes}</g>'


DRAW: dict[str, Callable[[random.Random], str]] = {
    "sky": _sky,
    "sea": _sea,
    "grass": _grass,
    "night": _night,
    "sunset": _sunset,
    "snow": _snow,
}


@lru_cache(maxsize=512)
def picture(place: str, variant: int) -> np.ndarray:
    """One of the `VARIANTS` of a place: (256, 256, 3) uint8. Other variants are for the evaluation alone."""
    body = DRAW[place](random.Random(f"{place} {variant}"))
    made = render(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIZE} {SIZE}">{body}</svg>', SIZE)
    return made[..., :3]
