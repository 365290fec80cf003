"""JAX: what of a network it takes, what is kept, and what is refused."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from darkroom.checkpoint.folder import open_checkpoint
from darkroom.cli.artefacts import Runtimes, rows_of
from darkroom.cli.doctor import findings
from darkroom.contract import Job, Profile
from darkroom.engines.jax.run import EXECUTABLE, WEIGHTS
from darkroom.engines.jax.runtime import Jax
from darkroom.engines.parity import TOLERANCES
from darkroom.engines.runtime import Denoiser, Options
from darkroom.errors import Failed
from darkroom.store.fingerprints import Fingerprints
from darkroom.store.store import Store
from darkroom.values import from_json
from tests.support import ROOT, Diffusers, Studio, assert_refused, listing, one_line, psnr

PROMPT = "a red apple on the house"
SAME_AS_DIFFUSERS = 45.0
"""dB."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Studio:
    """The tiny model, built for two images on two devices."""
    studio = Studio(tmp_path_factory.mktemp("pair"), tiny_model)
    assert len(studio.draw(PROMPT, engine="jax", batch_size=2, devices=2).pictures) == 2
    return studio


@pytest.fixture(scope="module")
def unet(pair: Studio) -> tuple[Job, Path]:
    """Its UNet, and the folder that it is kept in."""
    (folder,) = pair.engines.glob("unet-*")
    return from_json(Job, json.loads((folder / "manifest.json").read_text())["made"]["job"]), folder


def test_an_engine_is_an_executable_and_its_weights_alone(unet: tuple[Job, Path]) -> None:
    _, folder = unet
    assert {path.name for path in folder.iterdir()} - {".used"} == {EXECUTABLE, WEIGHTS, "manifest.json"}
    made = json.loads((folder / "manifest.json").read_text())["made"]
    assert made["error_against_torch"] < 1e-4 and made["compile_seconds"] > 0


def test_each_image_of_a_call_has_its_own_timestep(unet: tuple[Job, Path], tiny_model: Path) -> None:
    import torch

    from darkroom.networks.load import example_inputs, load_module

    job, folder = unet
    engine = Jax(Options()).load(job, folder, None)
    assert isinstance(engine, Denoiser)
    inputs = example_inputs(job.stage, job.profile.sizes(), seed=3)
    assert inputs["timestep"][0] != inputs["timestep"][1]
    with torch.no_grad():
        expected = load_module(job.stage, tiny_model)(*inputs.values()).numpy()
    made = engine({name: value.numpy() for name, value in inputs.items()})["output"]
    np.testing.assert_allclose(made, expected, atol=1e-4 * np.abs(expected).max())


