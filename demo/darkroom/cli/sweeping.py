"""What `benchmark.py` is asked to measure: flags, the cells that they make, and what each needs to be there."""

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any

from darkroom.bench.cell import RUNS_AT_LEAST, Cell, Place
from darkroom.bench.report import best_lines, text
from darkroom.bench.results import Row
from darkroom.bench.sections import meant
from darkroom.checkpoint.catalog import EMBEDDED, SCRIPTS, TXT2IMG, Version, find_version
from darkroom.checkpoint.folder import open_checkpoint
from darkroom.cli.console import Console
from darkroom.cli.flags import DEFAULT_OPSET, SHARES, add_place_arguments, add_tensorrt_arguments
from darkroom.cli.from_flags import PROVISIONAL_SIZE, unnamed
from darkroom.cli.opening import open_model, refuse_bounds
from darkroom.cli.parser import named
from darkroom.cli.prebuild import pixel_size, versions
from darkroom.cli.settings import artefact_folders, bounds_of, options_of, stores_of
from darkroom.contract import PRECISIONS
from darkroom.engines import RUNTIMES, automatic, find_runtime, options_for
from darkroom.engines.runtime import Options, Runtime, asked_as
from darkroom.errors import DarkroomError, Failed, InvalidRequest
from darkroom.prepare import BATCHES, Compiled, Preparer, check_precision
from darkroom.request import BUILDS
from darkroom.store.manifest import read_manifest

PROMPT = "a red apple, noto style, blue background"


