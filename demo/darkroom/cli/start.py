"""How a script starts: what holds while that which it runs is imported.

Any Python from 3.6 on can read this file, the scripts and the packages it is in: under an old one it prints what to do.
"""

import atexit
import gc
import io
import os
import signal
import sys

NEEDED = (3, 11)
WHAT_TO_DO = 'start it with .venv/bin/python, which `make picture PROMPT="a red apple"` makes'

STOPPED = {
    signal.SIGINT: (130, "stopped; nothing half-made was kept."),
    signal.SIGTERM: (143, "terminated; nothing half-made was kept."),
}
"""How a script ends that a signal stops: the exit code, which a shell reports for a program that it killed, and the
words."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which does all that Ctrl-C does, but is reported in other words."""


class Exit:
    """How a script that began with `Startup` ends: at once, with nothing taken apart that the system frees anyway."""

    def __init__(self) -> None:
        self._begun = False
        self._code = None  # type: int | None
        self._left = []  # type: list[object]

    def begin(self) -> None:
        """Before anything else that is to be done at the end: what is registered first is called last."""
        self._begun = True
        atexit.register(self._leave)

    def set_code(self, code: int) -> None:
        """The script's work is done, and all its output is printed."""
        self._code = code

    def keep(self, *things: object) -> None:
        """Keeps things to the end. Taking engines apart is a sixth of a short run."""
        if self._begun:
            self._left.extend(things)

    def _leave(self) -> None:
        if self._code is None:  # a fault, whose trace Python prints
            return
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except (OSError, ValueError):
            return  # Python reports it, with an exit code of its own
        os._exit(self._code)


EXIT = Exit()


class NullStream(io.TextIOWrapper):
    """Stands for a standard stream that was closed when the script began: writing to it is in vain."""


class Startup:
    """Around the imports of a script: Ctrl-C or SIGTERM among them ends it as it does later, without a traceback.

    Closed standard streams are opened, on nothing: else what is printed to one would go to another, and the first
    files that are opened, pictures even, would be taken for them.
    """

    def __enter__(self) -> None:
        EXIT.begin()
        gc.disable()  # imports leave hardly any garbage, and looking for it again and again takes 20 ms
        for name in ("stdin", "stdout", "stderr"):  # in this order, as each gets the least number that is free
            if getattr(sys, name) is None:
                setattr(sys, name, _null_stream("r" if name == "stdin" else "w"))
        if sys.version_info[:2] < NEEDED:
            found, needed = (".".join(map(str, version)) for version in (sys.version_info[:3], NEEDED))
            _fail(f"this is Python {found}, and {needed} or newer is needed: {WHAT_TO_DO}.")
        if sys.flags.optimize > 1:
            _start_with_docstrings()
        for number, unheard in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            if signal.getsignal(number) == unheard:  # a run in the background may be set to ignore it
                signal.signal(number, _stop)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Leaves both as they are: there is no moment between this and `handle_interrupts`."""
        missing = missing_package(error)
        if missing is not None:
            _fail(missing)


def missing_package(error: object) -> "str | None":
    """The message for an import that failed because a package is not installed; None of anything else."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    if name is None or "." in name:  # a part of a package that is there: a fault, which keeps its trace
        return None
    return f"{sys.executable} lacks the package {name}: {WHAT_TO_DO}, or pip install -r requirements.txt."


def handle_interrupts() -> None:
    """From here on Ctrl-C raises `KeyboardInterrupt` and SIGTERM `Terminated`, where a script began with `Startup`."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, _terminate)):
        if signal.getsignal(number) is _stop:
            signal.signal(number, handler)


def collect_garbage_again() -> None:
    """From here on, where a script began with `Startup`; what it has imported by now stays, and is not looked at."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def _start_with_docstrings() -> None:
    """Begins anew with -O where it was -OO: transformers reads its own docstrings, and fails to be imported without."""
    if os.name == "nt":  # where a program cannot be put in another's place
        _fail("Python was started with -OO, which transformers does not bear: leave it out.")
    own = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv)]
    kept = [each if each[:2] in ("-X", "-W") else each.replace("O", "") for each in own]
    kept = [each for each in kept if each != "-"]
    if "PYTHONOPTIMIZE" in os.environ:
        os.environ["PYTHONOPTIMIZE"] = "1"
    os.execv(sys.executable, [sys.executable, "-O", *kept, *sys.argv])


def _null_stream(mode: str) -> NullStream:
    file = open(os.devnull, mode + "b")
    os.set_inheritable(file.fileno(), True)  # as standard streams are: processes that it starts have them, too
    return NullStream(file, encoding="utf-8")


def _fail(reason: str) -> None:
    print(f"{_program()}: {reason}", file=sys.stderr)
    raise SystemExit(1)


def _stop(number: int, _: object) -> None:
    # There is nothing to clean up yet, and an exception would pass through imports that may catch it.
    code, words = STOPPED[number]
    try:
        os.write(2, f"{_program()}: {words}\n".encode())
    finally:
        os._exit(code)


def _terminate(*_: object) -> None:
    # `timeout` sends it twice: a second one must not break in where the first is being cleaned up after.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


def _program() -> str:
    return os.path.basename(sys.argv[0])
