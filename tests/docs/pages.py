"""The pages that users read, and what stands in them."""

import re
import shlex
from pathlib import Path

from tests.support import ROOT

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
"""Whose command lines are run."""

OTHERS = ("CONTRIBUTING.md", "benchmarks/*.md", "training/*.md", "demo/darkroom/models/*/*.md")
EVERY_PAGE = [*PAGES, *(page for pattern in OTHERS for page in sorted(ROOT.glob(pattern)))]
"""Whose links are followed."""

FENCE = re.compile(r"^ *```")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
PROGRAM = re.compile(r"(\$ )?(\.venv/bin/\S+|python3?|pip|pytest|make|git|(tools|scripts)/\S+)( |$)")


def blocks(page: Path) -> list[str]:
    """The lines of its blocks of code, fenced or indented; what a backslash continues is one line."""
    lines, fenced = [], False
    for line in re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8")).splitlines():
        if FENCE.match(line):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            lines.append(line.strip())
    return lines


def commands(page: Path) -> list[str]:
    """What a page tells its readers to type, without comments."""
    typed = (line.removeprefix("$ ") for line in blocks(page) if PROGRAM.match(line))
    return [shlex.join(shlex.split(line, comments=True)) for line in typed]


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    kept, fenced = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        if FENCE.match(line):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            kept.append(line)
    return "\n".join(kept)


def anchors(page: Path) -> set[str]:
    """The anchors of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
