"""The main of build_engines.py: engines before they are needed, and a list of those that are there."""

import argparse
import itertools
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from darkroom.catalog import SCRIPTS, TXT2IMG, Version, find_version
from darkroom.checkpoint import SD, SDXL, open_checkpoint
from darkroom.cli.asked import PROVISIONAL_SIZE, unnamed
from darkroom.cli.console import Console
from darkroom.cli.ending import ended
from darkroom.cli.flags import DEFAULT_OPSET, Parser, add_build_arguments, add_tensorrt_arguments
from darkroom.cli.main import open_model, refuse_bounds
from darkroom.cli.settings import artefact_folders, bounds_of, options_of
from darkroom.engines import RUNTIMES, automatic, find_runtime
from darkroom.engines.runtime import PRECISIONS, Options, Runtime
from darkroom.engines.store import Store
from darkroom.errors import AskedWrongly, DarkroomError
from darkroom.prepare import BATCHES, Preparer, check_precision
from darkroom.request import Request

PROGRAM = "build_engines.py"
WIDE, WIDE_ENOUGH = 200, 150
"""Characters that a table may take where it goes to a file or another program, and from which on it is whole."""

NARROW = ("engine", "size", "built in", "age", "here")
"""What is left of it where there is less room; `--json` has all."""


def versions() -> dict[str, Version]:
    """Every model that a script knows by name, refiners too."""
    known = {name: version for script in SCRIPTS.values() for name, version in script.versions.items()}
    return known | {script.refiner.name: script.refiner for script in SCRIPTS.values() if script.refiner}


