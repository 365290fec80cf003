"""Triton Inference Server as a child process: started on one address, watched, and stopped so that nothing is left."""

import contextlib
import ctypes
import io
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from darkroom.errors import Failed, InvalidRequest
from darkroom.processes.child import PR_SET_PDEATHSIG
from darkroom.triton.environment import Installed

SHARED = Path("/dev/shm")
STUB = "triton_python_backend_stub"
SECONDS_TO_STOP = 30
"""What requests in flight have to end in when the server is stopped."""

SECONDS_FOR_NEIGHBOURS = 5
"""What other models' requests have to end in when the server must be started again."""

SECONDS_BETWEEN_LOOKS = 0.5

STARTS, STARTS_SECONDS = 5, 300
"""How often a server is started again within so many seconds, before it is given up."""

CRASHES = {
    f"Signal ({number:d}) received."
    for number in (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV)
}
"""What a server prints when it has crashed: some then hang for ever instead of ending."""

IN_FLIGHT = "darkroom_requests_in_flight"
"""The metric of requests that a model has taken and not answered."""


@dataclass(frozen=True)
class Address:
    """Where a server listens: nowhere else than at `host`."""

    host: str = "127.0.0.1"
    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002

    def ports(self) -> dict[str, int]:
        return {"http": self.http, "grpc": self.grpc, "metrics": self.metrics}

    def check_free(self) -> None:
        """Raises `Failed` for a port that someone listens at, `InvalidRequest` for what is no address."""
        if len(set(self.ports().values())) < len(self.ports()):
            raise InvalidRequest("the three ports must differ.")
        for name, port in self.ports().items():
            if not 0 < port < 65536:
                raise InvalidRequest(f"--{name}-port must be from 1 to 65535, not {port}.")
            try:
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind((self.host, port))
            except OSError as error:
                raise Failed(f"port {port} of {self.host} cannot be had ({error.strerror}): --{name}-port.") from None


def command(
    server: Path, backends: Path, repository: Path, models: list[str], address: Address, verbose: bool = False
) -> list[str]:
    """What starts a server with these models."""
    line = [str(server), "--model-repository", str(repository), "--backend-directory", str(backends)]
    line += ["--model-control-mode", "explicit"]
    for model in models:
        line += ["--load-model", model]
    for name, port in address.ports().items():
        line += [f"--{name}-address", address.host, f"--{name}-port", str(port)]
    line += ["--exit-timeout-secs", str(SECONDS_TO_STOP), "--log-verbose", str(int(verbose))]
    return line


@dataclass
class _Said:
    """What one server's process has said of its end: its lines are read on when the next one runs already."""

    complaint: str = ""
    crashed: bool = False


