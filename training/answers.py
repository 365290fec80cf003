"""Whether pictures show what the questions asked for: measured on pixels alone, against the artwork.

| kind | right when |
| --- | --- |
| name, synonym | among all things of that style on that background, the right one is the nearest, or one of five |
| colour | most of what differs from the background has the colour asked for |
| relation | each thing, where it should be, is one of the five nearest of 100 to what differs from the background |
| place | the picture's outermost cells are nearest to those of one of that place's pictures that training never drew |

The same measures of the pictures that `scenes.compose` makes for the questions are the ceiling. What strangers' prompts
give is looked at.
"""

from __future__ import annotations

import random
from functools import lru_cache

import numpy as np
from PIL import Image

from training import measure, places
from training.artwork import composite
from training.colours import COLOURS, border_colour
from training.drawings import SIZE, Drawings, main_colour
from training.grammar import PLACES
from training.questions import Question
from training.scenes import Scene, box, compose, layout
from training.vocabulary import Thing

DIFFERENT = 36
"""Of 255, in some channel: what a pixel of a thing differs by from the background at least."""
SEEN, HALF = 64, 128
"""Sides of the pictures that are compared, and of those that things are cut from."""
DISTRACTORS = 98
"""With the two that are asked for, 100 things."""


def foreground(picture: np.ndarray) -> np.ndarray:
    """Pixels (H, W) bool that differ from the colour of the border. picture: (H, W, 3) uint8."""
    return (np.abs(picture - border_colour(picture[None])[0]) > DIFFERENT).any(-1)


def shown(question: Question, drawings: Drawings) -> np.ndarray:
    """The picture that a perfect model would draw: (256, 256, 3) uint8."""
    rng = random.Random(question.prompt)
    return compose(question.scene, drawings, rng).pixels


def reduced(pictures: np.ndarray, factor: int) -> np.ndarray:
    """The mean of every factor x factor pixels: (N, H, W, 3) uint8 -> (N, H / factor, W / factor, 3) uint8."""
    return np.stack([np.asarray(Image.fromarray(picture).reduce(factor)) for picture in pictures])


