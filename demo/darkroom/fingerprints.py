"""Hashes: of large files, computed again only when a file has changed, and of values."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Fingerprints:
    """Remembers the SHA-256 of files by their path, size, modification time and inode, in one JSON file.

    A memory that cannot be read or written costs time, never correctness: the hash is computed again.
    """

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        try:
            known = json.loads(memory.read_text(encoding="utf-8"))
            self._known: dict[str, list] = known if isinstance(known, dict) else {}
        except (OSError, ValueError):
            self._known = {}
        self._changed = False

    def sha256(self, path: Path, check: Callable[[Path], None] | None = None) -> str:
        """The hash of `path`, in hex. `check` is called first when the file is new or has changed, and may raise."""
        path = path.resolve()
        stat = path.stat()
        identity = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        known = self._known.get(str(path))
        if isinstance(known, list) and len(known) == 4 and known[:3] == identity:
            return known[3]
        if check:
            check(path)
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
        temporary = self._memory.with_name(f".{self._memory.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(self._known, indent=1), encoding="utf-8")
            temporary.replace(self._memory)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """SHA-256 of a JSON value in its canonical form, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
