"""The cells of one model, side by side: what to call them, which belong together, how they stand to the baseline."""

import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from darkroom.bench.results import PIPELINE, Row
from darkroom.errors import InvalidRequest, near_matches
from darkroom.pipeline.timing import ROWS

PREFERRED, OTHERWISE = "diffusers eager", "torch"
"""The baseline where none is named: what people start from; if it is not there, whatever has this in its name."""

WORK = ("batch_size", "denoising_steps", "size", "scheduler", "guidance_scale")
WORK += ("prompt", "seed", "weights", "processor", "cores", "gpu")
"""What must be equal for two contenders to be compared at all."""

UNSAID = ("prompt", "seed", "weights", "processor", "cores", "gpu")
"""What is not said again where it is common to all: it does not bear on speed, or `Section.machine` says it."""

MADE = ("engine", "precision", "build")
"""What makes a contender, and stands in its name where the label alone leaves it open."""

HOW = {"streams": 1, "threads": None, "use_cuda_graph": False, "async": False, "devices": 1}
"""Ways to run, and what goes without saying; others are part of a contender's name where they vary."""

NOISE = re.compile(
    r"\((?:R|TM|[0-9a-f]{8})\)|\b\d+-Core\b|\b(?:Processor|CPU)\b|@.*$|\b(?:with|w/) .*$|^\d+(?:st|nd|rd|th) Gen\b",
    re.IGNORECASE,
)
"""What processors' names say and nobody calls them; eight digits are Darkroom's hash of the instruction sets."""

INSTRUCTION_SETS = re.compile(r" \([0-9a-f]{8}\)$")
PROMPT_CHARACTERS = 40


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

    @property
    def called(self) -> str:
        """Its name with its group."""
        return f"{self.name} ({self.group.label})" if self.group.label else self.name


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
    def groups(self) -> dict[Group, list[Entry]]:
        """The groups in their order, with the cells of each."""
        return _by(lambda entry: entry.group, self.entries)

    @property
    def stages(self) -> list[str]:
        """The stages that any cell has, in the order in which they run."""
        present = dict.fromkeys(name for entry in self.entries for name in entry.row["stages"] if name != PIPELINE)
        return [name for name in ROWS if name in present] + [name for name in present if name not in ROWS]

    @property
    def machine(self) -> str:
        """`AMD EPYC 9B14, 2 cores`, with the GPU where there is one; every machine, if there are several."""
        texts = []
        for machine in (entry.row.machine for entry in (*self.entries, *self.failed)):
            cores = counted(machine["cores"], "core") if machine.get("cores") else None
            texts.append(", ".join(filter(None, [processor_name(machine["processor"]), cores, machine.get("gpu")])))
        return "; ".join(dict.fromkeys(texts))

    @property
    def dates(self) -> str:
        """`2026-11-21`, or the first and the last day."""
        days = sorted({entry.row["finished"][: len("2026-11-21")] for entry in (*self.entries, *self.failed)})
        return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def sections(rows: list[Row], baseline: str | None = None) -> list[Section]:
    """One section for each version, in the order of their first cells.

    `baseline` is a contender's name or a part that only one has, for all versions. Without one, each version has
    "diffusers eager", else the first with "torch" in its name, else the first. Raises `InvalidRequest` for another.
    """
    versions = list(_by(lambda row: row.settings["version"], rows).values())
    names = {row: name for alike in versions for row, name in _names(alike).items()}
    if baseline is not None:
        baseline = meant(baseline, list(dict.fromkeys(names.values())), "is not in these results")
    return [_section(alike, names, baseline) for alike in versions]


def meant(asked: str, known: list[str], otherwise: str) -> str:
    """The one of the known contenders that a baseline names: wholly, or by a part that only it has.

    What a report adds to a name where there are several, such as how it was built, may be said where it is not needed.
    Raises `InvalidRequest`, in the words of `otherwise`, for none.
    """
    part = asked.strip().lower()
    found = [name for name in known if name.lower() == part]
    found = found or [name for name in known if part and part in name.lower()]
    found = found or [name for name in known if part.startswith(f"{name.lower()} ")]
    if not found:
        raise InvalidRequest(
            f"--baseline {asked!r} {otherwise}.{near_matches(asked, known)} Known: {', '.join(known)}."
        )
    if len(found) > 1:
        raise InvalidRequest(f"--baseline {asked!r} could be {' or '.join(map(repr, found))}. Name one of them.")
    return found[0]


def _facts(row: Row) -> dict[str, Any]:
    """Everything a cell was run with and on, under one name each, but for its version, and how often it was started
    cold. A package whose version was not recorded is not there."""
    facts = row.settings | row.machine
    packages = {name: version for name, version in (facts.pop("packages", None) or {}).items() if version is not None}
    facts |= {"size": (facts["height"], facts["width"])} | packages
    return {name: value for name, value in facts.items() if name not in ("version", "cold_starts", "height", "width")}


def _varying(rows: Iterable[Row]) -> list[str]:
    """The facts that are not the same for all these rows, those of `WORK` first."""
    facts = [_facts(row) for row in rows]
    values: dict[str, set[Any]] = {name: set() for name in WORK}
    for each in facts:
        for name, value in each.items():
            values.setdefault(name, set()).add(value)
    return [name for name, found in values.items() if len(found) > 1]


def _names(rows: list[Row]) -> dict[Row, str]:
    """What to call the contender of each row."""
    ways = [way for way in _varying(rows) if way in HOW]
    names = {}
    for contender, alike in _by(lambda row: row["contender"], rows).items():
        made = [field for field in _varying(alike) if field in MADE]
        for row in alike:
            said = [words(field, row.settings[field]) for field in made]
            said += [words(way, row.settings[way]) for way in ways if row.settings[way] != HOW[way]]
            names[row] = " ".join([contender, *said])
    return names


