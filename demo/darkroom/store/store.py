"""The store of what was compiled: folders under keys that hold everything their contents depend on.

An artefact is written to a temporary folder, its files hashed into a manifest, and the folder renamed; so whatever
stands under a key is whole. Processes that need the same artefact wait for the one that is making it. What is found
damaged is set aside and made again; what a killed process left is swept up by the next.
"""

import atexit
import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darkroom.errors import Failed, InvalidRequest
from darkroom.store.fingerprints import Fingerprints, hash_json
from darkroom.store.manifest import MANIFEST, USED, Damaged, check_files, read_manifest, write_manifest
from darkroom.store.producers import missing, without

DIGITS = 12
LONGEST_LABEL = 120
"""Characters: with what else stands in names, below the 255 bytes that file systems take."""

TEMPORARY, ASIDE, OWN = ".tmp", ".aside", ".own"
HOUR = 3600.0
SCARCE = 16 * 2**20
"""Bytes: with less of them free, whatever a library says when it cannot write means a full disk."""


@dataclass(frozen=True)
class Key:
    """`facts`: all that the artefact depends on, as JSON values. `label`: what a person calls it; not identifying."""

    label: str
    facts: dict[str, Any]

    @property
    def digest(self) -> str:
        return hash_json(self.facts)

    @property
    def folder_name(self) -> str:
        return f"{re.sub(r'[^A-Za-z0-9.+-]+', '_', self.label)[:LONGEST_LABEL]}-{self.digest[:DIGITS]}"


