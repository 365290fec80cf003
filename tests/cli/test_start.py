"""How scripts start: what can go wrong before their own handling of it begins."""

import ast
import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import IO

import pytest

from tests.support import ROOT, SCRIPT, SOON, Ended, Studio, one_line

SCRIPTS = sorted((ROOT / "demo").glob("*.py"))
READ_BY_ANY_PYTHON = [
    *SCRIPTS,
    *(ROOT / "demo/darkroom" / name for name in ("__init__.py", "cli/__init__.py", "cli/start.py")),
]

INTERRUPTED_BY_IMPORT = """
import os, signal, sys

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == os.environ["MODULE"]:
            os.kill(os.getpid(), signal.Signals[os.environ["HOW"]])

sys.meta_path.insert(0, Finder)
"""
"""A `sitecustomize` for a process that gets a signal when it comes to importing a certain module."""

STOPS = {
    signal.SIGINT: (130, "stopped; nothing half-made was kept."),
    signal.SIGTERM: (143, "terminated; nothing half-made was kept."),
}
"""Ctrl-C and what `kill` and `timeout` send: the exit code that a shell would report of each, and what is said."""

CLOSING = """
import os, sys
for number in sys.argv[1]:
    os.close(int(number))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
"""Runs Python with what follows, after closing the descriptors that the first argument names."""


def interrupted_at(module: str, folder: Path, how: signal.Signals, *arguments: str, ignoring: bool = False) -> Ended:
    (folder / "sitecustomize.py").write_text(INTERRUPTED_BY_IMPORT)
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        env={**os.environ, "PYTHONPATH": str(folder), "MODULE": module, "HOW": how.name},
        cwd=folder,
        preexec_fn=(lambda: signal.signal(how, signal.SIG_IGN)) if ignoring else None,
        timeout=SOON,
        capture_output=True,
        text=True,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("how", STOPS)
@pytest.mark.parametrize(
    "module", ["darkroom.checkpoint.catalog", "numpy", "darkroom.cli.exit", "darkroom.cli.prompt_file"]
)
def test_signals_say_the_same_among_the_imports_as_later(module: str, how: signal.Signals, tmp_path: Path) -> None:
    ended = interrupted_at(module, tmp_path, how, "--prompts", "prompts.txt")  # the last is imported by the run itself
    code, words = STOPS[how]
    assert ended == Ended(code, "", f"{SCRIPT.name}: {words}\n")


@pytest.mark.parametrize("how", STOPS)
@pytest.mark.parametrize("module", ["numpy", "darkroom.cli.prompt_file"])
def test_run_that_was_told_to_ignore_a_signal_goes_on(module: str, how: signal.Signals, tmp_path: Path) -> None:
    ended = interrupted_at(module, tmp_path, how, "--prompts", "prompts.txt", ignoring=True)
    assert ended.code == 2 and "prompts.txt" in ended.err


LEAVING = """
import atexit, gc, sys
from darkroom.cli.exit import exit_code
from darkroom.cli.start import EXIT, Startup

class Engine:
    def __del__(self):
        print("taken apart")

def work():
    assert gc.isenabled() and gc.get_freeze_count()
    engine = Engine()
    if sys.argv[1] == "left":
        EXIT.keep(engine)
    print("the result")  # into a buffer, which somebody has to empty
    if sys.argv[2] == "fault":
        raise RuntimeError("a fault")
    if sys.argv[2] == "3":
        raise SystemExit(3)

atexit.register(print, "taken apart by Python")
with Startup():
    assert not gc.isenabled()
    atexit.register(print, "cleaned up")
