"""How a script ends: its exit code, and the line that gives the reason."""

import contextlib
import io
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from darkroom.cli.console import nobody_reads
from darkroom.cli.start import EXIT, STOPPED, Terminated, collect_garbage_again, handle_interrupts, missing_package
from darkroom.errors import DarkroomError, InvalidRequest

MEMORY = re.compile(
    r"bad_alloc|can'?t alloc|cannot allocate memory|failed to map segment|out of memory|std::length_error|"
    r"can't start new thread|Unable to allocate|DefaultCPUAllocator|Resource temporarily unavailable",
    re.IGNORECASE,
)
"""What libraries say when the system gives them no more memory, or no thread, which takes some."""


def exit_code(program: str, work: Callable[[], None]) -> int:
    """Does the work of a script. Returns the exit code: 0 done, 1 failed, 2 an invalid request."""
    code = _code_of(program, work)
    EXIT.set_code(code)
    return code


def _code_of(program: str, work: Callable[[], None]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a prompt may hold what the terminal has no letters for
    try:
        handle_interrupts()
        collect_garbage_again()
        _unveiled(work)
    except DarkroomError as error:
        # A refusal repeats what was typed, which may have lines of its own.
        said = " ".join(str(error).splitlines()) if isinstance(error, InvalidRequest) else error
        print(f"{program}: {said}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as error:
        code, words = STOPPED[signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT]
        print(f"{program}: {words}", file=sys.stderr)
        return code
    except ModuleNotFoundError as error:
        if (missing := missing_package(error)) is None:
            raise
        print(f"{program}: {missing}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        nobody_reads()
        return 1
    except OSError as error:
        reason = None if error.filename else _for_want_of_memory(error)
        said = reason or f"{error.filename or 'the system'}: {error.strerror or error}."
        print(f"{program}: {said}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError, ImportError) as error:
        if (reason := _for_want_of_memory(error)) is None:
            raise
        print(f"{program}: {reason}", file=sys.stderr)
        return 1
    return 0


def _for_want_of_memory(error: BaseException) -> str | None:
    """The line for an error that means that memory ran out, whichever library noticed; None for any other."""
    if not isinstance(error, MemoryError) and not MEMORY.search(str(error)):
        return None
    return "there is not enough memory: close other programs, or use smaller pictures, --batch-size or a smaller model."


def _unveiled(work: Callable[[], None]) -> None:
    """Does the work. Where a signal breaks into the import of a module in C, that fails with an error of its own: the
    `KeyboardInterrupt` behind it is raised."""
    try:
        work()
    except Exception as error:
        behind: BaseException | None = error
        while behind is not None and not isinstance(behind, KeyboardInterrupt):
            behind = behind.__cause__ or behind.__context__
        if behind is not None:
            raise behind from None
        raise


@contextlib.contextmanager
def interrupting(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM call `stop`, instead of breaking in between any two steps of the work. A second Ctrl-C breaks
    in. A `KeyboardInterrupt` that the block ends with after SIGTERM becomes `Terminated`."""
    if threading.current_thread() is not threading.main_thread():  # no other hears of it
        yield
        return
    terminated = False

    def heard(number: int, _: object) -> None:
        nonlocal terminated
        terminated = terminated or number == signal.SIGTERM
        # A second SIGTERM means nothing new: `timeout` sends two.
        signal.signal(number, signal.SIG_IGN if number == signal.SIGTERM else before[number])
        stop()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, heard)
    try:
        yield
    except KeyboardInterrupt as error:
        if terminated:
            raise Terminated from error
        raise
    finally:
        for number, handler in before.items():
            if not (terminated and number == signal.SIGTERM):
                signal.signal(number, handler)
