"""The store of what was compiled: folders under keys that hold everything their contents depend on.

An artefact is written to a temporary folder, its files hashed into a manifest, and the folder renamed; so whatever
stands under a key is whole. Processes that need the same artefact wait for the one that is making it.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darkroom.errors import Failed
from darkroom.fingerprints import Fingerprints, hash_json

MANIFEST = "manifest.json"
DIGITS = 12


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
        return f"{re.sub(r'[^A-Za-z0-9.+-]+', '_', self.label)}-{self.digest[:DIGITS]}"


class Store:
    """Artefacts in one folder, which is made when the first of them is."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fingerprints = Fingerprints(root / ".fingerprints.json")

    def find(self, key: Key) -> Path | None:
        """The folder of a whole artefact under this key, or None."""
        folder = self.root / key.folder_name
        return folder if self._whole(folder, key) else None

    def find_for(self, key: Key, runs: Callable[[str], bool]) -> Path | None:
        """A whole artefact that differs from the key only in its "device", one that `runs` says will do; or None."""
        facts = json.loads(json.dumps(key.facts))
        for folder, manifest in self.manifests():
            device = str(manifest["key"].get("device"))
            alike = manifest["key"] == facts | {"device": device}
            if alike and runs(device) and self._whole(folder, Key("", manifest["key"])):
                return folder
        return None

    def manifests(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """The artefacts that say what they are, and what they say: label, key, files, made."""
        for path in sorted(self.root.glob(f"*/{MANIFEST}")):
            try:
                manifest = json.loads(path.read_text(encoding="utf-8"))
                whole = all(isinstance(manifest[part], dict) for part in ("key", "files", "made"))
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if whole:
                yield path.parent, manifest

    def make(self, key: Key, build: Callable[[Path], dict[str, Any]]) -> Path:
        """The artefact's folder; `build` fills it if it is not there, and returns facts worth recording.

        Raises `Failed` when the store cannot be written.
        """
        if folder := self.find(key):
            return folder
        from filelock import FileLock

        folder = self.root / key.folder_name
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / f".{key.folder_name}.lock"):
                if self._whole(folder, key):
                    return folder
                return self._make(key, folder, build)
        except OSError as error:
            raise Failed(f"{self.root} cannot be written ({error.strerror or error}); name another folder.") from error

    def _make(self, key: Key, folder: Path, build: Callable[[Path], dict[str, Any]]) -> Path:
        temporary = self.root / f".{key.folder_name}.tmp"
        # Whoever holds the lock is alone here: what lies under the temporary name was left by a killed process.
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            start = time.perf_counter()
            made = build(temporary)
            seconds = round(time.perf_counter() - start, 3)
            files = {
                path.relative_to(temporary).as_posix(): {
                    "size": path.stat().st_size,
                    "sha256": self.fingerprints.sha256(path),
                }
                for path in sorted(temporary.rglob("*"))
                if path.is_file()
            }
            manifest = {"label": key.label, "key": key.facts, "files": files, "made": made | {"seconds": seconds}}
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(temporary, folder)
            self.fingerprints.moved(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return folder

    def _whole(self, folder: Path, key: Key) -> bool:
        """Whether the manifest is for this key and its files are the ones it names (hashed again if touched)."""
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if manifest["key"] != json.loads(json.dumps(key.facts)):
                return False
            return all(
                (folder / name).stat().st_size == file["size"]
                and self.fingerprints.sha256(folder / name) == file["sha256"]
                for name, file in manifest["files"].items()
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
