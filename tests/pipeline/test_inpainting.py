"""Inpainting against diffusers' own pipelines: models of both families, with a mask that is blended in or given."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from tests.pipeline.test_image_to_image import PROMPT, photograph
from tests.support import Diffusers, Studio, assert_refused, flags, louder, pixels, psnr

SAME_AS_DIFFUSERS, VISIBLE = 45, 40
"""dB."""

RUNTIMES = ("openvino", "onnxruntime", "torch", "jax")


def ellipse(width: int = 64, height: int = 64) -> Image.Image:
    mask = Image.new("L", (width, height), 0)
    ImageDraw.Draw(mask).ellipse((width // 8, height // 4, width * 3 // 4, height * 7 // 8), fill=255)
    return mask


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    photograph().save(tmp_path / "photograph.png")
    return tmp_path / "photograph.png"


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    ellipse().save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def with_nine_channels(model: Path, folder: Path) -> Path:
    """The same with a UNet that was made for a mask."""
    import torch
    from diffusers import UNet2DConditionModel

    shutil.copytree(model, folder)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    torch.manual_seed(99)
    wide = UNet2DConditionModel.from_config(dict(unet.config) | {"in_channels": 9})
    weights = {name: value for name, value in unet.state_dict().items() if not name.startswith("conv_in")}
    assert not wide.load_state_dict(weights, strict=False).unexpected_keys
    louder(wide, 3, "conv_in.weight")
    wide.save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="module")
def wide_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_nine_channels(tiny_model, tmp_path_factory.mktemp("wide") / "wide")


@pytest.fixture(scope="module")
def wide_xl_model(tiny_xl_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_nine_channels(tiny_xl_model, tmp_path_factory.mktemp("wide") / "wide-xl")


@pytest.fixture(scope="module")
def references() -> dict[Path, Diffusers]:
    return {}


@pytest.fixture(params=["sd", "xl", "sd-9", "xl-9"])
def pair(request: pytest.FixtureRequest, studio: Studio, references: dict[Path, Diffusers]) -> tuple[Studio, Diffusers]:
    """The script on the tiny models of each kind, and diffusers on the same."""
    names = {"sd": "tiny_model", "xl": "tiny_xl_model", "sd-9": "wide_model", "xl-9": "wide_xl_model"}
    model = request.getfixturevalue(names[request.param])
    if model not in references:
        references[model] = Diffusers(model)
    return replace(studio, script="demo_inpaint.py", model=model), references[model]


def both(pair: tuple[Studio, Diffusers], picture: Path, mask: Path, **more: Any) -> tuple[np.ndarray, np.ndarray]:
    """Our picture, all of it as the VAE has it, and diffusers'."""
    studio, diffusers = pair
    ours = {"denoising_steps": 8, "guidance_scale": 7.5, "no_keep": True} | more
    drawn = studio.draw(PROMPT, input_image=picture, mask_image=mask, **ours)
    theirs = {name: more[name] for name in ("scheduler", "guidance_scale") if name in more}
    (expected,) = diffusers.draw(
        PROMPT,
        denoising_steps=ours["denoising_steps"],
        image=Image.open(picture),
        mask_image=Image.open(mask),
        strength=more.get("image_strength", 1.0),
        **theirs,
    )
    return drawn.pictures[0], expected


@pytest.mark.parametrize("strength", [0.3, 0.7, 1.0])
def test_the_picture_is_that_of_diffusers(
    strength: float, pair: tuple[Studio, Diffusers], picture: Path, mask: Path
) -> None:
    made, expected = both(pair, picture, mask, image_strength=strength)
    assert psnr(made, expected) >= SAME_AS_DIFFUSERS
    everything = Image.new("L", (64, 64), 255)
    (whole,) = pair[1].draw(
        PROMPT, denoising_steps=8, image=Image.open(picture), mask_image=everything, strength=strength
    )
    assert psnr(made, whole) < VISIBLE


