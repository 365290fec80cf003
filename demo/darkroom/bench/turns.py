"""Contenders that do the same work take turns; each cell becomes a line of results as soon as it is measured."""

import math
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from darkroom.bench.contender import Contender, seconds_to_picture
from darkroom.bench.machine import Room
from darkroom.bench.results import FORMAT, priced
from darkroom.errors import Failed, InvalidRequest

Settings = dict[str, Any]
Found = dict[str, Any]
"""What a line of results holds beside its settings, the machine and the time."""


@dataclass(frozen=True)
class Entrant:
    """Who takes part: a name of its own, the label that its lines of results have, what starts it.

    `cells` are the settings of its lines: it is loaded for the first, and does the others, of another batch size or
    other steps, in the same process. `cold` starts a process that ends with a picture at the path that is appended;
    None where that is not measured. `environment` is added to this process's own. `facts` go into its lines as they
    are; where an `error` is among them, it is not run. `packages` are the versions it runs, None for this process's.
    """

    name: str
    label: str
    cells: tuple[Settings, ...]
    command: list[str]
    cold: list[str] | None
    facts: Found
    environment: dict[str, str] | None = None
    packages: dict[str, str] | None = None

    def lines(self, machine: dict[str, Any]) -> list[dict[str, Any]]:
        """What its lines of results begin with."""
        here = machine if self.packages is None else machine | {"packages": self.packages}
        return [{"contender": self.label, "settings": cell, "machine": here} for cell in self.cells]


def take_turns(
    entrants: Sequence[Entrant], cold_starts: int, show: Callable[[str], None], pictures: Path | None = None
) -> Iterator[tuple[Entrant, Settings, Found]]:
    """Measures those that do the same work, turn by turn, so that a machine busy with something else hurts all alike.

    Yields each cell as soon as it is known, with the `error` that says in one line what kept it from being measured.
    Those that memory has room for together take turns together. The first takes turns with every such group, and what
    it did in the turns of a later one is the others' `beside`. Pictures are saved in folders of `pictures`, if given.
    """
    facts = {each.name: dict(each.facts) for each in entrants}
    assert len(facts) == len(entrants), "two of one name"
    _start_cold([each for each in entrants if each.cold], cold_starts, facts, show)
    yield from (
        (each, cell, facts[each.name]) for each in entrants if "error" in facts[each.name] for cell in each.cells
    )
    waiting = [each for each in entrants if "error" not in facts[each.name]]
    first: Entrant | None = None
    room = Room()
    while waiting:
        with ExitStack() as stack:
            running: dict[str, Contender] = {}
            group = [waiting.pop(0)]
            if first is not None:
                running = _loaded(first, facts, stack, show)
                if running and not room.for_another(1):
                    running.pop(first.name).close()
            running |= _loaded(group[0], facts, stack, show)
            while waiting and (not running or room.for_another(len(running))):
                group.append(waiting.pop(0))
                running |= _loaded(group[-1], facts, stack, show)
            for work in dict.fromkeys(_work(cell) for each in group for cell in each.cells):
                taking = [each for each in (first, *group) if each]
                cells = {each.name: cell for each in taking for cell in each.cells if _work(cell) == work}
                saved = {each.name: pictures for each in group} if pictures else {}
                found = _measured(cells, running, facts, show, saved)
                beside = _beside(first, cells[first.name], found[first.name]) if first and first.name in cells else {}
                for each in group:
                    if each.name in cells:
                        here = found[each.name]
                        yield each, cells[each.name], here if "error" in here else here | beside
        first = first or next((each for each in group if "error" not in facts[each.name]), None)


def _work(cell: Settings) -> tuple[int, int]:
    """In what the cells of one process differ."""
    return cell["batch_size"], cell["denoising_steps"]


def _loaded(
    entrant: Entrant, facts: dict[str, Found], stack: ExitStack, show: Callable[[str], None]
) -> dict[str, Contender]:
    """Its process by its name, while the stack is open; nothing, but the error in its facts, where it fails."""
    show(f"{entrant.name}: loading")
    try:
        contender = stack.enter_context(Contender(entrant.name, entrant.command, entrant.environment))
        facts[entrant.name]["load_seconds"] = round(contender.loaded(), 4)
    except Failed as error:
        facts[entrant.name]["error"] = _without(str(error), entrant.name)
        return {}
    return {entrant.name: contender}


def _beside(entrant: Entrant, cell: Settings, found: Found) -> Found:
    """Who it was, its images a second, and each stage's median in milliseconds; nothing where it did not take part."""
    if "images_per_second" not in found:
        return {}
    medians = {stage: each["median"] for stage, each in found["stages"].items()}
    who = {"contender": entrant.label, "settings": cell}
    return {"beside": who | {"images_per_second": found["images_per_second"], "stages": medians}}


