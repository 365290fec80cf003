"""`build_engines.py export` and `import`: artefacts in one file, from one machine to another."""

import argparse
from pathlib import Path
from typing import Any

from darkroom.cli.artefacts import Runtimes, readable_size, row_of, rows_of, show, total
from darkroom.cli.console import Console
from darkroom.cli.settings import artefact_folders, stores_of
from darkroom.engines import runs_code
from darkroom.errors import InvalidRequest
from darkroom.store.archive import pack, unpack

ENGINES, GRAPHS = "engines", "onnx"
"""What the stores are called in an archive."""

PLACES = {"graph": GRAPHS} | dict.fromkeys(("engine", "choice", "compiled", "schedule", "tokenizer"), ENGINES)
"""Where what is carried belongs. A model's folder is not: links into this machine, or what the other one has."""


def add_transfer_commands(commands: Any) -> list[argparse.ArgumentParser]:
    export = commands.add_parser("export", help="put artefacts into one file", allow_abbrev=False)
    export.add_argument("archive", metavar="FILE", help="a tar file, to be made")
    export.add_argument("name", nargs="*", metavar="NAME", help="only what has this in its name; * stands for any")
    entry = commands.add_parser("import", help="take artefacts out of such a file", allow_abbrev=False)
    entry.add_argument("archive", metavar="FILE", help="what export made")
    entry.add_argument(
        "--trust",
        action="store_true",
        help="also take JAX's executables and what inductor compiled: code that runs here",
    )
    export.set_defaults(work=_export)
    entry.set_defaults(work=_import)
    return [export, entry]


def _export(flags: argparse.Namespace) -> None:
    console = Console(machine=flags.json)
    archive = Path(flags.archive)
    if archive.is_dir() or not archive.absolute().parent.is_dir():
        raise InvalidRequest(f"{archive} cannot be made: name a file in a folder that is there.")
    graphs, engines = stores_of(artefact_folders(flags), console)
    rows = rows_of((engines, graphs), Runtimes(), flags.name)
    for row in rows:
        if row.damaged:
            console.warn(f"{row.name} is left out: {row.unusable}.")
    rows = [row for row in rows if not row.damaged and row.kind in PLACES]
    if not rows:
        raise InvalidRequest("there is nothing to export.")
    folders = {f"{PLACES[row.kind]}/{Path(row.folder).name}": Path(row.folder) for row in rows}
    with console.job(f"writing {archive.name}", len(rows)) as advance:
        pack(archive, folders, advance)
    show(rows, flags, console)
    console.say(f"{len(rows)} artefacts, {readable_size(total(rows))}, are in {archive}.")


def _import(flags: argparse.Namespace) -> None:
    console = Console(machine=flags.json)
    graphs, engines = stores_of(artefact_folders(flags), console)
    archive = Path(flags.archive)

    def check(name: str, key: dict[str, Any]) -> None:
        if key.get("kind") not in PLACES:
            raise InvalidRequest(f"{archive} holds {name}, which is no kind of artefact: nothing was added.")
        if runs_code(key) and not flags.trust:
            raise InvalidRequest(
                f"{archive} holds {name}, which is code that runs when it is loaded: nothing was added. With --trust "
                f"it is taken; who made the file can then do here what you can."
            )

    with console.job(f"reading {archive.name}") as line:
        added, there = unpack(archive, {ENGINES: engines, GRAPHS: graphs}, line.phase, check)
    for store in (graphs, engines):
        store.fingerprints.remember()
    runtimes = Runtimes()
    rows = [row_of(folder, store, runtimes, made=True) for folder, store in added]
    if rows or flags.json:
        show(rows, flags, console)
    console.say(f"{len(added)} artefacts were added, {there} were there already.")
