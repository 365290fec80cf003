"""What a picture holds, how it is composed from the artwork, and what people would type for it.

A scene is one thing, or several of it, or two things with a relation, each in its own colours or in another; over a
plain colour or one of six places; in one style. A tenth of all pairings of a thing with a colour, with a place or, in a
relation, with another thing is never drawn in training (`held_out`): the evaluation asks for those.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from training import grammar, places
from training.colours import COLOURS as BACKGROUNDS
from training.drawings import NAMES as THING_COLOURS
from training.drawings import SIZE, Drawings
from training.grammar import PLACES, RELATIONS, STYLES
from training.vocabulary import Thing

EMPTY = 0.1
"""Share of empty captions, for classifier-free guidance (https://arxiv.org/abs/2207.12598)."""
HELD_OUT = 10
"""One pairing in so many is kept from training."""
PEOPLE, SYMBOLS = 1, 8
"""Groups whose things are not recoloured: persons would change their skin, and signs their meaning."""
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1), "on": (0, -1)}
"""Where the first thing's middle lies, seen from the second's: x to the right, y down."""


@dataclass(frozen=True)
class Part:
    """One of a scene's things; `colour` is None for its own."""

    thing: Thing
    colour: str | None = None


@dataclass(frozen=True)
class Scene:
    """What a picture holds. `relation` is that of the first part to the second, None with a single part."""

    parts: tuple[Part, ...]
    style: str
    background: str
    """One of the twelve colours, or one of the six places."""
    relation: str | None = None
    count: int = 1
    size: str | None = None


@dataclass(frozen=True)
class Composed:
    """A picture, with where its things are."""

    pixels: np.ndarray
    """(256, 256, 3) uint8."""
    areas: tuple[np.ndarray, ...] = field(repr=False)
    """For each thing drawn, the pixels that it covers: (256, 256) bool."""


def pairings(scene: Scene) -> list[str]:
    """The pairings in a scene, as text that does not depend on style or size."""
    first = scene.parts[0].thing.code
    found = [f"{part.thing.code} in {part.colour}" for part in scene.parts if part.colour]
    if scene.background in PLACES:
        found += [f"{part.thing.code} at {scene.background}" for part in scene.parts]
    if scene.relation:
        found.append(" with ".join(sorted([first, scene.parts[1].thing.code])))
    return found


def held_out(scene: Scene) -> bool:
    """Whether training never draws this: one of the pairings is kept for the evaluation."""
    return any(zlib.crc32(text.encode()) % HELD_OUT == 0 for text in pairings(scene))


def colourable(thing: Thing) -> bool:
    """Whether the thing can be asked for in other colours: not where its name says its own, as `red heart` does."""
    return thing.group not in (PEOPLE, SYMBOLS) and not set(thing.name.split()) & set(grammar.COLOURS)


ALONE = 0.55
"""Share of scenes with one thing as it is: the names are most of what there is to learn."""


def sample(things: list[Thing], drawings: Drawings, rng: random.Random, least: float = 0.0) -> Scene:
    """A random scene of those that training draws; `least=ALONE`: but none of one thing as it is."""
    while True:
        scene = _any(things, drawings, rng, least)
        if not held_out(scene):
            return scene


def alone(thing: Thing, style: str, rng: random.Random) -> Scene:
    """One thing as it is, on a random background."""
    while held_out(scene := Scene((Part(thing),), style, _background(rng))):
        pass
    return scene


def _background(rng: random.Random) -> str:
    return rng.choice(list(BACKGROUNDS)) if rng.random() < 0.75 else rng.choice(list(PLACES))


def _any(things: list[Thing], drawings: Drawings, rng: random.Random, least: float = 0.0) -> Scene:
    style, background = rng.choices(list(STYLES), (2, 1, 1))[0], _background(rng)
    kind = rng.uniform(least, 1)

    def thing() -> Thing:
        while True:
            one = rng.choice(things)
            if drawings.has(style, one.code):
                return one

    def part(coloured: float) -> Part:
        one = thing()
        return Part(one, rng.choice(THING_COLOURS) if rng.random() < coloured and colourable(one) else None)

    if kind < ALONE:
        return Scene((part(0),), style, background)
    if kind < 0.72:
        return Scene((part(1),), style, background)
    if kind < 0.77:
        return Scene((part(0.2),), style, background, size=rng.choice(list(grammar.SIZES)))
    if kind < 0.82:
        return Scene((part(0.2),), style, background, count=rng.randint(2, 4))
    return Scene((part(0.2), part(0.2)), style, background, relation=rng.choice(list(RELATIONS)))


