"""The main of build_engines.py: engines before they are needed, and what keeps the store in order."""

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path

from darkroom.checkpoint.catalog import SCRIPTS, TXT2IMG, Version, find_version
from darkroom.cli.artefacts import Runtimes, row_of, rows_of, show
from darkroom.cli.console import Console
from darkroom.cli.doctor import add_doctor_command
from darkroom.cli.dry_run import first_of_all, show_plan
from darkroom.cli.exit import exit_code
from darkroom.cli.flags import add_flags
from darkroom.cli.from_flags import PROVISIONAL_SIZE, make_request, unnamed
from darkroom.cli.maintenance import add_maintenance_commands
from darkroom.cli.opening import Models, refuse_bounds
from darkroom.cli.parser import Parser
from darkroom.cli.settings import artefact_folders, bounds_of, options_of, stores_of
from darkroom.cli.transfer import add_transfer_commands
from darkroom.contract import AUTO
from darkroom.engines import automatic, find_runtime
from darkroom.engines.runtime import Options, Runtime
from darkroom.errors import InvalidRequest
from darkroom.flags import BUILD, BUILDS, STORES, option
from darkroom.forecast import Planned
from darkroom.prepare import BATCHES, Preparer, check_precision
from darkroom.request import Request

PROGRAM = "build_engines.py"


def versions() -> dict[str, Version]:
    """Every model that a script knows by name, refiners too."""
    known = {name: version for script in SCRIPTS.values() for name, version in script.versions.items()}
    return known | {script.refiner.name: script.refiner for script in SCRIPTS.values() if script.refiner}


def versions_of(flags: argparse.Namespace) -> list[Version]:
    """The models that lists of --version and --model name."""
    known = versions()
    named = [find_version(name, known) for name in flags.version or ()]
    return named + [unnamed(source, TXT2IMG.unnamed) for source in flags.model or ()]


def parser() -> Parser:
    """The commands and their flags."""
    parser = Parser(prog=PROGRAM, allow_abbrev=False, description="Engines before they are needed, kept in order.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    build = commands.add_parser("build", help="build what is not there", allow_abbrev=False)
    _add_build_flags(build)
    listing = commands.add_parser("list", help="what is there, and whether it can be used here", allow_abbrev=False)
    listing.add_argument("name", nargs="*", metavar="NAME", help="only what has this in its name; * stands for any")
    add_flags(listing, STORES)
    listing.add_argument("--verbose", action="store_true", help="also the inputs and outputs of each engine")
    build.set_defaults(work=_build)
    listing.set_defaults(work=_list)
    for command in (*add_maintenance_commands(commands), *add_transfer_commands(commands)):
        add_flags(command, STORES)
        command.set_defaults(verbose=False)
    add_doctor_command(commands)
    return parser


def _add_build_flags(build: argparse.ArgumentParser) -> None:
    known = versions()
    embedded = " ".join(name for name, version in known.items() if version.embedded)
    add_flags(build, BUILD, versions=", ".join(known), version=embedded)
    build.add_argument("--onnx-export-only", action="store_true", help="export the graphs and stop there")
    build.set_defaults(engine=["auto"], precision=[AUTO])


def run(arguments: list[str] | None = None) -> int:
    """Runs `build_engines.py`. Returns the exit code: 0 done, 1 failed, 2 an invalid request."""

    def work() -> None:
        flags = parser().parse_args(arguments)
        flags.work(flags)

    return exit_code(PROGRAM, work)


@dataclass(frozen=True)
class Cell:
    """One combination of the requested settings."""

    version: Version
    runtime: Runtime
    precision: str
    build: str
    batch_size: int
    size: tuple[int, int] | None
    """Height and width in pixels; None for the model's own."""
    scheduler: str | None
    denoising_steps: int | None
    """None for the model's own."""

    def request(self, flags: argparse.Namespace, own: int) -> Request:
        """A request that needs the engines that are meant; what it would show does not matter."""
        size = self.size or (own, own)
        return make_request(vars(flags) | vars(self), self.version, size, engine=self.runtime.name)


def _cells(flags: argparse.Namespace) -> list[Cell]:
    """Every combination. Raises `InvalidRequest` where no model could be run with one."""
    options = options_of(flags)
    asked = versions_of(flags) or [version for version in versions().values() if version.embedded]
    runtimes = [_compiling(name, options) for name in flags.engine]
    builds = flags.build or [BUILDS[0]]
    for runtime in runtimes:
        refuse_bounds(flags, builds, runtime)
        for name in ("onnx_opset", "onnx_export_only"):
            if getattr(flags, name) and not runtime.from_graph:
                raise InvalidRequest(
                    f"{option(name)} has no effect with --engine {runtime.name}, which has no ONNX graphs."
                )
    _refuse_unused(flags, builds)
    cells = [
        Cell(version, runtime, precision, build, batch, size, scheduler, steps)
        for version, runtime, precision, build in itertools.product(asked, runtimes, flags.precision, builds)
        for batch in _batches(flags, build)
        for size in (flags.size if flags.size and build != "dynamic-shape" else [None])
        for scheduler in flags.scheduler or [None]
        for steps in flags.denoising_steps or [None]
    ]
    for cell in cells:
        # What is wrong is refused before anything is fetched.
        cell.request(flags, PROVISIONAL_SIZE)
        check_precision(cell.runtime, cell.precision)
    return list(dict.fromkeys(cells))


def _batches(flags: argparse.Namespace, build: str) -> list[int]:
    if build == BUILDS[0]:
        return flags.batch_size or [1]
    return [(bounds_of(flags, "dynamic_batches") or BATCHES)[1]]


def _refuse_unused(flags: argparse.Namespace, builds: list[str]) -> None:
    """Raises `InvalidRequest` for a size where engines leave that size free, and for sizes that are named twice."""
    if flags.size and (flags.height is not None or flags.width is not None):
        raise InvalidRequest("--size names heights and widths: leave out --height and --width.")
    free = {"static-batch": (), "dynamic-batch": ("batch_size",)}
    for name in ("batch_size", "size", "height", "width"):
        given = getattr(flags, name) is not None
        if given and all(name in free.get(build, ("batch_size", "size", "height", "width")) for build in builds):
            raise InvalidRequest(f"{option(name)} has no effect with --build-{builds[0]}, which leaves it free.")
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
    graphs, engines = stores = stores_of(folders, console)

    def prepared(cell: Cell) -> tuple[Preparer, Request, set[str]]:
        """What makes the engines of a cell, what they are for, and the stages that need them."""
        models = Models(
            folders=folders,
            runtime=cell.runtime,
            console=console,
            batches=bounds_of(flags, "dynamic_batches") or BATCHES,
            pixels=bounds_of(flags, "dynamic_sizes"),
            stores={store.root: store for store in stores},
        )
        preparer = models.preparer(cell.version)
        own = preparer.pixels[1] if preparer.pixels else cell.version.size or preparer.checkpoint.default_size
        request = cell.request(flags, own)
        return preparer, request, preparer.stages_for(request, from_image=True)

    if flags.dry_run:
        planned: list[Planned] = []
        for cell in cells:
            source = [] if cell.version.embedded else [cell.version.source]
            planned += first_of_all(source, folders) or Preparer.plan(*prepared(cell))
        show_plan(planned, flags.json, console)
        return
    made: dict[Path, bool] = {}
    ready: dict[str, str | None] = {}
    for cell in cells:
        preparer, request, wanted = prepared(cell)
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


def _list(flags: argparse.Namespace) -> None:
    console = Console(machine=flags.json)
    show(rows_of(stores_of(artefact_folders(flags), console), Runtimes(), flags.name), flags, console)
