"""The cells of one model, side by side: what to call them, which belong together, how they stand to the baseline."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from darkroom.bench.results import PIPELINE, Beside, Row
from darkroom.bench.words import counted, processor_name, words
from darkroom.errors import InvalidRequest, near_matches
from darkroom.pipeline.timing import ROWS

PREFERRED, OTHERWISE = "diffusers eager", "torch"
"""The baseline where none is named: what people start from; if it is not there, whatever has this in its name."""

WORK = (
    "batch_size",
    "denoising_steps",
    "size",
    "scheduler",
    "guidance_scale",
    "prompt",
    "seed",
    "weights",
    "processor",
    "cores",
    "gpu",
)
"""What must be equal for two contenders to be compared at all."""

UNSAID = ("prompt", "seed", "weights", "processor", "cores", "gpu")
"""What is not said again where it is common to all: it does not bear on speed, or `Section.machine` says it."""

MADE = ("engine", "precision", "build")
"""What makes a contender, and stands in its name where the label alone leaves it open."""

HOW = {"streams": 1, "threads": None, "use_cuda_graph": False, "asynchronous": False, "devices": 1}
"""Ways to run, and what goes without saying. One in which contenders differ, but no contender from itself, is part of
their names."""


@dataclass(frozen=True)
class Group:
    """Values that cells share which may be compared: of what varies among the cells of the section, and only that."""

    values: tuple[tuple[str, Any], ...]

    @property
    def label(self) -> str:
        """`batch 4, 20 steps`, or nothing where nothing varies."""
        return ", ".join(words(field, value) for field, value in self.values)

    def without(self, field: str) -> "Group":
        """The same but for one field."""
        return Group(tuple((name, value) for name, value in self.values if name != field))


@dataclass(frozen=True, eq=False)
class Entry:
    """A cell with its contender's `name` and its `group`, and how it stands to the baseline's cell for the same work.

    `speedup` is in images a second over the baseline's; `saved` are the bytes of peak host memory it takes less, and
    `saved_share` those over the baseline's. They are None where the baseline has nothing to compare with.
    """

    row: Row
    name: str
    group: Group
    speedup: float | None = None
    saved: int | None = None
    saved_share: float | None = None


@dataclass(frozen=True)
class Section:
    """The cells of one `version`: those that were measured, in the order of their groups, and those that failed.

    `baseline` is None where no cell of it was measured. `shared` is what all cells have in common that bears on speed.
    """

    version: str
    baseline: str | None
    entries: tuple[Entry, ...]
    failed: tuple[Entry, ...]
    shared: Group

    @property
    def names(self) -> list[str]:
        """The contenders that were measured, the baseline first."""
        return sorted(dict.fromkeys(entry.name for entry in self.entries), key=lambda name: name != self.baseline)

    @property
    def groups(self) -> list[Group]:
        return list(dict.fromkeys(entry.group for entry in self.entries))

    @property
    def stages(self) -> list[str]:
        """The stages that any cell has, in the order in which they run."""
        present = dict.fromkeys(name for entry in self.entries for name in entry.row.stages if name != PIPELINE)
        return [name for name in ROWS if name in present] + [name for name in present if name not in ROWS]

    @property
    def machine(self) -> str:
        """`AMD EPYC 9B14, 2 cores`, with the GPU where there is one; every machine, if there are several."""
        texts = []
        for machine in (entry.row.machine for entry in (*self.entries, *self.failed)):
            cores = machine.cores and counted(machine.cores, "core")
            texts.append(", ".join(filter(None, [processor_name(machine.processor), cores, machine.gpu])))
        return "; ".join(dict.fromkeys(texts))

    @property
    def dates(self) -> str:
        """`2026-11-21`, or the first and the last day."""
        days = sorted({f"{entry.row.finished:%Y-%m-%d}" for entry in (*self.entries, *self.failed)})
        return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def sections(rows: list[Row], baseline: str | None = None) -> list[Section]:
    """One section for each version, in the order of their first cells.

    `baseline` is a contender's name or a part that only one has, for all versions. Without one, each version has
    "diffusers eager", else the first with "torch" in its name, else the first. Raises `InvalidRequest` for another.
    """
    own = _own_ways(rows)
    versions = list(_by(lambda row: row.settings.version, rows).values())
    names = {row: name for alike in versions for row, name in _names(alike, own).items()}
    asked = None if baseline is None else _find(baseline, names)
    return [_section(alike, names, own, asked) for alike in versions]


def _facts(row: Row) -> dict[str, Any]:
    """Everything a cell was run with and on, under one name each, but for its version and label, and how often it was
    started cold."""
    facts: dict[str, Any] = dict(vars(row.settings)) | dict(vars(row.machine))
    del facts["version"], facts["cold_starts"]
    facts["size"] = (facts.pop("height"), facts.pop("width"))
    return facts | dict(facts.pop("packages"))


def _varying(rows: Iterable[Row], fields: Iterable[str] | None = None) -> list[str]:
    """The facts that are not the same for all these rows, those of `WORK` first. A package whose version was not
    recorded is no other version."""
    rows = list(rows)
    facts = [_facts(row) for row in rows]
    packages = {name for row in rows for name, _ in row.machine.packages}
    values: dict[str, set[Any]] = {name: set() for name in (*WORK, *(name for each in facts for name in each))}
    for name, found in values.items():
        found |= {each.get(name) for each in facts} - ({None} if name in packages else set())
    return [name for name, found in values.items() if (fields is None or name in fields) and len(found) > 1]


def _own_ways(rows: list[Row]) -> list[str]:
    """The ways to run that are part of a contender, since none was run in several of them."""
    return [
        way for way in _varying(rows, HOW) if not any(_varying(alike, (way,)) for alike in _by(_series, rows).values())
    ]


def _names(rows: list[Row], own: list[str]) -> dict[Row, str]:
    """What to call the contender of each row."""
    made = {contender: _varying(alike, MADE) for contender, alike in _by(lambda row: row.contender, rows).items()}
    names = {}
    for row in rows:
        facts = _facts(row)
        said = [words(field, facts[field]) for field in made[row.contender]]
        said += [words(way, facts[way]) for way in own if facts[way] != HOW[way]]
        names[row] = " ".join([row.contender, *said])
    return names


def _by(key: Callable[[Row], Any], rows: list[Row]) -> dict[Any, list[Row]]:
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def _series(row: Row) -> tuple:
    return row.contender, *(getattr(row.settings, field) for field in MADE)


def _find(asked: str, names: dict[Row, str]) -> str:
    """The one contender that is meant: by its name, its label, or a part of its name."""
    label = asked.strip().lower()
    labelled = dict.fromkeys(name for row, name in names.items() if row.contender.lower() == label)
    return meant(asked, list(dict.fromkeys(names.values())), "is not in these results", [*labelled])


def meant(asked: str, known: list[str], otherwise: str, labelled: Sequence[str] = ()) -> str:
    """The one of the known contenders that a baseline names: wholly, by its label, or by a part that only it has.

    What a report adds to a name where there are several, such as how it was built, may be said where it is not needed.
    Raises `InvalidRequest`, in the words of `otherwise`, for none.
    """
    part = asked.strip().lower()
    found = [name for name in known if name.lower() == part] or [*labelled]
    found = found or [name for name in known if part and part in name.lower()]
    found = found or [name for name in known if part.startswith(f"{name.lower()} ")]
    if not found:
        raise InvalidRequest(
            f"--baseline {asked!r} {otherwise}.{near_matches(asked, known)} Known: {', '.join(known)}."
        )
    if len(found) > 1:
        raise InvalidRequest(f"--baseline {asked!r} could be {' or '.join(map(repr, found))}. Name one of them.")
    return found[0]


def _section(rows: list[Row], names: dict[Row, str], own: list[str], asked: str | None) -> Section:
    measured = [row for row in rows if row.error is None]
    baseline = _baseline(list(dict.fromkeys(names[row] for row in measured)), asked)
    facts = {row: _facts(row) for row in rows}
    within = {field for alike in _by(_series, rows).values() for field in _varying(alike)}
    fields = [
        field
        for field in _varying(rows)
        if field not in MADE and (field in WORK or field in within or (field in HOW and field not in own))
    ]
    groups = {row: Group(tuple((field, facts[row].get(field)) for field in fields)) for row in rows}
    orders = {field: _order([facts[row].get(field) for row in rows]) for field in fields}
    contenders = sorted(dict.fromkeys(names[row] for row in rows), key=lambda name: name != baseline)
    # Batches of one kind follow each other: between other settings, rates differ by more.
    by = sorted(fields, key=lambda field: field == "batch_size")
    ordered = sorted(
        rows,
        key=lambda row: ([orders[field].index(facts[row].get(field)) for field in by], contenders.index(names[row])),
    )
    candidates = [row for row in measured if names[row] == baseline]
    entries = [_entry(row, names[row], groups[row], _counterpart(row, candidates)) for row in ordered]
    first = facts[rows[0]]
    shared = [field for field in WORK if field not in (*fields, *UNSAID) and first[field] is not None]
    shared += [way for way in HOW if way not in _varying(rows, HOW) and first[way] != HOW[way]]
    return Section(
        rows[0].settings.version,
        baseline,
        tuple(entry for entry in entries if entry.row.error is None),
        tuple(entry for entry in entries if entry.row.error is not None),
        Group(tuple((field, first.get(field)) for field in shared)),
    )


def _baseline(present: list[str], asked: str | None) -> str | None:
    if asked is not None:
        return asked if asked in present else None
    likely = [name for part in (PREFERRED, OTHERWISE) for name in present if part in name.lower()]
    return next(iter([*(name for name in likely if name == PREFERRED), *likely, *present]), None)


def _order(values: list[Any]) -> list[Any]:
    """Numbers by size, anything else as it first appears; what is not there goes first."""
    found = list(dict.fromkeys(values))
    there = [value for value in found if value is not None]
    if not any(isinstance(value, str) for value in there):
        there.sort()
    return [None] * (None in found) + there


def _counterpart(row: Row, candidates: list[Row]) -> Row | None:
    """The baseline's cell for the same work: the one run in the same way, or the only one that there is."""
    if row in candidates:
        return row
    facts = _facts(row)
    found = [each for each in candidates if _agree(facts, _facts(each), WORK)]
    for fields in (HOW, [field for field in facts if field not in MADE]):
        if len(found) > 1:
            found = [each for each in found if _agree(facts, _facts(each), fields)]
    return found[0] if len(found) == 1 else None


def _agree(one: dict[str, Any], other: dict[str, Any], fields: Iterable[str]) -> bool:
    return all(one[field] == other[field] for field in fields if field in one and field in other)


def _entry(row: Row, name: str, group: Group, base: Row | None) -> Entry:
    if row.error is not None or base is None:
        return Entry(row, name, group)
    saved = share = None
    if row.peak_host_bytes is not None and base.peak_host_bytes:
        saved = base.peak_host_bytes - row.peak_host_bytes
        share = saved / base.peak_host_bytes
    other: Row | Beside = base
    if row is not base and row.beside and row.beside.key == base.key[:2]:
        other = row.beside  # turns that both took tell more than those of different times
    return Entry(row, name, group, row.images_per_second / other.images_per_second, saved, share)
