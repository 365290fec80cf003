"""What stands in the stores, as rows: for tables that people read and for programs."""

import contextlib
import fnmatch
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from darkroom.cli.console import Console
from darkroom.engines import find_runtime
from darkroom.engines.runtime import Options, Runtime
from darkroom.errors import DarkroomError, InvalidRequest
from darkroom.prepare import GRAPH_REVISION
from darkroom.store.manifest import Damaged, read_manifest
from darkroom.store.store import Store, last_use

WIDE, WIDE_ENOUGH = 200, 150
"""Characters that a table may take where it goes to a file or another program, and from which on it is whole."""

NARROW = ("what", "size", "made in", "age", "here")
"""What is left of it where there is less room; `--json` has all."""

KINDS = ("engine", "choice", "compiled", "graph", "schedule", "tokenizer", "model", "damaged")

OF_A_RUNTIME = ("engine", "choice", "compiled")


@dataclass(frozen=True)
class Row:
    """An artefact. Sizes are in bytes, times in seconds; `unusable` says why it cannot be used here, if it cannot.

    `error` is an engine's against its graph, and `checked_in` the seconds that it took to find. `shapes` are those of
    its inputs. `unused_seconds` is the time since it was used, or else made.
    """

    kind: str
    name: str
    folder: str
    store: str
    bytes: int
    seconds: float | None = None
    error: float | None = None
    checked_in: float | None = None
    peak_bytes: int | None = None
    age_seconds: float = 0.0
    unused_seconds: float = 0.0
    made: bool = False
    unusable: str | None = None
    damaged: bool = False
    runtime: str | None = None
    version: str | None = None
    device: str | None = None
    precision: str | None = None
    model: str | None = None
    shapes: dict[str, list[Any]] = field(default_factory=dict)
    weights_bytes: int | None = None
    layers: int | None = None
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)


