"""A process that makes pictures on demand, and reports how long each stage took: see `contenders/protocol`."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from darkroom.errors import Failed

SECONDS_TO_END = 30.0


class Contender:
    """A running contender. It computes only while it is asked: between, it is stopped where the system can do that.

    Whatever is wrong with it is a `Failed` in one line.
    """

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str] | None = None) -> None:
        self.name = name
        self._complaints = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            env=os.environ | (environment or {}),
        )

    def loaded(self) -> float:
        """Waits until it is ready; the seconds that its loading took."""
        answer = self._answer("loaded")
        self._signal("SIGSTOP")
        return float(answer["loaded"])

    def run(self) -> dict[str, Any]:
        """One batch in every stream: see the protocol."""
        return self._ask("run", "streams")

    def set(self, batch_size: int, denoising_steps: int) -> None:
        """What is asked from now on."""
        self._ask(f"set {json.dumps({'batch_size': batch_size, 'denoising_steps': denoising_steps})}", "set")

    def save(self, folder: Path) -> list[Path]:
        """One batch, saved in `folder`; the pictures in their order."""
        return [Path(path) for path in self._ask(f"save {folder}", "saved")["saved"]]

    def memory(self) -> dict[str, int | None]:
        """The bytes that it took at most, by the names that lines of results have for them."""
        answer = self._ask("memory", "peak_bytes")
        return {"peak_host_bytes": answer["peak_bytes"], "peak_device_bytes": answer.get("peak_device_bytes")}

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

    def _ask(self, line: str, expected: str) -> dict[str, Any]:
        self._signal("SIGCONT")
        try:
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()
            return self._answer(expected)
        except OSError:
            raise Failed(f"{self.name}: {self._last_words()}.") from None
        finally:
            self._signal("SIGSTOP")

    def _answer(self, expected: str) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise Failed(f"{self.name}: {self._last_words()}.")
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if isinstance(answer, dict) and "error" in answer:
            raise Failed(f"{self.name}: {' '.join(str(answer['error']).split()).rstrip('.')}.")
        if not isinstance(answer, dict) or expected not in answer:
            raise Failed(f"{self.name} gave an answer that was not understood: {line[:80]!r}.")
        return answer

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(SECONDS_TO_END)
        self._complaints.seek(0)
        code, last = self._process.returncode, _last_line(self._complaints.read())
        ended = "it ran out of memory, most likely" if code == -signal.SIGKILL else f"it ended with {code}"
        return f"{ended}: {last}" if last else ended

    def _signal(self, name: str) -> None:
        if hasattr(signal, name) and self._process.poll() is None:
            self._process.send_signal(getattr(signal, name))


def seconds_to_picture(name: str, command: Sequence[str], environment: dict[str, str] | None = None) -> float:
    """Seconds from the start of a process to its end, which leaves a picture. Raises `Failed` if it ends badly."""
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, env=os.environ | (environment or {}))
    seconds = time.perf_counter() - start
    if done.returncode:
        raise Failed(f"{name}: {_last_line(done.stderr) or f'exit code {done.returncode}'}.")
    return seconds


def _last_line(complaints: bytes) -> str:
    lines = complaints.decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip().rstrip(".") if lines else ""