@pytest.mark.parametrize(
    "scheduler",
    ["DDIM", "DDPM", "DEIS", "DPM++", "DPM++SDE", "Euler", "EulerA", "Heun", "KDPM2A", "LCM", "LMSD", "PNDM", "TCD"],
)
@pytest.mark.parametrize("pair", ["sd"], indirect=True)
def test_every_scheduler_blends_the_picture_in(
    scheduler: str, pair: tuple[Studio, Diffusers], picture: Path, mask: Path
) -> None:
    made, expected = both(pair, picture, mask, scheduler=scheduler, image_strength=0.8)
    assert psnr(made, expected) >= SAME_AS_DIFFUSERS


@pytest.mark.parametrize("pair", ["sd-9"], indirect=True)
@pytest.mark.parametrize("scheduler", ["UniPC", "EulerA"])
def test_a_model_that_is_given_the_mask_takes_those_that_cannot_blend(
    scheduler: str, pair: tuple[Studio, Diffusers], picture: Path, mask: Path
) -> None:
    made, expected = both(pair, picture, mask, scheduler=scheduler)
    assert psnr(made, expected) >= SAME_AS_DIFFUSERS


@pytest.mark.parametrize("engine", RUNTIMES)
@pytest.mark.parametrize("pair", ["sd", "sd-9"], indirect=True)
def test_every_engine_makes_it(engine: str, pair: tuple[Studio, Diffusers], picture: Path, mask: Path) -> None:
    made, expected = both(pair, picture, mask, engine=engine, scheduler="EulerA")
    assert psnr(made, expected) >= SAME_AS_DIFFUSERS


@pytest.mark.parametrize("pair", ["sd-9", "xl-9"], indirect=True)
def test_without_guidance_too(pair: tuple[Studio, Diffusers], picture: Path, mask: Path) -> None:
    made, expected = both(pair, picture, mask, guidance_scale=1.0)
    assert psnr(made, expected) >= SAME_AS_DIFFUSERS


@pytest.mark.parametrize("pair", ["sd", "sd-9"], indirect=True)
def test_what_the_mask_leaves_keeps_its_bytes(pair: tuple[Studio, Diffusers], picture: Path, mask: Path) -> None:
    studio, _ = pair
    drawn = studio.draw(PROMPT, PROMPT, input_image=picture, mask_image=mask, batch_size=2)
    original, anew = pixels(picture), np.array(ellipse()) == 255
    for made in drawn.pictures:
        np.testing.assert_array_equal(made[~anew], original[~anew])
        assert psnr(made[anew], original[anew]) < VISIBLE
    loose = studio.draw(PROMPT, input_image=picture, mask_image=mask, no_keep=True)
    assert (loose.pictures[0][~anew] != original[~anew]).any()
    alone = studio.draw(PROMPT, input_image=picture, mask_image=mask, seed=7).pictures[0]
    assert psnr(drawn.pictures[2], alone) >= 50


