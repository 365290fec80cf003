"""Triton Inference Server as a child process: started on one address, watched, and stopped so that nothing is left."""

import contextlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from darkroom.errors import Failed, InvalidRequest
from darkroom.processes.child import end_with_parent
from darkroom.triton.environment import PACKAGE, Installed

SHARED = Path("/dev/shm")
HTTP_SOCKET, GRPC_PORT, METRICS_SOCKET = "http", 8001, "metrics"
GRPC_SOCKET = f"grpc:{GRPC_PORT}"
"""Where Triton listens, in a folder that only its user can enter. Its gRPC adds a port to any address."""

ENDING = "ending"
"""A file beside the sockets while a server ends that is to be started again: its door then lets no one in."""

LOCKED = "shared-memory,model-config,model-repository,trace,logging:no:key=none"
"""What a server without a door closes, and the header that would open it: a name with a colon cannot be sent, over
HTTP nor gRPC, so it does no harm that all can read it in the list of processes."""

DOOR = "darkroom.triton.door"
"""What listens at the address, and lets through what is open to all."""

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

    def flags(self) -> list[str]:
        """Of a server that listens here itself, without a door: what is not for everybody is closed to all."""
        flags = [f"--http-restricted-api={LOCKED}", f"--grpc-restricted-protocol={LOCKED}"]
        for name, port in self.ports().items():
            flags += [f"--{name}-address", self.host, f"--{name}-port", str(port)]
        return flags

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
    server: Path, backends: Path, repository: Path, models: list[str], listening: list[str], verbose: bool = False
) -> list[str]:
    """What starts a server with these models, and with the flags that say where it listens."""
    line = [str(server), "--model-repository", str(repository), "--backend-directory", str(backends)]
    line += ["--model-control-mode", "explicit"]
    for model in models:
        line += ["--load-model", model]
    line += [*listening, "--exit-timeout-secs", str(SECONDS_TO_STOP), "--log-verbose", str(int(verbose))]
    return line


@dataclass
class _Child:
    """A process, and what it has said of its end: its lines are read on when the next one runs already."""

    process: subprocess.Popen[bytes]
    complaint: str = ""
    crashed: bool = False
    reader: threading.Thread | None = None

    def hear(self, log: Callable[[str], None]) -> None:
        self.reader = threading.Thread(target=self._read, args=(log,), daemon=True)
        self.reader.start()

    def _read(self, log: Callable[[str], None]) -> None:
        """Passes on what it prints, and keeps why it ends if it does."""
        for line in io.TextIOWrapper(self.process.stdout, errors="replace"):
            if line.startswith("error: "):
                self.complaint = line.removeprefix("error: ").strip()
            if line.strip() in CRASHES:
                self.crashed = True
            log(line.rstrip("\n"))

    def why(self) -> str | None:
        """Why it has ended; None while it runs."""
        if self.process.poll() is None:
            return None
        self.reader.join(5)
        return _gist(self.complaint) or f"it ended with {self.process.returncode}"

    def end(self, number: int, seconds: float) -> bool:
        """Ends it with a signal, and with what may be left of its children; False where it had to be killed."""
        in_time = True
        if self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                in_time = False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return in_time


