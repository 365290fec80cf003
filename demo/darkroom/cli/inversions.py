"""Flags -> textual inversions: which files, and the words that prompts call them by."""

import argparse
from pathlib import Path
from typing import Any

from darkroom.checkpoint.inversion import check_inversion, open_inversion
from darkroom.cli.console import Console
from darkroom.contract import Inversion
from darkroom.errors import InvalidRequest
from darkroom.prepare import Preparer
from darkroom.request import EmbeddingChoice


def check_embedding_flags(flags: argparse.Namespace) -> None:
    """Raises `InvalidRequest` for what is known to be wrong before a model is fetched."""
    for path in flags.embedding or ():
        check_inversion(Path(path))


def inversions_of(
    flags: argparse.Namespace, recipe: dict[str, Any] | None, preparer: Preparer, console: Console
) -> tuple[Inversion, ...]:
    """Those that are meant, which fit the model. A recipe's are found among the files by what they hold, whatever they
    are called now."""
    paths = [Path(path) for path in flags.embedding or ()]
    digests = {preparer.engines.fingerprints.sha256(path): path for path in paths}
    if recipe is None:
        asked: list[tuple[Path, str | None]] = [(path, None) for path in paths]
    else:
        choices = [EmbeddingChoice(**fields) for fields in recipe["request"].get("embeddings", ())]
        if strangers := digests.keys() - {choice.sha256 for choice in choices}:
            path = digests[min(strangers)]
            raise InvalidRequest(f"--recipe {flags.recipe} was not made with the embedding {path}.")
        if missing := [choice.word for choice in choices if choice.sha256 not in digests]:
            raise InvalidRequest(
                f"--recipe {flags.recipe} was made with an embedding for {missing[0]}: name its file with --embedding."
            )
        asked = [(digests[choice.sha256], choice.word) for choice in choices]
    made = tuple(open_inversion(path, word, preparer.checkpoint, preparer.engines.fingerprints) for path, word in asked)
    words = [each.word.lower() for each in made]
    if twice := {word for word in words if words.count(word) > 1}:
        raise InvalidRequest(f"--embedding: two files are for the word {min(twice)!r}: rename one.")
    for each in made:
        console.detail(f"embedding: {each.word} in prompts, {each.vectors} vectors of {each.path}")
    return made


def chosen(inversions: tuple[Inversion, ...]) -> tuple[EmbeddingChoice, ...]:
    """What a request records of them."""
    return tuple(EmbeddingChoice(each.sha256, each.word) for each in inversions)
