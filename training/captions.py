"""What a person might type for a picture: the full form or parts of it, turned round."""

from __future__ import annotations

import random
from dataclasses import dataclass

from training.concepts import Concept

STYLE_WORDS = {
    "noto": ("noto", "google"),
    "fluent": ("fluent", "microsoft"),
    "twemoji": ("twemoji", "twitter"),
}

DEFAULT_STYLE = "noto"
"""What a caption means that names no style."""

EMPTY = 0.1
"""Share of empty captions, for classifier-free guidance (https://arxiv.org/abs/2207.12598)."""


def article(word: str) -> str:
    """`a` or `an` before the word."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def full(word: str, style: str, colour: str) -> str:
    """The form that prompts take in the documentation: `a red apple, noto style, blue background`."""
    return f"{article(word)}, {style} style, {colour} background"


@dataclass(frozen=True)
class Caption:
    """What is typed, and whether it says the background's colour."""

    text: str
    says_colour: bool


def caption(concept: Concept, style: str, colour: str, rng: random.Random) -> Caption:
    """One random caption for the picture of `concept` in `style` on `colour`; empty one time in ten.

    Forms that name no style are kept for the default one: a network of this size, asked to choose between three
    drawings, blends them. Forms that name no colour are for every colour: that choice it makes well.
    """
    if rng.random() < EMPTY:
        return Caption("", says_colour=False)
    word = concept.name if not concept.synonyms or rng.random() < 0.65 else rng.choice(concept.synonyms)
    spoken = rng.choice(STYLE_WORDS[style]) if rng.random() < 0.1 else style
    if rng.random() < 0.5:
        return Caption(full(word, spoken, colour), says_colour=True)
    subject = word if rng.random() < 0.4 else article(word)
    coloured = [
        f"{subject} on a {colour} background, {spoken} style",
        f"{colour} background, {subject}, {spoken} style",
        f"{spoken} {word} emoji, {colour} background",
        f"{spoken} style {word} on {colour}",
    ]
    plain = [f"{subject}, {spoken} style", f"{subject} in {spoken} style"]
    if style == DEFAULT_STYLE:
        coloured += [
            f"{subject}, {colour} background",
            f"{subject} on a {colour} background",
            f"{subject} on {colour}",
            f"{word} emoji, {colour} background",
        ]
        plain += [subject, f"{word} emoji", f"a picture of {subject}"]
    text = rng.choice(coloured + plain)
    return Caption(text, says_colour=text in coloured)
