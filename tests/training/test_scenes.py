"""Scenes hold what they say, captions say what they hold, and held-out pairings are never drawn."""

import random

import numpy as np
import pytest

pytest.importorskip("resvg_py")

from training import grammar, scenes
from training.colours import COLOURS as BACKGROUNDS
from training.drawings import NAMES, SIZE, Drawings
from training.scenes import Part, Scene
from training.vocabulary import Thing

THINGS = [Thing(f"1f{number:03x}", f"thing{number}", 3 + number % 5, (f"other{number}",)) for number in range(40)]


@pytest.fixture(scope="module")
def drawings() -> Drawings:
    """A disc in a colour of its own for each thing and style."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    disc = (rows - 128) ** 2 + (columns - 128) ** 2 < 100**2
    rgba = np.zeros((len(THINGS), SIZE, SIZE, 4), np.uint8)
    for number, picture in enumerate(rgba):
        picture[disc] = (*np.random.default_rng(number).integers(0, 256, 3), 255)
    keys = {(style, thing.code): row for style in grammar.STYLES for row, thing in enumerate(THINGS)}
    return Drawings(rgba, keys)


def middles(scene: Scene, drawings: Drawings) -> list[tuple[float, float]]:
    areas = scenes.compose(scene, drawings, random.Random(4)).areas
    return [tuple(np.argwhere(area).mean(0)[::-1]) for area in areas]


@pytest.mark.parametrize("relation", ["left", "right", "above", "below", "on"])
def test_the_first_thing_is_where_the_relation_says(relation: str, drawings: Drawings) -> None:
    scene = Scene((Part(THINGS[0]), Part(THINGS[1])), "noto", "white", relation)
    (x2, y2), (x1, y1) = middles(scene, drawings)  # the second is drawn first
    right, down = scenes.DIRECTIONS[relation]
    assert (x1 - x2) * right + (y1 - y2) * down > 60
    areas = scenes.compose(scene, drawings, random.Random(4)).areas
    if relation == "on":  # it touches
        assert 0 < np.argwhere(areas[1])[:, 0].max() - np.argwhere(areas[0])[:, 0].min() < 20


def test_counts_and_sizes_are_what_is_drawn(drawings: Drawings) -> None:
    for count in (1, 2, 3, 4):
        places = middles(Scene((Part(THINGS[0]),), "noto", "white", count=count), drawings)
        assert len(places) == len(set(places)) == count
    tiny, usual, huge = (
        scenes.compose(Scene((Part(THINGS[0]),), "noto", "white", size=size), drawings, random.Random(0)).areas[0].sum()
        for size in ("small", None, "large")
    )
    assert tiny < usual / 3 and huge > 1.1 * usual


def test_plain_backgrounds_are_their_colour_and_places_differ_by_seed(drawings: Drawings) -> None:
    made = scenes.compose(Scene((Part(THINGS[0]),), "noto", "teal"), drawings, random.Random(0)).pixels
    assert (made[0, 0] == BACKGROUNDS["teal"]).all()
    skies = [
        scenes.compose(Scene((Part(THINGS[0]),), "noto", "sky"), drawings, random.Random(seed)).pixels
        for seed in (1, 1, 2)
    ]
    assert (skies[0] == skies[1]).all() and (skies[0] != skies[2]).any()


def test_training_never_draws_a_held_out_pairing(drawings: Drawings) -> None:
    rng = random.Random(2)
    drawn = [scenes.sample(THINGS, drawings, rng) for _ in range(3000)]
    assert not any(map(scenes.held_out, drawn))
    free = [scenes._any(THINGS, drawings, rng) for _ in range(3000)]
    paired = [scene for scene in free if scenes.pairings(scene)]
    assert 0.05 < sum(map(scenes.held_out, paired)) / len(paired) < 0.25
    kinds = {(len(s.parts), s.relation is None, s.count, s.size) for s in drawn}
    assert {(1, True, n, None) for n in (1, 2, 3, 4)} | {(1, True, 1, "small"), (2, False, 1, None)} <= kinds
    assert {part.colour for scene in drawn for part in scene.parts} >= {None, *NAMES}


def test_held_out_does_not_depend_on_style_size_or_order() -> None:
    one, other = Part(THINGS[3]), Part(THINGS[8])
    answers = {
        scenes.held_out(Scene(parts, style, "red", relation))
        for parts in ((one, other), (other, one))
        for style in grammar.STYLES
        for relation in grammar.RELATIONS
    }
    assert len(answers) == 1


def test_captions_name_what_the_scene_holds(drawings: Drawings) -> None:
    rng, empty = random.Random(7), 0
    for _ in range(2000):
        scene = scenes.sample(THINGS, drawings, rng)
        caption = scenes.caption(scene, rng)
        empty += not caption.text
        if not caption.text:
            continue
        text = caption.text.lower()
        if scene.style != grammar.DEFAULT_STYLE:
            assert any(word in text for word in grammar.STYLES[scene.style])
        if scene.background in grammar.PLACES:
            assert any(form in text for form in grammar.PLACES[scene.background])
        else:
            assert not caption.says_background or scene.background in text
        if scene.relation:
            assert any(f" {form} " in text for form in grammar.RELATIONS[scene.relation])
        for part in scene.parts:
            assert part.colour is None or any(word in text for word in grammar.COLOURS[part.colour])
    assert 0.07 < empty / 2000 < 0.13


def test_persons_signs_and_things_that_name_a_colour_keep_their_own() -> None:
    assert scenes.colourable(Thing("1", "cat", 3))
    assert not scenes.colourable(Thing("1", "red heart", 0))
    assert not scenes.colourable(Thing("1", "mage", 1))
