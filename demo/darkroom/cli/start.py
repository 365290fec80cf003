"""How a script starts: what holds while that which it runs is imported."""

import io
import os
import signal
import sys

INTERRUPTED = 130
"""What a shell reports for a program that Ctrl-C ended."""

STOPPED = "stopped; nothing half-made was kept."


class Nowhere(io.TextIOWrapper):
    """Stands for a standard stream that was closed when the script began: writing to it is in vain."""


class Start:
    """Around the imports of a script: Ctrl-C among them ends it as it does later, without a traceback.

    Closed standard streams are opened, on nothing: else what is printed to one would go to another, and the first
    files that are opened, pictures even, would be taken for them.
    """

    def __enter__(self) -> None:
        for name in ("stdin", "stdout", "stderr"):  # in this order, as each gets the least number that is free
            if getattr(sys, name) is None:
                setattr(sys, name, _nowhere("r" if name == "stdin" else "w"))
        # A run in the background may have been told to ignore it.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _stop)

    def __exit__(self, *_: object) -> None:
        """Leaves that as it is: there is no moment between this and `hear_interrupts`."""


def hear_interrupts() -> None:
    """From here on Ctrl-C raises `KeyboardInterrupt`, where a script began with `Start`."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _nowhere(mode: str) -> Nowhere:
    file = open(os.devnull, mode + "b")
    os.set_inheritable(file.fileno(), True)  # as standard streams are: processes that it starts have them, too
    return Nowhere(file, encoding="utf-8")


def _stop(*_: object) -> None:
    # There is nothing to clean up yet, and an exception would pass through imports that may catch it.
    os.write(2, f"{os.path.basename(sys.argv[0])}: {STOPPED}\n".encode())
    os._exit(INTERRUPTED)