class Runtimes:
    """Runtimes by name and options, or why there is none; each is looked for once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, Options], Runtime | str] = {}

    def get(self, name: str, options: Options) -> Runtime | str:
        if (name, options) not in self._known:
            try:
                self._known[name, options] = find_runtime(name, options)
            except DarkroomError as error:
                self._known[name, options] = str(error)
        return self._known[name, options]


def rows_of(stores: Iterable[Store], runtimes: Runtimes, names: list[str] | None = None) -> list[Row]:
    """Every artefact of the stores, engines first; `names` keeps those that one of them, a pattern, fits.

    Raises `InvalidRequest` for a name that fits none.
    """
    unique = {store.root.resolve(): store for store in stores}.values()
    rows = []
    for store in unique:
        for folder in [*store.folders(), *store.aside()]:
            with contextlib.suppress(FileNotFoundError):  # another process has removed it meanwhile
                aside = folder.name.startswith(".")
                rows.append(_damaged(folder, store, "it was set aside") if aside else row_of(folder, store, runtimes))
    for store in unique:
        store.fingerprints.remember()
    for name in names or ():
        if not any(_fits(row, name) for row in rows):
            raise InvalidRequest(f"{name!r} fits no artefact here; `build_engines.py list` shows them.")
    rows = [row for row in rows if not names or any(_fits(row, name) for name in names)]
    return sorted(rows, key=lambda row: (KINDS.index(row.kind) if row.kind in KINDS else len(KINDS), row.name))


def row_of(folder: Path, store: Store, runtimes: Runtimes, made: bool = False) -> Row:
    """What is known of one artefact."""
    try:
        manifest = read_manifest(folder)
    except Damaged as error:
        return _damaged(folder, store, f"it is damaged: {error}")
    key, facts = manifest["key"], manifest["made"]
    networks = facts.get("engines", {})
    at = facts.get("at", folder.stat().st_mtime)
    damage = store.damage(folder)
    of_runtime = key.get("kind") in OF_A_RUNTIME
    return Row(
        kind=str(key.get("kind")),
        name=manifest["label"],
        folder=str(folder),
        store=str(store.root),
        bytes=sum(file["size"] for file in manifest["files"].values()),
        seconds=facts.get("seconds"),
        error=facts.get("error_against_graph"),
        checked_in=facts.get("checked_in"),
        peak_bytes=facts.get("peak_bytes"),
        age_seconds=time.time() - at,
        unused_seconds=time.time() - max(at, last_use(folder)),
        made=made,
        unusable=f"it is damaged: {damage}" if damage else _unusable(key, facts, runtimes) if of_runtime else None,
        damaged=damage is not None,
        runtime=key.get("runtime"),
        version=key.get("version"),
        device=key.get("device"),
        precision=key.get("precision"),
        model=facts.get("model"),
        shapes=key.get("shapes", {}) if of_runtime else {},
        weights_bytes=sum(network.get("weights_bytes", 0) for network in networks.values()) or None,
        layers=sum(network.get("layers", 0) for network in networks.values()) or None,
        tensors={name: network.get("tensors", {}) for name, network in networks.items()},
    )


def show(rows: list[Row], flags: Any, console: Console, more: dict[str, Callable[[Row], str]] | None = None) -> None:
    """The rows as a table, or with --json as one value; `more` are columns that follow, by their titles."""
    if flags.json:
        extra = {name.replace(" ", "_"): column for name, column in (more or {}).items()}
        console.result(json.dumps([asdict(row) | {name: get(row) for name, get in extra.items()} for row in rows]))
        return
    if not rows:
        console.say("nothing is there yet.")
        return
    columns = {
        "what": [row.name for row in rows],
        "by": [(row.version or row.kind).split("-")[0] for row in rows],
        "for": [row.device or "" for row in rows],
        "size": [readable_size(row.bytes) for row in rows],
        "weights": [readable_size(row.weights_bytes) for row in rows],
        "layers": [str(row.layers or "") for row in rows],
        "made in": ["" if row.seconds is None else f"{row.seconds:.1f} s" for row in rows],
        "checked": ["" if row.error is None else f"{row.error:.0e} in {row.checked_in:.1f} s" for row in rows],
        "memory": [readable_size(row.peak_bytes) for row in rows],
        "age": ["new" if row.made else readable_age(row.age_seconds) for row in rows],
        "here": ["no" if row.unusable else "yes" for row in rows],
    }
    added = {name: [get(row) for row in rows] for name, get in (more or {}).items()}
    table(columns | added, (*NARROW, *added))
    for reason, count in Counter(row.unusable for row in rows if row.unusable).items():
        console.say(f"{count} cannot be used here: {reason}.")
    if flags.verbose:
        for row in rows:
            _show_tensors(row)


def table(columns: dict[str, list[str]], narrow: tuple[str, ...]) -> None:
    """Prints columns by their titles; where the terminal is narrow, only those named so."""
    from rich.console import Console as RichConsole
    from rich.table import Table
    from rich.text import Text

    screen = RichConsole() if sys.stdout.isatty() else RichConsole(width=WIDE)
    if screen.width < WIDE_ENOUGH:
        columns = {name: column for name, column in columns.items() if name in narrow}
    # A column without values is not shown.
    columns = {name: column for name, column in columns.items() if any(column)}
    shown = Table(box=None, pad_edge=False)
    for name in columns:
        number = name in ("size", "weights", "layers", "made in", "memory", "age")
        shown.add_column(name, justify="right" if number else "left", no_wrap=True)
    for values in zip(*columns.values(), strict=True):
        shown.add_row(*map(Text, values))
    screen.print(shown)


def total(rows: Iterable[Row]) -> int:
    """Bytes of all of them."""
    return sum(row.bytes for row in rows)


def readable_size(count: int | None) -> str:
    if count is None:
        return ""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def readable_age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _fits(row: Row, name: str) -> bool:
    return any(fnmatch.fnmatchcase(each, name) or name in each for each in (row.name, Path(row.folder).name))


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _damaged(folder: Path, store: Store, why: str) -> Row:
    age = time.time() - folder.stat().st_mtime
    return Row(
        "damaged",
        folder.name,
        str(folder),
        str(store.root),
        _bytes(folder),
        age_seconds=age,
        unused_seconds=age,
        unusable=why,
        damaged=True,
    )


def _unusable(key: dict[str, Any], made: dict[str, Any], runtimes: Runtimes) -> str | None:
    """Why what a runtime built cannot be used on this machine as it is; None where it can."""
    runtime = runtimes.get(str(key.get("runtime")), Options(**made.get("options", {})))
    if isinstance(runtime, str):
        return runtime.rstrip(".")
    if (key.get("modules", GRAPH_REVISION), key.get("revision")) != (GRAPH_REVISION, runtime.revision):
        return "built by another version of Darkroom"
    if key["version"] != runtime.version():
        return f"built with {key['version']}; here is {runtime.version()}"
    if reason := runtime.unusable():
        return reason.split("; ")[-1]
    return runtime.short_of(key) if runtime.runs(key["device"]) else f"built for {key['device']}"


def _show_tensors(row: Row) -> None:
    for network, tensors in row.tensors.items():
        print(f"{row.name}, {network}:")
        for name, tensor in tensors.items():
            least, best, most = tensor["least"], tensor["best"], tensor["most"]
            sizes = str(least) if least == most else f"{least} to {most}, best at {best}"
            print(f"    {tensor['kind']} {name}: {tensor['dtype']} {sizes}")