def _start_cold(
    entrants: list[Entrant], cold_starts: int, facts: dict[str, Found], show: Callable[[str], None]
) -> None:
    """Adds to the facts how long each takes from a process's start to a picture, turn by turn. The first does not
    count: it fills the system's cache of files."""
    seconds: dict[str, list[float]] = {each.name: [] for each in entrants}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(cold_starts + 1 if cold_starts else 0):
            for index, each in enumerate(entrants):
                if "error" in facts[each.name]:
                    continue
                show(f"{each.name}: cold start {turn} of {cold_starts}")
                target = Path(folder) / f"{index}.png"  # a picture, or a folder for it
                try:
                    took = seconds_to_picture(each.name, [*each.cold, str(target)], each.environment)
                    seconds[each.name] += [took] if turn else []
                except Failed as error:
                    facts[each.name]["error"] = _without(str(error), each.name)
    for name, taken in seconds.items():
        facts[name]["cold_start"] = sample(taken) if taken and "error" not in facts[name] else None


def _measured(
    cells: dict[str, Settings],
    running: dict[str, Contender],
    facts: dict[str, Found],
    show: Callable[[str], None],
    pictures: dict[str, Path],
) -> dict[str, Found]:
    """What each does in its cell, turn by turn. One that is not running, or fails, has its facts alone: of a failure,
    the error stays there."""
    taking = [name for name in cells if name in running and "error" not in facts[name]]
    turns = {name: cells[name]["warmup_runs"] + cells[name]["repeat"] for name in taking}
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in taking}
    found = {name: dict(facts[name]) for name in cells}

    def ask(name: str, work: Callable[[Contender], Any]) -> Any:
        try:
            return work(running[name]) if "error" not in facts[name] else None
        except Failed as error:
            facts[name]["error"] = found[name]["error"] = _without(str(error), name)

    for name in taking:
        work = _work(cells[name])
        ask(name, lambda contender, work=work: contender.set(*work))
    for turn in range(max(turns.values(), default=0)):
        for name in taking:
            if turn < turns[name]:
                show(f"{name}: run {turn + 1} of {turns[name]}")
                answers[name].append(ask(name, Contender.run))
    for name in taking:
        if name in pictures:
            folder = pictures[name] / folder_of(cells[name]) / re.sub(r"[^\w.-]", "_", name)
            found[name]["pictures"] = [str(path) for path in ask(name, lambda each, to=folder: each.save(to)) or ()]
        memory = ask(name, Contender.memory)
        if "error" not in facts[name]:
            found[name] |= _summed(answers[name], cells[name]) | memory
    return found


def _summed(answers: list[dict[str, Any]], cell: Settings) -> Found:
    """What the answers to all runs come to, but for those of the warm-up."""
    stages: dict[str, list[float]] = {}
    timed = answers[cell["warmup_runs"] :]
    for stream in (stream for answer in timed for stream in answer["streams"]):
        for stage, milliseconds in stream["stages"].items():
            stages.setdefault(stage, []).append(float(milliseconds))
    rates = [1000 * cell["batch_size"] * len(answer["streams"]) / answer["wall"] for answer in timed]
    return {
        "first_run_ms": round(float(answers[0]["wall"]), 3),
        "stages": {stage: sample(values) for stage, values in stages.items()},
        "unet_calls": answers[-1]["streams"][-1]["unet_calls"],
        "images_per_second": round(statistics.median(rates), 4),
    }


def sample(values: list[float]) -> dict[str, Any]:
    """Median, 90th percentile (nearest rank), least, most and count."""
    ordered = sorted(values)
    ninth = ordered[math.ceil(0.9 * len(ordered)) - 1]
    numbers = {"median": statistics.median(ordered), "p90": ninth, "least": ordered[0], "most": ordered[-1]}
    return {name: round(value, 4) for name, value in numbers.items()} | {"count": len(ordered)}


def line_of(
    entrant: Entrant, cell: Settings, found: Found, machine: dict[str, Any], price: float | None
) -> dict[str, Any]:
    """A line of results; `price` is money an hour."""
    (begun,) = replace(entrant, cells=(cell,)).lines(machine)
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    line = {"format": FORMAT, **begun, "finished": finished, "stages": {}, "cold_start": None, **found}
    return priced(line | {"error": found.get("error")}, price)


def add_likeness(found: Found, expected: list[str]) -> None:
    """Gives a result that has pictures its `psnr` in dB against the `expected` ones: the least of its images."""
    if not (expected and found.get("pictures")):
        return
    from darkroom.pipeline.pictures import psnr, read_pixels

    try:
        pairs = zip(found["pictures"], expected, strict=True)
        found["psnr"] = round(min(psnr(*(read_pixels(Path(path), None, None) for path in pair)) for pair in pairs), 2)
    except (InvalidRequest, ValueError) as error:
        found["error"] = f"its pictures cannot be compared: {error}"


def folder_of(cell: Settings) -> str:
    """The folder of the pictures of all who do this work."""
    return f"{cell['version']}-b{cell['batch_size']}-{cell['denoising_steps']}-{cell['height']}x{cell['width']}"


def _without(text: str, name: str) -> str:
    return text.removeprefix(f"{name}: ").rstrip(".")
