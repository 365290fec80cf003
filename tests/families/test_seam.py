"""No file outside the families' own rooms decides anything by a family's name, or by that of a network."""

import ast
from pathlib import Path

from darkroom.families import every_family
from tests.support import ROOT

HOUSE = ROOT / "demo" / "darkroom"
KNOWING = ("families/", "networks/", "checkpoint/catalog.py", "bench/architectures.py", "bench/contenders/")
"""Where names of families and networks are what a file is about: the catalogs of models and of published shapes, and
what drives other libraries' pipelines in environments of their own."""

NAMES = {"unet", "clip_2", "text_encoder_2", "tokenizer_2"}


def literals(path: Path) -> set[str]:
    """The texts in a file's code that are a name alone; its documentation may speak of anything."""
    return {
        node.value
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def test_nobody_else_names_a_family_or_a_network() -> None:
    names = NAMES | {name for family in every_family() for name in (family.name, family.title, *family.pipelines)}
    found = {
        file: sorted(named)
        for path in sorted(HOUSE.rglob("*.py"))
        if not (file := path.relative_to(HOUSE).as_posix()).startswith(KNOWING) and (named := names & literals(path))
    }
    assert found == {}