@pytest.mark.parametrize("pair", ["sd"], indirect=True)
class TestMasks:
    def test_an_edge_fades(self, pair: tuple[Studio, Diffusers], picture: Path, mask: Path) -> None:
        made, expected = both(pair, picture, mask, mask_blur=3.0)
        blurred = ellipse().filter(ImageFilter.GaussianBlur(3))
        (expected,) = pair[1].draw(
            PROMPT, denoising_steps=8, image=Image.open(picture), mask_image=blurred, strength=1.0
        )
        assert psnr(made, expected) >= SAME_AS_DIFFUSERS
        kept = pair[0].draw(
            PROMPT, denoising_steps=8, guidance_scale=7.5, input_image=picture, mask_image=mask, mask_blur=3.0
        )
        share = np.array(blurred, np.float64)[..., None] / 255
        mixed = share * made + (1 - share) * pixels(picture)
        assert np.abs(kept.pictures[0] - mixed).max() <= 0.51

    def test_what_is_transparent_is_painted(
        self, pair: tuple[Studio, Diffusers], picture: Path, mask: Path, tmp_path: Path
    ) -> None:
        expected = pair[0].draw(PROMPT, input_image=picture, mask_image=mask)
        clear = photograph().convert("RGBA")
        clear.putalpha(Image.fromarray(255 - np.array(ellipse())))
        clear.save(tmp_path / "clear.png")
        made = pair[0].draw(PROMPT, input_image=tmp_path / "clear.png")
        np.testing.assert_array_equal(made.pictures[0], expected.pictures[0])

    def test_what_is_added_around_is_painted(self, pair: tuple[Studio, Diffusers], picture: Path) -> None:
        command = [PROMPT, *flags(model=pair[0].model, input_image=picture, engine="openvino", seed=5, json=True)]
        ended = pair[0].here(*command, "--outpaint", "8", "16", "24", "0", *pair[0].folders())
        assert ended.code == 0, ended.err
        (path,) = pair[0].output.glob("inpaint-*")
        made = pixels(path)
        assert made.shape == (80, 96, 3)
        np.testing.assert_array_equal(made[16:, 8:72], pixels(picture))
        assert len(np.unique(made[:16].reshape(-1, 3), axis=0)) > 100

    def test_a_recipe_needs_the_same_mask(
        self, pair: tuple[Studio, Diffusers], picture: Path, mask: Path, tmp_path: Path
    ) -> None:
        studio, _ = pair
        drawn = studio.draw(PROMPT, input_image=picture, mask_image=mask, mask_blur=2.0)
        given = {"recipe": drawn.paths[0], "input_image": picture}
        again = studio.draw(**given, mask_image=mask, output_dir=tmp_path / "again")
        np.testing.assert_array_equal(again.pictures[0], drawn.pictures[0])
        ellipse().transpose(Image.Transpose.ROTATE_90).save(tmp_path / "other.png")
        rest = [*flags(**given, model=studio.model), *studio.folders()]
        assert_refused(studio.here(*rest, f"--mask-image={tmp_path / 'other.png'}"), "--mask-image")
        assert_refused(studio.here(*rest, f"--mask-image={mask}", "--mask-blur=0"), "--mask-blur", "--recipe")

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            ([], "--mask-image is needed"),
            (["--mask-image=missing.png"], "missing.png"),
            (["--mask-image=words.png"], "words.png"),
            (["--mask-image=mask.png", "--mask-blur=-1"], "--mask-blur"),
            (["--mask-image=mask.png", "--mask-blur=nan"], "--mask-blur"),
            (["--outpaint", "1", "2", "3", "4"], "--outpaint"),
            (["--outpaint", "8", "8", "8", "8", "--height=16"], "--height 16"),
            (["--mask-image=mask.png", "--scheduler=UniPC"], "UniPC"),
        ],
    )
    def test_what_cannot_be_done_is_refused(
        self,
        more: list[str],
        said: str,
        pair: tuple[Studio, Diffusers],
        picture: Path,
        mask: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        (tmp_path / "words.png").write_text("not a picture")
        monkeypatch.chdir(tmp_path)
        rest = flags(model=pair[0].model, input_image=picture, engine="openvino")
        assert_refused(pair[0].here(PROMPT, *rest, *more, *pair[0].folders()), said)


def test_other_scripts_send_an_inpainting_model_to_this_one(studio: Studio, wide_model: Path, tmp_path: Path) -> None:
    ended = studio.here(PROMPT, f"--model={wide_model}", *studio.folders())
    assert_refused(ended, "demo_inpaint.py", "--mask-image")
    (tmp_path / "rows.txt").write_text("a cat\n")
    ended = studio.here(f"--prompts={tmp_path / 'rows.txt'}", f"--model={wide_model}", *studio.folders())
    assert_refused(ended, "demo_inpaint.py")


def test_a_mask_that_marks_nothing_is_a_warning(studio: Studio, picture: Path, tmp_path: Path) -> None:
    Image.new("L", (64, 64), 90).save(tmp_path / "dark.png")
    inpainting = replace(studio, script="demo_inpaint.py")
    drawn = inpainting.draw(PROMPT, input_image=picture, mask_image=tmp_path / "dark.png")
    assert "dark everywhere" in drawn.err
