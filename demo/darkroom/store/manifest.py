"""The manifest beside every artefact: what it is, what it was made of, its files, and a hash of all that."""

import json
from pathlib import Path
from typing import Any

from darkroom.contract import PLACES
from darkroom.store.fingerprints import Fingerprints, hash_json

MANIFEST = "manifest.json"
USED = ".used"
"""A file beside it whose time says when the artefact was last used, to the hour."""

PARTS = {"label": str, "key": dict, "files": dict, "made": dict}
OF_A_RUNTIME = ("runtime", "version", "device")
NAMED = {"engine": (*OF_A_RUNTIME, "precision"), "choice": OF_A_RUNTIME, "compiled": OF_A_RUNTIME}
"""What the key of a kind says in words."""


class Damaged(Exception):
    """An artefact that is not what its manifest says; the message says how, in half a sentence."""


def write_manifest(
    folder: Path, label: str, key: dict[str, Any], made: dict[str, Any], fingerprints: Fingerprints
) -> None:
    """Describes what lies in `folder`: `key` is what it depends on, `made` what is worth knowing of its making."""
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": fingerprints.sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {"label": label, "key": key, "files": files, "made": made}
    (folder / MANIFEST).write_bytes(_text(manifest | {"sha256": hash_json(manifest)}))


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the manifest says: label, key, files, made. Raises `Damaged` when a byte of it has changed."""
    try:
        return parse_manifest((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise Damaged(f"{MANIFEST} is missing") from None
    except OSError:
        raise Damaged(f"{MANIFEST} cannot be read") from None


def parse_manifest(text: bytes) -> dict[str, Any]:
    """The same of a manifest's bytes."""
    try:
        manifest = json.loads(text.decode("utf-8"))
        own = manifest.pop("sha256")
        whole = _is_shaped(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damaged(f"{MANIFEST} cannot be read") from None
    # As text, too: a changed blank is a change.
    if not whole or own != hash_json(manifest) or text != _text(manifest | {"sha256": own}):
        raise Damaged(f"{MANIFEST} has changed")
    return manifest


def check_files(folder: Path, manifest: dict[str, Any], fingerprints: Fingerprints, anew: bool = False) -> None:
    """Raises `Damaged` for a file that is not the one it names, or that it does not name; hidden ones, and what is in
    hidden folders, are its users'.

    `anew` hashes also what seems untouched.
    """
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in name.split("/"))
        if name not in manifest["files"] and name != MANIFEST and not hidden and not path.is_dir():
            raise Damaged(f"{name} is none of its files")
    for name, file in manifest["files"].items():
        path = folder / name
        try:
            if path.stat().st_size != file["size"]:
                raise Damaged(f"{name} has {path.stat().st_size} bytes, not {file['size']}")
            same = fingerprints.sha256(path, anew=anew) == file["sha256"]
            # What is remembered may be what is damaged.
            if not same and (anew or fingerprints.sha256(path, anew=True) != file["sha256"]):
                raise Damaged(f"{name} has changed")
        except FileNotFoundError:
            raise Damaged(f"{name} is missing") from None
        except OSError as error:
            raise Damaged(f"{name} cannot be read: {error.strerror}") from None


def _is_shaped(manifest: dict[str, Any]) -> bool:
    """Whether all that is read of a manifest is of the kind that it should be."""
    key, files, made = (manifest[part] for part in ("key", "files", "made"))
    networks = made.get("engines", {})
    return (
        all(isinstance(manifest[part], kind) for part, kind in PARTS.items())
        and all(type(file["size"]) is int and isinstance(file["sha256"], str) for file in files.values())
        and all(isinstance(key[name], str) for name in NAMED.get(key.get("kind"), ()))
        and all(isinstance(made.get(name, 0), int | float) for name in ("seconds", "at", "peak_bytes"))
        and all(isinstance(each.get("tensors", {}), dict) for each in networks.values())
        and all(name in PLACES and isinstance(value, str) for name, value in made.get("options", {}).items())
    )


def _text(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1).encode("utf-8")