def _by(key: Callable[[Any], Any], found: Iterable[Any]) -> dict[Any, list[Any]]:
    alike: dict[Any, list[Any]] = {}
    for each in found:
        alike.setdefault(key(each), []).append(each)
    return alike


def _section(rows: list[Row], names: dict[Row, str], asked: str | None) -> Section:
    measured = [row for row in rows if row["error"] is None]
    present = list(dict.fromkeys(names[row] for row in measured))
    baseline = _baseline(present) if asked is None else asked if asked in present else None
    facts = {row: _facts(row) for row in rows}
    varying = _varying(rows)
    within = {field for alike in _by(names.get, rows).values() for field in _varying(alike)}
    fields = [field for field in varying if field in WORK or (field in within and field not in (*MADE, *HOW))]
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
    shared = [field for field in WORK if field not in (*varying, *UNSAID) and first.get(field) is not None]
    shared += [way for way in HOW if way not in varying and first[way] != HOW[way]]
    return Section(
        rows[0].settings["version"],
        baseline,
        tuple(entry for entry in entries if entry.row["error"] is None),
        tuple(entry for entry in entries if entry.row["error"] is not None),
        Group(tuple((field, first.get(field)) for field in shared)),
    )


def _baseline(present: list[str]) -> str | None:
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
    """The baseline's cell for the same work: of several, the only one that everything else is the same for, too."""
    if row in candidates:
        return row
    facts = _facts(row)
    found = [each for each in candidates if _agree(facts, _facts(each), WORK)]
    if len(found) > 1:
        found = [each for each in found if _agree(facts, _facts(each), facts.keys() - {*MADE, *HOW})]
    return found[0] if len(found) == 1 else None


def _agree(one: dict[str, Any], other: dict[str, Any], fields: Iterable[str]) -> bool:
    return all(one[field] == other[field] for field in fields if field in one and field in other)


def _entry(row: Row, name: str, group: Group, base: Row | None) -> Entry:
    if row["error"] is not None or base is None:
        return Entry(row, name, group)
    saved = share = None
    if row["peak_host_bytes"] is not None and base["peak_host_bytes"]:
        saved = base["peak_host_bytes"] - row["peak_host_bytes"]
        share = saved / base["peak_host_bytes"]
    rate, beside = base["images_per_second"], row["beside"]
    if row is not base and beside and row.beside_key == base.key:
        rate = beside["images_per_second"]  # turns that both took tell more than those of different times
    return Entry(row, name, group, row["images_per_second"] / rate, saved, share)


def processor_name(name: str) -> str:
    """`AMD EPYC 9B14` for `AMD EPYC 9B14 96-Core Processor (0123abcd)`."""
    return " ".join(NOISE.sub(" ", name).split()).strip(" ,") or name


def counted(count: int, noun: str) -> str:
    """`1 step`, `20 steps`."""
    return f"{count} {noun}{'s' * (count != 1)}"


SAID: dict[str, Callable[[Any], str]] = {
    "batch_size": lambda value: f"batch {value}",
    "denoising_steps": lambda value: counted(value, "step"),
    "size": lambda value: f"{value[1]}×{value[0]}",
    "scheduler": lambda value: value or "the model's scheduler",
    "guidance_scale": lambda value: "the model's guidance" if value is None else f"guidance {value:g}",
    "streams": lambda value: counted(value, "stream"),
    "devices": lambda value: counted(value, "device"),
    "threads": lambda value: "all threads" if value is None else counted(value, "thread"),
    "use_cuda_graph": lambda value: "CUDA graph" if value else "no CUDA graph",
    "async": lambda value: "async" if value else "not async",
    "prompt": lambda value: f'"{textwrap.shorten(value or "", PROMPT_CHARACTERS, placeholder="...")}"',
    # Two of one name may differ in their instruction sets.
    "processor": lambda value: processor_name(value) + "".join(INSTRUCTION_SETS.findall(value)),
    "cores": lambda value: "cores unknown" if value is None else counted(value, "core"),
    "gpu": lambda value: value or "no GPU",
    **{name: lambda value: str(value or "unknown") for name in ("engine", "precision", "build", "system")},
}


def words(field: str, value: Any) -> str:
    """A value as it is said in a label: `batch 4`, `20 steps`, `DDIM`, `no CUDA graph`."""
    if field in SAID:
        return SAID[field](value)
    return f"{field.replace('_', ' ')} {'unknown' if value is None else value}"


def number(value: float) -> str:
    """Three digits of a measurement, more where there are more before the point: `0.812`, `2.10`, `48.5`, `1190`."""
    decimals = next((digits for digits, bound in ((0, 99.95), (1, 9.995), (2, 0.9995)) if abs(value) >= bound), 3)
    return f"{value:.{decimals}f}"


def size(count: float) -> str:
    """Bytes as `412 MB` or `1.24 GB`, in powers of ten."""
    for unit, amount in (("GB", 1e9), ("MB", 1e6)):
        if count >= 0.9995 * amount:
            return f"{number(count / amount)} {unit}"
    return f"{count / 1e3:.0f} kB"


def times(ratio: float) -> str:
    """A speed-up: `2.5x`; with one digit more where it is a loss, `0.93x`."""
    return f"{ratio:.1f}x" if ratio >= 0.995 else f"{ratio:.2f}x"


def less(share: float) -> str:
    """A share saved: `63% less`, `12% more`, or `as much`."""
    percent = round(100 * share)
    return f"{abs(percent)}% {'less' if percent > 0 else 'more'}" if percent else "as much"
