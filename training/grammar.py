"""How people put a picture into words: articles, plurals, numbers, sizes, colours, relations, places, styles.

`scenes.py` says what a picture holds; this file says it in English, in one of many ways.
"""

from __future__ import annotations

import random

COLOURS: dict[str, tuple[str, ...]] = {
    "red": ("red", "crimson", "scarlet"),
    "orange": ("orange",),
    "yellow": ("yellow", "golden"),
    "green": ("green",),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "pink": ("pink",),
    "brown": ("brown",),
    "black": ("black",),
    "white": ("white",),
    "grey": ("grey", "gray", "silver"),
}
"""Colours that a thing can be drawn in -> the words for them, the usual one first."""
SIZES: dict[str, tuple[str, ...]] = {
    "small": ("small", "tiny", "little"),
    "large": ("large", "huge", "big", "giant"),
}
NUMBERS: dict[int, tuple[str, ...]] = {
    2: ("two", "2", "a pair of", "a couple of"),
    3: ("three", "3"),
    4: ("four", "4"),
}
RELATIONS: dict[str, tuple[str, ...]] = {
    "left": ("left of", "to the left of", "on the left of"),
    "right": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
    "on": ("on", "on top of"),
    "beside": ("beside", "next to", "and"),
}
"""Where the first thing is, seen from the second. `beside` is left or right, as the picture likes."""
PLACES: dict[str, tuple[str, ...]] = {
    "sky": ("in the sky", "in the clouds", "sky background"),
    "sea": ("by the sea", "at sea", "on the ocean", "sea background"),
    "grass": ("on grass", "on the grass", "in a meadow", "grass background"),
    "night": ("at night", "under the stars", "in the night sky", "night background"),
    "sunset": ("at sunset", "at dusk", "in the sunset", "sunset background"),
    "snow": ("in the snow", "in winter", "on snow", "snow background"),
}
"""Scenes that can be behind things -> how they are said; the last form is the one of backgrounds."""
STYLES: dict[str, tuple[str, ...]] = {
    "noto": ("noto", "google"),
    "fluent": ("fluent", "microsoft"),
    "twemoji": ("twemoji", "twitter"),
}
DEFAULT_STYLE = "noto"
"""What a caption means that names no style."""
IRREGULAR = {
    "mouse": "mice",
    "man": "men",
    "woman": "women",
    "child": "children",
    "person": "people",
    "foot": "feet",
    "tooth": "teeth",
    "goose": "geese",
    "wolf": "wolves",
    "leaf": "leaves",
    "knife": "knives",
    "loaf": "loaves",
    "sheep": "sheep",
    "fish": "fish",
    "deer": "deer",
    "ox": "oxen",
    "cactus": "cacti",
}
MASS = {
    "bacon",
    "bread",
    "butter",
    "confetti",
    "fire",
    "fog",
    "garlic",
    "ginger",
    "grapes",
    "honey",
    "money",
    "popcorn",
    "rain",
    "rice",
    "snow",
}
"""What has no article, besides plurals."""


def reserved(word: str) -> bool:
    """Whether the word belongs to the grammar, and so cannot be the name of a thing."""
    return word in RESERVED


RESERVED = {
    word
    for table in (COLOURS, SIZES, NUMBERS, RELATIONS, PLACES, STYLES)
    for words in table.values()
    for phrase in words
    for word in (phrase, *([phrase.split()[-1]] if table is PLACES else []))
} - {"sky", "sea", "grass", "night", "sunset", "snow", "orange", "background"} | {
    *("emoji", "background", "style", "picture", "one", "two", "three", "four", "light blue", "teal"),
}
"""All of its words and phrases. `orange` alone is a fruit, as `a sunset` alone is the emoji of one."""


def is_plural(word: str) -> bool:
    """Whether a name is a plural already, or of something that is not counted."""
    last = word.split()[-1]
    return last in MASS or last in IRREGULAR.values() or (last.endswith("s") and not last.endswith(("ss", "us", "is")))


def article(word: str) -> str:
    """`a` or `an` before the word."""
    one = word.startswith(("one ", "uni", "use", "uk", "eu", "ufo", "u-"))
    return f"an {word}" if word[0] in "aeiou8" and not one else f"a {word}"


def plural(word: str) -> str:
    """More than one: `two red apples`, `three men in tuxedos`' first word only where the name says `of` or `with`."""
    for joint in (" of ", " with ", " in ", " on ", " without "):
        if joint in word:
            head, tail = word.split(joint, 1)
            return f"{plural(head)}{joint}{tail}"
    if is_plural(word):
        return word
    first, _, last = word.rpartition(" ")
    if last in IRREGULAR:
        last = IRREGULAR[last]
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return f"{first} {last}".strip()


def misspell(word: str, rng: random.Random) -> str:
    """One slip of the fingers: two letters swapped, one left out, one twice. Short words stay."""
    if len(word) < 5:
        return word
    at = rng.randrange(1, len(word) - 2)
    kind = rng.randrange(3)
    if kind == 0:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return word[:at] + (word[at] * 2 if kind == 1 else "") + word[at + 1 :]


def noun(word: str, colour: str | None = None, size: str | None = None, count: int = 1) -> str:
    """`a red apple`, `two tiny blue cats`, `popcorn`: one phrase, with the usual words or those given."""
    described = " ".join(part for part in (size, colour, plural(word) if count > 1 else word) if part)
    if count > 1:
        return f"{NUMBERS[count][0]} {described}"
    return described if is_plural(word) else article(described)
