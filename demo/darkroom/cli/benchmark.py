"""The main of benchmark.py: sweeps, comparisons with others, and what is made of their results."""

import argparse
from pathlib import Path

from darkroom.bench.machine import machine
from darkroom.bench.report import report
from darkroom.bench.results import read, row_of
from darkroom.bench.sweep import (
    append,
    check_writable,
    done,
    entrant_of,
    groups_of,
    identity,
    line_of,
    lines_of,
    priced,
    take_turns,
)
from darkroom.bench.worker import preparer_of
from darkroom.cli.compare import add_compare_flags, compare
from darkroom.cli.console import Console
from darkroom.cli.exit import exit_code
from darkroom.cli.flags import add_build_arguments
from darkroom.cli.parser import Parser, named
from darkroom.cli.settings import home
from darkroom.cli.sweeping import Sweep, add_work_flags, check_baseline, cold_command, say_line, say_results, title
from darkroom.errors import Failed

PROGRAM = "benchmark.py"
RESULTS = "benchmark.jsonl"


def parser() -> Parser:
    """The commands and their flags."""
    parser = Parser(prog=PROGRAM, allow_abbrev=False, description="Measures engines, precisions and batch sizes.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    sweep = commands.add_parser("run", help="measure every combination of what is listed", allow_abbrev=False)
    lists = add_work_flags(sweep)
    lists.add_argument("--scheduler", nargs="+", metavar="NAME", help="default: the model's own")
    lists.add_argument("--streams", nargs="+", type=int, default=[1], metavar="N", help="requests at a time; default 1")
    lists.add_argument(
        "--async",
        dest="asynchronous",
        action="store_true",
        help="measure also with text encoding and VAE decoding of neighbouring batches beside the UNet",
    )
    add_build_arguments(lists, several=True, opset=False)
    sweep.add_argument(
        "--output", type=named, metavar="FILE", help=f"results, a line a cell; default: output/{RESULTS}"
    )
    sweep.set_defaults(work=_run)
    making = commands.add_parser("report", help="tables and charts of what was measured", allow_abbrev=False)
    making.add_argument("results", nargs="*", metavar="FILE", help=f"what was measured; default: output/{RESULTS}")
    making.add_argument("--output-dir", type=named, metavar="DIR", help="default: FILE-report, beside the first file")
    making.set_defaults(work=_report)
    racing = commands.add_parser("compare", help="the same work by others, in the same run", allow_abbrev=False)
    add_work_flags(racing)
    add_compare_flags(racing)
    racing.set_defaults(work=lambda flags: compare(flags, Console(flags.verbose)))
    for command in (sweep, making, racing):
        command.add_argument(
            "--baseline", metavar="NAME", help="what speed-ups are over: a contender, or part of its name"
        )
        command.add_argument("--max-latency", type=float, metavar="MS", help="also the most images/s within this p90")
    return parser


def run(arguments: list[str] | None = None) -> int:
    """Runs `benchmark.py`. Returns the exit code: 0 done, 1 failed, 2 an invalid request."""

    def work() -> None:
        flags = parser().parse_args(arguments)
        flags.work(flags)

    return exit_code(PROGRAM, work)


def _run(flags: argparse.Namespace) -> None:
    console = Console(flags.verbose)
    file = Path(flags.output) if flags.output else home() / "output" / RESULTS
    sweep = Sweep(flags, console)
    check_writable(file)
    cells, place = sweep.cells(), sweep.place
    check_baseline(flags.baseline, [cell.contender for cell in cells])
    here, measured = machine(), done(file)
    asked = {identity(cell.contender, cell.settings(), here): cell for cell in cells}
    left = [cell for which, cell in asked.items() if which not in measured]
    if len(left) < len(cells):
        console.say(f"{len(cells) - len(left)} of {len(cells)} cells are in {file} already.")
    for line in lines_of(file, set(asked) & measured):
        if flags.price_per_hour not in (None, line.get("price_per_hour")):
            append(file, priced(line, flags.price_per_hour))  # what was measured costs another price now
    failed = 0
    for group in groups_of(left):
        entrants = []
        for cell in group:
            preparer = preparer_of(cell, place, job=console.job, detail=console.detail, verbose=flags.verbose)
            facts = sweep.built(cell, preparer)
            measures_cold = flags.cold_starts and cell.streams == 1 and not cell.asynchronous
            cold = cold_command(cell, preparer.checkpoint.family, place) if measures_cold else None
            entrants.append(entrant_of(cell, place, cold, facts))
        sweep.release()
        with console.job(title(group[0])) as progress:
            for each, found in take_turns(entrants, flags.cold_starts, progress.show):
                line = line_of(each, found, here, flags.price_per_hour)
                append(file, line)
                say_line(line, each.name, console)
                failed += line["error"] is not None
    say_results([row_of(line) for line in lines_of(file, set(asked))], flags, console)
    console.result(str(file))
    if failed:
        raise Failed(f"{failed} of {len(left)} cells could not be measured; a second run tries them again.")


def _report(flags: argparse.Namespace) -> None:
    console = Console()
    files = [Path(each) for each in flags.results] or [home() / "output" / RESULTS]
    folder = Path(flags.output_dir) if flags.output_dir else files[0].absolute().with_name(f"{files[0].stem}-report")
    made = report(files, folder, flags.baseline, flags.max_latency)
    say_results(read(files), flags, console)
    for path in made:
        console.result(str(path))