class Store:
    """Artefacts in one folder, which is made when the first of them is. `tell` gets lines for a user who waits."""

    def __init__(self, root: Path, tell: Callable[[str], None] = lambda text: None) -> None:
        self.root = root
        self.tell = tell
        self.fingerprints = Fingerprints(root / ".fingerprints.json")

    def find(self, key: Key) -> Path | None:
        """The folder of a whole artefact under this key, or None. Of packages that make it and are not installed here,
        any version will do: another machine made it."""
        folder = self.root / key.folder_name
        if not folder.exists() and missing(key.facts):
            return self.find_for(key, lambda device: device == str(key.facts.get("device")))
        return folder if folder.exists() and self.damage(folder, key.facts) is None else None

    def find_for(self, key: Key, runs: Callable[[str], bool]) -> Path | None:
        """A whole artefact that differs from the key only in its "device", one that `runs` says will do; or None."""
        facts, packages = json.loads(json.dumps(key.facts)), missing(key.facts)
        for folder, manifest in self.manifests():
            known = without(packages, manifest["key"])
            device = str(known.get("device"))
            alike = known == facts | ({"device": device} if "device" in facts else {})
            if alike and runs(device) and self.damage(folder) is None:
                return folder
        return None

    def digest_of(self, key: Key, folder: Path) -> str:
        """The digest of the artefact that was found in `folder` for this key: its own may be another. The key's, where
        there is no artefact."""
        if folder.parent != self.root or folder.name == key.folder_name:
            return key.digest
        return hash_json(read_manifest(folder)["key"])

    def damage(self, folder: Path, facts: dict[str, Any] | None = None, anew: bool = False) -> str | None:
        """Why the artefact in `folder` must not be used, in half a sentence; None where it is whole.

        It must be the one that its manifest says, for the key with these `facts` if any are given, with the files that
        it names. They are hashed again if they were touched since the last time, with `anew` in any case.
        """
        try:
            manifest = read_manifest(folder)
            own = Key(manifest["label"], manifest["key"])
            if folder.name != own.folder_name or facts not in (None, manifest["key"], json.loads(json.dumps(facts))):
                return f"{MANIFEST} is that of another artefact"
            check_files(folder, manifest, self.fingerprints, anew)
        except Damaged as error:
            return str(error)
        return None

    def manifests(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """The artefacts that say what they are, and what they say: label, key, files, made."""
        for folder in self.folders():
            with contextlib.suppress(Damaged):
                yield folder, read_manifest(folder)

    def folders(self) -> list[Path]:
        """What stands in the store as artefacts, whole or not. Raises `InvalidRequest` where it is no folder."""
        if self.root.exists() and not self.root.is_dir():
            raise InvalidRequest(f"{self.root} is not a folder.")
        try:
            return sorted(path for path in self.root.iterdir() if path.is_dir() and not path.name.startswith("."))
        except OSError:
            return []

    def aside(self) -> list[Path]:
        """What was damaged and set aside."""
        return sorted(self.root.glob(f".*{ASIDE}"))

    def make(self, key: Key, build: Callable[[Path], dict[str, Any]]) -> Path:
        """The artefact's folder; `build` fills it if it is not there, and returns facts worth recording.

        Raises `Failed` when the store cannot be written.
        """
        if folder := self.find(key):
            return folder
        folder = self.root / key.folder_name
        if os.path.lexists(folder) and not os.access(self.root, os.W_OK) and (damage := self.damage(folder, key.facts)):
            self.tell(f"{folder} is damaged ({damage}).")
        with self.changing(key.folder_name):
            if os.path.lexists(folder):
                if (damage := self.damage(folder, key.facts)) is None:
                    return folder
                self._set_aside(folder, damage)
            return self._make(key, folder, build)

    @contextlib.contextmanager
    def changing(self, name: str) -> Iterator[None]:
        """Alone with the artefact of this folder name, in a store that can be written. Raises `Failed` if it cannot."""
        from filelock import FileLock, Timeout

        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self._lock(name))
            try:
                lock.acquire(blocking=False)
            except Timeout:
                self.tell(f"waiting for another process, which is making {name}.")
                lock.acquire()
            try:
                self.sweep(name)
                yield
            finally:
                lock.release()
        except OSError as error:
            if error.filename and not str(error.filename).startswith(str(self.root)):
                raise Failed(f"{error.filename} cannot be used: {error.strerror or error}.") from error
            raise Failed(f"{self.root} cannot be written ({error.strerror or error}); name another folder.") from error

    def sweep(self, held: str | None = None) -> None:
        """Removes what killed processes left of what they were making; `held` is the artefact that is locked here."""
        left = [*self.root.glob(f".*{TEMPORARY}")]
        if not left:
            return
        from filelock import FileLock, Timeout

        for path in left:
            name = path.name[1:].rsplit(".", 2)[0]
            lock = contextlib.nullcontext() if name == held else FileLock(self._lock(name), timeout=0)
            with contextlib.suppress(Timeout, OSError), lock:
                clear(path)
                if name.endswith(OWN):  # no other process waits for it
                    self._lock(name).unlink(missing_ok=True)

    def remove(self, folder: Path) -> None:
        """Removes an artefact, or what was set aside: at once for other processes, then file by file."""
        with self.changing(folder.name):
            temporary = self._temporary(folder.name)
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                os.replace(folder, temporary)
                clear(temporary)

    def take(self, key: Key) -> Path | None:
        """What `find` finds; what is damaged is set aside, where the store can be written."""
        folder = self.root / key.folder_name
        if not os.path.lexists(folder):
            return None
        if self.damage(folder, key.facts) is None:
            return folder
        with contextlib.suppress(Failed), self.changing(key.folder_name):
            if os.path.lexists(folder) and (damage := self.damage(folder, key.facts)):
                self._set_aside(folder, damage)
        return self.find(key)

    def renew(self, key: Key, fill: Callable[[Path], None]) -> Path:
        """The artefact's folder, made anew of what it holds and what `fill` adds. Raises as `make` does."""
        folder = self.root / key.folder_name
        with self.changing(key.folder_name), self.filled(folder) as temporary:
            if os.path.lexists(folder) and (damage := self.damage(folder, key.facts)):
                self._set_aside(folder, damage)
            if folder.exists():
                shutil.copytree(folder, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST, USED))
            self._on_disk(lambda: fill(temporary) or {})
            write_manifest(temporary, key.label, key.facts, {"at": int(time.time())}, self.fingerprints)
        return folder

    def scratch(self, name: str) -> Path:
        """An empty folder of this process's own, which goes when it ends; where it is killed, the next sweep takes it.

        Raises `Failed` when the store cannot be written.
        """
        from filelock import FileLock

        own = f"{name}-{secrets.token_hex(4)}{OWN}"
        folder, lock = self._temporary(own), FileLock(self._lock(own))

        def end() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            lock.release()
            with contextlib.suppress(OSError):
                os.unlink(lock.lock_file)

        atexit.register(end)  # first: Ctrl-C must not come between the folder and what removes it
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            folder.mkdir()
        except OSError as error:
            raise Failed(f"{self.root} cannot be written ({error.strerror or error}); name another folder.") from error
        return folder

    def put(self, folder: Path, fill: Callable[[Path], None]) -> None:
        """Makes an artefact of what `fill` writes, manifest and all, once it is found whole. Raises `Damaged`."""
        with self.changing(folder.name), self.filled(folder) as temporary:
            fill(temporary)
            manifest = read_manifest(temporary)
            if Key(manifest["label"], manifest["key"]).folder_name != folder.name:
                raise Damaged(f"{MANIFEST} is that of another artefact")
            check_files(temporary, manifest, self.fingerprints)
            if os.path.lexists(folder):
                self._set_aside(folder, self.damage(folder) or "it was replaced")

    def note_use(self, folder: Path) -> None:
        """Leaves the time of use with an artefact; where nothing can be written, nothing is."""
        mark = folder / USED
        with contextlib.suppress(OSError):
            if time.time() - last_use(folder) > HOUR:
                mark.touch()

    def _make(self, key: Key, folder: Path, build: Callable[[Path], dict[str, Any]]) -> Path:
        with self.filled(folder) as temporary:
            start = time.perf_counter()
            made = self._on_disk(lambda: build(temporary))
            made |= {"seconds": round(time.perf_counter() - start, 3), "at": int(time.time())}
            write_manifest(temporary, key.label, key.facts, made, self.fingerprints)
        return folder

    @contextlib.contextmanager
    def filled(self, folder: Path) -> Iterator[Path]:
        """A temporary folder that takes the place of `folder` when the block ends well, and is gone when it does not.

        Its name is its own: what a killed process left may still be written to where children outlive their parents.
        """
        temporary, old = self._temporary(folder.name), self._temporary(folder.name)
        try:
            temporary.mkdir()  # in here, where Ctrl-C cannot come between it and what removes it
            yield temporary
            with contextlib.suppress(FileNotFoundError):
                os.replace(folder, old)
            os.replace(temporary, folder)
            self.fingerprints.moved(temporary, folder)
            with contextlib.suppress(OSError):
                clear(old)
        finally:
            for left in (temporary, old):  # something only where it did not end well
                with contextlib.suppress(OSError):
                    clear(left)

    def _on_disk(self, build: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `build` returns. Libraries have words of their own for a full disk: they become the system's."""
        try:
            return build()
        except (InvalidRequest, OSError):
            raise
        except Exception as error:
            if not self.root.is_dir():
                raise Failed(f"{self.root} was removed while something was made in it; start again.") from error
            if shutil.disk_usage(self.root).free < SCARCE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise

    def _set_aside(self, folder: Path, why: str) -> None:
        aside = self.root / f".{folder.name}{ASIDE}"
        if os.path.lexists(aside):
            clear(aside)
        os.replace(folder, aside)
        self.tell(f"{folder} is damaged ({why}): it was set aside as {aside.name}, and is made again.")

    def _lock(self, name: str) -> Path:
        return self.root / f".{name}.lock"

    def _temporary(self, name: str) -> Path:
        return self.root / f".{name}.{secrets.token_hex(4)}{TEMPORARY}"


def clear(path: Path) -> None:
    """Removes a folder, or what stands in the place of one: a file, or a link but not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def last_use(folder: Path) -> float:
    """When an artefact was last used, to the hour, in seconds since 1970; 0 when it never was."""
    try:
        return (folder / USED).stat().st_mtime
    except OSError:
        return 0.0