def nearest(made: np.ndarray, questions: list[Question], things: list[Thing], drawings: Drawings) -> np.ndarray:
    """Ranks of the right things for pictures of one thing each, (N,) int. made: (N, 256, 256, 3) uint8."""
    groups: dict[tuple[str, str], list[int]] = {}
    for index, question in enumerate(questions):
        groups.setdefault((question.scene.style, question.scene.background), []).append(index)
    found = np.empty(len(questions), int)
    for (style, background), members in groups.items():
        codes = [thing.code for thing in things if drawings.has(style, thing.code)]
        rgba = np.stack([drawings.small(style, code, SIZE // SEEN) for code in codes])
        gallery = composite(rgba, np.array([COLOURS[background]], np.uint8))
        right = np.array([codes.index(questions[i].scene.parts[0].thing.code) for i in members])
        found[members] = measure.ranks(reduced(made[members], SIZE // SEEN), gallery, right)
    return found


def colour_right(picture: np.ndarray, question: Question) -> bool:
    """Whether the thing has the colour asked for."""
    return main_colour(picture, foreground(picture)) == question.scene.parts[0].colour


def regions(scene: Scene, drawings: Drawings) -> list[tuple[np.ndarray, np.ndarray]]:
    """Where the first and the second thing of a relation should be, (HALF, HALF) bool; beside: either way round."""
    rows, columns = np.mgrid[:HALF, :HALF]
    if scene.relation in ("left", "right", "beside"):
        left = columns < HALF // 2
        ways = [(left, ~left), (~left, left)]
        return ways if scene.relation == "beside" else ways[scene.relation == "right" :][:1]
    line = HALF / 2
    if scene.relation == "on":
        drawn = [drawings.get(scene.style, part.thing.code, part.colour) for part in scene.parts]
        _, (_, _, y, side) = layout(scene, drawn, random.Random(0))
        line = (y + (box(drawn[0])[3] - SIZE // 2) * side / SIZE) * HALF / SIZE
    upper = rows < line
    return [(~upper, upper) if scene.relation == "below" else (upper, ~upper)]


def cut(picture: np.ndarray, area: np.ndarray) -> np.ndarray:
    """The smallest square around an area, scaled to (SEEN, SEEN, 3) uint8, the rest of it in the border's colour.

    picture: (HALF, HALF, 3) uint8, area: (HALF, HALF) bool, not empty.
    """
    behind = border_colour(picture[None])[0].round().astype(np.uint8)
    filled = np.where(area[..., None], picture, behind)
    left, top, right, bottom = box(np.repeat(area[..., None].astype(np.uint8) * 255, 4, 2))
    filled = filled[top:bottom, left:right]
    high, wide = filled.shape[:2]
    side = max(high, wide)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = behind
    y, x = (side - high) // 2, (side - wide) // 2
    square[y : y + high, x : x + wide] = filled
    return np.asarray(Image.fromarray(square).resize((SEEN, SEEN), Image.Resampling.BILINEAR))


def relation_right(picture: np.ndarray, question: Question, things: list[Thing], drawings: Drawings) -> bool:
    """Whether both things are there, each in its place. picture: (256, 256, 3) uint8."""
    scene, rng = question.scene, random.Random(question.prompt)
    both = [part.thing for part in scene.parts]
    others = [thing for thing in things if drawings.has(scene.style, thing.code) and thing not in both]
    codes = [thing.code for thing in both + rng.sample(others, DISTRACTORS)]
    rgba = np.stack([drawings.small(scene.style, code, SIZE // HALF) for code in codes])
    alone = composite(rgba, np.array([COLOURS[scene.background]], np.uint8))
    gallery = np.stack([cut(each, alpha[..., 3] > 100) for each, alpha in zip(alone, rgba, strict=True)])
    picture = reduced(picture[None], SIZE // HALF)[0]
    drawn = foreground(picture)
    for areas in regions(scene, drawings):
        if all((drawn & area).any() for area in areas):
            cuts = np.stack([cut(picture, drawn & area) for area in areas])
            if (measure.ranks(cuts, gallery, np.arange(2)) < 5).all():
                return True
    return False


def rim(pictures: np.ndarray) -> np.ndarray:
    """The outermost of 16 x 16 cells: (N, 60, 3) float32 in 0..1. pictures: (N, H, W, 3) uint8."""
    cells = measure.colour_features(pictures).reshape(len(pictures), 16, 16, 3)
    inner = np.zeros((16, 16), bool)
    inner[1:-1, 1:-1] = True
    return cells[:, ~inner]


@lru_cache(maxsize=1)
def _rims() -> tuple[list[str], np.ndarray]:
    unseen = range(places.VARIANTS, 2 * places.VARIANTS)
    names = [place for place in PLACES for _ in unseen]
    return names, rim(np.stack([places.picture(place, variant) for place in PLACES for variant in unseen]))


def place_of(picture: np.ndarray) -> str:
    """The place that a picture's rim looks most like."""
    names, known = _rims()
    return names[int(np.abs(known - rim(picture[None])).mean((1, 2)).argmin())]


def measured(made: np.ndarray, questions: list[Question], things: list[Thing], drawings: Drawings) -> dict[str, float]:
    """All measures, as parts of 1. made: (N, 256, 256, 3) uint8, one picture a question."""
    found = {}
    for kind in dict.fromkeys(question.kind for question in questions):
        which = [index for index, question in enumerate(questions) if question.kind == kind]
        pictures, asked = made[which], [questions[index] for index in which]
        pairs = list(zip(pictures, asked, strict=True))
        if kind in ("name", "synonym"):
            ranks = nearest(pictures, asked, things, drawings)
            found |= {f"{kind}_top1": (ranks == 0).mean(), f"{kind}_top5": (ranks < 5).mean()}
        if kind == "name":
            colours = np.array([list(COLOURS).index(question.scene.background) for question in asked])
            found["background"] = measure.backgrounds_right(pictures, colours).mean()
        elif kind == "colour":
            found["colour"] = np.mean([colour_right(picture, question) for picture, question in pairs])
        elif kind == "relation":
            found["relation"] = np.mean([relation_right(*pair, things, drawings) for pair in pairs])
        elif kind == "place":
            found["place"] = np.mean([place_of(picture) == question.scene.background for picture, question in pairs])
    return {name: float(value) for name, value in found.items()}
