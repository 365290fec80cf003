"""What a run prints: results and timings on stdout; progress, warnings and details on stderr."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from darkroom.cli.start import NullStream
from darkroom.errors import Failed
from darkroom.processes.progress import Line


def nobody_reads() -> None:
    """The reader of the output has closed it; Python must not complain of that once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Console:
    """`quiet` leaves warnings and results; `machine` sends the human form of a result to stderr."""

    def __init__(self, verbose: bool = False, quiet: bool = False, machine: bool = False) -> None:
        self.verbose = verbose
        self.quiet = quiet
        self.machine = machine

    def result(self, text: str, failing: bool = False) -> None:
        """What the run was for: the path of a picture, or the machine-readable result.

        Raises `Failed` where a program waits for it and stdout is closed; not in a run that is `failing`, whose own
        reason is still to be printed.
        """
        if failing:
            try:
                print(text, flush=True)
            except BrokenPipeError:
                nobody_reads()
            return
        if self.machine and isinstance(sys.stdout, NullStream):
            raise Failed("stdout is closed: the result, which --json requests, cannot be printed.")
        print(text, flush=True)

    def say(self, text: str) -> None:
        """What people read beside the result."""
        if not self.quiet:
            print(text, file=sys.stderr if self.machine else sys.stdout, flush=True)

    def detail(self, text: str) -> None:
        if self.verbose:
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr, flush=True)

    @contextmanager
    def job(self, title: str, total: int | None = None) -> Iterator[Line]:
        """One line of progress for a long job, when someone is looking."""
        if self.quiet or not sys.stderr.isatty():
            self.detail(title)
            yield Line()
            return
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        # Jobs in phases begin without a total.
        columns = [BarColumn(), MofNCompleteColumn()] if total else [TextColumn("{task.fields[phase]}", markup=False)]
        with Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}", markup=False),
            *columns,
            TimeElapsedColumn(),
            console=RichConsole(stderr=True),
            redirect_stdout=sys.stdout.isatty(),  # what is printed meanwhile goes above the line, but to a file as ever
        ) as progress:
            task = progress.add_task(title, total=total, phase="")
            yield Line(lambda: progress.advance(task), lambda text: progress.update(task, phase=text))
            if total is None:
                progress.update(task, total=1, completed=1, phase="")
