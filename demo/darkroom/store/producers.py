"""The packages that artefacts are made with. Their versions are part of the keys, and are read without an import."""

import contextlib
import os
import re
import sys
from functools import cache
from typing import Any

MADE_WITH = "made_with"
"""What they are called among a key's facts: versions by package, None for one that is not installed here."""


def made_with(*packages: str) -> dict[str, dict[str, str | None]]:
    """The fact of a key that these packages make its artefact; of their versions without what comes behind a "+", which
    says for which devices they were compiled."""
    installed = _installed(tuple(sys.path))
    return {MADE_WITH: {package: installed.get(package) for package in packages}}


def missing(facts: dict[str, Any]) -> set[str]:
    """The packages that a key's artefact is made with and that are not installed here."""
    own = {package for package, version in facts.get(MADE_WITH, {}).items() if version is None}
    return own.union(*(missing(value) for value in facts.values() if isinstance(value, dict)))


def without(packages: set[str], facts: dict[str, Any]) -> dict[str, Any]:
    """The facts of a key as they are where these packages are not installed."""
    told = {name: without(packages, value) if isinstance(value, dict) else value for name, value in facts.items()}
    if versions := facts.get(MADE_WITH):
        told[MADE_WITH] = {name: None if name in packages else version for name, version in versions.items()}
    return told


@cache
def _installed(path: tuple[str, ...]) -> dict[str, str]:
    """The version of every package in these folders, by the names of their metadata: to import `importlib.metadata`
    alone would take ten times as long."""
    found: dict[str, str] = {}
    for folder in path:
        with contextlib.suppress(OSError):
            for name in os.listdir(folder or "."):
                if match := re.fullmatch(r"(.+?)-([^-+]+).*\.(dist|egg)-info", name):
                    found.setdefault(match[1].replace("_", "-").lower(), match[2])
    return found
