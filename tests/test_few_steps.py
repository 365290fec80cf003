"""Latent consistency models, whose UNet is told the guidance scale, against diffusers' own pipeline."""

from dataclasses import replace
from pathlib import Path

import pytest

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


def test_negative_prompt_has_nothing_to_act_on(turbo: Studio) -> None:
    ended = turbo.here(
        PROMPT, "--negative-prompt=dog", "--guidance-scale=5", "--model", str(turbo.model), *turbo.folders()
    )
    assert_refused(ended, "--negative-prompt")
