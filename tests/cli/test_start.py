"""How scripts start: what can go wrong before their own handling of it begins."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import SCRIPT, SOON, Ended, Studio, one_line

INTERRUPTED_BY_IMPORT = """
import os, signal, sys

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == os.environ["MODULE"]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder)
"""
"""A `sitecustomize` for a process that gets Ctrl-C when it comes to importing a certain module."""

CLOSING = """
import os, sys
for number in sys.argv[1]:
    os.close(int(number))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
"""Runs Python with what follows, after closing the descriptors that the first argument names."""


def interrupted_at(module: str, folder: Path, *arguments: str, ignoring: bool = False) -> Ended:
    (folder / "sitecustomize.py").write_text(INTERRUPTED_BY_IMPORT)
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        env={**os.environ, "PYTHONPATH": str(folder), "MODULE": module},
        cwd=folder,
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if ignoring else None,
        timeout=SOON,
        capture_output=True,
        text=True,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("module", ["darkroom.catalog", "numpy", "darkroom.cli.ending", "darkroom.cli.prompts"])
def test_ctrl_c_says_the_same_among_the_imports_as_later(module: str, tmp_path: Path) -> None:
    ended = interrupted_at(module, tmp_path, "--prompts", "prompts.txt")  # the last is imported by the run itself
    assert ended == Ended(130, "", f"{SCRIPT.name}: stopped; nothing half-made was kept.\n")


@pytest.mark.parametrize("module", ["numpy", "darkroom.cli.prompts"])
def test_run_that_was_told_to_ignore_ctrl_c_goes_on(module: str, tmp_path: Path) -> None:
    ended = interrupted_at(module, tmp_path, "--prompts", "prompts.txt", ignoring=True)
    assert ended.code == 2 and "prompts.txt" in ended.err


@pytest.fixture
def drawing(studio: Studio) -> list[str]:
    """What draws a picture, when all that it takes has been built."""
    arguments = ["a red apple", "--model", str(studio.model), "--seed=5", "--denoising-steps=2", *studio.folders()]
    assert studio.here(*arguments).code == 0
    (picture,) = studio.output.glob("*.png")
    picture.unlink()
    return arguments


@pytest.mark.parametrize("closed", ["2", "1", "012"])
def test_picture_is_made_though_standard_streams_are_closed(closed: str, drawing: list[str], studio: Studio) -> None:
    ended = studio.shell(*drawing, interpreter=("-c", CLOSING, closed, str(SCRIPT)), timeout=SOON)
    assert (ended.code, ended.err) == (0, "")
    assert len(list(studio.output.glob("*.png"))) == 1
    expected = "" if "1" in closed else studio.here(*drawing).out
    times = re.compile(r"[\d. ]+")
    assert times.sub("", ended.out) == times.sub("", expected)


def test_result_that_cannot_be_told_is_a_failure(drawing: list[str], studio: Studio) -> None:
    closed = ("-c", CLOSING, "1", str(SCRIPT))
    ended = studio.shell(*drawing, "--json", "--quiet", interpreter=closed, timeout=SOON)
    assert ended.code == 1 and one_line(ended.err), ended.err
    assert "stdout is closed" in ended.err and len(list(studio.output.glob("*.png"))) == 1
