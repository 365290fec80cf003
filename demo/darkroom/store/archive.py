"""Artefacts in one tar file. Nothing is believed of what comes out of one: names are checked, and every hash."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from darkroom.errors import Failed, InvalidRequest
from darkroom.files import written
from darkroom.store.manifest import MANIFEST, USED, Damaged, parse_manifest
from darkroom.store.store import Store

INDEX = "index.json"
"""The first file of an archive: how many files there are of each artefact. tar itself takes damage for an end."""

MOST_OF_A_MANIFEST = 2**24
"""Bytes."""


def pack(archive: Path, artefacts: dict[str, Path], advance: Callable[[], None]) -> None:
    """Writes folders under the names given, `advance` after each. Raises `Failed` when the file cannot be written."""
    files = {
        name: sorted(path for path in folder.rglob("*") if path.is_file() and path.name != USED)
        for name, folder in artefacts.items()
    }
    with written(archive) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
        index = json.dumps({name: len(paths) for name, paths in files.items()}).encode()
        member = tarfile.TarInfo(INDEX)
        member.size = len(index)
        tar.addfile(_anonymous(member), io.BytesIO(index))
        for name, folder in artefacts.items():
            # The manifest first: a reader knows what follows.
            for path in sorted(files[name], key=lambda path: path != folder / MANIFEST):
                tar.add(path, f"{name}/{path.relative_to(folder).as_posix()}", filter=_anonymous)
            advance()


def unpack(
    archive: Path,
    stores: dict[str, Store],
    phase: Callable[[str, int, int], None],
    check: Callable[[str, dict[str, Any]], None],
) -> tuple[list[tuple[Path, Store]], int]:
    """Puts what is not there into the stores, by the names they have in the archive.

    `check` is called with each artefact's name and key before anything is written, and may raise. Returns the folders
    that were added with their stores, and how many artefacts were there already. Raises `InvalidRequest` for a file
    that is not such an archive, holds what no manifest names, or more than its manifests say; `Failed` where the disk
    has no room for it, and for one with a damaged artefact: those before it were added, and it was not.
    """
    added, there = [], 0
    try:
        with tarfile.open(archive, "r:") as tar:
            groups = _groups(tar, archive, stores)
            sizes = dict.fromkeys(stores, 0)
            for (place, name), members in groups.items():
                check(name, _manifest(tar, archive, name, members)["key"])
                sizes[place] += sum(member.size for member in members.values())
            for place, size in sizes.items():
                _check_room(archive, stores[place].root, size)
            for done, ((place, name), members) in enumerate(groups.items()):
                phase(name, done, len(groups))
                store, folder = stores[place], stores[place].root / name
                if folder.exists() and store.damage(folder) is None:
                    there += 1
                    continue
                try:
                    store.put(folder, lambda target, members=members: _extract(tar, members, target))
                except Damaged as error:
                    raise Failed(f"{archive}: {name} is damaged ({error}); it was not added.") from None
                added.append((folder, store))
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise InvalidRequest(f"{archive} is not an archive that `export` made, or not all of it: {error}.") from None
    except FileNotFoundError:
        raise InvalidRequest(f"{archive} is not there.") from None
    except OSError as error:
        raise InvalidRequest(f"{archive} cannot be read: {error.strerror or error}.") from None
    if not groups:
        raise InvalidRequest(f"{archive} holds no artefacts.")
    return added, there


Groups = dict[tuple[str, str], dict[str, tarfile.TarInfo]]


def _groups(tar: tarfile.TarFile, archive: Path, stores: dict[str, Store]) -> Groups:
    """The files of each artefact. Raises `InvalidRequest` for anything that is not a file of one."""
    groups: Groups = {}
    members = tar.getmembers()
    for member in members[1:]:
        parts = member.name.split("/")
        safe = all(part and part not in (".", "..") and "\\" not in part and ":" not in part for part in parts)
        whole = member.isreg() and not member.issparse()
        if not (whole and safe and len(parts) >= 3 and parts[0] in stores and not parts[1].startswith(".")):
            raise InvalidRequest(
                f"{archive} holds {member.name!r}, which is no file of an artefact: nothing was added."
            )
        groups.setdefault((parts[0], parts[1]), {})["/".join(parts[2:])] = member
    index = tar.extractfile(members[0]) if members and members[0].name == INDEX and members[0].isreg() else None
    expected = json.loads(index.read()) if index else None
    if expected != {"/".join(name): len(files) for name, files in groups.items()}:
        raise InvalidRequest(f"{archive} is not an archive that `export` made, or not all of it: nothing was added.")
    return groups


def _manifest(tar: tarfile.TarFile, archive: Path, name: str, members: dict[str, tarfile.TarInfo]) -> dict[str, Any]:
    """What an artefact's manifest says, which names all of its files and their sizes; else raises `InvalidRequest`."""
    member = members.get(MANIFEST)
    source = tar.extractfile(member) if member and member.size <= MOST_OF_A_MANIFEST else None
    try:
        manifest = parse_manifest(source.read() if source else b"")
    except Damaged as error:
        raise InvalidRequest(f"{archive}: {name} is damaged ({error}): nothing was added.") from None
    for file, member in members.items():
        said = manifest["files"].get(file, {}).get("size")
        if file != MANIFEST and said != member.size:
            what = "names no such file" if said is None else f"says {said} bytes of it, not {member.size}"
            raise InvalidRequest(f"{archive} holds {name}/{file}, but its manifest {what}: nothing was added.")
    return manifest


def _check_room(archive: Path, root: Path, size: int) -> None:
    """Raises `Failed` where the disk of a store has no room for so many bytes."""
    there = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.is_dir())
    if size > (free := shutil.disk_usage(there).free):
        raise Failed(f"{archive} holds {size:,} bytes for {root}, where {free:,} are free: nothing was added.")


def _extract(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], folder: Path) -> None:
    for name, member in members.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        source = tar.extractfile(member)
        assert source is not None, "only regular files come here"
        with path.open("wb") as file:
            while block := source.read(1 << 20):
                file.write(block)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Who made a file, and what they may do with it, is no other machine's business."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o644
    return member
