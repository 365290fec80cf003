"""Large networks keep their weights in float16 and compute in float32, in graphs and engines alike."""

from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from diffusers import DiffusionPipeline  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from tests.support import Diffusers, Studio, psnr  # noqa: E402

PROMPT = "a red apple on the house"


@pytest.fixture(scope="module")
def half_model(tiny_xl_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SDXL as published models come: in float16."""
    folder = tmp_path_factory.mktemp("half") / "model"
    DiffusionPipeline.from_pretrained(tiny_xl_model, dtype=torch.float16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(half_model: Path) -> np.ndarray:
    return Diffusers(half_model).draw(PROMPT, guidance_scale=5.0)[0]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix not in (".json", ".xml"))


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_pictures_are_those_of_float32_and_files_half_as_large(
    engine: str, half_model: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    studio = Studio(tmp_path, half_model, script="demo_txt2img_xl.py")
    with mock.patch("darkroom.checkpoint.folder.LARGE", 0), mock.patch("darkroom.networks.load.WORTH_HALVING", 500):
        drawn = studio.draw(PROMPT, engine=engine)
        again = studio.draw(PROMPT, engine=engine)
    assert psnr(drawn.pictures[0], expected) >= 60
    assert again.children == [] and psnr(again.pictures[0], drawn.pictures[0]) == float("inf")
    if engine == "jax":
        (folder,) = studio.engines.glob("unet-*")
        weights = load_file(folder / "weights.safetensors").values()
        assert all(weight.dtype == (torch.float16 if weight.numel() >= 500 else torch.float32) for weight in weights)
    if engine in ("torch", "jax"):
        return
    whole = Studio(tmp_path / "whole", half_model, script="demo_txt2img_xl.py")
    whole.root.mkdir()
    assert psnr(whole.draw(PROMPT, engine=engine).pictures[0], expected) >= 60
    for part in ("onnx", "engines"):
        (small,), (large,) = ((made.root / part).glob("unet-*") for made in (studio, whole))
        assert small.name != large.name
        assert size_of(small) < 0.65 * size_of(large)


def test_large_weights_are_half_and_what_is_computed_is_not(half_model: Path) -> None:
    from darkroom.checkpoint.folder import open_checkpoint
    from darkroom.networks.load import example_inputs, load_module
    from darkroom.store.fingerprints import Fingerprints

    checkpoint = open_checkpoint(half_model, Fingerprints(half_model / "none"))
    stage = replace(checkpoint.family.stages(checkpoint, True, 0)["unet"], half_weights=True)
    with mock.patch("darkroom.networks.load.WORTH_HALVING", 500):
        module = load_module(stage, half_model)
    kept = {weight.dtype: weight.numel() for weight in module.parameters()}
    assert kept.keys() == {torch.float16, torch.float32}
    assert all(weight.dtype == torch.float16 for weight in module.parameters() if weight.numel() >= 500)
    inputs = example_inputs(stage, {"B": 1, "h": 8, "w": 8, "T": 77})
    with torch.inference_mode():
        made, expected = (
            module(*inputs.values()),
            load_module(replace(stage, half_weights=False), half_model)(*inputs.values()),
        )
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


def test_rounded_from_float32_the_pictures_stay_those_of_diffusers(
    xl_studio: Studio, tiny_xl_model: Path, diffusers_tiny_xl: Diffusers
) -> None:
    with mock.patch("darkroom.checkpoint.folder.LARGE", 0), mock.patch("darkroom.networks.load.WORTH_HALVING", 500):
        drawn = xl_studio.draw(PROMPT)
    assert psnr(drawn.pictures[0], diffusers_tiny_xl.draw(PROMPT, guidance_scale=5.0)[0]) >= 45
