"""Virtual environments of their own, for what must not live in the user's: made when first needed, and kept."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from darkroom.errors import Failed
from darkroom.store.fingerprints import hash_json

DIGITS = 12
UNFINISHED = ".unfinished"
"""Ends the name of what lies beside an environment that is being made, or was when its maker was interrupted."""

INSTALLED = ".installed-"
"""Begins the name of what a finished install leaves; the rest is the hash of all that was requested."""


class Lodger(Protocol):
    """Who needs an environment: what it is called, the folder's name, and what is installed: `requirements` with all
    they ask for, `alone` without."""

    name: str
    environment: str
    requirements: tuple[str, ...]
    alone: tuple[str, ...]


def ensure(lodger: Lodger, root: Path, show: Callable[[str], None] = lambda text: None) -> Path:
    """The python of the lodger's environment, `root`/NAME, which is made if it is not there or holds other versions.

    `show` gets lines for a user who waits: an install takes minutes and GBs. Raises `Failed` in one line.
    """
    folder = root / lodger.environment
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    mark = folder / f"{INSTALLED}{_asked_for(lodger)}"
    if _whole(folder, python, mark):
        return python
    from filelock import FileLock

    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{lodger.environment}.lock"):
            if not _whole(folder, python, mark):  # another process has made it meanwhile
                _make(lodger, folder, python, show)
                mark.touch()
                _unfinished(folder).unlink()
    except OSError as error:
        raise Failed(f"{root} cannot be written ({error.strerror or error}); name another folder.") from error
    return python


def packages_of(python: Path) -> list[str]:
    """The folders with the packages of an environment, by its python."""
    root = python.parent.parent
    return [str(folder) for folder in (*root.glob("lib/python*/site-packages"), *root.glob("Lib/site-packages"))]


def _asked_for(lodger: Lodger) -> str:
    """A hash of what an environment is made from: another one means another environment."""
    made_by = [sys.implementation.name, *sys.version_info[:2]]
    return hash_json([*lodger.requirements, "without dependencies", *lodger.alone, *made_by])[:DIGITS]


def _whole(folder: Path, python: Path, mark: Path) -> bool:
    return mark.exists() and python.exists() and not _unfinished(folder).exists()


def _unfinished(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{UNFINISHED}")


def _make(lodger: Lodger, folder: Path, python: Path, show: Callable[[str], None]) -> None:
    if folder.exists():
        if not _unfinished(folder).exists() and not any(folder.glob(f"{INSTALLED}*")):
            raise Failed(f"{folder} is there and is no environment that was made here: name another folder.")
        _unfinished(folder).touch()
        shutil.rmtree(folder)
    _unfinished(folder).touch()
    folder.mkdir()
    show(f"making the environment of {lodger.name} in {folder} (once: some minutes and GBs)")
    _run(lodger, [sys.executable, "-m", "venv", str(folder)])
    # -I: what the caller's variables say about Python is not for this one; pip still reads its own.
    pip = [str(python), "-I", "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--quiet"]
    for more, packages in (([], lodger.requirements), (["--no-deps"], lodger.alone)):
        if packages:
            show(f"pip install {' '.join([*more, *packages])}")
            _run(lodger, [*pip, *more, *packages])


def _run(lodger: Lodger, command: list[str]) -> None:
    """Raises `Failed` with the command's last line of error, or its last line."""
    ended = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if ended.returncode:
        lines = [line.strip() for line in ended.stdout.splitlines() if line.strip()]
        errors = (
            [line for line in lines if re.match(r"(?i)error\b", line)] or lines or [f"exit code {ended.returncode}"]
        )
        raise Failed(f"no environment for {lodger.name}: {errors[-1]}")
