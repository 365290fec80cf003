"""The main of benchmark.py: sweeps, and what is made of their results."""

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from darkroom.bench.cell import RUNS_AT_LEAST, Cell, Place
from darkroom.bench.machine import machine
from darkroom.bench.report import best_lines, report, text
from darkroom.bench.results import read, row_of
from darkroom.bench.sweep import append, done, entrant_of, groups_of, identity, line_of, take_turns
from darkroom.bench.worker import preparer_of
from darkroom.catalog import EMBEDDED, SCRIPTS, TXT2IMG, TXT2IMG_XL, Version, find_version
from darkroom.checkpoint import SD, SDXL, open_checkpoint
from darkroom.cli.asked import PROVISIONAL_SIZE, unnamed
from darkroom.cli.console import Console
from darkroom.cli.ending import ended
from darkroom.cli.flags import DEFAULT_OPSET, Parser, add_build_arguments, add_tensorrt_arguments
from darkroom.cli.main import open_model, refuse_bounds
from darkroom.cli.prebuild import pixel_size, versions
from darkroom.cli.settings import artefact_folders, bounds_of, home, options_of, stores_of
from darkroom.engines import RUNTIMES, automatic, find_runtime, options_for
from darkroom.engines.manifest import read_manifest
from darkroom.engines.runtime import PRECISIONS, Options, Runtime
from darkroom.errors import AskedWrongly, DarkroomError, Failed
from darkroom.prepare import BATCHES, Compiled, Preparer, check_precision
from darkroom.request import BUILDS

PROGRAM = "benchmark.py"
PROMPT = "a red apple, noto style, blue background"
RESULTS = "benchmark.jsonl"