raise SystemExit(exit_code("it", work))
"""


@pytest.mark.parametrize(
    ("what", "how", "code", "said"),
    [
        ("left", "well", 0, ["the result", "cleaned up"]),
        ("not left", "well", 0, ["the result", "taken apart", "cleaned up"]),
        ("left", "fault", 1, ["the result", "cleaned up", "taken apart by Python"]),
        ("left", "3", 3, ["the result", "cleaned up", "taken apart by Python"]),
    ],
)
def test_script_ends_without_taking_apart_what_it_leaves(what: str, how: str, code: int, said: list[str]) -> None:
    done = leaving(what, how, subprocess.PIPE)
    assert (done.returncode, done.stdout.splitlines()) == (code, said)
    assert ("a fault" in done.stderr) == (how == "fault") and ("Traceback" in done.stderr) == (how == "fault")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full is needed")
def test_output_that_is_lost_at_the_very_end_is_a_failure() -> None:
    with open("/dev/full", "w") as full:
        done = leaving("left", "well", full)
    assert done.returncode == 120 and "No space left on device" in done.stderr


def leaving(what: str, how: str, stdout: int | IO[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LEAVING, what, how],
        env={**os.environ, "PYTHONPATH": str(ROOT / "demo"), "PYTHONUNBUFFERED": ""},
        timeout=SOON,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_nothing_is_kept_where_no_script_began() -> None:
    from darkroom.cli.start import Exit

    ending, thing = Exit(), threading.Event()
    seen = weakref.ref(thing)
    ending.keep(thing)
    ending.set_code(0)
    del thing
    assert seen() is None


TWICE = """
import os, signal, sys
from darkroom.cli.exit import exit_code, interrupting
from darkroom.cli.start import Startup

def work():
    stopped = []
    try:
        if sys.argv[1] == "loop":
            with interrupting(lambda: stopped.append(True)):
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
                assert stopped == [True]
                raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        print("cleaned up")

with Startup():
    pass
raise SystemExit(exit_code("it", work))
"""
"""Is terminated twice, as `timeout` does it: once in its work, and once while it cleans up after it."""


@pytest.mark.parametrize("where", ["step", "loop"])
def test_terminating_it_twice_does_not_break_into_the_cleaning_up(where: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TWICE, where],
        env={**os.environ, "PYTHONPATH": str(ROOT / "demo")},
        timeout=SOON,
        capture_output=True,
        text=True,
    )
    code, words = STOPS[signal.SIGTERM]
    assert (done.returncode, done.stdout, done.stderr) == (code, "cleaned up\n", f"it: {words}\n")


@pytest.mark.parametrize("how", STOPS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_signal_that_a_module_in_c_takes_for_an_error_of_its_own_is_told(
    how: signal.Signals, wrapped: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """As NumPy's and OpenVINO's do, when it breaks into their import."""
    from darkroom.cli.exit import exit_code
    from darkroom.cli.start import Terminated
    from darkroom.errors import Failed

    def work() -> None:
        try:
            raise ImportError("initialization failed") from (
                KeyboardInterrupt() if how is signal.SIGINT else Terminated()
            )
        except ImportError:
            if wrapped:
                raise Failed("the engine cannot be imported.") from None
            raise

    code, words = STOPS[how]
    assert exit_code("it", work) == code and capsys.readouterr() == ("", f"it: {words}\n")


def test_work_that_was_told_to_ignore_ctrl_c_is_not_stopped_by_it() -> None:
    from darkroom.cli.exit import interrupting

    stopped: list[bool] = []
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupting(lambda: stopped.append(True)):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN and not stopped
    finally:
        signal.signal(signal.SIGINT, before)


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


def test_failing_run_says_why_though_its_result_cannot_be_told(
    drawing: list[str], studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    from darkroom.checkpoint.catalog import SCRIPTS
    from darkroom.cli.main import run
    from darkroom.cli.start import NullStream
    from darkroom.errors import Failed

    def full(*_: object) -> None:
        raise Failed("the disk is full.")

    monkeypatch.setattr("darkroom.pipeline.pictures.save", full)
    err = io.StringIO()
    with open(os.devnull, "wb") as nowhere, contextlib.redirect_stderr(err):
        with contextlib.redirect_stdout(NullStream(nowhere, encoding="utf-8")):
            assert run(SCRIPTS[SCRIPT.name], [*drawing, "--json", "--quiet"]) == 1
    assert err.getvalue() == f"{SCRIPT.name}: the disk is full.\n"


OF_ANOTHER_VERSION = """
import runpy, sys
sys.version_info = (3, 10, 13, "final", 0)
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv.pop(0))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def said_by(*command: str | Path) -> Ended:
    done = subprocess.run([sys.executable, *command], timeout=SOON, capture_output=True, text=True)
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
class TestWrongPython:
    def test_python_without_the_packages_is_told_what_to_do(self, script: Path) -> None:
        ended = said_by("-S", "-E", "-s", script)
        assert (ended.code, ended.out) == (1, "") and one_line(ended.err), ended.err
        first = r"(numpy|tokenizers)"  # whichever it imports first
        assert re.match(f"{script.name}: {re.escape(sys.executable)} lacks the package {first}: ", ended.err)
        assert "make picture" in ended.err and "pip install -r requirements.txt" in ended.err

    def test_python_that_is_too_old_is_told_what_to_do(self, script: Path) -> None:
        ended = said_by("-c", OF_ANOTHER_VERSION, script.parent, script)
        assert (ended.code, ended.out) == (1, "") and one_line(ended.err), ended.err
        assert ended.err.startswith(f"{script.name}: this is Python 3.10.13, and 3.11 or newer is needed: ")
        assert "make picture" in ended.err


