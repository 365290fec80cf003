"""How a server is watched and started again: a small program stands in for Triton, which takes minutes to install."""

import contextlib
import http.server
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from darkroom.cli import serve
from darkroom.errors import Failed
from darkroom.triton.environment import Installed
from darkroom.triton.server import Address, Triton
from tests.support import until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton Inference Server comes for Linux alone")

WAIT = 60.0
LAST_WORDS = "that was all"
CRASH = "Signal (11) received."

STAND_IN = """#!{python}
import http.server, pathlib, signal, socketserver, sys

signal.signal(signal.SIGINT, signal.SIG_DFL)
lives = pathlib.Path({lives!r})
lives.mkdir(exist_ok=True)
life = len(list(lives.iterdir()))
(lives / str(life)).touch()
lines, code = {script!r}[life]
print(*lines, sep="\\n", flush=True)
if code is not None:
    sys.exit(code)

class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass

address = sys.argv[sys.argv.index("--http-address") + 1]
Ready.address_string = lambda _: "somebody"
socketserver.UnixStreamServer(address.removeprefix("unix:"), Ready).serve_forever()
"""
"""Each time that it is started, it says other lines, and ends with a code, or says that it is ready for ever."""

Life = tuple[list[str], int | None]


@dataclass
class Stage:
    """A server, what it printed, and what was told of it. Whoever reads it waits at its last words for `gate`."""

    server: Triton
    lines: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)

    def hear(self, line: str) -> None:
        self.lines.append(line)
        if line == LAST_WORDS:
            assert self.gate.wait(WAIT)

    def heard(self, line: str) -> None:
        until(lambda: line in self.lines)


def free_ports() -> list[int]:
    with contextlib.ExitStack() as stack:
        return [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(3)]


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Callable[..., Stage]]:
    made: list[Stage] = []

    def make(*script: Life) -> Stage:
        program = tmp_path / "server"
        program.write_text(STAND_IN.format(python=sys.executable, lives=str(tmp_path / "lives"), script=script))
        program.chmod(0o755)
        installed = Installed(Path(sys.executable), program, tmp_path)
        server = Triton(
            installed,
            tmp_path,
            [],
            Address("127.0.0.1", *free_ports()),
            lambda line: made[-1].hear(line),
            tell=lambda text: made[-1].told.append(text),
        )
        made.append(Stage(server))
        return made[-1]

    yield make
    for each in made:
        each.gate.set()
        each.server.stop(WAIT)


def test_a_crash_is_not_laid_at_the_next_servers_door(stage: Callable[..., Stage]) -> None:
    """The lines of the one that has died are read when the next one runs already."""
    here = stage(([LAST_WORDS, CRASH], 1), ([], None))
    with here.server as server:
        here.heard(LAST_WORDS)
        server.process.wait(WAIT)
        server.look_after(WAIT)
        running = server.process.pid
        here.gate.set()
        here.heard(CRASH)
        server.look_after(WAIT)
        assert server.process.pid == running
    assert here.told == ["the server has died, with 1: the server is started again."]


def test_a_crash_of_its_own_is_a_crash(stage: Callable[..., Stage]) -> None:
    here = stage(([CRASH], None), ([], None))
    with here.server as server:
        here.heard(CRASH)
        server.look_after(WAIT)
    assert here.told == ["the server has crashed: the server is started again."]


def test_why_one_ended_is_not_why_the_next_did(stage: Callable[..., Stage]) -> None:
    here = stage((["error: the first reason"], 1), (["error: the second reason"], 2), ([], 3))
    with here.server as server:
        here.heard("error: the first reason")
        server.process.wait(WAIT)
        with pytest.raises(Failed, match="the second reason"):
            server.look_after(WAIT)
        with pytest.raises(Failed, match="it ended with 3"):
            server.look_after(WAIT)


def test_one_that_has_ended_is_not_ready_whoever_else_answers(stage: Callable[..., Stage]) -> None:
    class Ready(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

    here = stage(([], 4))
    with here.server as server:
        server.process.wait(WAIT)
        with http.server.HTTPServer(("127.0.0.1", server.address.http), Ready) as other:
            threading.Thread(target=other.serve_forever, daemon=True).start()
            with pytest.raises(Failed, match="it ended with 4"):
                server.wait_until_ready(WAIT)
            other.shutdown()


def test_a_server_that_is_interrupted_as_it_begins_is_ended(
    stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(thread: threading.Thread) -> None:
        raise KeyboardInterrupt

    here = stage(([], None))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(threading.Thread, "start", interrupted)
        with here.server:
            pass
    assert here.server.process.poll() is not None


@pytest.mark.parametrize("seconds", ["0", "-1", "nan"])
def test_a_time_that_nothing_can_be_loaded_in_is_refused(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.run([f"--timeout={seconds}"]) == 2
    assert f"--timeout must be more than 0 seconds, not {seconds}." in capsys.readouterr().err
