"""The main of build_engines.py: engines before they are needed, and what keeps the store in order."""

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from darkroom.checkpoint.catalog import SCRIPTS, TXT2IMG, Version, find_version
from darkroom.checkpoint.folder import open_checkpoint
from darkroom.checkpoint.hub import on_disk, repository_of
from darkroom.cli.artefacts import Runtimes, row_of, rows_of, show, table
from darkroom.cli.console import Console
from darkroom.cli.doctor import add_doctor_command
from darkroom.cli.exit import exit_code
from darkroom.cli.flags import (
    DEFAULT_OPSET,
    SHARES,
    add_build_arguments,
    add_place_arguments,
    add_tensorrt_arguments,
)
from darkroom.cli.from_flags import PROVISIONAL_SIZE, unnamed
from darkroom.cli.maintenance import add_maintenance_commands
from darkroom.cli.opening import open_model, refuse_bounds
from darkroom.cli.parser import Parser, named
from darkroom.cli.settings import Folders, artefact_folders, bounds_of, options_of, stores_of
from darkroom.cli.transfer import add_transfer_commands
from darkroom.contract import PRECISIONS
from darkroom.engines import RUNTIMES, automatic, find_runtime
from darkroom.engines.runtime import Options, Runtime
from darkroom.errors import InvalidRequest
from darkroom.prepare import BATCHES, Preparer, check_precision
from darkroom.request import BUILDS, Request
from darkroom.store.store import Store

PROGRAM = "build_engines.py"


def versions() -> dict[str, Version]:
    """Every model that a script knows by name, refiners too."""
    known = {name: version for script in SCRIPTS.values() for name, version in script.versions.items()}
    return known | {script.refiner.name: script.refiner for script in SCRIPTS.values() if script.refiner}


