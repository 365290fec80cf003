"""How a script ends: its exit code, and the line that says why."""

import os
import sys
from collections.abc import Callable

from darkroom.errors import DarkroomError

INTERRUPTED = 130
"""What a shell reports for a program that Ctrl-C ended."""


def ended(program: str, work: Callable[[], None]) -> int:
    """Does the work of a script. Returns the exit code: 0 done, 1 failed, 2 asked wrongly."""
    try:
        work()
    except DarkroomError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{program}: stopped; nothing half-made was kept.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has had enough; Python must not complain of it once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0
