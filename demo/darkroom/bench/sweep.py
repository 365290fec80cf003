"""Runs the cells of a sweep, and appends a line of results for each as it finishes."""

import contextlib
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from darkroom.bench.cell import Cell, Place
from darkroom.bench.contender import Contender, seconds_to_picture
from darkroom.bench.memory import Room
from darkroom.bench.results import FORMAT, PIPELINE
from darkroom.errors import Failed, InvalidRequest


@dataclass(frozen=True)
class Measured:
    """What a contender's runs gave: milliseconds of each stage by run, and images a second by turn."""

    stages: dict[str, list[float]]
    rates: list[float]
    unet_calls: int | None


@dataclass(frozen=True)
class Entrant:
    """Who takes part: a name of its own, the label and settings that its line of results has, what starts it.

    `cold` starts a process that ends with a picture at the path that is appended; None where that is not measured.
    `environment` is added to this process's own. `facts` go into its line of results as they are. `packages` are the
    versions that it runs, None for this process's.
    """

    name: str
    label: str
    settings: dict[str, Any]
    command: list[str]
    cold: list[str] | None
    facts: dict[str, Any]
    environment: dict[str, str] | None = None
    packages: dict[str, str] | None = None


def take_turns(
    entrants: Sequence[Entrant],
    cold_starts: int,
    show: Callable[[str], None],
    pictures: Path | None = None,
) -> Iterator[tuple[Entrant, dict[str, Any]]]:
    """Measures those that do the same work, turn by turn, so that a machine busy with something else hurts all alike.

    Yields each with what a line of results holds of it beside the machine and the time, as soon as it is known: those
    that memory had room for together end together. The first takes turns with every such group, and what it did in the
    turns of a later one is the others' `beside`. `error` says in one line what kept one from being measured; where
    that is among its facts, nobody tries. Pictures are saved in a folder of `pictures` for each, if given.
    """
    found: dict[str, dict[str, Any]] = {each.name: dict(each.facts) for each in entrants}
    assert len(found) == len(entrants), "two of one name"
    _start_cold([each for each in entrants if each.cold], cold_starts, found, show)
    waiting = [each for each in entrants if "error" not in found[each.name]]
    yield from ((each, found[each.name]) for each in entrants if "error" in found[each.name])
    first: Entrant | None = None
    room = Room()
    while waiting:
        group, again = [], {}
        with ExitStack() as stack:
            running: dict[str, Contender] = {}
            if first is not None:
                again[first.name] = {}
                running |= _loaded(first, again[first.name], stack, show)
                if running and not room.for_another(1):
                    running.pop(first.name).close()
            while waiting and (not running or not group or room.for_another(len(running))):
                group.append(waiting.pop(0))
                running |= _loaded(group[-1], found[group[-1].name], stack, show)
            _measure({each.name: each for each in entrants}, running, found | again, show, pictures, again)
        for each in group:
            if first is not None and "images_per_second" in again[first.name] and "error" not in found[each.name]:
                found[each.name]["beside"] = _beside(first, again[first.name])
            yield each, found[each.name]
        first = first or next((each for each in group if "error" not in found[each.name]), None)


def _loaded(
    entrant: Entrant, found: dict[str, Any], stack: ExitStack, show: Callable[[str], None]
) -> dict[str, Contender]:
    """Its process by its name, for as long as the stack is open; nothing, but the error in `found`, where it fails."""
    show(f"{entrant.name}: loading")
    try:
        contender = stack.enter_context(Contender(entrant.name, entrant.command, entrant.environment))
        found["load_seconds"] = round(float(contender.loaded()["loaded"]), 4)
    except Failed as error:
        found["error"] = _without(str(error), entrant.name)
        return {}
    return {entrant.name: contender}