class Triton:
    """A server that runs while the block does. `log` gets the lines that it prints; `tell` what happens to it.

    Raises `Failed` where it ends before its models are loaded, with the reason that it gave.
    """

    def __init__(
        self,
        installed: Installed,
        repository: Path,
        models: list[str],
        address: Address,
        log: Callable[[str], None],
        verbose: bool = False,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.address = address
        self.models = models
        self._repository = repository.absolute()
        self._tell = tell
        # Segments that are told from others', so that those of a killed server can be removed.
        self._shared = f"darkroom_{os.getpid()}_{address.http}_"
        self._line = command(installed.server, installed.backends, self._repository, models, address, verbose)
        self._line += ["--backend-config", f"python,shm-region-prefix-name={self._shared}"]
        self._variables = installed.variables()
        self._log = log
        self.process: subprocess.Popen[bytes] | None = None
        self._stubs: dict[int, str] = {}
        self._said = _Said()
        self._starts: list[float] = []

    def __enter__(self) -> "Triton":
        self.address.check_free()
        try:
            self._start()
        except BaseException:  # the block is not entered, and nobody leaves it
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        try:
            # A session of its own: Ctrl-C is this process's to pass on.
            self.process = subprocess.Popen(
                self._line,
                env=self._variables,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        except OSError as error:
            raise Failed(f"{self._line[0]} cannot be started: {error.strerror}.") from None
        self._said = _Said()
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout, self._said), daemon=True)
        self._reader.start()

    def __exit__(self, *_: Any) -> None:
        self.stop(SECONDS_TO_STOP + 10)

    def _read(self, printed: IO[bytes], said: _Said) -> None:
        """Passes on what the server prints, and keeps why it ends if it does."""
        for line in io.TextIOWrapper(printed, errors="replace"):
            if line.startswith("error: "):
                said.complaint = line.removeprefix("error: ").strip()
            if line.strip() in CRASHES:
                said.crashed = True
            self._log(line.rstrip("\n"))

    def wait_until_ready(self, seconds: float) -> None:
        """Returns when all models are loaded."""
        until = time.monotonic() + seconds
        # Whether it runs is asked last: another may answer at the address of one that has ended.
        while not (self._is_up() and all(map(self.is_ready, self.models)) and self.process.poll() is None):
            if self.process.poll() is not None:
                self._reader.join(5)
                why = _gist(self._said.complaint) or f"it ended with {self.process.returncode}"
                raise Failed(f"the server could not be started: {why}.")
            if self._is_up() and (reasons := self._failures()):
                raise Failed("; ".join(f"{model} was not loaded: {reason}" for model, reason in reasons.items()))
            if time.monotonic() > until:
                raise Failed(f"the server was not ready within {seconds:g} seconds.")
            time.sleep(SECONDS_BETWEEN_LOOKS / 5)
        self._stubs = self._running_stubs()

    def watch(self, seconds: float) -> None:
        """Keeps the server and its models running: starts again, within `seconds`, what has died. Raises `Failed` when
        that is of no use."""
        while True:
            self.look_after(seconds)
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def look_after(self, seconds: float) -> None:
        """Starts again what has died since the last look.

        Triton never answers the requests that a model's process has taken, and does not get over its death; so the
        server is started again as a whole: it is the only way to tell those who wait.
        """
        if (code := self.process.poll()) is not None:
            self._start_again(f"the server has died, with {code}", seconds)
            return
        if self._said.crashed:
            self._start_again("the server has crashed", seconds)
            return
        running = self._running_stubs()
        gone = {pid: model for pid, model in self._stubs.items() if pid not in running}
        self._stubs = running
        if not gone:
            return
        try:
            # A process that ended as it should has taken its metric with it; a model of another kind has none.
            left = self._in_flight()
            dead = {model for pid, model in gone.items() if pid in left}
            dead |= {
                model for model in gone.values() if model not in running.values() and self._state(model) == "READY"
            }
        except Failed:
            dead = set(gone.values())
        if dead:
            self._start_again(f"the process of {', '.join(sorted(dead))} has died", seconds)

    def _start_again(self, why: str, seconds: float) -> None:
        now = time.monotonic()
        self._starts = [start for start in self._starts if now - start < STARTS_SECONDS]
        if len(self._starts) == STARTS:
            raise Failed(f"{why}: that was too often to start again.")
        self._starts.append(now)
        self._tell(f"{why}: the server is started again.")
        self.stop(SECONDS_FOR_NEIGHBOURS)
        self._start()
        self.wait_until_ready(seconds)

    def _in_flight(self) -> dict[int, int]:
        """Requests that processes have taken and not answered, as they said themselves at last."""
        metrics = self.call("/metrics", port=self.address.metrics).decode()
        found = re.findall(rf'^{IN_FLIGHT}{{[^}}]*process="(\d+)"[^}}]*}} (\S+)', metrics, re.MULTILINE)
        return {int(process): int(float(count)) for process, count in found}

    def _state(self, model: str) -> str | None:
        """What the server thinks of a model: READY, or None where it does not know it."""
        known = json.loads(self.call("/v2/repository/index", {}))
        return next((each.get("state") for each in known if each["name"] == model), None)

    def stop(self, seconds: float) -> None:
        """Ends the server as it wants to be: requests in flight have `seconds` to finish. Nothing of it is left."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self._tell("the server does not end by itself: it is killed.")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what may be left of its children
        self.process.wait()
        for segment in SHARED.glob(f"{self._shared}*"):
            with contextlib.suppress(OSError):
                segment.unlink()

    def is_ready(self, model: str) -> bool:
        """Whether requests for a model would be answered."""
        try:
            self.call(f"/v2/models/{model}/ready")
        except Failed:
            return False
        return True

    def call(
        self, path: str, body: dict[str, Any] | None = None, seconds: float = 120, port: int | None = None
    ) -> bytes:
        """What the server answers to a GET, or to a POST of `body`. Raises `Failed` for what is no success."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://{self.address.host}:{port or self.address.http}{path}", data=data)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=seconds) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            with contextlib.suppress(ValueError, KeyError, TypeError):
                text = json.loads(text)["error"]
            raise Failed(" ".join(str(text).split()) or f"HTTP {error.code}") from None
        except (OSError, ValueError) as error:
            raise Failed(f"no answer: {error}") from None

    def _is_up(self) -> bool:
        try:
            self.call("/v2/health/live", seconds=5)
        except Failed:
            return False
        return True

    def _failures(self) -> dict[str, str]:
        """Models that could not be loaded, and why."""
        known = json.loads(self.call("/v2/repository/index", {}))
        return {
            each["name"]: _gist(each["reason"])
            for each in known
            if each["name"] in self.models and each.get("state") == "UNAVAILABLE" and each.get("reason")
        }

    def _running_stubs(self) -> dict[int, str]:
        """The processes of this server's models, and whose they are."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError, ValueError):
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if words[0].endswith(STUB) and self.process and parent == self.process.pid:
                    model = Path(words[1]).relative_to(self._repository).parts[0]
                    found[int(entry.name)] = model
        return found


def _gist(text: str) -> str:
    """What an error of a model says, without where in whose sources it was said."""
    words = text.replace("\\n", "\n").rpartition("Internal: ")[2].removeprefix("TritonModelException: ")
    return " ".join(words.partition("\n\nAt:")[0].split()).rstrip(".;")


def _end_with_parent() -> None:
    """A server whose starter was killed ends too, in its own way. (The starter is a thread, as Linux has it.)"""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)
