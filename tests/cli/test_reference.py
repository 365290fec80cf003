"""The documented table of flags is the parser's."""

from pathlib import Path

from darkroom.cli.reference import BEGIN, END, flags_table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "flags.md"


def test_page_of_flags_shows_the_flags_the_parser_has() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip() == flags_table()
