"""The README's table of flags is the parser's."""

from pathlib import Path

from darkroom.cli.reference import BEGIN, END, flags_table

README = Path(__file__).resolve().parents[2] / "README.md"


def test_readme_shows_the_flags_the_parser_has() -> None:
    text = README.read_text(encoding="utf-8")
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip() == flags_table()