def test_an_engine_for_more_devices_than_are_there_says_so(
    unet: tuple[Job, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jax.device_count", lambda: 1)
    with pytest.raises(Failed, match="2 devices, and here are 1"):
        Jax(Options()).load(*unet, None)


def test_an_engine_for_more_devices_than_are_there_is_listed_as_such(
    pair: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reasons() -> set[str | None]:
        return {row.unusable for row in rows_of([Store(pair.engines)], Runtimes()) if row.kind == "engine"}

    assert reasons() == {None}
    monkeypatch.setattr("jax.device_count", lambda: 1)
    assert reasons() == {"built for 2 devices, of which 1 are here"}


LETS_GO = """
import gc, json, sys, weakref
from pathlib import Path
import jax
from darkroom.engines.jax.runtime import Jax
from darkroom.contract import Job
from darkroom.engines.runtime import Options
from darkroom.values import from_json
folder = Path(sys.argv[1])
job = from_json(Job, json.loads((folder / "manifest.json").read_text())["made"]["job"])
runtime = Jax(Options())
runtime.load(job, folder, None)
client = weakref.ref(jax.devices()[0].client)
runtime.release()
gc.collect()
assert client() is None
runtime.load(job, folder, None)
"""


def test_a_device_that_was_let_go_of_is_free_for_others_and_can_be_had_again(unet: tuple[Job, Path]) -> None:
    """In a process of its own: torchax, which tests have and benchmark.py has not, keeps arrays for ever."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "demo")}
    ended = subprocess.run([sys.executable, "-c", LETS_GO, unet[1]], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_an_engine_that_disagrees_with_torch_is_not_kept(empty_studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darkroom.engines.jax.run.TOLERANCES", {"fp32": 1e-12})
    ended = empty_studio.here(PROMPT, "--engine=jax", f"--model={empty_studio.model}", *empty_studio.folders())
    assert ended.code == 1 and one_line(ended.err) and "differs from torch" in ended.err
    assert not list(empty_studio.engines.glob("clip-*"))


@pytest.mark.parametrize(("name", "precision", "kept"), [("unet", "bf16", "bfloat16"), ("clip", "fp16", "float16")])
def test_a_network_computes_in_the_precision_that_is_asked(
    name: str, precision: str, kept: str, tiny_model: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny_model, Fingerprints(tmp_path / "none"))
    job = Job(checkpoint.family.stages(checkpoint, False, 0)[name], Profile(1, 64, 64), precision)
    runtime = Jax(Options())
    runtime.build(job, tiny_model, tmp_path, lambda *_: True)
    error = runtime.finish(job, tmp_path)["error_against_torch"]
    assert 1e-4 < error < TOLERANCES[precision]
    kinds = {weight.dtype.name for weight in load_file(tmp_path / WEIGHTS).values()}
    assert kinds - {"int32"} == {kept}  # position ids are whole numbers


def test_a_picture_to_start_from_is_encoded_by_one_device(pair: Studio, diffusers_tiny: Diffusers) -> None:
    rng = np.random.default_rng(7)
    picture = pair.root / "photograph.png"
    Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).resize((64, 64)).save(picture)
    drawn = replace(pair, script="demo_img2img.py").draw(
        PROMPT, engine="jax", batch_size=2, devices=2, guidance_scale=7.5, input_image=picture
    )
    expected = diffusers_tiny.draw(PROMPT, PROMPT, image=Image.open(picture), strength=0.8)
    assert min(map(psnr, drawn.pictures, expected)) >= SAME_AS_DIFFUSERS


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"build_dynamic_batch": True}, "--build-static-batch"),
        ({"build_dynamic_shape": True}, "--build-static-batch"),
        ({"onnx_opset": 18}, "--onnx-opset"),
        ({"threads": 1}, "--threads"),
        ({"devices": 3, "batch_size": 4}, "--batch-size 4 cannot be divided by the 3 of --devices"),
        ({"devices": 9, "batch_size": 9}, "--devices 9 is more than the 8"),
        ({"devices": 0}, "'0'"),
        ({"devices": "some"}, "'some'"),
        ({"devices": 2, "engine": "openvino"}, "--devices has no effect"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused(asked: dict[str, Any], said: str, empty_studio: Studio) -> None:
    more = [
        f"--{name.replace('_', '-')}" if value is True else f"--{name.replace('_', '-')}={value}"
        for name, value in ({"engine": "jax"} | asked).items()
    ]
    before = listing(empty_studio.engines, empty_studio.onnx)
    ended = empty_studio.here(PROMPT, f"--model={empty_studio.model}", *more, *empty_studio.folders())
    assert_refused(ended, said)
    assert listing(empty_studio.engines, empty_studio.onnx) == before


def test_devices_divide_no_file_of_prompts(empty_studio: Studio) -> None:
    (empty_studio.root / "prompts.txt").write_text("a cat\n")
    ended = empty_studio.here(
        f"--prompts={empty_studio.root / 'prompts.txt'}", "--engine=jax", "--devices=2", *empty_studio.folders()
    )
    assert_refused(ended, "--devices cannot be given beside --prompts")


def test_doctor_says_what_is_missing_beside_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darkroom.engines.jax.runtime.BESIDE_JAX", ("no_such_package",))
    (found,) = (each for each in findings() if each.engine == "jax")
    assert not found.usable and "no_such_package" in found.why_not
    assert found.command.startswith("pip install jax==")
