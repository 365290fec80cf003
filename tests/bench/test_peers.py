"""The contenders of a comparison, and what makes them ready: environments, conversions, one protocol."""

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from darkroom.bench.peers import CONTENDERS, PEERS, Peer, command, prepare
from darkroom.bench.published_names import copy_with_published_names
from darkroom.errors import Failed
from darkroom.noise import NoiseStream, initial_latents
from darkroom.processes import environments
from darkroom.processes.environments import INSTALLED, UNFINISHED, ensure
from tests.support import SIZE, SOON, Diffusers, listing, pixels

SETTINGS = {
    "prompt": "a red apple",
    "batch_size": 2,
    "denoising_steps": 3,
    "guidance_scale": 7.5,
    "height": SIZE,
    "width": SIZE,
    "seed": 5,
}

FAKE = f"""
import os, sys
sys.path.insert(0, {str(CONTENDERS)!r})
from protocol import serve

def load(settings):
    import numpy as np
    print("a library that prints")
    os.write(1, b"native code that prints\\n")

    def make(clock, settings):
        if settings.prompt == "crash":
            raise RuntimeError("the first line\\nand a second")
        for _ in range(settings.denoising_steps):
            with clock.time("UNet"):
                pass
        return np.full((settings.batch_size, 4, 6, 3), 0.5, np.float32)

    return make

serve(load)
"""