def parser() -> Parser:
    """The commands and their flags."""
    parser = Parser(prog=PROGRAM, allow_abbrev=False, description="Engines before they are needed, kept in order.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    build = commands.add_parser("build", help="build what is not there", allow_abbrev=False)
    _add_build_flags(build)
    listing = commands.add_parser("list", help="what is there, and whether it can be used here", allow_abbrev=False)
    listing.add_argument("name", nargs="*", metavar="NAME", help="only what has this in its name; * stands for any")
    for command in (build, listing):
        add_store_arguments(command)
        command.add_argument("--verbose", action="store_true", help="also the inputs and outputs of each engine")
    build.set_defaults(work=_build)
    listing.set_defaults(work=_list)
    for command in (*add_maintenance_commands(commands), *add_transfer_commands(commands)):
        add_store_arguments(command)
        command.set_defaults(verbose=False)
    add_doctor_command(commands)
    return parser


def add_store_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--onnx-dir", type=named, metavar="DIR", help="ONNX graphs; default: onnx")
    command.add_argument("--engine-dir", type=named, metavar="DIR", help="engines and schedules; default: engines")
    command.add_argument("--json", action="store_true", help="for programs: one JSON value on stdout")


def _add_build_flags(build: argparse.ArgumentParser) -> None:
    embedded = [name for name, version in versions().items() if version.embedded]
    build.add_argument(
        "--version", nargs="+", metavar="NAME", help=f"any of {', '.join(versions())}; default: {' '.join(embedded)}"
    )
    build.add_argument(
        "--model", nargs="+", type=named, metavar="PATH_OR_REPO", help="model folders or hub repositories"
    )
    build.add_argument("--engine", nargs="+", default=["auto"], metavar="NAME", help=f"any of {', '.join(RUNTIMES)}")
    add_place_arguments(build)
    build.add_argument("--precision", nargs="+", default=[PRECISIONS[0]], metavar="NAME", help=", ".join(PRECISIONS))
    build.add_argument("--batch-size", nargs="+", type=int, metavar="B", help="images a batch; default 1")
    build.add_argument(
        "--size", nargs="+", type=pixel_size, metavar="HxW", help="heights and widths in pixels, as 512 or 512x768"
    )
    build.add_argument("--height", type=int, metavar="PIXELS", help="of a single size; default: the model's own")
    build.add_argument("--width", type=int, metavar="PIXELS", help="of a single size; default: the model's own")
    build.add_argument(
        "--guidance-scale",
        type=float,
        metavar="X",
        help="1 and below build a UNet without guidance; default: the model's",
    )
    build.add_argument("--clip-skip", type=int, default=0, metavar="N", help="text encoder layers to leave out")
    build.add_argument("--scheduler", nargs="+", metavar="NAME", help="schedules to compile; default: the model's own")
    build.add_argument("--denoising-steps", nargs="+", type=int, metavar="N", help="for each; default: the model's own")
    build.add_argument("--hf-token", metavar="TOKEN", help="for gated models on the hub; default: $HF_TOKEN")
    build.add_argument("--framework-model-dir", type=named, metavar="DIR", help="download models here")
    build.add_argument("--onnx-export-only", action="store_true", help="export the graphs and stop there")
    build.add_argument("--dry-run", action="store_true", help="say what is there and what would be made")
    build.add_argument("--devices", nargs=1, metavar="N", help=f"with --engine jax: {SHARES}")
    add_build_arguments(build.add_argument_group("what engines leave free; several build each"), several=True)
    add_tensorrt_arguments(build)


def pixel_size(text: str) -> tuple[int, int]:
    """`512` or `512x768` -> height and width in pixels. For argparse: raises `ValueError` for anything else."""
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def run(arguments: list[str] | None = None) -> int:
    """Runs `build_engines.py`. Returns the exit code: 0 done, 1 failed, 2 an invalid request."""

    def work() -> None:
        flags = parser().parse_args(arguments)
        flags.work(flags)

    return exit_code(PROGRAM, work)


@dataclass(frozen=True)
class Cell:
    """One combination of what is asked for."""

    version: Version
    runtime: Runtime
    precision: str
    build: str
    batch_size: int
    size: tuple[int, int] | None
    """Height and width in pixels; None for the model's own."""
    scheduler: str | None
    denoising_steps: int

    def request(self, flags: argparse.Namespace, own: int) -> Request:
        """A request that needs the engines that are meant; what it would show does not matter."""
        version = self.version
        height, width = self.size or (own, own)
        return Request(
            model=version.name or None,
            prompts=("a picture",),
            negative_prompt=None,
            batch_size=self.batch_size,
            batch_count=1,
            height=height if flags.height is None else flags.height,
            width=width if flags.width is None else flags.width,
            denoising_steps=self.denoising_steps,
            guidance_scale=version.guidance_scale if flags.guidance_scale is None else flags.guidance_scale,
            clip_skip=flags.clip_skip,
            scheduler=self.scheduler,
            seed=0,
            engine=self.runtime.name,
            precision=self.precision,
            build=self.build,
            onnx_opset=DEFAULT_OPSET if flags.onnx_opset is None else flags.onnx_opset,
        )


def _cells(flags: argparse.Namespace) -> list[Cell]:
    """Every combination, refused where any could not be asked of any model."""
    options = options_of(flags)
    known = versions()
    asked = [find_version(name, known) for name in flags.version or ()]
    asked += [unnamed(source, TXT2IMG.unnamed) for source in flags.model or ()]
    asked = asked or [version for version in known.values() if version.embedded]
    runtimes = [_compiling(name, options) for name in flags.engine]
    builds = flags.build or [BUILDS[0]]
    for runtime in runtimes:
        refuse_bounds(flags, builds, runtime)
        for name in ("onnx_opset", "onnx_export_only"):
            if getattr(flags, name) and not runtime.from_graph:
                flag = f"--{name.replace('_', '-')}"
                raise InvalidRequest(f"{flag} has no effect with --engine {runtime.name}, which has no ONNX graphs.")
    _refuse_unused(flags, builds)
    schedules = [
        (scheduler, steps) for scheduler in flags.scheduler or [None] for steps in flags.denoising_steps or [None]
    ]
    cells = [
        Cell(
            version,
            runtime,
            precision,
            build,
            batch,
            size,
            version.scheduler if scheduler is None else scheduler,
            version.steps if steps is None else steps,
        )
        for version, runtime, precision, build in itertools.product(asked, runtimes, flags.precision, builds)
        for batch in _batches(flags, build)
        for size in (flags.size if flags.size and build != "dynamic-shape" else [None])
        for scheduler, steps in schedules
    ]
    for cell in cells:
        # What is wrong is said before anything is fetched.
        cell.request(flags, PROVISIONAL_SIZE)
        check_precision(cell.runtime, cell.precision)
    return list(dict.fromkeys(cells))


def _batches(flags: argparse.Namespace, build: str) -> list[int]:
    if build == BUILDS[0]:
        return flags.batch_size or [1]
    return [(bounds_of(flags.dynamic_batches, "--dynamic-batches") or BATCHES)[1]]


def _refuse_unused(flags: argparse.Namespace, builds: list[str]) -> None:
    """Raises `InvalidRequest` for a size where engines leave that size free, and for sizes that are named twice."""
    if flags.size and (flags.height is not None or flags.width is not None):
        raise InvalidRequest("--size names heights and widths: leave out --height and --width.")
    free = {"static-batch": (), "dynamic-batch": ("batch_size",)}
    for name in ("batch_size", "size", "height", "width"):
        given = getattr(flags, name) is not None
        if given and all(name in free.get(build, ("batch_size", "size", "height", "width")) for build in builds):
            flag = f"--{name.replace('_', '-')}"
            raise InvalidRequest(f"{flag} has no effect with --build-{builds[0]}, which leaves it free.")
    if flags.dry_run and flags.onnx_export_only:
        raise InvalidRequest("--onnx-export-only makes graphs and --dry-run makes nothing: take one of them.")


def _compiling(name: str, options: Options) -> Runtime:
    runtime = find_runtime(automatic(options) if name == "auto" else name, options)
    if not runtime.compiles:
        raise InvalidRequest(f"--engine {runtime.name} builds nothing: it runs the model as it is.")
    return runtime


def _build(flags: argparse.Namespace) -> None:
    console = Console(flags.verbose, machine=flags.json)
    cells = _cells(flags)
    folders = artefact_folders(flags)
    graphs, engines = stores_of(folders, console)
    if flags.dry_run:
        _show_plan(_plan(cells, flags, folders, graphs, engines, console), flags, console)
        return
    made: dict[Path, bool] = {}
    ready: dict[str, str | None] = {}
    for cell in cells:
        preparer = _preparer(cell, flags, folders, graphs, engines, console)
        request = cell.request(flags, _own_size(preparer, cell))
        wanted = preparer.stages_for(request, from_image=True)
        if flags.onnx_export_only:
            needed = preparer.export(request, wanted)
        else:
            needed = [*preparer.compile(request, wanted).sources.values()]
            ready[cell.runtime.name] = cell.runtime.unusable()
        made |= {folder: made.get(folder, False) or folder in preparer.made for folder in [*preparer.made, *needed]}
    runtimes = Runtimes()
    rows = [
        row_of(folder, graphs if folder.parent == graphs.root else engines, runtimes, new)
        for folder, new in made.items()
    ]
    show(rows, flags, console)
    for name, reason in ready.items():
        if reason:
            console.say(f"The {name} engines are built and kept in {engines.root}: {reason}.")


def _preparer(
    cell: Cell, flags: argparse.Namespace, folders: Folders, graphs: Store, engines: Store, console: Console
) -> Preparer:
    folder = open_model(cell.version, None, folders, graphs, console)
    return Preparer(
        open_checkpoint(folder, engines.fingerprints),
        cell.runtime,
        graphs,
        engines,
        name=cell.version.name,
        batches=bounds_of(flags.dynamic_batches, "--dynamic-batches") or BATCHES,
        pixels=bounds_of(flags.dynamic_sizes, "--dynamic-sizes"),
        verbose=flags.verbose,
        job=console.job,
        detail=console.detail,
    )


def _own_size(preparer: Preparer, cell: Cell) -> int:
    return preparer.pixels[1] if preparer.pixels else cell.version.size or preparer.checkpoint.default_size


def _plan(
    cells: list[Cell], flags: argparse.Namespace, folders: Folders, graphs: Store, engines: Store, console: Console
) -> Iterator[tuple[str, Path | None, str]]:
    """What is needed, the folder of what is there, and a remark."""
    for cell in cells:
        source = cell.version.source
        if not cell.version.embedded and repository_of(source) and not on_disk(source, folders.framework_model_dir):
            yield source, None, "to be fetched first; what it needs is known then"
            continue
        if Path(source).is_file():
            yield source, None, "to be unpacked first; what it needs is known then"
            continue
        preparer = _preparer(cell, flags, folders, graphs, engines, console)
        request = cell.request(flags, _own_size(preparer, cell))
        for label, folder in preparer.plan(request, preparer.stages_for(request, from_image=True)).items():
            yield label, folder, ""


def _show_plan(planned: Iterator[tuple[str, Path | None, str]], flags: argparse.Namespace, console: Console) -> None:
    plan = list(dict.fromkeys(planned))
    if flags.json:
        rows = [
            {"what": what, "folder": str(folder) if folder else None, "remark": note} for what, folder, note in plan
        ]
        console.result(json.dumps(rows))
        return
    columns = {
        "what": [what for what, _, _ in plan],
        "there": ["yes" if folder else "no" for _, folder, _ in plan],
        "": [note for _, _, note in plan],
    }
    table(columns, tuple(columns))
    missing = sum(folder is None for _, folder, _ in plan)
    console.say(f"{len(plan) - missing} are there, {missing} would be made. Nothing was changed.")


def _list(flags: argparse.Namespace) -> None:
    console = Console(machine=flags.json)
    show(rows_of(stores_of(artefact_folders(flags), console), Runtimes(), flags.name), flags, console)