def box(rgba: np.ndarray) -> tuple[int, int, int, int]:
    """The smallest box around what is drawn: left, top, right, bottom."""
    rows, columns = (np.flatnonzero(rgba[..., 3].max(axis)) for axis in (1, 0))
    return (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if len(rows) else (0, 0, SIZE, SIZE)


def resized(rgba: np.ndarray, side: int) -> np.ndarray:
    """A whole drawing at another size, its colours weighed by their alpha: (side, side, 4) uint8."""
    return np.asarray(Image.fromarray(rgba).resize((side, side), Image.Resampling.LANCZOS)) if side != SIZE else rgba


def layout(scene: Scene, drawn: list[np.ndarray], rng: random.Random) -> list[tuple[int, float, float, int]]:
    """(which part, x and y of the middle, side) of each thing, in the order of drawing. drawn: (256, 256, 4) each."""
    if scene.relation is None:
        if scene.count == 1:
            usual = 200 if scene.background in PLACES else SIZE
            side = {None: usual, "small": 110, "large": 284}[scene.size]
            free = max(SIZE - side, 0) / 4
            return [(0, 128 + rng.uniform(-free, free), 128 + rng.uniform(-free, free), side)]
        spots = {
            2: [(68, 128), (188, 128)],
            3: [(128, 72), (68, 184), (188, 184)],
            4: [(68, 68), (188, 68), (68, 188), (188, 188)],
        }[scene.count]
        return [(0, x, y, 122) for x, y in spots]
    relation = rng.choice(("left", "right")) if scene.relation == "beside" else scene.relation
    x, y = DIRECTIONS[relation]
    if relation != "on":
        first, second = rng.randint(116, 132), rng.randint(116, 132)
        shift = rng.uniform(-14, 14)
        return [
            (1, 128 - 61 * x + shift * abs(y), 128 - 61 * y + shift * abs(x), second),
            (0, 128 + 61 * x - shift * abs(y), 128 + 61 * y - shift * abs(x), first),
        ]
    lower, upper = 148, 112
    at = SIZE - 4 - (box(drawn[1])[3] - 128) * lower / SIZE  # stands near the bottom
    top = at + (box(drawn[1])[1] - 128) * lower / SIZE
    above = top + 10 - (box(drawn[0])[3] - 128) * upper / SIZE
    return [(1, 128, at, lower), (0, 128 + rng.uniform(-10, 10), max(above, 40), upper)]


def compose(scene: Scene, drawings: Drawings, rng: random.Random, variants: int = places.VARIANTS) -> Composed:
    """Draw a scene; `rng` chooses what the scene leaves open. `variants` are the places' that may be drawn."""
    if scene.background in PLACES:
        canvas = Image.fromarray(places.picture(scene.background, rng.randrange(variants)))
    else:
        canvas = Image.new("RGB", (SIZE, SIZE), BACKGROUNDS[scene.background])
    drawn = [drawings.get(scene.style, part.thing.code, part.colour) for part in scene.parts]
    areas = []
    for which, x, y, side in layout(scene, drawn, rng):
        piece = Image.fromarray(resized(drawn[which], side))
        corner = (round(x - side / 2), round(y - side / 2))
        canvas.paste(piece, corner, piece)
        mask = Image.new("L", (SIZE, SIZE))
        mask.paste(piece.getchannel("A"), corner)
        areas.append(np.asarray(mask) > 200)
    return Composed(np.asarray(canvas), tuple(areas))


@dataclass(frozen=True)
class Caption:
    """What is typed, and whether it names the background and the style that the picture has."""

    text: str
    says_background: bool = True
    says_style: bool = True


def phrase(part: Part, scene: Scene, rng: random.Random, word: str | None = None) -> str:
    """One thing as people say it: `two tiny red apples`."""
    thing = part.thing
    if word is None:
        word = thing.name if not thing.synonyms or rng.random() < 0.6 else rng.choice(thing.synonyms)
    colour = size = None
    if part.colour:
        usual, *others = grammar.COLOURS[part.colour]
        colour = rng.choice(others) if others and rng.random() < 0.15 else usual
    if scene.size:
        size = rng.choice(grammar.SIZES[scene.size])
    if rng.random() < 0.02:
        word = grammar.misspell(word, rng)
    text = grammar.noun(word, colour, size, scene.count)
    if scene.count > 1 and rng.random() < 0.5:
        usual, *others = grammar.NUMBERS[scene.count]
        text = rng.choice(others) + text.removeprefix(usual)
    kind = rng.random()
    if scene.count == 1 and kind < 0.35:
        return text.removeprefix("an ").removeprefix("a ")
    return "the " + text.removeprefix("an ").removeprefix("a ") if scene.count == 1 and kind < 0.4 else text


def caption(scene: Scene, rng: random.Random) -> Caption:
    """One random caption; empty one time in ten.

    Forms that name no style are kept for the default one: a network of this size, asked to choose between three
    drawings, blends them. Forms that name no background are for every plain colour: that choice it makes well.
    """
    if rng.random() < EMPTY:
        return Caption("", says_background=False, says_style=False)
    text = phrase(scene.parts[0], scene, rng)
    if scene.relation:
        text = f"{text} {rng.choice(RELATIONS[scene.relation])} {phrase(scene.parts[1], scene, rng)}"
    styled = scene.style != grammar.DEFAULT_STYLE or rng.random() < 0.3
    usual, *others = STYLES[scene.style]
    style = rng.choice(others) if rng.random() < 0.1 else usual
    if (kind := rng.random()) < 0.1:
        text = f"{text} emoji"
    elif kind < 0.14:
        text = f"{rng.choice(('a picture of', 'a drawing of', 'an emoji of'))} {text}"
    behind, said = scene.background, True
    if behind in PLACES:
        *short, long = PLACES[behind]
        text = f"{text}, {long}" if rng.random() < 0.25 else f"{text} {rng.choice(short)}"
    elif rng.random() < 0.35:
        said = False
    else:
        plain = grammar.article(behind)
        forms = (f"{text}, {behind} background", f"{text} on {plain} background", f"{text} on {behind}")
        text = rng.choices(forms, (5, 4, 1))[0]
    if styled:
        text = rng.choices((f"{text}, {style} style", f"{style} style {text}", f"{style} {text}"), (6, 1, 1))[0]
    if rng.random() < 0.1:
        text = text.capitalize()
    return Caption(text, said, styled)
