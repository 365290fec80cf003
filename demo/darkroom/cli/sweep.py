"""What `benchmark.py` measures: flags, the cells that they make, and what each needs to be there."""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from darkroom.bench import results
from darkroom.bench.cell import RUNS_AT_LEAST, Cell
from darkroom.bench.machine import machine
from darkroom.bench.report import best_under, text
from darkroom.bench.results import Row, identity, row_of
from darkroom.bench.sections import meant, sections
from darkroom.bench.turns import Entrant, add_likeness, folder_of, line_of, take_turns
from darkroom.bench.worker import preparer_of
from darkroom.checkpoint.catalog import EMBEDDED, SCRIPTS, Version
from darkroom.checkpoint.folder import open_checkpoint
from darkroom.cli.console import Console
from darkroom.cli.flags import add_flags, refuse_below
from darkroom.cli.from_flags import PROVISIONAL_SIZE
from darkroom.cli.opening import open_model, refuse_bounds
from darkroom.cli.parser import named
from darkroom.cli.prebuild import versions, versions_of
from darkroom.cli.settings import PACKAGE, artefact_folders, bounds_of, home, options_of, stores_of
from darkroom.contract import AUTO
from darkroom.engines import automatic, find_runtime, options_for
from darkroom.engines.runtime import Options, Runtime, asked_as
from darkroom.errors import DarkroomError, Failed, InvalidRequest
from darkroom.flags import BUILDS, option
from darkroom.prepare import BATCHES, Compiled, Preparer, check_precision, offers
from darkroom.request import DEFAULTS
from darkroom.store.manifest import read_manifest

Show = Callable[[str], None]
PROMPT = "a red apple, noto style, blue background"

LEAST = {"repeat": RUNS_AT_LEAST, "num_warmup_runs": 0, "cold_starts": 0, "streams": 1, "threads": 1}
"""What numbers must be at least."""


def add_work_flags(command: argparse.ArgumentParser, name: str, file: str) -> argparse._ArgumentGroup:
    """What the command of this name runs, and how often, and the `file` of results; returns the group of its own."""
    add_flags(command, name, versions=", ".join(versions()), version="emoji", seed="0", warmup_runs="1")
    own = command.add_argument_group("what is measured")
    own.add_argument("--prompt", default=PROMPT, metavar="TEXT", help=f"default: {PROMPT!r}")
    least = RUNS_AT_LEAST
    own.add_argument("--repeat", type=int, default=least, metavar="N", help=f"timed runs, {least} or more")
    starts = f"processes from the shell to a picture; 0 for none, default {least}"
    own.add_argument("--cold-starts", type=int, default=least, metavar="N", help=starts)
    own.add_argument("--price-per-hour", type=float, metavar="X", help="of the machine, for images per unit of money")
    kept = f"results, a line a cell, to which a second run adds what is missing; default: output/{file}"
    own.add_argument("--output", type=named, default=home() / "output" / file, metavar="FILE", help=kept)
    command.set_defaults(engine=["auto"], precision=[AUTO], batch_size=[1], seed=0, num_warmup_runs=1)
    command.set_defaults(scheduler=None, streams=[1], asynchronous=False, build=None, keep_loaded=False)
    return own


