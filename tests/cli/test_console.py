"""What is shown on a terminal, and what is not where nobody looks."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from darkroom.cli.console import Console
from darkroom.cli.start import NullStream
from darkroom.errors import Failed
from tests.support import ROOT, SCRIPT, Ended, Studio

CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""What moves a terminal's cursor and colours its text."""

TALKING = """
from darkroom.cli.console import Console

console = Console()
with console.job("a long job", 2) as progress:
    for number in range(2):
        console.say(f"{number} is done")
        progress()
console.result("result")
"""


def on_terminal(studio: Studio, *command: str | Path, out: bool = False, err: bool = False) -> tuple[str, Ended]:
    """Runs Python with stdout or stderr on a terminal: all that this has received, and what came through pipes."""
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, *command],
        env=studio.environment(TERM="xterm", COLUMNS="200", PYTHONPATH=str(ROOT / "demo")),
        cwd=studio.root,
        stdin=subprocess.DEVNULL,
        stdout=inside if out else subprocess.PIPE,
        stderr=inside if err else subprocess.PIPE,
    )
    os.close(inside)
    received = b""
    try:
        while some := os.read(terminal, 65536):
            received += some
    except OSError:  # the last that had it open has ended
        pass
    finally:
        os.close(terminal)
    piped = [(text or b"").decode() for text in process.communicate()]
    return received.decode().replace("\r\n", "\n"), Ended(process.returncode, *piped)


def without_times(text: str) -> str:
    return re.sub(r" *\d+\.\d\d ", "", text)


@pytest.fixture
def drawing(studio: Studio) -> list[str]:
    """What draws a picture, when all that it takes has been built."""
    arguments = ["a red apple", "--model", str(studio.model), "--seed=5", "--denoising-steps=2", *studio.folders()]
    assert studio.here(*arguments).code == 0
    return arguments


@pytest.mark.parametrize(("out", "err"), [(False, True), (True, True), (True, False), (False, False)])
def test_progress_is_on_the_terminal_and_leaves_the_table_alone(
    out: bool, err: bool, drawing: list[str], studio: Studio
) -> None:
    expected = without_times(studio.here(*drawing).out)
    terminal, ended = on_terminal(studio, SCRIPT, *drawing, out=out, err=err)
    assert (ended.code, ended.err) == (0, "")
    assert bool(re.search(r"denoising .* (\d+)/\1 ", CODES.sub("", terminal))) == err
    if out:
        assert without_times(CODES.sub("", terminal)).endswith(expected)
    else:
        assert without_times(ended.out) == expected
    if not err:
        assert "denoising" not in terminal and "\x1b" not in terminal


def test_quiet_run_shows_no_progress(drawing: list[str], studio: Studio) -> None:
    terminal, ended = on_terminal(studio, SCRIPT, *drawing, "--quiet", err=True)
    assert terminal == "" and ended.out.endswith(".png\n")


@pytest.mark.parametrize("out", [False, True])
def test_what_is_said_during_a_job_goes_where_all_that_is_said_goes(out: bool, studio: Studio) -> None:
    terminal, ended = on_terminal(studio, "-c", TALKING, out=out, err=True)
    assert re.search(r"a long job .* 2/2 ", CODES.sub("", terminal))
    if out:
        assert re.search(r"0 is done(.|\n)*1 is done(.|\n)*\nresult\n", CODES.sub("", terminal))
    else:
        assert ended.out == "0 is done\n1 is done\nresult\n" and "is done" not in terminal


class TestFailingRun:
    """Its own reason is what is said of it, whoever hears its result."""

    def test_says_why_though_stdout_is_closed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with open(os.devnull, "wb") as nowhere:
            monkeypatch.setattr(sys, "stdout", NullStream(nowhere, encoding="utf-8"))
            Console(machine=True).result("{}", failing=True)
            with pytest.raises(Failed, match="stdout is closed"):
                Console(machine=True).result("{}")

    def test_says_why_though_nobody_reads(self) -> None:
        said = run_with_a_reader_that_is_gone(
            "from darkroom.cli.console import Console\n"
            "Console().result('result', failing=True)\n"
            "raise SystemExit('the reason')"
        )
        assert said == (1, "the reason\n")


def run_with_a_reader_that_is_gone(code: str) -> tuple[int, str]:
    """The exit code and stderr of Python whose stdout is a pipe that nobody reads."""
    nobody_reads, pipe = os.pipe()
    os.close(nobody_reads)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": str(ROOT / "demo")},
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(pipe)
    return done.returncode, done.stderr
