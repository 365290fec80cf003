"""How a script starts: what holds while that which it runs is imported."""

import os
import signal
import sys

INTERRUPTED = 130
"""What a shell reports for a program that Ctrl-C ended."""

STOPPED = "stopped; nothing half-made was kept."


class Start:
    """Around the imports of a script: Ctrl-C among them ends it as it does later, without a traceback."""

    def __enter__(self) -> None:
        # A run in the background may have been told to ignore it.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _stop)

    def __exit__(self, *_: object) -> None:
        """Leaves that as it is: there is no moment between this and `hear_interrupts`."""


def hear_interrupts() -> None:
    """From here on Ctrl-C raises `KeyboardInterrupt`, where a script began with `Start`."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(*_: object) -> None:
    # There is nothing to clean up yet, and an exception would pass through imports that may catch it.
    os.write(2, f"{os.path.basename(sys.argv[0])}: {STOPPED}\n".encode())
    os._exit(INTERRUPTED)