def _beside(entrant: Entrant, found: dict[str, Any]) -> dict[str, Any]:
    """Who it was, its images a second, and each stage's median in milliseconds."""
    medians = {stage: each["median"] for stage, each in found["stages"].items()}
    who = {"contender": entrant.label, "settings": entrant.settings}
    return who | {"images_per_second": found["images_per_second"], "stages": medians}


def _start_cold(
    entrants: list[Entrant], cold_starts: int, found: dict[str, dict[str, Any]], show: Callable[[str], None]
) -> None:
    """Whole processes, from the shell to a picture; the first of each warms the system's caches and is not counted."""
    seconds: dict[str, list[float]] = {each.name: [] for each in entrants}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(cold_starts + 1 if cold_starts else 0):
            for index, each in enumerate(entrants):
                if "error" in found[each.name]:
                    continue
                show(f"{each.name}: cold start {turn} of {cold_starts}")
                target = Path(folder) / f"{index}.png"  # a picture, or a folder for it
                try:
                    took = seconds_to_picture(each.name, [*each.cold, str(target)], each.environment)
                    seconds[each.name] += [took] if turn else []
                except Failed as error:
                    found[each.name]["error"] = _without(str(error), each.name)
    for name, taken in seconds.items():
        found[name]["cold_start"] = sample(taken) if taken and "error" not in found[name] else None


def _measure(
    entrants: dict[str, Entrant],
    running: dict[str, Contender],
    found: dict[str, dict[str, Any]],
    show: Callable[[str], None],
    pictures: Path | None,
    drawn: Collection[str],
) -> None:
    """Adds to `found` what the running ones do, turn by turn. The pictures of those who are `drawn` are there."""
    turns = {name: entrants[name].settings["warmup_runs"] + entrants[name].settings["repeat"] for name in running}
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in running}

    def ask(name: str, work: Callable[[Contender], Any]) -> Any:
        try:
            return work(running[name]) if "error" not in found[name] else None
        except Failed as error:
            found[name]["error"] = _without(str(error), name)

    for turn in range(max(turns.values(), default=0)):
        for name in running:
            if turn < turns[name]:
                show(f"{name}: run {turn + 1} of {turns[name]}")
                if (answer := ask(name, Contender.run)) is not None:
                    answers[name].append(answer)
    for name in running:
        if pictures is not None and name not in drawn:
            paths = ask(name, lambda contender, name=name: contender.save(pictures / _safe(name)))
            found[name]["pictures"] = [str(path) for path in paths or ()]
        ended = ask(name, Contender.quit)
        if "error" in found[name]:
            continue
        settings = entrants[name].settings
        warmup = settings["warmup_runs"]
        measured = _measured(answers[name][warmup:], settings["batch_size"])
        found[name] |= {
            "first_run_ms": round(_wall(answers[name][0]), 3),
            "stages": {stage: sample(values) for stage, values in measured.stages.items()},
            "unet_calls": measured.unet_calls,
            "images_per_second": round(statistics.median(measured.rates), 4),
            "peak_host_bytes": ended["peak_bytes"],
            "peak_device_bytes": ended.get("peak_device_bytes"),
        }


def _measured(answers: list[dict[str, Any]], batch_size: int) -> Measured:
    stages: dict[str, list[float]] = {}
    rates, calls = [], None
    for answer in answers:
        streams = answer.get("streams", [answer])
        for stream in streams:
            calls = stream.get("unet_calls", calls)
            for stage, milliseconds in stream["stages"].items():
                stages.setdefault(stage, []).append(float(milliseconds))
        rates.append(1000 * batch_size * len(streams) / _wall(answer))
    return Measured(stages, rates, calls)


def _wall(answer: dict[str, Any]) -> float:
    """Milliseconds that a turn took."""
    return float(answer["wall"] if "wall" in answer else answer["stages"][PIPELINE])


