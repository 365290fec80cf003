"""client.py against a real Triton server with a toy model, and against what is no server at all."""

import asyncio
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from darkroom.cli import client
from darkroom.cli.start import STOPPED
from darkroom.errors import Failed
from darkroom.pipeline.pictures import read_recipe
from darkroom.triton.album import Album
from darkroom.triton.answers import Image
from darkroom.triton.client import Server, address_of
from darkroom.triton.environment import Installed
from darkroom.triton.load import Load, Tally
from darkroom.triton.server import Address, Triton
from tests.support import ROOT, Ended, assert_refused, free_ports, one_line, pixels, until

PROTOCOLS = ("http", "grpc")
WAIT = 600.0
TOY = Path(__file__).with_name("toy_model")
AWAKE = "awake"
"""As the toy has it, which can be imported inside Triton alone."""
SIZE = 16
"""Height and width of the toy's pictures."""


def ask(*arguments: object) -> Ended:
    """Runs client.py's main in this process."""
    from darkroom.cli.client import run

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(argument) for argument in arguments])
    assert "Traceback" not in err.getvalue(), err.getvalue()
    return Ended(code, out.getvalue(), err.getvalue())


def ask_json(*arguments: object) -> dict[str, Any]:
    ended = ask(*arguments, "--json")
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


def noise(seed: int) -> np.ndarray:
    """What the toy draws from a seed."""
    return np.random.Generator(np.random.PCG64(seed)).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


# The server.


@dataclass
class Toy:
    """A Triton server with `toy`; `toy_encoded`, which answers files; `toy_bare`, with a prompt in and pixels out;
    `toy_asleep`, which is not loaded; and `toy_broken`, which cannot be."""

    ports: dict[str, int]
    awake: Path
    log: list[str] = field(default_factory=list)

    def flags(self, protocol: str, model: str = "toy") -> list[str]:
        return [f"--url={protocol}://127.0.0.1:{self.ports[protocol]}", f"--model={model}"]

    def said(self, words: str) -> int:
        """How many lines of the server's have these words."""
        return sum(words in line for line in self.log)

    def until_it_says(self, words: str, lines: int) -> None:
        until(lambda: self.said(words) >= lines, WAIT)

    def wake(self) -> None:
        """Ends what `slow` takes."""
        self.awake.touch()
        until(lambda: self.said("toy: slow has ended") == self.said("toy: slow has begun"), WAIT)
        self.awake.unlink()


@pytest.fixture(scope="module")
def toy_server(triton: Installed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toy]:
    repository = tmp_path_factory.mktemp("repository")
    write_toys(repository)
    names = (*PROTOCOLS, "metrics")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    toy = Toy(ports, repository / "toy" / AWAKE)
    models = ["toy", "toy_encoded", "toy_bare"]
    with Triton(triton, repository, models, Address(**ports), toy.log.append) as server:
        server.wait_until_ready(WAIT)
        with contextlib.suppress(Failed):
            server.call("/v2/repository/models/toy_broken/load", {})
        yield toy


def write_toys(repository: Path) -> None:
    config, code = (TOY / "config.pbtxt").read_text(), (TOY / "1" / "model.py").read_text()

    def write(name: str, code: str = code, **changes: str) -> None:
        changed = config if name == "toy" else config.replace("count: 2", "count: 1")
        for old, new in changes.values():
            assert old in changed
            changed = changed.replace(old, new)
        (repository / name / "1").mkdir(parents=True)
        (repository / name / "config.pbtxt").write_text(changed)
        (repository / name / "1" / "model.py").write_text(code)

    image = '{ name: "generated_image" data_type: TYPE_UINT8 dims: [-1, -1, 3] },'
    recipe = '{ name: "recipe" data_type: TYPE_STRING dims: [1] },'
    file = '{ name: "encoded_image" data_type: TYPE_STRING dims: [1] },'
    write("toy")
    write("toy_asleep")
    write("toy_encoded", pixels=(image, file), recipe=(recipe, ""))
    write("toy_broken", code='raise ValueError("broken on purpose")\n')
    inputs = config[config.index("input [") : config.index("output [")]
    outputs = config[config.index("output [") : config.index("dynamic_batching")]
    write(
        "toy_bare",
        inputs=(inputs, 'input [{ name: "prompt" data_type: TYPE_STRING dims: [1] }]\n'),
        outputs=(outputs, f"output [{image.rstrip(',')}]\n"),
    )


class Relay:
    """A port that passes everything on to a server, until it breaks."""

    def __init__(self, port: int) -> None:
        self._to = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ends = [self._listener]
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, far = self._listener.accept()[0], socket.create_connection(self._to)
                self._ends += [near, far]
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    @staticmethod
    def _pass_on(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)

    def broken(self) -> None:
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


