"""A process that makes pictures when it is told to, and says how long each stage took.

It is told by lines: `run` makes one batch, `save FOLDER` makes one and saves its pictures, `quit` ends it. It answers
each with a line of JSON, the first being {"loaded": seconds} once it is ready; see `worker` and `contenders/protocol`.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from darkroom.errors import Failed
from darkroom.processes.child import PR_SET_PDEATHSIG

KINDS = {"loaded": float | int, "stages": dict, "streams": list, "saved": list, "peak_bytes": int}
SECONDS_TO_END = 30.0


class Contender:
    """A running contender. It computes only while it is asked: between, it is stopped where the system can do that."""

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str] | None = None) -> None:
        self.name = name
        self._complaints = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            env=os.environ | (environment or {}),
            preexec_fn=_dies_with_parent(),
        )

    def loaded(self) -> dict[str, Any]:
        """Waits until it is ready; what it says of its loading. Raises `Failed` in one line, as all do here."""
        answer = self._answer("loaded")
        self._signal("SIGSTOP")
        return answer

    def run(self) -> dict[str, Any]:
        """One batch: the milliseconds of its stages; of each stream's, where it has several."""
        return self._ask("run", "stages", "streams")

    def save(self, folder: Path) -> list[Path]:
        """One batch, saved in `folder`; the pictures in their order."""
        return [Path(path) for path in self._ask(f"save {folder}", "saved")["saved"]]

    def quit(self) -> dict[str, Any]:
        """Ends it; what it says of the memory that it took."""
        answer = self._ask("quit", "peak_bytes")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(SECONDS_TO_END)
        return answer

    def close(self) -> None:
        """Ends it whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._complaints):
            with contextlib.suppress(OSError):
                stream.close()

    def __enter__(self) -> "Contender":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, line: str, *expected: str) -> dict[str, Any]:
        self._signal("SIGCONT")
        try:
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()
        except OSError:
            raise Failed(f"{self.name}: {self._last_words()}.") from None
        try:
            return self._answer(*expected)
        finally:
            if line != "quit":
                self._signal("SIGSTOP")

    def _answer(self, *expected: str) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise Failed(f"{self.name}: {self._last_words()}.")
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if isinstance(answer, dict) and "error" in answer:
            raise Failed(f"{self.name}: {' '.join(str(answer['error']).split()).rstrip('.')}.")
        if not isinstance(answer, dict) or not any(isinstance(answer.get(key), KINDS[key]) for key in expected):
            raise Failed(f"{self.name} gave an answer that was not understood: {line[:80]!r}.")
        return answer

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(SECONDS_TO_END)
        self._complaints.seek(0)
        lines = self._complaints.read().decode("utf-8", "replace").strip().splitlines()
        killed = self._process.returncode == -signal.SIGKILL
        ended = "it ran out of memory, most likely" if killed else f"it ended with {self._process.returncode}"
        return f"{ended}: {lines[-1].strip().rstrip('.')}" if lines else ended

    def _signal(self, name: str) -> None:
        if hasattr(signal, name) and self._process.poll() is None:
            self._process.send_signal(getattr(signal, name))


def _dies_with_parent() -> Callable[[], None] | None:
    """What a new process calls first on Linux, where one that is stopped would wait for its dead parent for ever."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def seconds_to_picture(name: str, command: Sequence[str], environment: dict[str, str] | None = None) -> float:
    """Seconds from the start of a process to its end, which leaves a picture. Raises `Failed` if it ends badly."""
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, env=os.environ | (environment or {}))
    seconds = time.perf_counter() - start
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise Failed(f"{name}: {lines[-1].strip().rstrip('.')}.")
    return seconds
