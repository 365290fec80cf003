"""How scripts start: what can go wrong before their own handling of it begins."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import SCRIPT, SOON, Ended

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