# What a server answers.


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_saved_pictures_are_the_servers_and_carry_its_recipes(protocol: str, toy_server: Toy, tmp_path: Path) -> None:
    asked = ["--prompt", "a cat", "a dog", "--requests=2", "--num-images=2", "--seed=40", "--steps=4", "--save-image"]
    made = ask_json(*toy_server.flags(protocol), *asked, "--negative-prompt=blurry", f"--output-dir={tmp_path}")
    assert [image["seed"] for image in made["images"]] == [40, 41, 42, 43]
    assert [image["prompt"] for image in made["images"]] == ["a cat", "a cat", "a dog", "a dog"]
    assert len({image["path"] for image in made["images"]}) == 4
    for image in made["images"]:
        recipe = read_recipe(Path(image["path"]))
        assert (recipe["seed"], recipe["prompt"]) == (image["seed"], image["prompt"])
        assert (recipe["request"]["denoising_steps"], recipe["request"]["negative_prompt"]) == (4, "blurry")
        np.testing.assert_array_equal(pixels(image["path"]), noise(image["seed"]))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_field_reaches_the_server(protocol: str, toy_server: Toy, tmp_path: Path) -> None:
    fields = {"height": 24, "width": 32, "guidance_scale": 2.5, "scheduler": "DPM++", "denoising_steps": 7}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()]
    made = ask_json(*toy_server.flags(protocol), *flags, "--save-image", f"--output-dir={tmp_path}")
    recipe = read_recipe(Path(made["images"][0]["path"]))
    assert {name: recipe["request"][name] for name in fields} == fields
    assert pixels(made["images"][0]["path"]).shape == (24, 32, 3)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_several_clients_together_make_every_image_once(
    protocol: str, toy_server: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    infer, waiting, together = Server.infer, [], asyncio.Event()

    async def with_two_others(server: Server, *asked: Any) -> list[Image]:
        """Nobody's first request goes out before there are three."""
        waiting.append(asked)
        if len(waiting) == 3:
            together.set()
        await asyncio.wait_for(together.wait(), WAIT)
        return await infer(server, *asked)

    monkeypatch.setattr(Server, "infer", with_two_others)
    flags = ["--clients=3", "--requests=4", "--static-batch-size=2", "--seed=100"]
    made = ask_json(*toy_server.flags(protocol), *flags)
    assert (made["requests"], made["answered"], made["failed"]) == (12, 12, 0)
    assert sorted(image["seed"] for image in made["images"]) == list(range(100, 124))
    assert made["images_per_second"] == pytest.approx(24 / made["seconds"])
    for name, share in {"p50": 50, "p95": 95, "p99": 99}.items():
        assert made["latency"][name] == pytest.approx(np.percentile(made["latencies"], share))
    assert made["latency"]["mean"] == pytest.approx(np.mean(made["latencies"]))
    for image in made["images"]:
        assert list(image["milliseconds"]) == ["Queue", "CLIP", "UNet", "VAE-Dec", "Pipeline"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_one_failing_request_does_not_fail_the_others(protocol: str, toy_server: Toy, tmp_path: Path) -> None:
    asked = ["--prompt", "a cat", "fail", "a dog", "--requests=3", "--save-image", f"--output-dir={tmp_path}"]
    ended = ask(*toy_server.flags(protocol), *asked)
    assert ended.code == 1
    assert ended.err == "client.py: 1 of 3 requests failed: the toy was asked to fail.\n"
    assert len(list(tmp_path.glob("*.png"))) == 2
    assert sum(line.startswith(str(tmp_path)) for line in ended.out.splitlines()) == 2


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_different_failures_are_counted_apart(protocol: str, toy_server: Toy) -> None:
    ended = ask(*toy_server.flags(protocol), "--prompt", "fail", "busy", "unreadable", "--requests=7")
    assert ended.code == 1
    first, *lines = ended.err.splitlines()
    assert first == "client.py: 7 of 7 requests failed:"
    assert lines[0] == "  3 x the toy was asked to fail"
    assert sorted(lines[1:]) == [
        "  2 x the server answered a recipe that cannot be read: b'no recipe'",
        "  2 x the toy has no room",
    ]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_server_says_itself_what_it_does_not_take(protocol: str, toy_server: Toy) -> None:
    ended = ask(*toy_server.flags(protocol), "--static-batch-size=9")
    assert ended.code == 1
    assert ended.err == "client.py: 1 of 1 requests failed: inference request batch-size must be <= 8 for 'toy'.\n"


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("toi", "unknown model: 'toi' is not found. Did you mean 'toy'? It has: toy, toy_encoded, toy_bare."),
        ("toy_asleep", "unknown model: 'toy_asleep' is not found. Did you mean"),
        ("toy_broken", "unknown model: 'toy_broken' has no available versions. Did you mean"),
    ],
)
def test_model_that_cannot_answer_is_refused_in_one_line(
    protocol: str, model: str, said: str, toy_server: Toy, tmp_path: Path
) -> None:
    folder = tmp_path / "output"
    ended = ask(*toy_server.flags(protocol, model), "--save-image", f"--output-dir={folder}")
    assert (ended.code, ended.out) == (1, "")
    assert one_line(ended.err)
    assert said in ended.err
    assert not folder.exists()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_files_are_kept_as_the_server_made_them(protocol: str, toy_server: Toy, tmp_path: Path) -> None:
    asked = ["--requests=2", "--seed=3", "--save-image", "--quiet", f"--output-dir={tmp_path}"]
    for first in (1, 3):  # a second run replaces nothing
        ended = ask(*toy_server.flags(protocol, "toy_encoded"), *asked)
        assert (ended.code, ended.err) == (0, "")
        assert ended.out.splitlines() == [str(tmp_path / f"toy_encoded-{first + index}.png") for index in range(2)]
    np.testing.assert_array_equal(pixels(tmp_path / "toy_encoded-4.png"), noise(4))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_only_what_the_model_has_is_asked_of_it(protocol: str, toy_server: Toy, tmp_path: Path) -> None:
    flags = toy_server.flags(protocol, "toy_bare")
    made = ask_json(*flags, "--save-image", f"--output-dir={tmp_path}")
    assert made["images"][0]["path"] == str(tmp_path / "toy_bare-1.png")
    assert (made["images"][0]["seed"], made["images"][0]["milliseconds"]) == (None, {})
    assert pixels(tmp_path / "toy_bare-1.png").shape == (SIZE, SIZE, 3)
    for flag in ("--seed=1", "--steps=3", "--negative-prompt=x"):
        ended = ask(*flags, flag)
        assert_refused(ended, "has no effect: the model toy_bare has no such input")
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b", "seed": 3}\n')
    ended = ask(*flags, f"--prompts-file={file}")
    assert_refused(ended, f"{file}:2: seed has no effect")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_file_of_prompts_is_sent_once_by_all_clients_together(protocol: str, toy_server: Toy, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n  two \nthree\nfour\nfive\n")
    flags = [*toy_server.flags(protocol), f"--prompts-file={file}", "--seed=7", "--clients=2"]
    made = ask_json(*flags, "--static-batch-size=2")
    assert made["requests"] == 3
    drawn = [(image["prompt"], image["seed"]) for image in made["images"]]
    assert drawn == [("one", 7), ("two", 8), ("three", 9), ("four", 10), ("five", 11)]
    turns = ask_json(*flags, "--requests=4")
    assert [image["prompt"] for image in turns["images"]] == [
        "one",
        "two",
        "three",
        "four",
        "five",
        "one",
        "two",
        "three",
    ]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_deadline_is_told_to_the_server_and_kept_by_the_client(
    protocol: str, toy_server: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = ask(*toy_server.flags(protocol), "--prompt", "hurry", "--timeout=500")
    assert (ended.code, ended.err) == (1, "client.py: 1 of 1 requests failed: the toy has 500 seconds.\n")
    # A server that does not keep to it is not waited for.
    monkeypatch.setattr("darkroom.triton.client.GRACE", -29.9)
    ended = ask(*toy_server.flags(protocol), "--prompt", "slow", "--timeout=30")
    toy_server.wake()
    assert ended.code == 1
    assert ended.err == "client.py: 1 of 1 requests failed: the server did not answer within 30 seconds.\n"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_connection_that_breaks_in_the_middle_fails_what_is_left(
    protocol: str, toy_server: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay = Relay(toy_server.ports[protocol])
    kept: list[Path] = []
    keep = Album.keep

    def keep_and_break(album: Album, image: Image) -> Path:
        kept.append(keep(album, image))
        if len(kept) == 3:
            relay.broken()
        return kept[-1]

    monkeypatch.setattr(Album, "keep", keep_and_break)
    asked = ["--model=toy", "--clients=2", "--requests=40", "--save-image", f"--output-dir={tmp_path}"]
    ended = ask(f"--url={protocol}://127.0.0.1:{relay.port}", *asked)
    assert ended.code == 1
    first, *lines = ended.err.splitlines()
    assert f"{80 - len(kept)} of 80 requests failed:" in first
    assert all(" the connection broke (" in line for line in lines or [first])
    assert 3 <= len(kept) < 80
    assert set(kept) == set(tmp_path.iterdir())


@pytest.mark.parametrize(
    "protocol,how", [*((protocol, signal.SIGINT) for protocol in PROTOCOLS), (PROTOCOLS[0], signal.SIGTERM)]
)
def test_interrupted_run_reports_what_ended_and_cancels_the_rest(
    protocol: str, how: signal.Signals, toy_server: Toy, tmp_path: Path
) -> None:
    asked = ["--prompt", "a cat", "slow", "--requests=2", "--save-image", "--verbose", f"--output-dir={tmp_path}"]
    command = [sys.executable, str(ROOT / "demo" / "client.py"), *toy_server.flags(protocol), *asked]
    begun, cancelled = toy_server.said("toy: slow has begun"), toy_server.said("a request was cancelled")
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "demo")},
    )
    said = [process.stderr.readline(), process.stderr.readline()]
    assert said[1].startswith("request 1: "), said
    toy_server.until_it_says("toy: slow has begun", begun + 1)
    process.send_signal(how)
    out, err = process.communicate(timeout=WAIT)
    code, words = STOPPED[how]
    assert process.returncode == code
    assert one_line(err)
    assert words in err
    assert "1 of 2" in out
    picture = next(tmp_path.glob("*.png"))
    assert str(picture) in out.splitlines()
    assert list(tmp_path.iterdir()) == [picture]
    if protocol == "grpc":
        toy_server.until_it_says("a request was cancelled", cancelled + 1)
    else:
        toy_server.wake()  # over HTTP this Triton does not notice that a client is gone