class Triton:
    """A server that runs while the block does. `log` gets the lines that it prints; `tell` what happens to it.

    It listens at sockets that only its user can reach; at its address its door does, see `darkroom.triton.door`.
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
        # Segments whose names differ from others', so that those of a killed server can be removed.
        self._shared = f"darkroom_{os.getpid()}_{address.http}_"
        self._installed = installed
        self._verbose = verbose
        self._log = log
        self._folder: Path | None = None
        self._server: _Child | None = None
        self._door: _Child | None = None
        self._stubs: dict[int, str] = {}
        self._starts: list[float] = []

    @property
    def process(self) -> "subprocess.Popen[bytes] | None":
        return self._server and self._server.process

    def __enter__(self) -> "Triton":
        self.address.check_free()
        try:
            self._folder = Path(tempfile.mkdtemp(prefix=self._shared, dir=SHARED))
            self._start()
            self._open_door()
        except BaseException:  # the block is not entered, and not left
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        parts = self._installed
        listening = ["--http-address", f"unix:{self._folder / HTTP_SOCKET}"]
        listening += ["--grpc-address", f"unix:{self._folder / GRPC_SOCKET.partition(':')[0]}"]
        listening += ["--grpc-port", str(GRPC_PORT), "--metrics-address", f"unix:{self._folder / METRICS_SOCKET}"]
        line = command(parts.server, parts.backends, self._repository, self.models, listening, self._verbose)
        self._server = self._run([*line, "--backend-config", f"python,shm-region-prefix-name={self._shared}"])
        self._server.hear(self._log)

    def _open_door(self) -> None:
        ports = map(str, self.address.ports().values())
        line = [str(self._installed.python), "-m", DOOR, str(self._folder), self.address.host, *ports, *self.models]
        self._door = self._run(line, {"PYTHONPATH": str(PACKAGE.parent), "PYTHONSAFEPATH": "1"})
        self._door.hear(self._log)

    def _run(self, line: list[str], more: dict[str, str] | None = None) -> _Child:
        """A process in a session of its own: Ctrl-C is this process's to pass on."""
        try:
            process = subprocess.Popen(
                line,
                env=self._installed.variables() | (more or {}),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=partial(end_with_parent, signal.SIGINT),  # in its own way
            )
        except OSError as error:
            raise Failed(f"{line[0]} cannot be started: {error.strerror}.") from None
        return _Child(process)

    def __exit__(self, *_: Any) -> None:
        self.stop(SECONDS_TO_STOP + 10)
        if self._door:
            self._door.end(signal.SIGTERM, SECONDS_TO_STOP)
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def wait_until_ready(self, seconds: float) -> None:
        """Returns when all models are loaded."""
        until = time.monotonic() + seconds
        while True:
            up = self._succeeds("/v2/health/live", 5)
            ready = up and all(map(self.is_ready, self.models))
            opened = ready and self._is_open()
            # Checked last: another may answer at the address of one that has ended.
            if why := self._server.why() or self._door.why():
                raise Failed(f"the server could not be started: {why}.")
            if opened:
                break
            if up and not ready and (reasons := self._failures()):
                raise Failed("; ".join(f"{model} was not loaded: {reason}" for model, reason in reasons.items()))
            if time.monotonic() > until:
                raise Failed(f"the server was not ready within {seconds:g} seconds.")
            time.sleep(SECONDS_BETWEEN_LOOKS / 5)
        self._stubs = self._running_stubs()
        self._hide()

    def _hide(self) -> None:
        """Closes to others the memory that prompts and pictures go through: the backend makes it for all to read."""
        for segment in SHARED.glob(f"{self._shared}*"):
            with contextlib.suppress(FileNotFoundError):
                found = segment.lstat()
                if stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid():  # anybody may put a link here
                    segment.chmod(0o600)

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
        self._hide()
        if why := self._door.why():
            self._count(f"the door has died: {why}")
            self._tell("the door of the server has died: it is opened again.")
            self._open_door()
            return
        if (code := self.process.poll()) is not None:
            self._start_again(f"the server has died, with {code}", seconds)
            return
        if self._server.crashed:
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
        self._count(why)
        self._tell(f"{why}: the server is started again.")
        (self._folder / ENDING).touch()  # goes with the server's own files
        self.stop(SECONDS_FOR_NEIGHBOURS)
        self._start()
        self.wait_until_ready(seconds)

    def _count(self, why: str) -> None:
        """Raises `Failed` where something has died too often."""
        now = time.monotonic()
        self._starts = [start for start in self._starts if now - start < STARTS_SECONDS]
        if len(self._starts) == STARTS:
            raise Failed(f"{why}: that was too often to start again.")
        self._starts.append(now)

    def _in_flight(self) -> dict[int, int]:
        """Requests that processes have taken and not answered, by their own last report."""
        metrics = self.call("/metrics", where=METRICS_SOCKET).decode()
        found = re.findall(rf'^{IN_FLIGHT}{{[^}}]*process="(\d+)"[^}}]*}} (\S+)', metrics, re.MULTILINE)
        return {int(process): int(float(count)) for process, count in found}

    def _state(self, model: str) -> str | None:
        """What the server thinks of a model: READY, or None where it does not know it."""
        return next((each.get("state") for each in self._index() if each["name"] == model), None)

    def stop(self, seconds: float) -> None:
        """Ends the server as it wants to be: requests in flight have `seconds` to finish. Nothing of it is left."""
        if self._server is None:
            return
        if not self._server.end(signal.SIGINT, seconds):
            self._tell("the server does not end by itself: it is killed.")
        for left in (*SHARED.glob(f"{self._shared}*"), *SHARED.glob(f"{self._shared}*/*")):
            with contextlib.suppress(OSError):  # the folder itself, or another user's
                left.unlink()

    def is_ready(self, model: str) -> bool:
        """Whether requests for a model would be answered."""
        return self._succeeds(f"/v2/models/{model}/ready")

    def _succeeds(self, path: str, seconds: float = 120) -> bool:
        try:
            self.call(path, seconds=seconds)
        except Failed:
            return False
        return True

    def call(
        self, path: str, body: dict[str, Any] | None = None, seconds: float = 120, where: str = HTTP_SOCKET
    ) -> bytes:
        """What the server answers to a GET, or to a POST of `body`, from the user that it belongs to: nothing is closed
        here. Raises `Failed` for what is no success."""
        connection = _Unix(self._folder / where, seconds)
        try:
            connection.request(*(("GET", path) if body is None else ("POST", path, json.dumps(body))))
            answer = connection.getresponse()
            text = answer.read()
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise Failed(f"no answer: {error}") from None
        finally:
            connection.close()
        if answer.status < 400:
            return text
        text = text.decode(errors="replace")
        with contextlib.suppress(ValueError, KeyError, TypeError):
            text = json.loads(text)["error"]
        raise Failed(" ".join(str(text).split()) or f"HTTP {answer.status}")

    def _is_open(self) -> bool:
        """Whether the door listens, at the last of its ports too."""
        try:
            socket.create_connection((self.address.host, self.address.metrics), 5).close()
        except OSError:
            return False
        return True

    def _index(self) -> list[dict[str, Any]]:
        """What the server says of the models in its repository."""
        return json.loads(self.call("/v2/repository/index", {}))

    def _failures(self) -> dict[str, str]:
        """Models that could not be loaded, and why."""
        return {
            each["name"]: _gist(each["reason"])
            for each in self._index()
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


class _Unix(http.client.HTTPConnection):
    """HTTP over a socket that is a file."""

    def __init__(self, file: Path, seconds: float) -> None:
        super().__init__("triton", timeout=seconds)
        self._file = file

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._file))


def _gist(text: str) -> str:
    """What an error of a model says, without the place in the sources."""
    words = text.replace("\\n", "\n").rpartition("Internal: ")[2].removeprefix("TritonModelException: ")
    return " ".join(words.partition("\n\nAt:")[0].split()).rstrip(".;")
