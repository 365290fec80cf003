"""Hashes: of large files, computed again only when a file has changed, and of values."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from darkroom.errors import Failed
from darkroom.files import write_whole

TICK = 20_000_000
"""Nanoseconds: what the times that a file system keeps are exact to, at least."""


class Fingerprints:
    """Remembers the SHA-256 of files by their path, size, times of change and inode, in one JSON file.

    A memory that cannot be read or written costs time, never correctness: the hash is computed again.
    """

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        try:
            known = json.loads(memory.read_text(encoding="utf-8"))
            self._known: dict[str, list] = known if isinstance(known, dict) else {}
        except (OSError, ValueError, RecursionError):
            self._known = {}
        self._changed = False

    def sha256(self, path: Path, check: Callable[[Path], None] | None = None, anew: bool = False) -> str:
        """The hash of `path`, in hex; computed `anew` even when it is known.

        `check` is called first when the file is new or has changed, and may raise.
        """
        path = path.resolve()
        identity = _identity(path)
        known = self._known.get(str(path))
        if not anew and isinstance(known, list) and known[:-1] == identity and isinstance(known[-1], str):
            return known[-1]
        if check:
            check(path)
        # A change within the clock's tick would keep the file's times: those must be past before it is read.
        while (wait := max(identity[1:3]) + TICK - time.time_ns()) > 0 and wait <= TICK:
            time.sleep(wait / 1e9)
        digest = hash_file(path)
        self._known[str(path)] = [*identity, digest]
        self._changed = True
        return digest

    def moved(self, old: Path, new: Path) -> None:
        """Keeps what is known of the files of a folder that was renamed."""
        for path in new.rglob("*"):
            if (known := self._known.pop(str(old.resolve() / path.relative_to(new)), None)) is not None:
                self._known[str(path.resolve())] = known

    def remember(self) -> None:
        """Writes the memory, without files that are gone, if anything in it is new and its folder can be written."""
        if not self._changed:
            return
        self._known = {path: known for path, known in self._known.items() if os.path.exists(path)}
        with contextlib.suppress(Failed):
            write_whole(self._memory, json.dumps(self._known, indent=1).encode())


def _identity(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """SHA-256 of a JSON value in its canonical form, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
