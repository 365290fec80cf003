"""Phrases are English: articles, plurals, numbers, slips of the fingers."""

import random

import pytest

from training import grammar


@pytest.mark.parametrize(
    ("word", "single", "several"),
    [
        ("cat", "a cat", "two cats"),
        ("owl", "an owl", "two owls"),
        ("unicorn", "a unicorn", "two unicorns"),
        ("glass of milk", "a glass of milk", "two glasses of milk"),
        ("man with beard", "a man with beard", "two men with beard"),
        ("cherry", "a cherry", "two cherries"),
        ("toothbrush", "a toothbrush", "two toothbrushes"),
        ("grapes", "grapes", "two grapes"),
        ("bus", "a bus", "two buses"),
        ("popcorn", "popcorn", "two popcorn"),
    ],
)
def test_one_has_its_article_and_two_are_plural(word: str, single: str, several: str) -> None:
    assert grammar.noun(word) == single
    assert grammar.noun(word, count=2) == several


def test_the_article_is_that_of_the_first_word_spoken() -> None:
    assert grammar.noun("cat", "orange") == "an orange cat"
    assert grammar.noun("owl", "red", "tiny") == "a tiny red owl"


def test_a_slip_changes_one_place_of_a_long_word_and_leaves_short_ones() -> None:
    rng = random.Random(1)
    made = {grammar.misspell("dolphin", rng) for _ in range(200)}
    assert len(made) > 8
    assert all(5 < len(word) < 9 and word[0] == "d" and word[-1] == "n" for word in made)
    assert grammar.misspell("cat", rng) == "cat"


def test_words_of_the_grammar_are_reserved_and_those_of_things_are_not() -> None:
    assert all(map(grammar.reserved, ("blue", "tiny", "two", "left of", "at night", "noto", "emoji")))
    assert not any(map(grammar.reserved, ("orange", "sunset", "cat", "clock")))
