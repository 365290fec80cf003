"""Heavy work in a process of its own, which gives its memory back and leaves torch out of the run that asked."""

import ctypes
import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from darkroom.errors import DarkroomError, Failed

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal a process gets when its parent dies."""


def run_in_child(function: Callable[..., Any], *arguments: Any, verbose: bool = False) -> Any:
    """Calls an importable function in a fresh process and returns what it returns (or raises what it raises).

    What libraries print there is shown only with `verbose`. The child dies with its parent.
    """
    import multiprocessing  # not above: a run that finds everything built starts no child

    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(sender, verbose, function, arguments), daemon=True)
    child.start()
    sender.close()
    try:
        ended_well, value = receiver.recv()
    except EOFError:
        child.join()
        reason = (
            "it ran out of memory, most likely" if child.exitcode == -signal.SIGKILL else f"exit code {child.exitcode}"
        )
        raise Failed(f"the process that ran {function.__name__} ended early: {reason}.") from None
    except BaseException:
        child.terminate()
        child.join()
        raise
    child.join()
    if ended_well:
        return value
    raise value


def _work(sender: "Connection", verbose: bool, function: Callable[..., Any], arguments: tuple) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(2 if verbose else silence, 1)
    if not verbose:
        os.dup2(silence, 2)
    try:
        sender.send((True, function(*arguments)))
    except DarkroomError as error:
        sender.send((False, error))
    except ImportError as error:
        missing = Failed(f"compiling needs the package {error.name}, which is missing: pip install -r requirements.txt")
        sender.send((False, missing))
    except OSError as error:
        # A full or read-only disk is the asker's to explain; anything else is a fault, with its trace.
        known = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
        sender.send((False, error if known else _fault(function, error)))
    except BaseException as error:
        sender.send((False, _fault(function, error)))


def _fault(function: Callable[..., Any], error: BaseException) -> RuntimeError:
    trace = "".join(traceback.format_exception(error))
    return RuntimeError(f"{type(error).__name__} in {function.__name__}\n{trace}")