@pytest.mark.parametrize("file", READ_BY_ANY_PYTHON, ids=lambda path: str(path.relative_to(ROOT / "demo")))
def test_what_comes_before_the_check_is_read_by_old_pythons(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"), feature_version=(3, 6))
    at_the_top = {
        name for node in tree.body if isinstance(node, ast.Import) for name in (each.name for each in node.names)
    }
    at_the_top |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert at_the_top <= {"atexit", "gc", "io", "os", "signal", "sys", "darkroom.cli.start"}


def test_package_that_is_found_missing_later_is_told_in_the_same_way(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'filelock'", name="filelock")

    monkeypatch.setattr("darkroom.cli.main.version_of", lacking)
    ended = studio.here("a red apple")
    assert ended.code == 1 and one_line(ended.err) and "lacks the package filelock" in ended.err


WITHOUT_PILLOW = """
import runpy, sys
sys.modules["PIL"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_pillow_that_is_missing_is_told_once(drawing: list[str], studio: Studio) -> None:
    """Though it is imported ahead of time, in a thread of its own."""
    ended = studio.shell(*drawing, interpreter=("-c", WITHOUT_PILLOW, str(SCRIPT)), timeout=SOON)
    assert ended.code == 1 and one_line(ended.err) and "lacks the package PIL" in ended.err, ended.err


@pytest.mark.parametrize("name", ["darkroom.nothing", "numpy.nothing", None])
def test_import_that_is_a_fault_keeps_its_trace(
    name: str | None, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ModuleNotFoundError("broken", name=name)

    monkeypatch.setattr("darkroom.cli.main.version_of", broken)
    with pytest.raises(ModuleNotFoundError):
        studio.here("a red apple")


@pytest.mark.parametrize(
    "flags", [("-P",), ("-I",), ("-O",), ("-OO",), ("-I", "-OO"), ("-X", "dev", "-OO")], ids=" ".join
)
def test_python_may_be_started_in_any_way(flags: tuple[str, ...], studio: Studio) -> None:
    script = str(SCRIPT.with_name("build_engines.py"))
    ended = studio.shell("--help", interpreter=(*flags, script))
    assert (ended.code, ended.err) == (0, "") and "usage: build_engines.py" in ended.out


def test_python_without_docstrings_makes_a_picture(studio: Studio) -> None:
    """Which wakes torch and transformers."""
    arguments = ["a red apple", "--model", str(studio.model), "--denoising-steps=2", "--quiet", "--engine=torch"]
    ended = studio.shell(
        *arguments, *studio.folders(), interpreter=("-OO", str(SCRIPT)), PYTHONSAFEPATH="1", LC_ALL="C"
    )
    assert (ended.code, ended.err) == (0, "") and Path(ended.out.strip()).is_file()


@pytest.mark.parametrize("megabytes", [450, 600, 850])
def test_too_little_memory_is_said_in_a_line(megabytes: int, studio: Studio) -> None:
    arguments = ["a red apple", "--model", str(studio.model), "--denoising-steps=2", *studio.folders()]
    assert studio.here(*arguments).code == 0  # everything is built
    limit = f"import os, resource, sys; resource.setrlimit(resource.RLIMIT_AS, ({megabytes << 20},) * 2); "
    limit += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    ended = studio.shell(str(SCRIPT), *arguments, interpreter=("-c", limit))
    assert ended.code == 1 and one_line(ended.err) and "not enough memory" in ended.err, ended


def test_names_of_any_length_are_taken(studio: Studio) -> None:
    """The store cuts its labels; keys tell its folders apart."""
    model = studio.root / ("long" * 60)
    model.symlink_to(studio.model)
    assert studio.here("a red apple", f"--model={model}", "--denoising-steps=1", *studio.folders()).code == 0