class Sweep:
    """The cells that flags request. Raises `InvalidRequest` for what no cell could be run with, `Failed` for engines
    that cannot be measured here."""

    def __init__(self, flags: argparse.Namespace, console: Console) -> None:
        check_numbers(flags)
        flags.output = Path(flags.output)
        self.flags = flags
        self.console = console
        self.folders = artefact_folders(flags)
        self.asked = versions_of(flags)
        self.builds = flags.build or [BUILDS[0]]
        options = options_of(flags)
        runtimes = [_runtime(name, options, self.builds, flags) for name in flags.engine]
        for runtime in runtimes:
            if flags.threads and not runtime.threaded:
                raise InvalidRequest(f"--threads has no effect with {asked_as(runtime)}.")
            if flags.keep_loaded and runtime.compiles:
                raise InvalidRequest(f"--keep-loaded has no effect with {asked_as(runtime)}, built for one batch size.")
        self.pairs = list(_pairs(runtimes, flags.precision, console))
        for version in self.asked or [versions()["emoji"]]:
            # What is wrong with any is refused before models are fetched.
            for cell in self._cells_of(version, version.source, "", PROVISIONAL_SIZE):
                cell.request()
        if flags.asynchronous and min(flags.streams) > 1:
            raise InvalidRequest("--async has no effect without --streams 1: several overlap by themselves.")
        results.check_writable(flags.output)

    def cells(self) -> list[Cell]:
        """Every combination, the models being fetched."""
        graphs, engines = stores_of(self.folders, self.console)
        cells = []
        for version in self.asked or [versions()["emoji"]]:
            folder = open_model(version, None, self.folders, graphs, self.console)
            checkpoint = open_checkpoint(folder, engines.fingerprints)
            size = version.size or checkpoint.default_size
            named = replace(version, name=version.name or folder.name)
            cells += self._cells_of(named, str(folder), checkpoint.revision[:12], size)
        engines.fingerprints.remember()
        return list(dict.fromkeys(cells))

    def _cells_of(self, version: Version, folder: str, weights: str, own_size: int) -> Iterator[Cell]:
        flags = self.flags
        for size, scheduler, steps, batch, build, (runtime, precision), streams, threads, overlap in itertools.product(
            flags.size or [(own_size, own_size)],
            flags.scheduler or [version.scheduler],
            flags.denoising_steps or [version.steps],
            flags.batch_size,
            self.builds,
            self.pairs,
            flags.streams,
            flags.threads or [None],
            (False, True) if flags.asynchronous else (False,),
        ):
            if overlap and streams > 1:
                continue  # one stream's stages overlap; several streams do by themselves
            yield Cell(
                version=version.name,
                folder=folder,
                weights=weights,
                engine=runtime.name,
                precision=precision,
                build=build if runtime.compiles else BUILDS[0],
                batch_size=batch,
                denoising_steps=steps,
                height=size[0],
                width=size[1],
                scheduler=scheduler,
                guidance_scale=version.guidance_scale if flags.guidance_scale is None else flags.guidance_scale,
                streams=streams,
                threads=threads,
                asynchronous=overlap,
                warmup_runs=flags.num_warmup_runs,
                onnx_opset=DEFAULTS["onnx_opset"] if flags.onnx_opset is None else flags.onnx_opset,
                batches=bounds_of(flags, "dynamic_batches") or BATCHES,
                pixels=bounds_of(flags, "dynamic_sizes"),
                **{name: getattr(flags, name) for name in ("prompt", "seed", "repeat", "cold_starts")},
                options=runtime.options,
                onnx_dir=str(self.folders.onnx_dir.absolute()),
                engine_dir=str(self.folders.engine_dir.absolute()),
            )

    def groups(self, cells: list[Cell]) -> list[list[list[Cell]]]:
        """Cells that take turns, together, in the order of the first of each: as lists of those that share a process,
        which differ in batch size and steps alone."""
        same = {"batch_size": 0, "denoising_steps": 0} if self.flags.keep_loaded else {}
        groups: dict[Any, dict[Cell, list[Cell]]] = {}
        for cell in cells:
            shared = replace(cell, **same)
            groups.setdefault(shared.work, {}).setdefault(shared, []).append(cell)
        return [list(group.values()) for group in groups.values()]

    def entrant(self, cells: list[Cell], name: str, label: str) -> Entrant:
        """Darkroom itself, all that it needs being built."""
        cell = cells[0]
        preparer = preparer_of(cell, job=self.console.job, detail=self.console.detail, verbose=self.flags.verbose)
        facts: dict[str, Any] = {}
        try:
            for each in cells:
                facts = built_facts(preparer, preparer.compile(each.request()))
        except (DarkroomError, RuntimeError) as error:  # of a build's own process, too: its last line is the reason
            facts = {"error": str(error).strip().rpartition("\n")[2].rstrip(".")}
        measures_cold = cell.cold_starts and cell.streams == 1 and not cell.asynchronous
        cold = cold_command(cell, preparer.checkpoint.family.name) if measures_cold else None
        command = [sys.executable, "-m", "darkroom.bench.worker", json.dumps(asdict(cell))]
        paths = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
        settings = tuple(each.settings() for each in cells)
        return Entrant(name, label, settings, command, cold, facts, {"PYTHONPATH": paths})

    def measure(self, race: Any = None) -> None:
        """Measures every cell that the file has not yet, and reports how all stand. In a race, which is a
        `compare.Comparison`, others take part."""
        flags, console, file = self.flags, self.console, self.flags.output
        here, before = machine(), results.last_lines(file)
        asked: dict[str, dict[str, Any] | None] = {}
        expected: dict[str, list[str]] = {}

        def missing(entrant: Entrant) -> list[dict[str, Any]]:
            """The cells of it that are still to be measured; what was measured may cost another price now."""
            left = []
            for cell, line in zip(entrant.cells, map(before.get, map(identity, entrant.lines(here))), strict=True):
                if line is None or line.get("error") is not None:
                    left.append(cell)
                    continue
                if flags.price_per_hour not in (None, line.get("price_per_hour")):
                    results.append(file, line := results.priced(line, flags.price_per_hour))
                asked[identity(line)] = line
                if race and entrant.label == race.reference:
                    expected[folder_of(cell)] = line.get("pictures", [])
            return left

        failed: dict[str, None] = {}
        count = 0
        for group in self.groups(self.cells()):
            entrants = []
            for cells in group:
                label = f"Darkroom ({cells[0].contender})" if race else cells[0].contender
                name = label if race else cells[0].name
                left = missing(Entrant(name, label, tuple(cell.settings() for cell in cells), [], None, {}))
                if cells := [cell for cell in cells if cell.settings() in left]:
                    entrants.append(self.entrant(cells, name, label))
            for runtime, _ in self.pairs:
                runtime.release()  # contenders need their devices
            with console.job(group[0][0].title) as progress:
                for each in race.others(group[0], progress.show) if race else ():
                    if left := missing(each):
                        entrants.append(replace(each, cells=tuple(left)))
                # The reference goes first: the others' lines record, as they end, how like its pictures theirs are.
                entrants.sort(key=lambda each: race is not None and each.label != race.reference)
                turns = take_turns(entrants, flags.cold_starts, progress.show, race and race.pictures)
                for each, cell, found in turns:
                    work = folder_of(cell)
                    if race and each.label == race.reference:
                        expected[work] = found.get("pictures", [])
                    elif race:
                        add_likeness(found, expected.get(work, []))
                    line = line_of(each, cell, found, here, flags.price_per_hour)
                    results.append(file, line)
                    asked[identity(line)] = line
                    said = line["error"] or f"{line['images_per_second']:.3g} images/s"
                    console.say(f"batch {cell['batch_size']}, {cell['denoising_steps']} steps, {each.name}: {said}")
                    count += 1
                    failed |= {each.name: None} if line["error"] is not None else {}
        if count < len(asked):
            console.say(f"{len(asked) - count} of {len(asked)} cells are in {file} already.")
        say_results([row_of(line) for line in asked.values()], flags, console)
        console.result(str(file))
        if failed:
            errors = sum(line["error"] is not None for line in asked.values())
            raise Failed(
                f"{errors} of {count} cells could not be measured ({', '.join(failed)}); a second run tries them again."
            )


