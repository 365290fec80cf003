"""The list of what the model can draw, read from `concepts.txt`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PATH = Path(__file__).with_name("concepts.txt")


@dataclass(frozen=True)
class Concept:
    """One thing to draw, the same in every style."""

    icon: str
    """Its name in the artwork packages."""
    name: str
    """Its name in captions."""
    synonyms: tuple[str, ...] = ()
    """Other words that people type for it."""
    favourite: bool = False
    """Whether it is among what people ask for first."""

    @property
    def words(self) -> tuple[str, ...]:
        """Every way to say it, the caption's name first."""
        return (self.name, *self.synonyms)


def parse(text: str) -> list[Concept]:
    """Read `icon | name | synonym, synonym` lines, favourites with a star before them; blank lines and lines that start
    with # are skipped."""
    concepts = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        icon, name, synonyms = (*(part.strip() for part in line.removeprefix("* ").split("|")), "", "")[:3]
        words = tuple(word.strip() for word in synonyms.split(",") if word.strip())
        concepts.append(Concept(icon, name or icon.replace("-", " "), words, line.startswith("* ")))
    return concepts


def load(path: Path = PATH) -> list[Concept]:
    """All concepts, in the order of the file."""
    return parse(path.read_text("utf-8"))
