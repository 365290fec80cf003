"""The two ways a run can end badly for reasons its user can understand."""

import os
from collections.abc import Iterable
from pathlib import Path


class DarkroomError(Exception):
    """A failure with a one-line message for the user; `exit_code` is what the process ends with."""

    exit_code = 1


class InvalidRequest(DarkroomError):
    """The request cannot be met: the message says what is wrong, the value seen, and what to do."""

    exit_code = 2


class Failed(DarkroomError):
    """The request is valid, but could not be met here and now."""

    exit_code = 1


def gist(error: Exception) -> str:
    """The first line of another library's error, without the full stop; the error's kind where it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")


def check_known(flag: str, name: str, choices: Iterable[str], more: str = "") -> None:
    """Raises `InvalidRequest` for a value of a flag that is none of its `choices`; `more` ends the message."""
    known = list(choices)
    if name not in known:
        raise InvalidRequest(f"{flag} {unknown(name, known)}{more}.")


def unknown(name: str, choices: list[str]) -> str:
    """`'Eular' is not known here. Did you mean 'Euler'? Known: DDIM, Euler`."""
    return f"{name!r} is not known here.{near_matches(name, choices)} Known: {', '.join(choices)}"


def near_matches(word: str, choices: list[str]) -> str:
    """` Did you mean 'Euler' or 'EulerA'?`, or nothing when no choice is near."""
    return _did_you_mean(_near(word, choices))


def near_on_disk(path: Path) -> str:
    """` Did you mean 'models/emoji'?` of a path that is not there, or nothing when nothing near is.

    Where the folder that would hold it is not there either, those of a name near its are searched.
    """
    holders = [path.parent]
    if not os.path.isdir(path.parent):
        above = path.parent.parent
        holders = [above / name for name in _near(path.parent.name, _models_in(above))]
    return _did_you_mean([str(holder / name) for holder in holders for name in _near(path.name, _models_in(holder))])


def _models_in(folder: Path) -> list[str]:
    """The names of what a model can be: folders and safetensors files."""
    try:
        return sorted(
            path.name for path in folder.iterdir() if os.path.isdir(path) or path.suffix.lower() == ".safetensors"
        )
    except OSError:
        return []


def _near(word: str, choices: list[str]) -> list[str]:
    import difflib

    folded = {choice.lower(): choice for choice in choices}
    return [folded[match] for match in difflib.get_close_matches(word.lower(), folded, n=3, cutoff=0.5)]


def _did_you_mean(near: list[str]) -> str:
    return f" Did you mean {' or '.join(repr(match) for match in near)}?" if near else ""