def check_numbers(flags: argparse.Namespace) -> None:
    """Raises `InvalidRequest` for numbers that no cell could be run with."""
    refuse_below(flags, **LEAST)
    for name in ("price_per_hour", "max_latency"):
        if getattr(flags, name) is not None and not getattr(flags, name) > 0:
            raise InvalidRequest(f"{option(name)} must be above 0, not {getattr(flags, name)}.")


def _runtime(name: str, options: Options, builds: list[str], flags: argparse.Namespace) -> Runtime:
    if name == "auto":
        name = automatic(options)
    runtime = find_runtime(name, options_for(name, options, flags.engine))
    if reason := runtime.unusable():
        raise Failed(f"--engine {name} cannot be measured here: {reason.split('; ')[-1]}.")
    refuse_bounds(flags, builds, runtime)
    return runtime


def _pairs(runtimes: list[Runtime], precisions: list[str], console: Console) -> Iterator[tuple[Runtime, str]]:
    """Runtimes with the precisions that they have. Raises `InvalidRequest` for a precision that none of them has."""
    for precision in precisions:
        able = [runtime for runtime in runtimes if offers(runtime, precision)]
        if not able:
            check_precision(runtimes[0], precision)
        for runtime in runtimes:
            if runtime in able:
                yield runtime, precision
            else:
                console.warn(f"--precision {precision} is left out for --engine {runtime.name}, which has it not here.")


