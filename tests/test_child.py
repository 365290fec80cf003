"""Work in a process of its own: Ctrl-C, which a terminal sends to it too, is for its parent alone."""

import importlib
import os
import signal
import socket
import threading
from multiprocessing import resource_tracker, util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from darkroom.child import run_in_child
from darkroom.workers import Gone, News, Orders, Process, Ready
from tests.support import until

INTERRUPTED = """
import os, signal, time
if os.getpid() != {parent}:
    os.kill(os.getpid(), signal.SIGINT)

def seven():
    return 7

def forever(*_):
    while True:
        time.sleep(60)

def work(connection, *_):
    from darkroom.workers import Ready
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


def test_ctrl_c_while_a_worker_begins_is_its_parents(
    interrupted: ModuleType, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[News] = []
    monkeypatch.setattr("darkroom.workers._work", interrupted.work)
    Process("worker 1", Orders(None, 1, Path(), ""), {}, told.append)
    until(lambda: bool(told) and isinstance(told[-1], Gone))
    assert told == [Ready(), Gone("exit code 0")]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["child", "worker"])
def test_what_ctrl_c_finds_beginning_is_ended(
    kind: str, interrupted: ModuleType, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It falls between the process's first instant and what it is told to do, and another thread hears of it first."""
    begun: list[int] = []
    spawn = util.spawnv_passfds
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    heard, hears = socket.socketpair()
    hears.setblocking(False)

    def spawn_and_interrupt(*given: Any) -> int:
        begun.append(spawn(*given))
        signal.pthread_kill(thread.ident, signal.SIGINT)
        heard.recv(1)
        return begun[0]

    resource_tracker.ensure_running()
    monkeypatch.setattr(util, "spawnv_passfds", spawn_and_interrupt)
    monkeypatch.setattr("darkroom.workers._work", interrupted.forever)
    thread.start()
    before = signal.set_wakeup_fd(hears.fileno())
    try:
        with pytest.raises(KeyboardInterrupt):
            if kind == "child":
                run_in_child(interrupted.forever)
            else:
                Process("worker 1", Orders(None, 1, Path(), ""), {}, lambda news: None)
    finally:
        signal.set_wakeup_fd(before)
        ended.set()
        heard.close()
        hears.close()
    with pytest.raises(ProcessLookupError):
        os.kill(begun[0], signal.SIGKILL)
    assert capfd.readouterr() == ("", "")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