def parser() -> Parser:
    """The flags of `build` and `list`."""
    parser = Parser(prog=PROGRAM, allow_abbrev=False, description="Engines before they are needed.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    embedded = [name for name, version in versions().items() if version.embedded]
    build = commands.add_parser("build", help="build what is not there", allow_abbrev=False)
    build.add_argument(
        "--version", nargs="+", metavar="NAME", help=f"any of {', '.join(versions())}; default: {' '.join(embedded)}"
    )
    build.add_argument("--model", nargs="+", metavar="PATH_OR_REPO", help="model folders or hub repositories")
    build.add_argument("--engine", nargs="+", default=["auto"], metavar="NAME", help=f"any of {', '.join(RUNTIMES)}")
    build.add_argument("--precision", nargs="+", default=[PRECISIONS[0]], metavar="NAME", help=", ".join(PRECISIONS))
    build.add_argument("--batch-size", nargs="+", type=int, metavar="B", help="images a batch; default 1")
    build.add_argument("--height", type=int, metavar="PIXELS", help="default: the model's own")
    build.add_argument("--width", type=int, metavar="PIXELS", help="default: the model's own")
    build.add_argument(
        "--guidance-scale",
        type=float,
        metavar="X",
        help="1 and below build a UNet without guidance; default: the model's",
    )
    build.add_argument("--clip-skip", type=int, default=0, metavar="N", help="text encoder layers to leave out")
    build.add_argument("--hf-token", metavar="TOKEN", help="for gated models on the hub; default: $HF_TOKEN")
    build.add_argument("--framework-model-dir", metavar="DIR", help="download models here")
    add_build_arguments(build.add_argument_group("what engines leave free"))
    add_tensorrt_arguments(build)
    listing = commands.add_parser("list", help="what is there, and whether it can be used here", allow_abbrev=False)
    build.add_argument("--onnx-dir", metavar="DIR", help="ONNX graphs; default: onnx")
    for command in (build, listing):
        command.add_argument("--engine-dir", metavar="DIR", help="engines; default: engines")
        command.add_argument("--json", action="store_true", help="for programs: one JSON value on stdout")
        command.add_argument("--verbose", action="store_true", help="also the inputs and outputs of each engine")
    return parser


def run(arguments: list[str] | None = None) -> int:
    """Runs `build_engines.py`. Returns the exit code: 0 done, 1 failed, 2 asked wrongly."""

    def work() -> None:
        flags = parser().parse_args(arguments)
        {"build": _build, "list": _list}[flags.command](flags)

    return ended(PROGRAM, work)


def _build(flags: argparse.Namespace) -> None:
    console = Console(flags.verbose, machine=flags.json)
    folders, options = artefact_folders(flags), options_of(flags)
    batches = bounds_of(flags.dynamic_batches, "--dynamic-batches") or BATCHES
    pixels = bounds_of(flags.dynamic_sizes, "--dynamic-sizes")
    known = versions()
    asked = [find_version(name, known) for name in flags.version or ()]
    asked += [unnamed(source, TXT2IMG.unnamed) for source in flags.model or ()]
    asked = asked or [version for version in known.values() if version.embedded]
    runtimes = [_compiling(name, options) for name in flags.engine]
    for runtime in runtimes:
        refuse_bounds(flags, flags.build, runtime)
    _refuse_free(flags)
    free = flags.build not in (None, "static-batch")
    sizes = flags.batch_size or [batches[1] if free else 1]
    cells = list(itertools.product(asked, runtimes, flags.precision, sizes))
    for version, runtime, precision, batch in cells:
        # What is wrong is said before anything is fetched.
        _request(flags, version, runtime, precision, batch, PROVISIONAL_SIZE)
        check_precision(runtime, precision)
    graphs, engines = Store(folders.onnx_dir), Store(folders.engine_dir)
    rows: dict[Path, dict[str, Any]] = {}
    ready: dict[str, str | None] = {}
    for version, runtime, precision, batch in cells:
        folder = open_model(version, None, folders, graphs, console)
        checkpoint = open_checkpoint(folder, engines.fingerprints, (SD, SDXL))
        preparer = Preparer(
            checkpoint,
            runtime,
            graphs,
            engines,
            name=version.name,
            batches=batches,
            pixels=pixels,
            verbose=flags.verbose,
            job=console.job,
            detail=console.detail,
        )
        size = pixels[1] if pixels else version.size or checkpoint.default_size
        request = _request(flags, version, runtime, precision, batch, size)
        compiled = preparer.compile(request, preparer.stages_for(request, from_image=True))
        made = set(preparer.made)
        for folder in compiled.sources.values():
            rows.setdefault(folder, _row(folder, folder in made, runtime))
        ready[runtime.name] = runtime.unusable()
    _show([*rows.values()], flags, console)
    for name, reason in ready.items():
        if reason:
            console.say(f"The {name} engines are built and kept in {engines.root}: {reason}.")


def _refuse_free(flags: argparse.Namespace) -> None:
    """Raises `AskedWrongly` for a size where engines leave that size free."""
    free = {"static-batch": (), "dynamic-batch": ("batch_size",), "dynamic-shape": ("batch_size", "height", "width")}
    for name in free[flags.build or "static-batch"]:
        if getattr(flags, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise AskedWrongly(f"{flag} has nothing to act on with --build-{flags.build}, which leaves it free.")


def _compiling(name: str, options: Options) -> Runtime:
    runtime = find_runtime(automatic(options) if name == "auto" else name, options)
    if not runtime.compiles:
        raise AskedWrongly(f"--engine {runtime.name} builds nothing: it runs the model as it is.")
    return runtime


def _request(
    flags: argparse.Namespace, version: Version, runtime: Runtime, precision: str, batch: int, size: int
) -> Request:
    """A request that needs the engines that are meant; what it would show does not matter."""
    return Request(
        model=version.name or None,
        prompts=("a picture",),
        negative_prompt=None,
        batch_size=batch,
        batch_count=1,
        height=size if flags.height is None else flags.height,
        width=size if flags.width is None else flags.width,
        denoising_steps=version.steps,
        guidance_scale=version.guidance_scale if flags.guidance_scale is None else flags.guidance_scale,
        clip_skip=flags.clip_skip,
        scheduler=version.scheduler,
        seed=0,
        engine=runtime.name,
        precision=precision,
        build=flags.build or "static-batch",
        onnx_opset=DEFAULT_OPSET if flags.onnx_opset is None else flags.onnx_opset,
    )


def _list(flags: argparse.Namespace) -> None:
    runtimes: dict[str, Runtime | str] = {}
    rows = []
    for folder, manifest in Store(artefact_folders(flags).engine_dir).manifests():
        if manifest["key"].get("kind") != "engine":
            continue
        name = str(manifest["key"].get("runtime"))
        if name not in runtimes:
            try:
                runtimes[name] = find_runtime(name)
            except DarkroomError as error:
                runtimes[name] = str(error)
        rows.append(_row(folder, False, runtimes[name]))
    _show(rows, flags, Console(machine=flags.json))


def _row(folder: Path, made: bool, runtime: Runtime | str) -> dict[str, Any]:
    """What is known of an engine; `runtime` is the one that runs it, or why there is none."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    key, facts = manifest["key"], manifest["made"]
    networks = facts.get("engines", {})
    return {
        "engine": manifest["label"],
        "folder": str(folder),
        "runtime": key["runtime"],
        "version": key["version"],
        "device": key["device"],
        "bytes": sum(file["size"] for file in manifest["files"].values()),
        "weights_bytes": sum(network.get("weights_bytes", 0) for network in networks.values()) or None,
        "layers": sum(network.get("layers", 0) for network in networks.values()) or None,
        "seconds": facts["seconds"],
        "peak_bytes": facts.get("peak_bytes"),
        "age_seconds": time.time() - folder.stat().st_mtime,
        "made": made,
        "unusable": _unusable(key, runtime),
        "tensors": {name: network.get("tensors", {}) for name, network in networks.items()},
    }


def _unusable(key: dict[str, Any], runtime: Runtime | str) -> str | None:
    """Why an engine cannot be used on this machine as it is; None where it can."""
    if isinstance(runtime, str):
        return runtime
    if key["version"] != runtime.version():
        return f"built with {key['version']}; here is {runtime.version()}"
    if reason := runtime.unusable():
        return reason.split("; ")[-1]
    return None if runtime.runs(key["device"]) else f"built for {key['device']}"


def _show(rows: list[dict[str, Any]], flags: argparse.Namespace, console: Console) -> None:
    if flags.json:
        console.result(json.dumps(rows))
        return
    if not rows:
        console.say("no engines are there yet.")
        return
    from rich.console import Console as RichConsole
    from rich.table import Table

    screen = RichConsole() if sys.stdout.isatty() else RichConsole(width=WIDE)
    columns = {
        "engine": [row["engine"] for row in rows],
        "by": [row["version"].split("-")[0] for row in rows],
        "for": [row["device"] for row in rows],
        "size": [_size(row["bytes"]) for row in rows],
        "weights": [_size(row["weights_bytes"]) for row in rows],
        "layers": [str(row["layers"] or "") for row in rows],
        "built in": [f"{row['seconds']:.1f} s" for row in rows],
        "memory": [_size(row["peak_bytes"]) for row in rows],
        "age": ["new" if row["made"] else _age(row["age_seconds"]) for row in rows],
        "here": ["no" if row["unusable"] else "yes" for row in rows],
    }
    if screen.width < WIDE_ENOUGH:
        columns = {name: column for name, column in columns.items() if name in NARROW}
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in ("engine", "by", "for", "here") else "right", no_wrap=True)
    for values in zip(*columns.values(), strict=True):
        table.add_row(*values)
    screen.print(table)
    for reason, count in Counter(row["unusable"] for row in rows if row["unusable"]).items():
        console.say(f"{count} cannot be used here: {reason}.")
    if flags.verbose:
        for row in rows:
            for network, tensors in row["tensors"].items():
                screen.print(f"{row['engine']}, {network}:", highlight=False)
                for name, tensor in tensors.items():
                    bounds = [tensor["least"], tensor["best"], tensor["most"]]
                    sizes = str(bounds[0]) if bounds[0] == bounds[2] else " to ".join(map(str, (bounds[0], bounds[2])))
                    best = "" if bounds[0] == bounds[2] else f", best at {bounds[1]}"
                    screen.print(f"    {tensor['kind']} {name}: {tensor['dtype']} {sizes}{best}", highlight=False)


def _size(count: int | None) -> str:
    if count is None:
        return ""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
