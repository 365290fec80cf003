"""What a person might type for a picture: the full form or parts of it, turned round."""

from __future__ import annotations

import random

from training.concepts import Concept

STYLE_WORDS = {
    "noto": ("noto", "google"),
    "fluent": ("fluent", "microsoft"),
    "twemoji": ("twemoji", "twitter"),
}

EMPTY = 0.1
"""Share of empty captions, for classifier-free guidance (https://arxiv.org/abs/2207.12598)."""


def article(word: str) -> str:
    """`a` or `an` before the word."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def full(word: str, style: str, colour: str) -> str:
    """The form that prompts take in the documentation: `a red apple, noto style, blue background`."""
    return f"{article(word)}, {style} style, {colour} background"


def caption(concept: Concept, style: str, colour: str, rng: random.Random) -> str:
    """One random caption for the picture of `concept` in `style` on `colour`; empty one time in ten."""
    if rng.random() < EMPTY:
        return ""
    word = concept.name if not concept.synonyms or rng.random() < 0.65 else rng.choice(concept.synonyms)
    spoken = rng.choice(STYLE_WORDS[style]) if rng.random() < 0.1 else style
    if rng.random() < 0.5:
        return full(word, spoken, colour)
    subject = word if rng.random() < 0.4 else article(word)
    forms = (
        subject,
        f"{word} emoji",
        f"{subject}, {spoken} style",
        f"{subject}, {colour} background",
        f"{subject} on a {colour} background",
        f"{subject} on {colour}",
        f"{subject} in {spoken} style",
        f"{subject} on a {colour} background, {spoken} style",
        f"{colour} background, {subject}, {spoken} style",
        f"{spoken} {word} emoji, {colour} background",
        f"{spoken} style {word} on {colour}",
        f"a picture of {subject}",
    )
    return rng.choice(forms)
