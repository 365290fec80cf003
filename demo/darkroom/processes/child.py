"""Heavy work in a process of its own, which gives its memory back and leaves torch out of its parent."""

import ctypes
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from darkroom.errors import DarkroomError, Failed

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

REPORT = "report"
SECONDS_TO_END = 5.0
"""What a child that reports its progress has to give up its work in, before it is killed."""

MEMORY = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Large pages for gigabytes of weights: measured to take a fifth of the time off an export."""

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal a process gets when its parent dies."""


def run_in_child(
    function: Callable[..., Any],
    *arguments: Any,
    verbose: bool = False,
    progress: Callable[..., Any] | None = None,
) -> Any:
    """Calls an importable function in a fresh process and returns what it returns (or raises what it raises).

    What libraries print there is shown only with `verbose`. The child dies with its parent. With `progress`, the
    function gets a callable of that name: what it is called with reaches `progress` here, and it returns False when
    this process has been interrupted.
    """
    import multiprocessing  # not above: a run that finds everything built starts no child

    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    reports = progress is not None
    child = context.Process(
        target=_work, args=(sender, os.getpid(), verbose, reports, function, arguments), daemon=True
    )
    try:
        with _environment(MEMORY), deaf_to_interrupts():
            child.start()
        sender.close()
        while (received := receiver.recv())[0] == REPORT:
            progress(*received[1])
        ended_well, value = received
    except EOFError:
        child.join()
        reason = (
            "it ran out of memory, most likely" if child.exitcode == -signal.SIGKILL else f"exit code {child.exitcode}"
        )
        raise Failed(f"the process that ran {function.__name__} ended early: {reason}.") from None
    except BaseException:
        if child.pid is not None:  # it has begun
            child.terminate()
            child.join(SECONDS_TO_END)
            child.kill()
            child.join()
        raise
    child.join()
    if ended_well:
        return value
    raise value


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Processes that begin in the block never hear Ctrl-C, which a terminal sends to all: it is their parent's to pass
    on. This process hears what falls into the block when it ends, SIGTERM too."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows: they hear it until they ignore it themselves
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # or else it begins in the block, and lets signals through again
    heard: list[int] = []

    def hear(number: int, _: Any) -> None:
        heard.append(number)

    # Blocked is what a process that begins inherits. This one's other threads may hear Ctrl-C all the same, and its
    # handler would break in here, between a process that has begun and its orders.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    main = threading.current_thread() is threading.main_thread()  # no other has handlers
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, hear)
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in heard[:1]:
            signal.raise_signal(number)


def end_with_parent(number: int = signal.SIGKILL, parent: int | None = None) -> None:
    """On Linux, this process gets a signal when its parent dies; where the one with the id `parent` has, at once.

    (The parent is a thread, as Linux has it.)
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
        if parent not in (None, os.getppid()):
            os.kill(os.getpid(), number)


@contextmanager
def _environment(more: dict[str, str]) -> Iterator[None]:
    """What is not set yet is set for the processes that begin in the block."""
    added = more.keys() - os.environ.keys()
    os.environ.update({name: more[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _work(
    sender: "Connection", parent: int, verbose: bool, reports: bool, function: Callable[..., Any], arguments: tuple
) -> None:
    end_with_parent(parent=parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(2 if verbose else silence, 1)
    if not verbose:
        os.dup2(silence, 2)
    more = {"progress": _reporter(sender)} if reports else {}
    try:
        sender.send((True, function(*arguments, **more)))
    except DarkroomError as error:
        if error.__cause__ is not None:  # which --verbose shows with its trace
            traceback.print_exception(error.__cause__)
        sender.send((False, error))
    except ImportError as error:
        missing = Failed(f"compiling needs the package {error.name}, which is missing: pip install -r requirements.txt")
        sender.send((False, missing))
    except OSError as error:
        # A disk that is full, read-only or takes no file so large is the asker's to explain; anything else is a fault,
        # with its trace.
        known = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
        sender.send((False, error if known else _fault(function, error)))
    except BaseException as error:
        sender.send((False, _fault(function, error)))


def _reporter(sender: "Connection") -> Callable[..., bool]:
    wanted = True

    def stop(*_: Any) -> None:
        nonlocal wanted
        wanted = False

    signal.signal(signal.SIGTERM, stop)

    def report(*news: Any) -> bool:
        if wanted:
            sender.send((REPORT, news))
        return wanted

    return report


def _fault(function: Callable[..., Any], error: BaseException) -> RuntimeError:
    trace = "".join(traceback.format_exception(error))
    return RuntimeError(f"{type(error).__name__} in {function.__name__}\n{trace}")