def add_work_flags(command: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """What is run, and how often; returns the group of what takes several values."""
    lists = command.add_argument_group("what is swept over; each takes several")
    lists.add_argument("--version", nargs="+", metavar="NAME", help=f"any of {', '.join(versions())}; default: emoji")
    lists.add_argument(
        "--model", nargs="+", type=named, metavar="PATH_OR_REPO", help="model folders or hub repositories"
    )
    lists.add_argument("--engine", nargs="+", default=["auto"], metavar="NAME", help=f"any of {', '.join(RUNTIMES)}")
    lists.add_argument("--precision", nargs="+", default=[PRECISIONS[0]], metavar="NAME", help=", ".join(PRECISIONS))
    lists.add_argument("--batch-size", nargs="+", type=int, default=[1], metavar="B", help="images a batch; default 1")
    lists.add_argument("--denoising-steps", nargs="+", type=int, metavar="N", help="default: the model's own")
    lists.add_argument("--size", nargs="+", type=pixel_size, metavar="HxW", help="pixels, as 512 or 512x768")
    lists.add_argument("--threads", nargs="+", type=int, metavar="N", help="CPU threads; default: the runtime's own")
    each = command.add_argument_group("each cell")
    each.add_argument("--prompt", default=PROMPT, metavar="TEXT", help=f"default: {PROMPT!r}")
    each.add_argument("--seed", type=int, default=0, metavar="S", help="default 0")
    each.add_argument("--guidance-scale", type=float, metavar="X", help="default: the model's own")
    each.add_argument(
        "--repeat", type=int, default=RUNS_AT_LEAST, metavar="N", help=f"timed runs, {RUNS_AT_LEAST} or more"
    )
    each.add_argument("--num-warmup-runs", type=int, default=1, metavar="N", help="untimed runs before; default 1")
    each.add_argument(
        "--cold-starts",
        type=int,
        default=RUNS_AT_LEAST,
        metavar="N",
        help=f"processes from the shell to a picture; 0 for none, default {RUNS_AT_LEAST}",
    )
    add_place_arguments(each)
    each.add_argument("--use-cuda-graph", action="store_true", help="on engines that have CUDA")
    each.add_argument("--devices", nargs=1, metavar="N", help=f"with --engine jax: {SHARES}")
    each.add_argument("--price-per-hour", type=float, metavar="X", help="of the machine, for images per unit of money")
    each.add_argument("--onnx-opset", type=int, metavar="N", help=f"default {DEFAULT_OPSET}")
    add_tensorrt_arguments(command)
    folders = command.add_argument_group("folders")
    folders.add_argument("--onnx-dir", type=named, metavar="DIR", help="ONNX graphs; default: onnx")
    folders.add_argument("--engine-dir", type=named, metavar="DIR", help="engines and schedules; default: engines")
    folders.add_argument("--hf-token", metavar="TOKEN", help="for gated models on the hub; default: $HF_TOKEN")
    folders.add_argument("--framework-model-dir", type=named, metavar="DIR", help="download models here")
    command.add_argument("--verbose", action="store_true", help="also what is loaded, built and reused")
    command.set_defaults(scheduler=None, streams=[1], asynchronous=False, build=None)
    return lists


class Sweep:
    """The cells that flags ask for. Raises `InvalidRequest` for what no cell could be run with, `Failed` for engines
    that cannot be measured here."""

    def __init__(self, flags: argparse.Namespace, console: Console) -> None:
        check_numbers(flags)
        self.flags = flags
        self.console = console
        self.folders = artefact_folders(flags)
        known = versions()
        self.asked = [find_version(name, known) for name in flags.version or ()]
        self.asked += [unnamed(source, TXT2IMG.unnamed) for source in flags.model or ()]
        self.builds = flags.build or [BUILDS[0]]
        options = options_of(flags)
        runtimes = [_runtime(name, options, self.builds, flags) for name in flags.engine]
        for runtime in runtimes if flags.threads else ():
            if not runtime.threaded:
                raise InvalidRequest(f"--threads has no effect with {asked_as(runtime)}.")
        self.pairs = list(_pairs(runtimes, flags.precision, console))
        for version in self.asked or [known["emoji"]]:
            # What is wrong with any is said before models are fetched.
            for cell in _cells_of(version, version.source, "", PROVISIONAL_SIZE, self.pairs, self.builds, flags):
                cell.request()
        if flags.asynchronous and min(flags.streams) > 1:
            raise InvalidRequest("--async has no effect without --streams 1: several overlap by themselves.")

    @property
    def place(self) -> Place:
        """Where graphs and engines are."""
        return Place(str(self.folders.onnx_dir.absolute()), str(self.folders.engine_dir.absolute()))

    def cells(self) -> list[Cell]:
        """Every combination, the models being fetched."""
        graphs, engines = stores_of(self.folders, self.console)
        cells = []
        for version in self.asked or [versions()["emoji"]]:
            folder = open_model(version, None, self.folders, graphs, self.console)
            checkpoint = open_checkpoint(folder, engines.fingerprints)
            size = version.size or checkpoint.default_size
            named = replace(version, name=version.name or folder.name)
            weights = checkpoint.revision[:12]
            cells += _cells_of(named, str(folder), weights, size, self.pairs, self.builds, self.flags)
        engines.fingerprints.remember()
        return list(dict.fromkeys(cells))

    def release(self) -> None:
        """Lets go of the devices that the contenders need."""
        for runtime, _ in self.pairs:
            runtime.release()

    def built(self, cell: Cell, preparer: Preparer) -> dict[str, Any]:
        """Builds what a cell needs; what its line says of that, or the error that kept it from being there."""
        try:
            return built_facts(preparer, preparer.compile(cell.request()))
        except (DarkroomError, RuntimeError) as error:  # of a build's own process, too: its last line says what it was
            return {"error": str(error).strip().rpartition("\n")[2].rstrip(".")}


def check_numbers(flags: argparse.Namespace) -> None:
    """Raises `InvalidRequest` for numbers that no cell could be run with."""
    least = {"repeat": RUNS_AT_LEAST, "num_warmup_runs": 0, "cold_starts": 0}
    least |= {"streams": 1, "threads": 1}
    for name, bound in least.items():
        values = getattr(flags, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < bound:
                why = ": medians need as many" if name == "repeat" else ""
                raise InvalidRequest(f"--{name.replace('_', '-')} must be {bound} or more, not {value}{why}.")
    for name in ("price_per_hour", "max_latency"):
        if getattr(flags, name) is not None and not getattr(flags, name) > 0:
            raise InvalidRequest(f"--{name.replace('_', '-')} must be above 0, not {getattr(flags, name)}.")


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
        able = [runtime for runtime in runtimes if precision in runtime.precisions()]
        if not able:
            check_precision(runtimes[0], precision)
        for runtime in runtimes:
            if runtime in able:
                yield runtime, precision
            else:
                console.warn(f"--precision {precision} is left out for --engine {runtime.name}, which has it not here.")


def _cells_of(
    version: Version,
    folder: str,
    weights: str,
    own_size: int,
    pairs: list[tuple[Runtime, str]],
    builds: list[str],
    flags: argparse.Namespace,
) -> Iterator[Cell]:
    for size, scheduler, steps, batch, build, (runtime, precision), streams, threads, overlap in itertools.product(
        flags.size or [(own_size, own_size)],
        flags.scheduler or [version.scheduler],
        flags.denoising_steps or [version.steps],
        flags.batch_size,
        builds,
        pairs,
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
            repeat=flags.repeat,
            prompt=flags.prompt,
            seed=flags.seed,
            onnx_opset=DEFAULT_OPSET if flags.onnx_opset is None else flags.onnx_opset,
            batches=bounds_of(flags.dynamic_batches, "--dynamic-batches") or BATCHES,
            pixels=bounds_of(flags.dynamic_sizes, "--dynamic-sizes"),
            cold_starts=flags.cold_starts,
            options=runtime.options,
        )


def built_facts(preparer: Preparer, compiled: Compiled) -> dict[str, Any]:
    """Seconds that the engines of a run took to build, graphs included, those of the compiler where it says them, and
    their bytes; None where none are."""
    if not preparer.runtime.compiles:
        return {"build_seconds": None, "engine_bytes": None}
    manifests = [read_manifest(folder) for folder in compiled.sources.values()]
    graphs = [manifest["key"].get("graph") for manifest in manifests]
    exported = [manifest["made"]["seconds"] for _, manifest in preparer.graphs.manifests() if manifest["key"] in graphs]
    compiling = [made for manifest in manifests if (made := manifest["made"].get("compile_seconds")) is not None]
    return {
        "compile_seconds": round(sum(compiling), 3) if compiling else None,
        "build_seconds": round(sum(exported) + sum(manifest["made"]["seconds"] for manifest in manifests), 3),
        "engine_bytes": sum(file["size"] for manifest in manifests for file in manifest["files"].values()),
    }


def cold_command(cell: Cell, family: str, place: Place) -> list[str]:
    """The script that makes the cell's picture, with all that it is asked; the folder for the picture is to follow."""
    few = [script for script in SCRIPTS.values() if script.few_steps and cell.version in script.versions]
    program = (few or [script for script in SCRIPTS.values() if family.name in script.families])[0].program
    command = [sys.executable, str(EMBEDDED.parents[1] / program), cell.prompt, f"--model={cell.folder}"]
    runtime = find_runtime(cell.engine, cell.options)
    flags = {
        "engine": cell.engine,
        "precision": cell.precision,
        "batch-size": cell.batch_size,
        "denoising-steps": cell.denoising_steps,
        "height": cell.height,
        "width": cell.width,
        "scheduler": cell.scheduler,
        "guidance-scale": cell.guidance_scale,
        "seed": cell.seed,
        "threads": cell.threads,
        "onnx-opset": cell.onnx_opset if runtime.from_graph else None,
        "onnx-dir": place.onnx_dir,
        "engine-dir": place.engine_dir,
    }
    command += [f"--{name}={value}" for name, value in flags.items() if value is not None]
    if runtime.compiles:
        command.append(f"--build-{cell.build}")
    for name, value in asdict(cell.options).items():
        if value is not None and value is not False:
            values = value if isinstance(value, tuple) else () if value is True else (value,)
            command += [f"--{name.replace('_', '-')}", *map(str, values)]
    if runtime.bounded and cell.build != BUILDS[0]:
        command += ["--dynamic-batches", *map(str, cell.batches)]
        if cell.pixels and cell.build == BUILDS[2]:
            command += ["--dynamic-sizes", *map(str, cell.pixels)]
    return [*command, "--quiet", "--output-dir"]


def title(cell: Cell) -> str:
    scheduler = f", {cell.scheduler}" if cell.scheduler else ""
    return (
        f"{cell.version}, batch {cell.batch_size}, {cell.denoising_steps} steps, {cell.height}x{cell.width}{scheduler}"
    )


def check_baseline(baseline: str | None, contenders: Iterable[str]) -> None:
    """Raises `InvalidRequest` for a baseline that will be none of those that are measured, or could be several."""
    if baseline is not None:
        meant(baseline, list(dict.fromkeys(contenders)), "is not measured here")


def say_results(rows: list[Row], flags: argparse.Namespace, console: Console) -> None:
    """The table for the terminal, and what is best within --max-latency, if that is asked."""
    console.say("\n" + text(rows, flags.baseline))
    for sentence in best_lines(rows, flags.max_latency) if flags.max_latency is not None else ():
        console.say(sentence)


def say_line(line: dict[str, Any], name: str, console: Console) -> None:
    settings = line["settings"]
    where = f"batch {settings['batch_size']}, {settings['denoising_steps']} steps, {name}"
    console.say(f"{where}: {line['error'] or '{:.3g} images/s'.format(line['images_per_second'])}")