class Contender:
    """A process that speaks the protocol."""

    def __init__(self, started: list[str]) -> None:
        self.process = subprocess.Popen(
            started, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def hear(self) -> dict[str, Any]:
        return json.loads(self.process.stdout.readline())

    def ask(self, line: str) -> dict[str, Any]:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.hear()

    def end(self) -> tuple[int, str, str]:
        """Exit code, and the rest of stdout and stderr."""
        rest, err = self.process.communicate(timeout=SOON)
        return self.process.returncode, rest, err


@contextmanager
def contender(started: list[str]) -> Iterator[Contender]:
    process = Contender(started)
    try:
        yield process
    finally:
        process.process.kill()
        process.process.communicate()


@pytest.fixture
def fake(tmp_path: Path) -> list[str]:
    """What starts a contender that makes grey pictures."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    return command(replace(PEERS["diffusers"], script=str(script)), Path(sys.executable), tmp_path, SETTINGS)


def test_every_line_on_stdout_is_an_answer_whatever_libraries_print(fake: list[str]) -> None:
    with contender(fake) as made:
        assert made.hear()["loaded"] > 0
        assert set(made.ask("run")) == {"streams", "wall"}
        assert made.ask("memory")["peak_bytes"] > 1_000_000
        code, rest, err = made.end()
    assert (code, rest) == (0, "")
    assert sorted(err.splitlines()) == ["a library that prints", "native code that prints"]


def test_stages_and_calls_are_those_of_one_batch(fake: list[str]) -> None:
    with contender(fake) as made:
        made.hear()
        for _ in range(2):
            answer = made.ask("run")
            (stream,) = answer["streams"]
            assert stream["unet_calls"] == SETTINGS["denoising_steps"]
            assert answer["wall"] == stream["stages"]["Pipeline"] >= stream["stages"].pop("UNet") >= 0
            assert set(stream["stages"]) == {"Pipeline"}
        assert made.ask('set {"denoising_steps": 2}') == {"set": {"denoising_steps": 2}}
        assert made.ask("run")["streams"][0]["unet_calls"] == 2


def test_save_writes_every_picture_of_the_batch(fake: list[str], tmp_path: Path) -> None:
    with contender(fake) as made:
        made.hear()
        folder = tmp_path / "a folder"
        saved = made.ask(f"save {folder}")["saved"]
    assert saved == [str(folder / "image-0.png"), str(folder / "image-1.png")]
    assert all((pixels(path) == 128).all() and pixels(path).shape == (4, 6, 3) for path in saved)


def test_the_end_of_the_input_is_the_end(fake: list[str]) -> None:
    with contender(fake) as made:
        made.hear()
        code, rest, _ = made.end()
    assert (code, rest) == (0, "")


def test_cold_makes_one_picture_and_says_nothing(fake: list[str], tmp_path: Path) -> None:
    picture = tmp_path / "cold.png"
    ended = subprocess.run([*fake, "--cold", str(picture)], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "")
    assert pixels(picture).shape == (4, 6, 3)


@pytest.mark.parametrize("line", ["dance", "", "run fast", "save"])
def test_what_it_does_not_know_is_one_line_and_the_end(fake: list[str], line: str) -> None:
    with contender(fake) as made:
        made.hear()
        answer = made.ask(line)
        code, rest, _ = made.end()
    assert set(answer) == {"error"} and "save FOLDER, memory, quit" in answer["error"]
    assert (code, rest) == (1, "")


def test_a_crash_is_one_line_and_its_trace_is_on_stderr(fake: list[str], tmp_path: Path) -> None:
    settings = json.loads(fake[-1]) | {"prompt": "crash"}
    with contender([*fake[:-1], json.dumps(settings)]) as made:
        made.hear()
        assert made.ask("run") == {"error": "RuntimeError: the first line"}
        code, rest, err = made.end()
    assert (code, rest) == (1, "")
    assert "Traceback" in err and "and a second" in err
    cold = subprocess.run(
        [*fake[:-1], json.dumps(settings), "--cold", str(tmp_path / "no.png")], capture_output=True, text=True
    )
    assert cold.returncode == 1 and json.loads(cold.stdout) == {"error": "RuntimeError: the first line"}


@pytest.mark.parametrize("settings", ["garbage", "[]", "{}", '{"colour": 1}'])
def test_settings_that_make_no_sense_are_one_line(fake: list[str], settings: str) -> None:
    if settings.startswith('{"'):
        settings = json.dumps(json.loads(fake[-1]) | json.loads(settings))
    ended = subprocess.run([*fake[:-1], settings], capture_output=True, text=True, input="run\n")
    assert ended.returncode == 1
    assert list(json.loads(ended.stdout)) == ["error"]


def test_diffusers_contender_draws_what_diffusers_draws(
    tiny_model: Path, diffusers_tiny: Diffusers, tmp_path: Path
) -> None:
    expected = diffusers_tiny.draw(*[SETTINGS["prompt"]] * 2)
    started = command(PEERS["diffusers"], Path(sys.executable), tiny_model, SETTINGS)
    with contender(started) as made:
        assert made.hear()["loaded"] > 0
        answer = made.ask("run")
        saved = made.ask(f"save {tmp_path}")["saved"]
    (stream,) = answer["streams"]
    assert stream["unet_calls"] == SETTINGS["denoising_steps"] + 1  # PNDM, the tiny model's scheduler, makes N + 1
    stages = stream["stages"]
    assert set(stages) == {"CLIP", "UNet", "VAE-Dec", "Pipeline"}
    assert sum(stages.values()) - stages["Pipeline"] <= stages["Pipeline"]
    for path, picture in zip(saved, expected, strict=True):
        # The layout that the contender's networks are in changes the order of sums.
        assert np.abs(pixels(path).astype(int) - picture).max() <= 1


def test_noise_in_bfloat16_is_that_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.syspath_prepend(str(CONTENDERS))
    like = importlib.import_module("run_diffusers_like")
    expected = initial_latents([NoiseStream(9)], (4, 8, 8))
    drawn = like._randn((1, 4, 8, 8), generator=torch.Generator("cpu").manual_seed(9), dtype=torch.bfloat16)
    assert drawn.dtype == torch.bfloat16
    np.testing.assert_allclose(drawn.float().numpy(), expected, rtol=2**-8, atol=1e-6)


def test_published_names_are_read_back_as_the_same_text_encoder(tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from safetensors import safe_open
    from transformers import CLIPTextModel

    before = listing(tiny_model)
    copy = copy_with_published_names(tiny_model, tmp_path / "copy")
    assert listing(tiny_model) == before
    with safe_open(copy / "text_encoder" / "model.safetensors", "pt") as file:
        assert all(name.startswith("text_model.") for name in file.keys())
    ids = torch.tensor([[0, 1, 2, 3]])
    of_model, of_copy = (
        CLIPTextModel.from_pretrained(folder / "text_encoder")(ids).last_hidden_state for folder in (tiny_model, copy)
    )
    assert torch.equal(of_model, of_copy)


EXPORTER = """
import os, pathlib, sys
source, out = pathlib.Path(sys.argv[-2]), pathlib.Path(sys.argv[-1])
assert (source / "model_index.json").exists()
said = pathlib.Path("say.txt").read_text()
print(said)
(out / "arguments.txt").write_text(" ".join(sys.argv[1:-2]))
with open("runs.txt", "a") as runs:
    runs.write("run\\n")
sys.exit("fails" in said)
"""


@pytest.fixture
def exporting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Peer:
    """A peer whose exporter says what `say.txt` holds, and fails if that is in it; it notes its runs in `runs.txt`."""
    monkeypatch.chdir(tmp_path)
    Path("fake_exporter.py").write_text(EXPORTER)
    Path("say.txt").write_text("done")
    return replace(PEERS["optimum-intel"], exporter=("fake_exporter", "export", "openvino"))


def test_a_model_is_converted_once_for_its_weights_versions_and_precision(
    exporting: Peer, tiny_model: Path, tmp_path: Path
) -> None:
    model, store, python = tmp_path / "model", tmp_path / "converted", Path(sys.executable)
    shutil.copytree(tiny_model, model)
    shutil.move(model / "scheduler", tmp_path / "shared")
    (model / "scheduler").symlink_to(tmp_path / "shared")
    first = prepare(exporting, python, model, store)
    assert prepare(exporting, python, model, store) == first
    assert (first / "arguments.txt").read_text() == (
        "export openvino --task text-to-image --weight-format fp32 --model"
    )
    others = [
        prepare(replace(exporting, options={}), python, model, store),
        prepare(replace(exporting, alone=("optimum-intel==9",)), python, model, store),
    ]
    (model / "scheduler" / "scheduler_config.json").write_text("{}")
    others.append(prepare(exporting, python, model, store))
    assert len({first, *others}) == 4
    assert len(Path("runs.txt").read_text().splitlines()) == 4
    assert "fp32" not in (others[0] / "arguments.txt").read_text()


@pytest.mark.parametrize("name", ["run_openvino_genai", "run_diffusers_like"])
def test_what_a_peer_keeps_with_its_conversion_is_no_damage(
    exporting: Peer, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.syspath_prepend(str(CONTENDERS))
    cache = importlib.import_module(name).CACHE
    folder = prepare(exporting, Path(sys.executable), tiny_model, tmp_path / "converted")
    (folder / cache).mkdir()
    (folder / cache / "1234.blob").write_bytes(b"compiled")
    assert prepare(exporting, Path(sys.executable), tiny_model, tmp_path / "converted") == folder
    assert Path("runs.txt").read_text().split() == ["run"] and (folder / cache / "1234.blob").exists()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("reading\nit fails for a reason", "could not convert the model: it fails for a reason"),
        ("Some weights of CLIPTextModel were newly initialized: []", "did not find all weights"),
        ("text_model.final_layer_norm.bias | MISSING |", "did not find all weights"),
    ],
)
def test_a_conversion_that_went_wrong_is_one_line_and_leaves_nothing(
    exporting: Peer, tiny_model: Path, tmp_path: Path, said: str, message: str
) -> None:
    Path("say.txt").write_text(said)
    with pytest.raises(Failed, match=message) as failed:
        prepare(exporting, Path(sys.executable), tiny_model, tmp_path / "converted")
    assert exporting.name in str(failed.value) and "\n" not in str(failed.value)
    assert [path for path in (tmp_path / "converted").iterdir() if path.is_dir()] == []


def test_peers_of_one_environment_ask_for_the_same_packages() -> None:
    packages: dict[str, set] = {}
    for peer in PEERS.values():
        packages.setdefault(peer.environment, set()).add((peer.requirements, peer.alone))
        assert all("==" in requirement for requirement in (*peer.requirements, *peer.alone))
        assert (CONTENDERS / peer.script).exists()
    assert all(len(sets) == 1 for sets in packages.values())


@pytest.fixture
def installs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that would make environments; a venv appears, a package called `broken` fails."""
    ran: list[list[str]] = []

    def run(asked: list[str], **_: Any) -> subprocess.CompletedProcess:
        ran.append(asked)
        if "venv" in asked:
            python = Path(asked[-1]) / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
            python.parent.mkdir()
            python.touch()
        said = "Collecting broken\nERROR: No matching distribution found for broken==1\n\n[notice] a new pip\n"
        return subprocess.CompletedProcess(asked, int("broken==1" in asked), said)

    monkeypatch.setattr(environments.subprocess, "run", run)
    return ran


def test_an_environment_is_made_once_for_all_who_share_it(installs: list[list[str]], tmp_path: Path) -> None:
    python = ensure(PEERS["optimum-intel"], tmp_path)
    assert python.exists() and python.is_relative_to(tmp_path / "openvino")
    made = len(installs)
    assert [command[-1] for command in installs if "--no-deps" in command] == ["optimum-intel==2.2.0"]
    assert ensure(PEERS["openvino-genai"], tmp_path) == python
    assert len(installs) == made
    ensure(replace(PEERS["openvino-genai"], requirements=("openvino==1",)), tmp_path)
    assert len(installs) > made
    assert len(list((tmp_path / "openvino").glob(f"{INSTALLED}*"))) == 1


def test_an_interrupted_install_is_made_again(
    installs: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = PEERS["diffusers"]
    with monkeypatch.context() as patched:
        patched.setattr(environments.subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ensure(peer, tmp_path)
    left = tmp_path / peer.environment
    mark = tmp_path / f".{peer.environment}{UNFINISHED}"
    assert mark.exists()
    (left / "half a package").touch()
    assert ensure(peer, tmp_path).exists()
    assert not (left / "half a package").exists() and not mark.exists()


def test_pip_that_fails_is_one_line_with_its_last_error(installs: list[list[str]], tmp_path: Path) -> None:
    peer = replace(PEERS["diffusers"], requirements=("broken==1",))
    with pytest.raises(Failed) as failed:
        ensure(peer, tmp_path)
    assert str(failed.value) == f"no environment for {peer.name}: ERROR: No matching distribution found for broken==1"
    with pytest.raises(Failed):
        ensure(peer, tmp_path)


def test_a_folder_of_somebody_elses_is_left_alone(installs: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "diffusers").mkdir()
    (tmp_path / "diffusers" / "thesis.txt").touch()
    with pytest.raises(Failed, match="name another folder"):
        ensure(PEERS["diffusers"], tmp_path)
    assert (tmp_path / "diffusers" / "thesis.txt").exists()
