"""Latent consistency models, whose UNet is told the guidance scale, against diffusers' own pipeline."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support import Diffusers, Studio, assert_refused, changed_copy, edit_json, psnr

PROMPT = "a red apple on the house"
SAME_AS_DIFFUSERS = 45
"""dB."""
VISIBLE = 40


@pytest.fixture(scope="module")
def lcm_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a UNet that embeds the guidance scale, in the layout of the published one."""

    def change(folder: Path) -> None:
        import torch
        from diffusers import UNet2DConditionModel

        torch.manual_seed(77)
        plain = UNet2DConditionModel.from_pretrained(folder / "unet")
        unet = UNet2DConditionModel.from_config(plain.config, time_cond_proj_dim=16)
        missing = unet.load_state_dict(plain.state_dict(), strict=False).missing_keys
        assert missing == ["time_embedding.cond_proj.weight"]
        with torch.no_grad():
            unet.time_embedding.cond_proj.weight.mul_(20)
        unet.save_pretrained(folder / "unet")
        edit_json(folder / "scheduler" / "scheduler_config.json", _class_name="LCMScheduler")
        edit_json(
            folder / "model_index.json",
            _class_name="LatentConsistencyModelPipeline",
            scheduler=["diffusers", "LCMScheduler"],
        )

    return changed_copy(tiny_model, tmp_path_factory.mktemp("models") / "tiny-lcm", change)


@pytest.fixture(scope="module")
def diffusers_lcm(lcm_model: Path) -> Diffusers:
    return Diffusers(lcm_model)


@pytest.fixture
def turbo(studio: Studio, lcm_model: Path) -> Studio:
    return replace(studio, script="demo_turbo.py", model=lcm_model)


@pytest.mark.parametrize("steps", [1, 4, 8])
@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "torch", "jax"])
def test_guidance_is_told_to_the_network(engine: str, steps: int, turbo: Studio, diffusers_lcm: Diffusers) -> None:
    made = []
    for scale in (1.0, 8.5):
        drawn = turbo.draw(PROMPT, engine=engine, denoising_steps=steps, guidance_scale=scale)
        (expected,) = diffusers_lcm.draw(PROMPT, denoising_steps=steps, guidance_scale=scale)
        assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS
        made.append(expected)
    assert psnr(*made) < VISIBLE


def test_images_of_a_batch_are_those_of_diffusers(turbo: Studio, diffusers_lcm: Diffusers) -> None:
    drawn = turbo.draw(PROMPT, batch_size=3, guidance_scale=8.5)
    expected = diffusers_lcm.draw(*[PROMPT] * 3, guidance_scale=8.5)
    assert min(map(psnr, drawn.pictures, expected)) >= SAME_AS_DIFFUSERS


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    rows, columns = np.mgrid[0:64, 0:64]
    pixels = np.stack([columns * 4, rows * 4, (rows // 8 + columns // 8) % 2 * 200], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "squares.png")
    return tmp_path / "squares.png"


@pytest.mark.parametrize(("strength", "engine"), [(0.5, "openvino"), (0.2, "torch"), (1.0, "onnxruntime")])
def test_from_a_picture_all_steps_are_made_as_in_diffusers(
    strength: float, engine: str, turbo: Studio, diffusers_lcm: Diffusers, picture: Path
) -> None:
    common = {"denoising_steps": 4, "guidance_scale": 8.5}
    from_image = replace(turbo, script="demo_img2img.py")
    drawn = from_image.draw(PROMPT, engine=engine, batch_size=2, input_image=picture, image_strength=strength, **common)
    expected = diffusers_lcm.draw(*[PROMPT] * 2, image=Image.open(picture), strength=strength, **common)
    assert min(map(psnr, drawn.pictures, expected)) >= SAME_AS_DIFFUSERS
    assert drawn.result["unet_calls"] == 4
    assert psnr(*expected) < VISIBLE


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--denoising-steps=4", "--image-strength=0.05"], "cannot make 4 denoising steps"),
        (["--denoising-steps=4", "--image-strength=0.05", "--scheduler=Euler"], "leaves no step"),
    ],
    ids=["own scheduler", "Euler"],
)
def test_a_strength_that_leaves_too_little_is_refused(
    arguments: list[str], said: str, turbo: Studio, picture: Path
) -> None:
    from_image = replace(turbo, script="demo_img2img.py")
    asked = [PROMPT, f"--input-image={picture}", "--model", str(turbo.model), *arguments]
    assert_refused(from_image.here(*asked, *turbo.folders()), said, "strength")


def test_negative_prompt_has_nothing_to_act_on(turbo: Studio) -> None:
    ended = turbo.here(
        PROMPT, "--negative-prompt=dog", "--guidance-scale=5", "--model", str(turbo.model), *turbo.folders()
    )
    assert_refused(ended, "--negative-prompt")