def sample(values: list[float]) -> dict[str, Any]:
    """Median, 90th percentile (nearest rank), least, most and count."""
    ordered = sorted(values)
    ninth = ordered[math.ceil(0.9 * len(ordered)) - 1]
    numbers = {"median": statistics.median(ordered), "p90": ninth, "least": ordered[0], "most": ordered[-1]}
    return {name: round(value, 4) for name, value in numbers.items()} | {"count": len(ordered)}


def line_of(entrant: Entrant, found: dict[str, Any], machine: dict[str, Any], price: float | None) -> dict[str, Any]:
    """A line of results; `price` is money an hour."""
    line = {
        "format": FORMAT,
        "contender": entrant.label,
        "settings": entrant.settings,
        "machine": machine if entrant.packages is None else machine | {"packages": entrant.packages},
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "stages": {},
        "cold_start": None,
        **found,
        "error": found.get("error"),
    }
    return priced(line, price)


def priced(line: dict[str, Any], price: float | None) -> dict[str, Any]:
    """The line, on a machine that costs so much an hour."""
    rate = line.get("images_per_second") if line.get("error") is None else None
    return line | {
        "price_per_hour": price,
        "images_per_unit": round(rate * 3600 / price, 2) if rate and price else None,
    }


def check_writable(file: Path) -> None:
    """Raises `InvalidRequest` for a file that lines could not be appended to. Leaves nothing there."""
    try:
        if file.exists():
            file.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=next(parent for parent in file.absolute().parents if parent.exists())).close()
    except OSError as error:
        raise InvalidRequest(f"--output {file} cannot be written ({error.strerror or error}); name another.") from None


def append(file: Path, line: dict[str, Any]) -> None:
    """Adds a whole line; what a killed sweep left of one goes. Raises `Failed` when the file cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as out:
            whole = _whole_lines(file.read_bytes())
            out.truncate(len(whole))
            begin = b"\n" if whole and not whole.endswith(b"\n") else b""
            out.write(begin + json.dumps(line).encode() + b"\n")
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        raise Failed(f"{file} cannot be written: {error.strerror or error}.") from None


def _whole_lines(content: bytes) -> bytes:
    """What is left of a file without the half of a line that it may end with. An editor may have taken the line feed of
    a whole one."""
    end = content.rfind(b"\n") + 1
    with contextlib.suppress(ValueError):
        if isinstance(json.loads(content[end:]), dict):
            return content
    return content[:end]


def done(file: Path) -> set[str]:
    """What the lines of a file were measured with, where that went well: see `identity`."""
    return {_identity_of(line) for line in _lines(file) if line.get("error") is None}


def lines_of(file: Path, wanted: set[str]) -> list[dict[str, Any]]:
    """The last line of each of these cells."""
    return [*{which: line for line in _lines(file) if (which := _identity_of(line)) in wanted}.values()]


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The lines that can be read; the rest is the report's to complain of."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return
    for text in content.split(b"\n"):
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict):
                yield line


def _identity_of(line: dict[str, Any]) -> str:
    return identity(line.get("contender"), line.get("settings"), line.get("machine"))


def identity(contender: Any, settings: Any, machine: Any) -> str:
    """What makes two lines the same cell."""
    return json.dumps([contender, settings, machine], sort_keys=True)


def entrant_of(cell: Cell, place: Place, cold: list[str] | None, facts: dict[str, Any]) -> Entrant:
    """Darkroom itself. `cold` is a script with all its flags but the folder for its picture."""
    command = [sys.executable, "-m", "darkroom.bench.worker", json.dumps(cell.as_json()), json.dumps(asdict(place))]
    package = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
    return Entrant(cell.name, cell.contender, cell.settings(), command, cold, facts, {"PYTHONPATH": paths})


def groups_of(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that do the same work, together, in the order of the first of each."""
    groups: dict[Any, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.work(), []).append(cell)
    return list(groups.values())


def _without(text: str, name: str) -> str:
    return text.removeprefix(f"{name}: ").rstrip(".")


def _safe(name: str) -> str:
    return "".join(each if each.isalnum() or each in ".-" else "_" for each in name)
