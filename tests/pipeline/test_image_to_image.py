"""Image-to-image against diffusers' own pipelines, for both families."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support import Diffusers, Studio, assert_refused, listing, psnr

PROMPT = "a red apple on the house"
RUNTIMES = ("openvino", "onnxruntime", "torch")
SAME_AS_DIFFUSERS, SAME_IN_A_BATCH = 45, 50
"""dB."""
VISIBLE = 40


def photograph(width: int = 64, height: int = 64) -> Image.Image:
    """Something with edges, ramps and texture."""
    rows, columns = np.mgrid[0:height, 0:width]
    rng = np.random.default_rng(7)
    ramp = np.stack([columns * 255 / width, rows * 255 / height, (rows // 8 + columns // 8) % 2 * 200], axis=-1)
    return Image.fromarray(np.clip(ramp + rng.normal(0, 12, ramp.shape), 0, 255).astype(np.uint8))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    photograph().save(tmp_path / "photograph.png")
    return tmp_path / "photograph.png"


@pytest.fixture(params=["sd", "xl"])
def both(request: pytest.FixtureRequest, studio: Studio, xl_studio: Studio) -> tuple[Studio, Diffusers]:
    """The script on the tiny model of each family, and diffusers on the same."""
    name, base = ("diffusers_tiny", studio) if request.param == "sd" else ("diffusers_tiny_xl", xl_studio)
    return replace(base, script="demo_img2img.py"), request.getfixturevalue(name)


@pytest.mark.parametrize(
    "scheduler", ["DDIM", "DPM++", "Euler", "EulerA", "Heun", "KDPM2A", "LMSD", "PNDM", "TCD", "UniPC"]
)
@pytest.mark.parametrize("engine", RUNTIMES)
def test_every_scheduler_makes_the_picture_of_diffusers(
    engine: str, scheduler: str, both: tuple[Studio, Diffusers], picture: Path
) -> None:
    studio, diffusers = both
    drawn = studio.draw(
        PROMPT,
        engine=engine,
        scheduler=scheduler,
        denoising_steps=8,
        guidance_scale=7.5,
        input_image=picture,
        image_strength=0.7,
    )
    (expected,) = diffusers.draw(
        PROMPT, scheduler=scheduler, denoising_steps=8, image=Image.open(picture), strength=0.7
    )
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS


@pytest.mark.parametrize("strength", [0.2, 0.5, 0.99, 1.0])
def test_every_strength_means_what_it_means_in_diffusers(
    strength: float, both: tuple[Studio, Diffusers], picture: Path
) -> None:
    studio, diffusers = both
    ours: dict[str, Any] = {"denoising_steps": 6, "guidance_scale": 7.5, "input_image": picture}
    drawn = studio.draw(PROMPT, image_strength=strength, **ours)
    (expected,) = diffusers.draw(PROMPT, denoising_steps=6, image=Image.open(picture), strength=strength)
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS
    if strength != 0.5:
        assert psnr(studio.draw(PROMPT, image_strength=0.5, **ours).pictures[0], expected) < VISIBLE


@pytest.mark.parametrize("scale", [0, 1])
def test_without_guidance_too(scale: float, both: tuple[Studio, Diffusers], picture: Path) -> None:
    studio, diffusers = both
    drawn = studio.draw(PROMPT, guidance_scale=scale, input_image=picture, image_strength=0.7)
    common: dict[str, Any] = {"image": Image.open(picture), "strength": 0.7}
    (expected,) = diffusers.draw(PROMPT, guidance_scale=float(scale), **common)
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS
    assert psnr(diffusers.draw(PROMPT, **common)[0], expected) < VISIBLE


def test_each_image_of_a_batch_has_its_own_stream(both: tuple[Studio, Diffusers], picture: Path) -> None:
    studio, diffusers = both
    asked: dict[str, Any] = {"scheduler": "EulerA", "guidance_scale": 7.5, "input_image": picture}
    together = studio.draw(PROMPT, batch_size=3, **asked)
    expected = diffusers.draw(*[PROMPT] * 3, scheduler="EulerA", image=Image.open(picture), strength=0.8)
    assert min(map(psnr, together.pictures, expected)) >= SAME_AS_DIFFUSERS
    alone = studio.draw(PROMPT, **asked | {"seed": 7}).pictures[0]
    assert psnr(together.pictures[2], alone) >= SAME_IN_A_BATCH
    assert psnr(together.pictures[1], alone) < VISIBLE


def test_picture_is_cut_to_fit_or_resized_as_asked(both: tuple[Studio, Diffusers], tmp_path: Path) -> None:
    studio, diffusers = both
    photograph(77, 45).save(tmp_path / "odd.png")
    drawn = studio.draw(PROMPT, guidance_scale=7.5, input_image=tmp_path / "odd.png")
    assert drawn.pictures[0].shape == (40, 72, 3)
    (expected,) = diffusers.draw(PROMPT, image=Image.open(tmp_path / "odd.png"), strength=0.8)
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS
    drawn = studio.draw(PROMPT, guidance_scale=7.5, input_image=tmp_path / "odd.png", height=64, width=32)
    resized = Image.open(tmp_path / "odd.png").resize((32, 64), Image.Resampling.LANCZOS)
    (expected,) = diffusers.draw(PROMPT, image=resized, strength=0.8)
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS


def test_recipe_needs_the_same_picture_again(both: tuple[Studio, Diffusers], picture: Path, tmp_path: Path) -> None:
    studio, _ = both
    drawn = studio.draw(PROMPT, input_image=picture)
    again = studio.draw(recipe=drawn.paths[0], input_image=picture, output_dir=tmp_path / "again")
    np.testing.assert_array_equal(again.pictures[0], drawn.pictures[0])
    photograph().transpose(Image.Transpose.ROTATE_90).save(tmp_path / "other.png")
    recipe = ["--recipe", str(drawn.paths[0]), "--model", str(studio.model), *studio.folders()]
    ended = studio.here(*recipe, "--input-image", str(tmp_path / "other.png"))
    assert_refused(ended, "other.png")
    for zero in ("--seed=0", "--guidance-scale=0", "--clip-skip=0", "--image-strength=0"):
        ended = studio.here(*recipe, "--input-image", str(picture), zero)
        assert_refused(ended, zero.split("=")[0])
    ended = replace(studio, script="demo_turbo.py").here(*recipe)
    assert_refused(ended, "demo_img2img.py")


def test_timing_table_has_a_row_for_the_encoder(studio: Studio, picture: Path) -> None:
    drawn = replace(studio, script="demo_img2img.py").draw(PROMPT, input_image=picture)
    assert "VAE-Enc" in drawn.err
    assert "VAE-Enc" not in studio.draw(PROMPT).err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([PROMPT], "--input-image"),
        ([PROMPT, "--input-image=missing.png"], "missing.png"),
        ([PROMPT, "--input-image=words.png"], "words.png"),
        ([PROMPT, "--input-image=speck.png"], "speck.png"),
        ([PROMPT, "--input-image=photograph.png", "--image-strength=1.5"], "--image-strength"),
        ([PROMPT, "--input-image=photograph.png", "--image-strength=nan"], "--image-strength"),
        ([PROMPT, "--input-image=photograph.png", "--image-strength=0.1", "--denoising-steps=5"], "--image-strength"),
        ([PROMPT, "--input-image=photograph.png", "--height=-8"], "--height"),
        ([PROMPT, "--input-image=photograph.png", "--width=30"], "--width"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_refused(
    arguments: list[str], said: str, studio: Studio, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "words.png").write_text("not a picture")
    photograph(5, 64).save(tmp_path / "speck.png")
    monkeypatch.chdir(tmp_path)
    before = listing(tmp_path)
    ended = replace(studio, script="demo_img2img.py").here(*arguments, "--model", str(studio.model), *studio.folders())
    assert_refused(ended, said)
    assert listing(tmp_path) == before


def test_text_to_image_has_no_such_flag(studio: Studio) -> None:
    ended = studio.here(PROMPT, "--input-image=x.png", "--model", str(studio.model), *studio.folders())
    assert_refused(ended, "--input-image is not a flag")
