"""Captions, concepts and colours say what they should."""

import random

import numpy as np

from training import captions, concepts
from training.colours import COLOURS, NAMES, TABLE, border_colour, nearest


def test_at_least_500_concepts_each_named_once() -> None:
    listed = concepts.load()
    assert len(listed) >= 500
    assert len({concept.icon for concept in listed}) == len(listed)
    words = [word for concept in listed for word in concept.words]
    assert len(set(words)) == len(words)
    assert all(word == word.lower().strip() and word for word in words)


def test_concept_lines_are_read_with_their_defaults() -> None:
    one, two = concepts.parse("# food\n\n* red-apple\nautomobile | car | red car, auto\n")
    assert (one.icon, one.words, one.favourite) == ("red-apple", ("red apple",), True)
    assert (two.words, two.favourite) == (("car", "red car", "auto"), False)


def test_full_caption_has_the_documented_form() -> None:
    assert captions.full("red apple", "noto", "blue") == "a red apple, noto style, blue background"
    assert captions.full("owl", "fluent", "light blue") == "an owl, fluent style, light blue background"


def test_captions_name_the_thing_and_a_tenth_are_empty() -> None:
    concept, rng = concepts.Concept("automobile", "car", ("auto",)), random.Random(1)
    made = [captions.caption(concept, "noto", "teal", rng).text for _ in range(2000)]
    assert 0.07 < sum(not text for text in made) / len(made) < 0.13
    assert all("car" in text or "auto" in text for text in made if text)
    assert 0.4 < sum("teal" in text for text in made) / len(made) < 0.9
    assert len(set(made)) > 30


def test_captions_without_a_style_are_the_default_one_and_know_whether_they_name_the_colour() -> None:
    concept, rng = concepts.Concept("automobile", "car", ("auto",)), random.Random(2)
    for style, spoken in captions.STYLE_WORDS.items():
        made = [captions.caption(concept, style, "teal", rng) for _ in range(2000)]
        assert all(one.says_colour == ("teal" in one.text) for one in made)
        unstyled = [one.text for one in made if one.text and not any(word in one.text for word in spoken)]
        assert bool(unstyled) == (style == captions.DEFAULT_STYLE)


def test_same_stream_gives_same_captions() -> None:
    concept = concepts.load()[0]
    first, second = ([captions.caption(concept, "noto", "red", random.Random(i)) for i in range(9)] for _ in "ab")
    assert first == second


def test_a_dozen_colours_each_nearest_to_itself_with_room_around() -> None:
    assert len(COLOURS) == 12
    shaken = TABLE.astype(int)[:, None] + np.random.default_rng(0).integers(-12, 13, (12, 50, 3))
    assert (nearest(shaken) == np.arange(12)[:, None]).all()


def test_border_colour_ignores_the_middle() -> None:
    picture = np.full((1, 32, 32, 3), TABLE[NAMES.index("pink")], np.uint8)
    picture[:, 4:-4, 4:-4] = 0
    assert (border_colour(picture)[0] == TABLE[NAMES.index("pink")]).all()