def built_facts(preparer: Preparer, compiled: Compiled) -> dict[str, Any]:
    """The precisions that were computed; seconds that the engines of a run took to build, with their graphs, those of
    the compiler where it reports them, and their bytes; None where none are built."""
    facts: dict[str, Any] = {"computed": compiled.request.precision}
    if not preparer.runtime.compiles:
        return facts | {"build_seconds": None, "engine_bytes": None}
    manifests = [read_manifest(folder) for folder in compiled.sources.values()]
    graphs = [manifest["key"].get("graph") for manifest in manifests]
    exported = [manifest["made"]["seconds"] for _, manifest in preparer.graphs.manifests() if manifest["key"] in graphs]
    compiling = [made for manifest in manifests if (made := manifest["made"].get("compile_seconds")) is not None]
    return facts | {
        "compile_seconds": round(sum(compiling), 3) if compiling else None,
        "build_seconds": round(sum(exported) + sum(manifest["made"]["seconds"] for manifest in manifests), 3),
        "engine_bytes": sum(file["size"] for manifest in manifests for file in manifest["files"].values()),
    }


def cold_command(cell: Cell, family: str) -> list[str]:
    """The script that makes the cell's picture, with all its flags; the folder for the picture is to follow."""
    few = [script for script in SCRIPTS.values() if script.few_steps and cell.version in script.versions]
    program = (few or [script for script in SCRIPTS.values() if family in script.families])[0].program
    runtime = find_runtime(cell.engine, cell.options)
    names = ("engine", "precision", "batch_size", "denoising_steps", "height", "width", "scheduler", "guidance_scale")
    asked = {name: getattr(cell, name) for name in (*names, "seed", "threads", "onnx_dir", "engine_dir")}
    asked |= {"model": cell.folder, "onnx_opset": cell.onnx_opset if runtime.from_graph else None}
    asked |= asdict(cell.options) | ({f"build-{cell.build}": True} if runtime.compiles else {})
    if runtime.bounded and cell.build != BUILDS[0]:
        asked |= {"dynamic_batches": cell.batches, "dynamic_sizes": cell.pixels if cell.build == BUILDS[2] else None}
    command = [sys.executable, str(EMBEDDED.parents[1] / program), cell.prompt]
    for name, value in asked.items():
        if value is not None and value is not False:
            values = value if isinstance(value, tuple) else () if value is True else (value,)
            command += [option(name), *map(str, values)]
    return [*command, "--quiet", "--output-dir"]


def check_baseline(baseline: str | None, contenders: Iterable[str]) -> None:
    """Raises `InvalidRequest` for a baseline that will be none of those that are measured, or could be several."""
    if baseline is not None:
        meant(baseline, list(dict.fromkeys(contenders)), "is not measured here")


def say_results(rows: list[Row], flags: argparse.Namespace, console: Console) -> None:
    """The table for the terminal, and what is best within --max-latency, if that is passed."""
    console.say("\n" + text(rows, flags.baseline))
    for sentence in best_under(sections(rows), flags.max_latency) if flags.max_latency is not None else ():
        console.say(sentence)
