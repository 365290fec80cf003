"""The main of benchmark.py: sweeps, comparisons with others, and what is made of their results."""

import argparse
from pathlib import Path

from darkroom.bench.report import report
from darkroom.bench.results import read
from darkroom.cli import compare
from darkroom.cli.console import Console
from darkroom.cli.exit import exit_code
from darkroom.cli.parser import Parser, named
from darkroom.cli.settings import home
from darkroom.cli.sweep import Sweep, add_work_flags, check_baseline, say_results
from darkroom.flags import COMPARE, SWEEP

PROGRAM = "benchmark.py"
RESULTS = "benchmark.jsonl"


def parser() -> Parser:
    """The commands and their flags."""
    parser = Parser(prog=PROGRAM, allow_abbrev=False, description="Measures engines, precisions and batch sizes.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    sweep = commands.add_parser("run", help="measure every combination of what is listed", allow_abbrev=False)
    own = add_work_flags(sweep, SWEEP, RESULTS)
    own.add_argument("--streams", nargs="+", type=int, default=[1], metavar="N", help="requests at a time; default 1")
    own.add_argument(
        "--async",
        dest="asynchronous",
        action="store_true",
        help="measure also with text encoding and VAE decoding of neighbouring batches beside the UNet",
    )
    sweep.set_defaults(work=_run)
    making = commands.add_parser("report", help="tables and charts of what was measured", allow_abbrev=False)
    making.add_argument("results", nargs="*", metavar="FILE", help=f"what was measured; default: output/{RESULTS}")
    making.add_argument("--output-dir", type=named, metavar="DIR", help="default: FILE-report, beside the first file")
    making.set_defaults(work=_report)
    racing = commands.add_parser("compare", help="the same work by others, in the same run", allow_abbrev=False)
    add_work_flags(racing, COMPARE, compare.RESULTS)
    compare.add_compare_flags(racing)
    racing.set_defaults(work=lambda flags: compare.Comparison(flags, Console(flags.verbose)).run())
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
    sweep = Sweep(flags, Console(flags.verbose))
    check_baseline(flags.baseline, [cell.contender for cell in sweep.cells()])
    sweep.measure()


def _report(flags: argparse.Namespace) -> None:
    console = Console()
    files = [Path(each) for each in flags.results] or [home() / "output" / RESULTS]
    folder = Path(flags.output_dir) if flags.output_dir else files[0].absolute().with_name(f"{files[0].stem}-report")
    made = report(files, folder, flags.baseline, flags.max_latency)
    say_results(read(files), flags, console)
    for path in made:
        console.result(str(path))