def parser() -> Parser:
    """The commands and their flags."""
    parser = Parser(prog=PROGRAM, allow_abbrev=False, description="Measures engines, precisions and batch sizes.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    sweep = commands.add_parser("run", help="measure every combination of what is listed", allow_abbrev=False)
    _add_run_flags(sweep)
    sweep.set_defaults(work=_run)
    making = commands.add_parser("report", help="tables and charts of what was measured", allow_abbrev=False)
    making.add_argument("results", nargs="*", metavar="FILE", help=f"what run wrote; default: output/{RESULTS}")
    making.add_argument("--output-dir", metavar="DIR", help="default: beside the first file, in a folder of its name")
    making.set_defaults(work=_report)
    for command in (sweep, making):
        command.add_argument(
            "--baseline", metavar="NAME", help="what speed-ups are over: a contender, or part of its name"
        )
        command.add_argument("--max-latency", type=float, metavar="MS", help="also the most images/s within this p90")
    return parser


def _add_run_flags(sweep: argparse.ArgumentParser) -> None:
    lists = sweep.add_argument_group("what is swept over; each takes several")
    lists.add_argument("--version", nargs="+", metavar="NAME", help=f"any of {', '.join(versions())}; default: emoji")
    lists.add_argument("--model", nargs="+", metavar="PATH_OR_REPO", help="model folders or hub repositories")
    lists.add_argument("--engine", nargs="+", default=["auto"], metavar="NAME", help=f"any of {', '.join(RUNTIMES)}")
    lists.add_argument("--precision", nargs="+", default=[PRECISIONS[0]], metavar="NAME", help=", ".join(PRECISIONS))
    lists.add_argument("--batch-size", nargs="+", type=int, default=[1], metavar="B", help="images a batch; default 1")
    lists.add_argument("--denoising-steps", nargs="+", type=int, metavar="N", help="default: the model's own")
    lists.add_argument("--size", nargs="+", type=pixel_size, metavar="HxW", help="pixels, as 512 or 512x768")
    lists.add_argument("--scheduler", nargs="+", metavar="NAME", help="default: the model's own")
    lists.add_argument("--streams", nargs="+", type=int, default=[1], metavar="N", help="requests at a time; default 1")
    lists.add_argument("--threads", nargs="+", type=int, metavar="N", help="CPU threads; default: the runtime's own")
    lists.add_argument(
        "--async",
        dest="asynchronous",
        action="store_true",
        help="measure also with text encoding and VAE decoding of neighbouring batches beside the UNet",
    )
    add_build_arguments(lists, several=True)
    each = sweep.add_argument_group("each cell")
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
    each.add_argument("--use-cuda-graph", action="store_true", help="on engines that have CUDA")
    each.add_argument("--price-per-hour", type=float, metavar="X", help="of the machine, for images per unit of money")
    add_tensorrt_arguments(sweep)
    folders = sweep.add_argument_group("folders")
    folders.add_argument("--output", metavar="FILE", help=f"results, a line a cell; default: output/{RESULTS}")
    folders.add_argument("--onnx-dir", metavar="DIR", help="ONNX graphs; default: onnx")
    folders.add_argument("--engine-dir", metavar="DIR", help="engines and schedules; default: engines")
    folders.add_argument("--hf-token", metavar="TOKEN", help="for gated models on the hub; default: $HF_TOKEN")
    folders.add_argument("--framework-model-dir", metavar="DIR", help="download models here")
    sweep.add_argument("--verbose", action="store_true", help="also what is loaded, built and reused")


def run(arguments: list[str] | None = None) -> int:
    """Runs `benchmark.py`. Returns the exit code: 0 done, 1 failed, 2 asked wrongly."""

    def work() -> None:
        flags = parser().parse_args(arguments)
        flags.work(flags)

    return ended(PROGRAM, work)


def _run(flags: argparse.Namespace) -> None:
    console = Console(flags.verbose)
    _check_numbers(flags)
    file = Path(flags.output) if flags.output else home() / "output" / RESULTS
    if file.is_dir():
        raise AskedWrongly(f"--output {file} is a folder: name a file.")
    cells, models = _cells(flags, console)
    folders = artefact_folders(flags)
    place = Place(
        str(folders.onnx_dir.absolute()),
        str(folders.engine_dir.absolute()),
        bounds_of(flags.dynamic_batches, "--dynamic-batches") or BATCHES,
        bounds_of(flags.dynamic_sizes, "--dynamic-sizes"),
    )
    here, measured = machine(), done(file)
    left = [cell for cell in cells if identity(cell.contender, cell.settings(), here) not in measured]
    if len(left) < len(cells):
        console.say(f"{len(cells) - len(left)} of {len(cells)} cells are in {file} already.")
    lines = []
    for group in groups_of(left):
        entrants = []
        for cell in group:
            facts = _prepared(cell, place, console, flags.verbose)
            cold = _cold_command(cell, models[cell.folder], place) if flags.cold_starts and cell.streams == 1 else None
            entrants.append(entrant_of(cell, place, None if cell.asynchronous else cold, facts))
        ready = [each for each in entrants if "error" not in each.facts]
        with console.job(_title(group[0])) as line:
            found = dict(
                zip([each.name for each in ready], take_turns(ready, flags.cold_starts, line.show), strict=True)
            )
        for each in entrants:
            lines.append(line_of(each, found.get(each.name, each.facts), here, flags.price_per_hour))
            append(file, lines[-1])
            _say(lines[-1], each.name, console)
    if lines:
        rows = [row_of(line) for line in lines]
        console.say("\n" + text(rows, flags.baseline))
        for sentence in best_lines(rows, flags.max_latency) if flags.max_latency is not None else ():
            console.say(sentence)
    console.result(str(file))
    if failed := sum(line["error"] is not None for line in lines):
        raise Failed(f"{failed} of {len(lines)} cells could not be measured; a second run tries them again.")


def _check_numbers(flags: argparse.Namespace) -> None:
    """Raises `AskedWrongly` for numbers that no cell could be run with."""
    least = {"repeat": RUNS_AT_LEAST, "num_warmup_runs": 0, "cold_starts": 0}
    least |= {"streams": 1, "threads": 1}
    for name, bound in least.items():
        values = getattr(flags, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < bound:
                why = ": medians need as many" if name == "repeat" else ""
                raise AskedWrongly(f"--{name.replace('_', '-')} must be {bound} or more, not {value}{why}.")
    for name in ("price_per_hour", "max_latency"):
        if getattr(flags, name) is not None and not getattr(flags, name) > 0:
            raise AskedWrongly(f"--{name.replace('_', '-')} must be above 0, not {getattr(flags, name)}.")


def _cells(flags: argparse.Namespace, console: Console) -> tuple[list[Cell], dict[str, Version]]:
    """Every combination, and the models by their folders. What is wrong with any is said before models are fetched."""
    known = versions()
    asked = [find_version(name, known) for name in flags.version or ()]
    asked += [unnamed(source, TXT2IMG.unnamed) for source in flags.model or ()]
    asked = asked or [known["emoji"]]
    options, builds = options_of(flags), flags.build or [BUILDS[0]]
    runtimes = [_runtime(name, options, builds, flags) for name in flags.engine]
    pairs = list(_pairs(runtimes, flags.precision, console))
    for version in asked:
        for cell in _cells_of(version, version.source, PROVISIONAL_SIZE, pairs, builds, flags):
            cell.request()
    folders = artefact_folders(flags)
    graphs, engines = stores_of(folders, console)
    cells, models = [], {}
    for version in asked:
        folder = open_model(version, None, folders, graphs, console)
        checkpoint = open_checkpoint(folder, engines.fingerprints, (SD, SDXL))
        if not version.name:
            version = replace(version, name=folder.name)
        script = TXT2IMG_XL if checkpoint.family == SDXL else TXT2IMG
        models[str(folder)] = replace(version, source=script.program)
        cells += _cells_of(version, str(folder), version.size or checkpoint.default_size, pairs, builds, flags)
    return list(dict.fromkeys(cells)), models


def _runtime(name: str, options: Options, builds: list[str], flags: argparse.Namespace) -> Runtime:
    if name == "auto":
        name = automatic(options)
    runtime = find_runtime(name, options_for(name, options, flags.engine))
    if reason := runtime.unusable():
        raise Failed(f"--engine {name} cannot be measured here: {reason.split('; ')[-1]}.")
    refuse_bounds(flags, builds, runtime)
    return runtime


def _pairs(runtimes: list[Runtime], precisions: list[str], console: Console) -> Iterator[tuple[Runtime, str]]:
    """Runtimes with the precisions that they have. Raises `AskedWrongly` for a precision that none of them has."""
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
            options=runtime.options,
        )


def _prepared(cell: Cell, place: Place, console: Console, verbose: bool) -> dict[str, Any]:
    """Builds what a cell needs; what its line says of that, or the error that kept it from being there."""
    preparer = preparer_of(cell, place, job=console.job, detail=console.detail, verbose=verbose)
    try:
        compiled = preparer.compile(cell.request())
    except DarkroomError as error:
        return {"error": str(error).rstrip(".")}
    return built_facts(preparer, compiled)


def built_facts(preparer: Preparer, compiled: Compiled) -> dict[str, Any]:
    """Seconds that the engines of a run took to build, graphs included, and their bytes; None where none are."""
    if not preparer.runtime.compiles:
        return {"build_seconds": None, "engine_bytes": None}
    manifests = [read_manifest(folder) for folder in compiled.sources.values()]
    graphs = [manifest["key"]["graph"] for manifest in manifests]
    exported = [manifest["made"]["seconds"] for _, manifest in preparer.graphs.manifests() if manifest["key"] in graphs]
    return {
        "build_seconds": round(sum(exported) + sum(manifest["made"]["seconds"] for manifest in manifests), 3),
        "engine_bytes": sum(file["size"] for manifest in manifests for file in manifest["files"].values()),
    }


def _cold_command(cell: Cell, model: Version, place: Place) -> list[str]:
    """The script that makes the cell's picture, with all that it is asked; the folder for the picture is to follow."""
    named = next((script for script in SCRIPTS.values() if cell.version in script.versions and model.few_steps), None)
    program = named.program if named else model.source
    command = [sys.executable, str(EMBEDDED.parents[1] / program), cell.prompt, f"--model={cell.folder}"]
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
        "onnx-opset": cell.onnx_opset if RUNTIMES[cell.engine].module != "torch" else None,
        "onnx-dir": place.onnx_dir,
        "engine-dir": place.engine_dir,
    }
    command += [f"--{name}={value}" for name, value in flags.items() if value is not None]
    if RUNTIMES[cell.engine].module != "torch":
        command.append(f"--build-{cell.build}")
    if cell.options.use_cuda_graph:
        command.append("--use-cuda-graph")
    return [*command, "--quiet", "--output-dir"]


def _title(cell: Cell) -> str:
    scheduler = f", {cell.scheduler}" if cell.scheduler else ""
    return (
        f"{cell.version}, batch {cell.batch_size}, {cell.denoising_steps} steps, {cell.height}x{cell.width}{scheduler}"
    )


def _say(line: dict[str, Any], name: str, console: Console) -> None:
    settings = line["settings"]
    where = f"batch {settings['batch_size']}, {settings['denoising_steps']} steps, {name}"
    console.say(f"{where}: {line['error'] or '{:.3g} images/s'.format(line['images_per_second'])}")


def _report(flags: argparse.Namespace) -> None:
    console = Console()
    files = [Path(each) for each in flags.results] or [home() / "output" / RESULTS]
    folder = Path(flags.output_dir) if flags.output_dir else files[0].with_suffix("")
    made = report(files, folder, flags.baseline, flags.max_latency)
    rows = read(files)
    console.say(text(rows, flags.baseline))
    for sentence in best_lines(rows, flags.max_latency) if flags.max_latency is not None else ():
        console.say(sentence)
    for path in made:
        console.result(str(path))
