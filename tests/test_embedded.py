"""The models that ship with Darkroom: each script's default, and diffusers' own pictures from their folders."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from darkroom.checkpoint.catalog import EMBEDDED, SCRIPTS
from tests.support import Diffusers, Studio, one_line, psnr

PROMPTS = ("a red apple, noto style, blue background", "a ghost, noto style, teal background", "pizza")
MODELS = {"demo_txt2img.py": "emoji", "demo_txt2img_xl.py": "emoji-xl", "demo_turbo.py": "emoji-turbo"}
SAME_AS_DIFFUSERS, SAME_AS_ALONE = 45, 50
"""dB."""
MEGABYTES, OF_THE_FIRST = 100, 40
"""Of all models together, and of the one that a first picture is made with."""


@pytest.fixture(scope="module")
def diffusers_of() -> dict[str, Diffusers]:
    return {model: Diffusers(EMBEDDED / model) for model in MODELS.values()}


def embedded(studio: Studio, script: str) -> Studio:
    return replace(studio, script=script, model=EMBEDDED / MODELS[script])


@pytest.mark.parametrize("script", MODELS)
def test_a_script_takes_its_own_model_and_says_which_is_the_real_one(script: str, studio: Studio) -> None:
    ended = replace(studio, script=script).here(PROMPTS[0], "--denoising-steps=1", "--seed=1", *studio.folders())
    assert ended.code == 0, ended.err
    first = ended.out.splitlines()[0]
    assert MODELS[script] in first and f"--version {SCRIPTS[script].real}" in first
    named = replace(studio, script=script).here(
        PROMPTS[0], f"--version={MODELS[script]}", "--denoising-steps=1", "--seed=1", *studio.folders()
    )
    assert named.out.splitlines()[-1] == ended.out.splitlines()[-1]
    assert "--version" not in named.out


ASKED: dict[str, dict[str, Any]] = {
    "as it is": {},
    "LCM": {"scheduler": "LCM"},
    "unguided": {"guidance_scale": 1.0},
    "not square": {"height": 96, "width": 160},
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("script", MODELS)
def test_pictures_are_those_of_diffusers(
    script: str, asked: str, studio: Studio, diffusers_of: dict[str, Diffusers]
) -> None:
    common = {"denoising_steps": 4, "guidance_scale": 4.0} | ASKED[asked]
    drawn = embedded(studio, script).draw(PROMPTS[0], **common)
    (expected,) = diffusers_of[MODELS[script]].draw(PROMPTS[0], **common)
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
@pytest.mark.parametrize("script", MODELS)
def test_on_the_other_engines_too(engine: str, script: str, studio: Studio, diffusers_of: dict[str, Diffusers]) -> None:
    common = {"denoising_steps": 4, "guidance_scale": 4.0}
    drawn = embedded(studio, script).draw(PROMPTS[0], engine=engine, **common)
    (expected,) = diffusers_of[MODELS[script]].draw(PROMPTS[0], **common)
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS


def test_a_batch_of_three(studio: Studio, diffusers_of: dict[str, Diffusers]) -> None:
    script = next(iter(MODELS))
    drawn = embedded(studio, script).draw(*PROMPTS, batch_size=3, batch_count=1, denoising_steps=4, guidance_scale=4.0)
    # Prompt by prompt: the first three pictures are of the first prompt.
    expected = diffusers_of[MODELS[script]].draw(*[PROMPTS[0]] * 3, denoising_steps=4, guidance_scale=4.0)
    assert min(map(psnr, drawn.pictures, expected)) >= SAME_AS_DIFFUSERS


@pytest.mark.slow
@pytest.mark.parametrize("script", ["demo_txt2img.py", "demo_txt2img_xl.py"])
def test_eight_devices_make_a_batch_of_eight(script: str, studio: Studio, diffusers_of: dict[str, Diffusers]) -> None:
    asked: dict[str, Any] = {"denoising_steps": 2, "guidance_scale": 4.0}
    together = embedded(studio, script).draw(PROMPTS[0], engine="jax", batch_size=8, devices=8, **asked).pictures
    expected = diffusers_of[MODELS[script]].draw(*[PROMPTS[0]] * 8, **asked)
    assert min(map(psnr, together, expected)) >= SAME_AS_DIFFUSERS
    for image in (0, 7):
        alone = embedded(studio, script).draw(PROMPTS[0], engine="jax", seed=5 + image, **asked).pictures[0]
        assert psnr(together[image], alone) >= SAME_AS_ALONE


@pytest.mark.parametrize("model", ["emoji", "emoji-xl"])
def test_from_a_picture(model: str, studio: Studio, diffusers_of: dict[str, Diffusers], tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image = Image.fromarray(picture).resize((128, 128))
    image.save(tmp_path / "start.png")
    from_image = replace(studio, script="demo_img2img.py", model=EMBEDDED / model)
    drawn = from_image.draw(
        PROMPTS[0], input_image=tmp_path / "start.png", image_strength=0.6, denoising_steps=10, guidance_scale=4.0
    )
    (expected,) = diffusers_of[model].draw(
        PROMPTS[0], image=image, strength=0.6, denoising_steps=10, guidance_scale=4.0
    )
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS


def test_the_real_refiner_is_not_put_after_the_small_model(studio: Studio) -> None:
    ended = replace(studio, script="demo_txt2img_xl.py").shell(PROMPTS[0], "--enable-refiner", *studio.folders())
    assert ended.code == 1 and one_line(ended.err)
    assert "stabilityai/stable-diffusion-xl-base-1.0 could not be fetched" in ended.err


def test_all_weights_together_are_small() -> None:
    files = [path for path in EMBEDDED.rglob("*") if path.is_file() and not path.is_symlink()]
    linked = {path for path in EMBEDDED.rglob("*") if path.is_symlink()}
    assert all(path.resolve().is_relative_to(EMBEDDED) for path in linked)
    assert sum(path.stat().st_size for path in files) <= MEGABYTES * 1e6
    first = [path for path in files if path.is_relative_to(EMBEDDED / "emoji")]
    assert 0 < sum(path.stat().st_size for path in first) <= OF_THE_FIRST * 1e6
    assert {path.name for path in EMBEDDED.iterdir()} == set(MODELS.values())


def test_text_encoders_can_be_read_by_every_transformers() -> None:
    """Those before version 5 make random weights of what has no prefix, and go on."""
    files = sorted(EMBEDDED.glob("*/text_encoder*/model.safetensors"))
    assert len(files) == 4
    for file in files:
        names = load_file(file).keys()
        assert names and all(name.startswith(("text_model.", "text_projection.")) for name in names), file
