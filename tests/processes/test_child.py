"""Work in a process of its own: Ctrl-C, which a terminal sends to it too, is for its parent alone."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from darkroom.processes.child import run_in_child
from darkroom.serving.workers import Gone, News, Orders, Process, Ready
from tests.support import ROOT, SOON, until

INTERRUPTED = """
import errno, os, signal
if os.getpid() != {parent}:
    os.kill(os.getpid(), signal.SIGINT)

def seven():
    return 7

def write_too_much():
    raise OSError(errno.EFBIG, "File too large")

def work(connection, *_):
    from darkroom.serving.workers import Ready
    connection.send(Ready())
"""
"""A module that a child imports before its work begins, and hears Ctrl-C in."""


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "interrupted_early.py").write_text(INTERRUPTED.format(parent=os.getpid()))
    monkeypatch.syspath_prepend(str(tmp_path))
    return importlib.import_module("interrupted_early")


def test_ctrl_c_while_a_child_begins_is_its_parents(interrupted: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_in_child(interrupted.seven) == 7
    assert capfd.readouterr() == ("", "")


def test_file_that_the_disk_takes_not_whole_is_no_fault(interrupted: ModuleType) -> None:
    """As FAT takes none beyond 4 GB, and `ulimit -f` none beyond what it says."""
    with pytest.raises(OSError, match="File too large"):
        run_in_child(interrupted.write_too_much)


def test_ctrl_c_while_a_worker_begins_is_its_parents(
    interrupted: ModuleType, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[News] = []
    monkeypatch.setattr("darkroom.serving.workers._work", interrupted.work)
    Process("worker 1", Orders(None, 1, Path(), ""), {}, told.append)
    until(lambda: bool(told) and isinstance(told[-1], Gone))
    assert told == [Ready(), Gone("exit code 0")]
    assert capfd.readouterr() == ("", "")


FOUND_BEGINNING = """
import os, signal, socket, sys, threading
from multiprocessing import resource_tracker, util
from pathlib import Path

from darkroom.serving import workers
from darkroom.processes.child import run_in_child

def forever(*_):
    threading.Event().wait()

begun = []
spawn = util.spawnv_passfds
heard, hears = socket.socketpair()
hears.setblocking(False)
elsewhere = threading.Thread(target=forever, daemon=True)

def spawn_and_interrupt(*given):
    begun.append(spawn(*given))
    signal.pthread_kill(elsewhere.ident, signal.Signals[sys.argv[2]])
    heard.recv(1)
    return begun[0]

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)  # which a shell may have told it to ignore
    resource_tracker.ensure_running()
    util.spawnv_passfds = spawn_and_interrupt
    workers._work = forever
    elsewhere.start()
    signal.set_wakeup_fd(hears.fileno())
    try:
        if sys.argv[1] == "child":
            run_in_child(forever)
        else:
            workers.Process("worker 1", workers.Orders(None, 1, Path(), ""), {}, lambda news: None)
    except KeyboardInterrupt:
        signal.set_wakeup_fd(-1)
        try:
            os.kill(begun[0], signal.SIGKILL)
        except ProcessLookupError:
            for number in (signal.SIGINT, signal.SIGTERM):
                assert signal.getsignal(number) is signal.default_int_handler
            assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
            print("ended")
"""
"""Interrupts itself between a process's first instant and what that is told to do, where another thread hears of it
first: in an interpreter of its own, for a signal to a thread is no matter for one that holds other tests' libraries."""


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("kind", ["child", "worker"])
def test_what_a_signal_finds_beginning_is_ended(kind: str, how: str, tmp_path: Path) -> None:
    script = tmp_path / "found_beginning.py"
    script.write_text(FOUND_BEGINNING)
    done = subprocess.run(
        [sys.executable, script, kind, how],
        env=os.environ | {"PYTHONPATH": str(ROOT / "demo")},
        timeout=SOON,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")
