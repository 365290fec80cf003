"""What the evaluation asks was written down, is held out where it says so, and can be told right from wrong."""

import json
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("resvg_py")

from training import answers, grammar, questions, scenes
from training.drawings import SIZE, Drawings
from training.questions import Question
from training.scenes import Part, Scene
from training.vocabulary import Thing

THINGS = [Thing(f"1f{number:03x}", f"thing{number}", 3) for number in range(130)]
ROWS = [json.loads(line) for line in questions.PATH.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def drawings() -> Drawings:
    """For each thing three boxes of its own colours and places."""
    rgba = np.zeros((len(THINGS), SIZE, SIZE, 4), np.uint8)
    for number, picture in enumerate(rgba):
        rng = np.random.default_rng(number)
        for _ in range(3):
            top, left, height, width = *rng.integers(20, 120, 2), *rng.integers(30, 116, 2)
            picture[top : top + height, left : left + width] = (*rng.integers(0, 200, 3), 255)
    return Drawings(rgba, {(style, thing.code): row for style in grammar.STYLES for row, thing in enumerate(THINGS)})


def test_two_hundred_of_each_kind_and_forty_of_strangers() -> None:
    expected = dict.fromkeys(("name", "synonym", "colour", "relation", "place"), 200) | {"stranger": 40}
    assert Counter(row["kind"] for row in ROWS) == expected
    assert len({(row["kind"], row["prompt"]) for row in ROWS}) == len(ROWS)
    relations = Counter(row.get("relation") for row in ROWS if row["kind"] == "relation")
    assert set(relations) == set(grammar.RELATIONS) and min(relations.values()) > 30


def test_pairings_that_are_asked_for_are_never_drawn_in_training() -> None:
    things = {code: Thing(code, "x", 3) for row in ROWS for code, *_ in row["parts"]}
    for row in ROWS:
        question = questions.from_row(row, things)
        assert scenes.held_out(question.scene) == (row["kind"] in ("colour", "relation", "place"))
        assert questions.to_row(question) == row


def asked(drawings: Drawings) -> list[Question]:
    made = [
        Question("name", f"{index}", Scene((Part(THINGS[index]),), "noto", ("blue", "white")[index % 2]))
        for index in range(8)
    ]
    made += [
        Question("colour", f"{index} {colour}", Scene((Part(THINGS[index], colour),), "noto", "white"))
        for index, colour in enumerate(("red", "green", "blue", "purple"))
    ]
    for index, relation in enumerate(grammar.RELATIONS):
        parts = (Part(THINGS[index]), Part(THINGS[index + 20]))
        made.append(Question("relation", relation, Scene(parts, "noto", "white", relation)))
    made += [Question("place", place, Scene((Part(THINGS[5]),), "noto", place)) for place in grammar.PLACES]
    return made


def test_right_pictures_are_all_right(drawings: Drawings) -> None:
    these = asked(drawings)
    made = np.stack([answers.shown(question, drawings) for question in these])
    found = answers.measured(made, these, THINGS, drawings)
    assert set(found) == {"name_top1", "name_top5", "background", "colour", "relation", "place"}
    assert found.pop("colour") >= 0.75
    assert found.pop("relation") >= 0.8  # boxes upon boxes hide more of each other than artwork does
    assert all(value == 1 for value in found.values())


def test_pictures_of_something_else_are_not(drawings: Drawings) -> None:
    these = asked(drawings)
    made = np.stack([answers.shown(question, drawings) for question in these])
    for start, count in ((0, 8), (8, 4), (12, 6), (18, 6)):
        made[start : start + count] = np.roll(made[start : start + count], 1, 0)
    found = answers.measured(made, these, THINGS, drawings)
    assert max(value for name, value in found.items() if name != "colour") <= 0.25 and found["colour"] < 0.5


def test_two_things_the_wrong_way_round_are_wrong(drawings: Drawings) -> None:
    parts = (Part(THINGS[3]), Part(THINGS[44]))
    for relation, other in (("left", "right"), ("above", "below"), ("on", "below")):
        question = Question("relation", relation, Scene(parts, "noto", "teal", relation))
        turned = Question("relation", relation, Scene(parts, "noto", "teal", other))
        assert answers.relation_right(answers.shown(question, drawings), question, THINGS, drawings)
        assert not answers.relation_right(answers.shown(turned, drawings), question, THINGS, drawings)
