"""How a script ends: its exit code, and the line that says why."""

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from darkroom.cli.start import INTERRUPTED, STOPPED, hear_interrupts, missing_package
from darkroom.errors import AskedWrongly, DarkroomError


def ended(program: str, work: Callable[[], None]) -> int:
    """Does the work of a script. Returns the exit code: 0 done, 1 failed, 2 asked wrongly."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a prompt may hold what the terminal has no letters for
    try:
        hear_interrupts()
        work()
    except DarkroomError as error:
        # A refusal repeats what was typed, which may have lines of its own.
        said = " ".join(str(error).splitlines()) if isinstance(error, AskedWrongly) else error
        print(f"{program}: {said}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{program}: {STOPPED}", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        if (missing := missing_package(error)) is None:
            raise
        print(f"{program}: {missing}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever read the output has had enough; Python must not complain of it once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"{program}: {error.filename or 'the system'}: {error.strerror or error}.", file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def interrupting(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls `stop`, instead of breaking in between any two steps of the work. A second one breaks in."""
    if threading.current_thread() is not threading.main_thread():  # no other hears of it
        yield
        return

    def heard(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        stop()

    before = signal.signal(signal.SIGINT, heard)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
