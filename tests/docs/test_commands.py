"""Every command line of the README and of docs/ that can run here does, in folders of its own."""

import contextlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from PIL import Image
from safetensors.torch import save_file

from tests.bench.lines import line, write
from tests.docs.pages import PAGES, commands
from tests.docs.scripts import run_here
from tests.support import ROOT, Ended, Studio, children_inline, one_line, pixels

LEFT_OUT = {
    "git clone ": "there is no network",
    "pip install ": "it installs",
    "-m venv ": "it makes an environment",
    "make test": "it is what runs this",
    "benchmark.py compare ": "it makes an environment for each peer",
    "report output/gpu-check/results.jsonl": "a GPU has to be checked before",
    "gpu_check.sh --wheels": "it asks the package index",
    "gpu_check.sh": "it takes a GPU and nine minutes",
    "--engine torch-compile ": "it takes an NVIDIA GPU",
    "--ray ": "it takes Ray, which listens on other addresses",
    "build_triton_repository.py ": "it takes Triton: see tests/triton",
    "demo/serve.py": "it serves until it is stopped: see tests/web",
    "serve_triton.py ": "it takes Triton: see tests/triton",
    "client.py ": "it takes a server: see tests/triton",
}
"""What a command line holds, or ends with, that is not run, and why."""

FROM_THE_HUB = re.compile(r"--version (1\.5|xl-1\.0|sd-turbo)\b|_flux\.py|_sd35?\.py|--controlnet-type")
SLOW = ("benchmark.py run ", "--engine jax", "--prompts", "--grid")
SCRIPT = ".venv/bin/python "


def why_left_out(command: str) -> str | None:
    return next((why for part, why in LEFT_OUT.items() if part in command or command.endswith(part)), None)


COMMANDS = tuple(dict.fromkeys(command for page in PAGES for command in commands(page)))
CAN_RUN = [command for command in COMMANDS if not why_left_out(command)]
HUB = [command for command in CAN_RUN if FROM_THE_HUB.search(command)]
HERE = [command for command in CAN_RUN if command.startswith(SCRIPT) and command not in HUB]
DIRECTLY = [command for command in CAN_RUN if not command.startswith(SCRIPT)]
OF_A_STORE = re.compile(r"build_engines\.py (list|verify|clean|export|import)\b")
"""What looks at all engines that are there: it gets a small store of its own."""


def test_nothing_is_left_out_that_is_not_there() -> None:
    for part in LEFT_OUT:
        assert any(part in command or command.endswith(part) for command in COMMANDS), part


def shell(command: str, root: Path, *more: str) -> Ended:
    """Runs a command line that starts with SCRIPT in this process, as if `root` were the checkout."""
    (root / "demo").mkdir(exist_ok=True)
    (root / "setup.cfg").touch()
    package = mock.patch("darkroom.cli.settings.PACKAGE", root / "demo" / "darkroom")
    with children_inline(), contextlib.chdir(root), package:
        return run_here(*shlex.split(command.removeprefix(SCRIPT)), *more)


def set_the_scene(root: Path, command: str) -> None:
    """The files that a command takes for granted."""
    for name in ("sketch.png", "mask.png", "map.png"):
        if name in command:
            Image.new("RGB", (128, 128), "aqua").save(root / name)
    if "prompts.txt" in command:
        (root / "prompts.txt").write_text("a red apple, noto style\npizza\n")
    if "prompts.jsonl" in command:
        prompts = ("pizza", "a ghost, noto style")
        (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    if "--wildcards" in command:
        (root / "wildcards").mkdir()
        (root / "wildcards" / "style.txt").write_text("noto\nfluent\n")
    if "--lora-path" in command:
        save_file(_lora(), root / "ink.safetensors")
    if "--recipe" in command:
        drawn = shell(f"{SCRIPT} demo/demo_txt2img.py 'a red apple' --seed 3 --quiet", root)
        Path(drawn.out.strip()).rename(root / "output" / "picture.png")
    if "benchmark.py report" in command:
        (root / "output").mkdir()
        write(root / "output" / "benchmark.jsonl", line("openvino fp32", 400), line("torch fp32", 1000))
    if "build_engines.py import" in command:
        assert shell(command.replace("import", "export"), root).code == 0


def _lora() -> dict[str, Any]:
    import torch

    layer = "unet.mid_block.attentions.0.proj_in"
    return {f"{layer}.lora_A.weight": torch.zeros(2, 1280, 1, 1), f"{layer}.lora_B.weight": torch.zeros(1280, 2, 1, 1)}


@pytest.fixture(scope="module")
def stock(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """A small store. To be copied only."""
    studio = Studio(tmp_path_factory.mktemp("stock"), tiny_model)
    studio.draw("red apple")
    return studio


@pytest.mark.parametrize(
    "command",
    [pytest.param(each, marks=[pytest.mark.slow] * any(part in each for part in SLOW), id=each) for each in HERE],
)
def test_it_runs(command: str, studio: Studio, stock: Studio, tmp_path: Path) -> None:
    root = studio.root
    if OF_A_STORE.search(command):
        root = Path(shutil.copytree(stock.root, tmp_path / "stocked"))
    set_the_scene(root, command)
    ended = shell(command, root)
    assert ended.code == 0, ended.err
    assert ended.out


@pytest.mark.parametrize("command", HUB)
def test_it_gets_as_far_as_the_hub(command: str, studio: Studio) -> None:
    if "--engine tensorrt" in command:
        pytest.importorskip("tensorrt_rtx")
    set_the_scene(studio.root, command)
    ended = shell(command, studio.root, f"--framework-model-dir={studio.root / 'models'}")
    assert ended.code == 1 and one_line(ended.err), ended
    assert "could not be fetched" in ended.err


INTERPRETER = f"""#!/bin/sh
# Makes environments that hold a copy of itself, in which everything is installed, and is this Python otherwise.
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip") ;;
    *) exec {shlex.quote(sys.executable)} "$@" ;;
esac
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
@pytest.mark.parametrize("command", DIRECTLY)
def test_it_runs_in_a_shell(command: str, studio: Studio) -> None:
    python = studio.root / "python"
    python.write_text(INTERPRETER)
    python.chmod(0o755)
    program, *arguments = shlex.split(command)
    if program == "make":
        arguments += [f"VENV={studio.root / 'venv'}", f"PYTHON={python}", f"ARGS={shlex.join(studio.folders())}"]
    environment = studio.environment(PYTHON=str(python))
    done = subprocess.run([program, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if program == "make":
        assert pixels(done.stdout.splitlines()[-1]).shape == (128, 128, 3)


@pytest.mark.slow
def test_python_of_the_page_makes_a_picture(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    code = re.search(r"\n\n((?:    .*\n|\n)*    from darkroom import Darkroom\n(?:    .*\n|\n)+)", page)[1]
    monkeypatch.chdir(studio.root)
    monkeypatch.setattr("darkroom.notebook.home", lambda: studio.root)
    with children_inline():
        exec(textwrap.dedent(code), {})
    assert pixels(studio.root / "apple.png").shape == (128, 128, 3)