@pytest.mark.parametrize("how", STOPPED)
@pytest.mark.parametrize("sending", [True, False])
def test_what_ended_is_reported_whichever_signal_stops_it(
    how: signal.Signals, sending: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def stopped(address: Address, load: Load, *_: object) -> Tally:
        heard = signal.getsignal(how)
        assert callable(heard), heard
        heard(how, None)
        if not sending:
            await asyncio.sleep(WAIT)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(WAIT)
        return Tally({0: 5.0}, seconds=1.0, stopped=True)

    monkeypatch.setattr(client, "_send", stopped)
    before = signal.getsignal(how)
    try:
        code = client.run(["--requests=2"])
    finally:
        signal.signal(how, before)
    out, err = capsys.readouterr()
    expected, words = STOPPED[how]
    assert code == expected and one_line(err) and words in err
    assert ("1 of 2 requests ended" in out) == sending


def test_pictures_that_cannot_be_kept_end_it_in_one_line(
    toy_server: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = Album.keep

    def full_disk(album: Album, image: Image) -> Path:
        if list(tmp_path.iterdir()):
            raise Failed("no space is left.")
        return keep(album, image)

    monkeypatch.setattr(Album, "keep", full_disk)
    ended = ask(*toy_server.flags("http"), "--requests=500", "--save-image", f"--output-dir={tmp_path}")
    assert (ended.code, ended.err) == (1, "client.py: no space is left.\n")
    assert ended.out.splitlines()[-1] == str(next(tmp_path.iterdir()))
    assert " of 500" in ended.out


def test_what_is_printed_is_what_was_asked_for(toy_server: Toy, tmp_path: Path) -> None:
    flags = toy_server.flags("http")
    for quiet, json_too in ((False, False), (True, False), (False, True), (True, True)):
        ended = ask(*flags, *["--quiet"] * quiet, *["--json"] * json_too)
        assert ended.code == 0
        assert (", p99 " in ended.out, ", p99 " in ended.err) == (
            not quiet and not json_too,
            json_too and not quiet,
        )
        assert bool(ended.out) == (json_too or not quiet)


# Where there is no server.


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_server_that_is_down_is_said_in_one_line(protocol: str) -> None:
    with socket.socket() as taken:  # and nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"{protocol}://127.0.0.1:{taken.getsockname()[1]}"
        ended = ask(f"--url={url}", "--model=toy")
    assert (ended.code, ended.out) == (1, "")
    assert one_line(ended.err)
    assert f"no Triton server that speaks {protocol} answers at {url}" in ended.err
    assert "start one with demo/serve_triton.py" in ended.err


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_port_of_the_other_protocol_is_said_in_one_line(protocol: str, toy_server: Toy) -> None:
    other = next(each for each in PROTOCOLS if each != protocol)
    ended = ask(f"--url=127.0.0.1:{toy_server.ports[other]}", f"--protocol={protocol}", "--model=toy")
    assert ended.code == 1
    assert one_line(ended.err)
    assert f"no Triton server that speaks {protocol}" in ended.err
    assert f"--protocol {other}" in ended.err


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_server_that_never_answers_is_given_up_in_one_line(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darkroom.triton.client.ANSWERS_WITHIN", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ended = ask(f"--url={protocol}://127.0.0.1:{silent.getsockname()[1]}", "--model=toy")
    assert ended.code == 1
    assert one_line(ended.err)
    assert "nothing within 0.5 seconds" in ended.err


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_missing_library_is_said_in_one_line(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"tritonclient.{protocol}.aio", None)
    ended = ask(f"--protocol={protocol}")
    assert ended.code == 1
    assert one_line(ended.err)
    assert 'pip install "tritonclient[http,grpc]"' in ended.err


# What is asked.


def test_file_with_a_bad_line_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b", "steps": 0}\n')
    ended = ask(f"--prompts-file={file}")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == f"client.py: {file}:2: steps must be 1 or more, not 0.\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", ""], "prompt is empty"),
        (["--prompt", "  "], "prompt is empty"),
        (["--prompt", "a\udce9"], "prompt is not valid UTF-8"),
        (["--prompt", "a", "b", "c"], "--requests 3"),
        (["--prompt", "a", "b", "c", "--clients=2"], "--requests 2"),
        (["--prompt", "a", "--prompts-file=b"], "--prompts-file"),
        (["--prompts-file=/nowhere/prompts.txt"], "/nowhere/prompts.txt"),
        (["--prompts-file=/"], "--prompts-file"),
        (["--protocol=ftp"], "--protocol"),
        (["--url=ftp://localhost"], "ftp://"),
        (["--url=https://localhost"], "https://"),
        (["--url=http://localhost", "--protocol=grpc"], "--protocol grpc"),
        (["--url=localhost:http"], "--url"),
        (["--url=localhost:99999"], "--url"),
        (["--url=localhost:0"], "--url"),
        (["--url=:8000"], "--url"),
        (["--url="], "--url"),
        (["--url=http://localhost/v2"], "--url"),
        (["--url=http://["], "--url"),
        (["--model="], "--model"),
        (["--clients=0"], "--clients"),
        (["--requests=0"], "--requests"),
        (["--requests=-1"], "--requests"),
        (["--static-batch-size=0"], "--static-batch-size"),
        (["--timeout=0"], "--timeout"),
        (["--timeout=nan"], "--timeout"),
        (["--timeout=inf"], "--timeout"),
        (["--seed=-1"], "--seed"),
        ([f"--seed={2**64}"], "--seed"),
        ([f"--seed={2**64 - 3}", "--requests=2", "--num-images=2"], "--seed"),
        (["--steps=0"], "--denoising-steps"),
        (["--denoising-steps=many"], "--denoising-steps"),
        ([f"--steps={2**31}"], "--denoising-steps"),
        (["--guidance-scale=nan"], "--guidance-scale"),
        (["--guidance-scale=-1"], "--guidance-scale"),
        (["--guidance-scale=1e39"], "--guidance-scale"),
        (["--scheduler=euler"], "'Euler'"),
        (["--height=65"], "--height"),
        (["--width=0"], "--width"),
        ([f"--width={2**34}"], "--width"),
        (["--num-images=0"], "--num-images"),
        (["--output-dir=somewhere"], "--save-image"),
        (["--quiet", "--verbose"], "--verbose"),
        (["--request=3"], "'--requests'"),
        (["prompt"], "prompt"),
    ],
)
def test_what_cannot_be_sent_is_refused_before_anything_is(arguments: list[str], said: str) -> None:
    ended = ask(*arguments)  # a server that was asked would be said to be down, with exit code 1
    assert (ended.code, ended.out) == (2, ""), ended.err
    assert one_line(ended.err), ended.err
    assert said in ended.err


@pytest.mark.parametrize(
    ("url", "protocol", "said"),
    [
        (None, None, "http://127.0.0.1:8000"),
        (None, "grpc", "grpc://127.0.0.1:8001"),
        ("localhost:9000", None, "http://localhost:9000"),
        ("localhost:9000", "grpc", "grpc://localhost:9000"),
        ("grpc://localhost", None, "grpc://localhost:8001"),
        ("http://localhost:80/", "http", "http://localhost:80"),
        ("[::1]:8000", None, "http://[::1]:8000"),
    ],
)
def test_address_is_read(url: str | None, protocol: str | None, said: str) -> None:
    assert str(address_of(url, protocol)) == said
