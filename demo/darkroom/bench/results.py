"""Lines of JSON that sweeps and comparisons append, read into one `Row` per measured cell."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from darkroom.errors import InvalidRequest

FORMAT = 1
"""What `format` in a line must be: the meaning of a name never changes without it."""

JSON_NAMES = {"asynchronous": "async"}
"""Fields whose name in the file is a keyword of Python."""

MAY_BE_INFINITE = ("psnr",)
"""Two pictures that are equal to the last bit are infinitely alike."""

PIPELINE = "Pipeline"
"""The stage that is all of them: from the prompt to the pictures."""


Kind = TypeVar("Kind")


class Damaged(Exception):
    """What is wrong with a line, in half a sentence."""


@dataclass(frozen=True)
class Settings:
    """Everything that was asked for, in the words of the flags. `scheduler` None is the model's own; `devices`
    divide each batch among them; `options` are those that only some engines have, in JSON."""

    version: str
    engine: str | None
    precision: str | None
    build: str | None
    batch_size: int
    denoising_steps: int
    height: int
    width: int
    scheduler: str | None = None
    guidance_scale: float | None = None
    streams: int = 1
    threads: int | None = None
    use_cuda_graph: bool = False
    asynchronous: bool = False
    warmup_runs: int | None = None
    repeat: int | None = None
    prompt: str | None = None
    seed: int | None = None
    onnx_opset: int | None = None
    weights: str | None = None
    cold_starts: int | None = None
    devices: int = 1
    options: str | None = None


@dataclass(frozen=True)
class Machine:
    """What it was measured on. `packages` are pairs of name and version, in the order of their names."""

    processor: str
    cores: int | None = None
    memory_bytes: int | None = None
    system: str | None = None
    gpu: str | None = None
    python: str | None = None
    packages: tuple[tuple[str, str | None], ...] = ()


@dataclass(frozen=True)
class Sample:
    """`count` measurements of one thing, in the unit of the field that holds them."""

    median: float
    p90: float
    least: float
    most: float
    count: int

    @property
    def spread(self) -> float:
        """How far the measurements lie apart, in their unit."""
        return self.most - self.least


@dataclass(frozen=True)
class Beside:
    """What another contender did in the same turns, where memory had no room for all at a time."""

    contender: str
    settings: Settings
    images_per_second: float

    def __post_init__(self) -> None:
        if not self.images_per_second > 0:
            raise Damaged("beside.images_per_second must be above 0")

    @property
    def key(self) -> tuple[str, Settings]:
        """As that of a `Row`, without the machine."""
        return self.contender, replace(self.settings, cold_starts=None)


@dataclass(frozen=True, eq=False)
class Row:
    """One cell: a contender, the settings it ran with, and what was measured, or the `error` that it ended with.

    `stages` is in milliseconds a batch; `cold_start`, from the start of a process to its first PNG, and
    `build_seconds`, of which `compile_seconds` are the compiler's where it says so, and `load_seconds` are in seconds;
    `first_run_ms` is the first batch's; `psnr` is in dB against PyTorch float32; `images_per_unit` is for each unit of
    the money that `price_per_hour` is in; `beside` is set where memory had no room for all at a time.
    """

    contender: str
    settings: Settings
    machine: Machine
    finished: datetime
    stages: dict[str, Sample]
    unet_calls: int | None = None
    images_per_second: float | None = None
    cold_start: Sample | None = None
    build_seconds: float | None = None
    compile_seconds: float | None = None
    load_seconds: float | None = None
    first_run_ms: float | None = None
    peak_host_bytes: int | None = None
    peak_device_bytes: int | None = None
    engine_bytes: int | None = None
    psnr: float | None = None
    price_per_hour: float | None = None
    images_per_unit: float | None = None
    beside: Beside | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        if self.error is None:
            for what, value in (
                (f"stages.{PIPELINE}.median", PIPELINE in self.stages and self.pipeline.median),
                ("images_per_second", self.images_per_second),
            ):
                if not value or value < 0:
                    raise Damaged(f"{what} must be above 0 where there is no error")

    @property
    def pipeline(self) -> Sample:
        """Milliseconds of a whole batch. Only for a cell without an error."""
        return self.stages[PIPELINE]

    @property
    def key(self) -> tuple[str, Settings, Machine]:
        """What makes two lines the same cell: how often it was started cold does not."""
        return self.contender, replace(self.settings, cold_starts=None), self.machine


def read(files: Iterable[Path]) -> list[Row]:
    """The cells in these files, in the order in which they first appear; of lines for the same cell the last counts,
    with the cold starts of the one before where it has none.

    Raises `InvalidRequest` for a file that cannot be read, holds no whole line, or is damaged before its end.
    """
    rows: dict[tuple[str, Settings, Machine], Row] = {}
    for file in files:
        found = list(_rows(file))
        if not found:
            raise InvalidRequest(f"{file} holds no results. Give a file that `benchmark.py run` wrote.")
        for row in found:
            before = rows.get(row.key)
            if before and before.cold_start and row.error is None and not row.cold_start:
                settings = replace(row.settings, cold_starts=before.settings.cold_starts)
                row = replace(row, settings=settings, cold_start=before.cold_start)
            rows[row.key] = row
    return list(rows.values())


def _rows(file: Path) -> Iterator[Row]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror or error}.") from None
    # Nothing but a line feed ends a line: prompts may hold the other characters that Python would split at.
    *whole, last = content.split(b"\n")
    for number, line in enumerate([*whole, last], start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8"))
        except ValueError:
            if number > len(whole):
                return  # A sweep that was killed while it wrote: a line that is whole ends with a line feed.
            raise InvalidRequest(f"{file}, line {number} is damaged: it is not JSON. Remove the line.") from None
        try:
            yield row_of(value)
        except Damaged as error:
            raise InvalidRequest(f"{file}, line {number} is damaged: {error}. Remove the line.") from None


def row_of(line: Any) -> Row:
    """One line of a results file, as JSON gives it. Raises `Damaged`.

    A setting that is not known is refused, for two cells that differ in it would be taken for one. Further
    measurements are passed over.
    """
    if not isinstance(line, dict):
        raise Damaged("it is not an object")
    if line.get("format") != FORMAT:
        raise Damaged(f"its format is {line.get('format')!r}, and this Darkroom reads {FORMAT}")
    settings = _object(line, "settings")
    if unknown := settings.keys() - {JSON_NAMES.get(field.name, field.name) for field in fields(Settings)}:
        raise Damaged(f"settings.{min(unknown)} is not a setting of format {FORMAT}")
    machine = _object(line, "machine")
    packages = _object(machine, "packages", "machine.") if machine.get("packages") else {}
    stages = {name: _made(Sample, sample, f"stages.{name}") for name, sample in _object(line, "stages").items()}
    cold_start, beside = line.get("cold_start"), line.get("beside")
    return _made(
        Row,
        line,
        "the line",
        settings=_made(Settings, settings, "settings"),
        machine=_made(Machine, machine, "machine", packages=_packages(packages)),
        finished=_time(line.get("finished")),
        stages=stages,
        cold_start=None if cold_start is None else _made(Sample, cold_start, "cold_start"),
        beside=None if beside is None else _beside(beside),
    )


def _beside(value: Any) -> Beside:
    if not isinstance(value, dict):
        raise Damaged("beside is not an object")
    return _made(Beside, value, "beside", settings=_made(Settings, value.get("settings"), "beside.settings"))


def _object(line: dict[str, Any], name: str, within: str = "") -> dict[str, Any]:
    value = line.get(name)
    if value is None and name == "stages":
        return {}
    if not isinstance(value, dict):
        raise Damaged(f"{within}{name} is not an object")
    return value


def _packages(versions: dict[str, Any]) -> tuple[tuple[str, str | None], ...]:
    return tuple((name, None if version is None else str(version)) for name, version in sorted(versions.items()))


def _time(text: Any) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):
        raise Damaged(f"finished is no ISO 8601 time: {text!r}") from None


def _made(kind: type[Kind], value: Any, what: str, **known: Any) -> Kind:
    """A dataclass of this kind from an object's members; `known` are those that are made already."""
    if not isinstance(value, dict):
        raise Damaged(f"{what} is not an object")
    hints = get_type_hints(kind)
    members = dict(known)
    for field in fields(kind):
        name = JSON_NAMES.get(field.name, field.name)
        if field.name in known:
            continue
        if name in value:
            members[field.name] = _checked(value[name], get_args(hints[field.name]) or (hints[field.name],), what, name)
        elif field.default is MISSING:
            raise Damaged(f"{what} has no {name}")
    return kind(**members)


def _checked(value: Any, allowed: tuple[type, ...], what: str, name: str) -> Any:
    if type(value) is int and float in allowed:
        value = float(value)
    if type(value) not in allowed:
        raise Damaged(f"{name} of {what} is {value!r}")
    if isinstance(value, float) and not math.isfinite(value) and (math.isnan(value) or name not in MAY_BE_INFINITE):
        raise Damaged(f"{name} of {what} is {value!r}")
    return value
