"""A model with another VAE than its own: `--vae`."""

from pathlib import Path

import numpy as np
import pytest

from tests.support import Diffusers, Studio, assert_refused, changed_copy, edit_json, flags, one_line, psnr

PROMPT = "red apple"


@pytest.fixture(scope="module")
def vae(tiny_xl_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE in a folder of its own, with louder colours than the model's, that may run in float16."""
    import torch
    from diffusers import AutoencoderKL

    network = AutoencoderKL.from_pretrained(tiny_xl_model, subfolder="vae")
    with torch.no_grad():
        network.decoder.conv_out.weight *= 2
        network.decoder.conv_out.bias += 0.2
    folder = tmp_path_factory.mktemp("vaes") / "louder"
    network.register_to_config(force_upcast=False)
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(tiny_xl_model: Path, vae: Path) -> np.ndarray:
    """What diffusers makes with it."""
    from diffusers import AutoencoderKL

    diffusers = Diffusers(tiny_xl_model)
    diffusers.pipeline.vae = AutoencoderKL.from_pretrained(vae)
    return diffusers.draw(PROMPT)[0]


def test_decodes_as_it_does_in_diffusers(xl_studio: Studio, vae: Path, expected: np.ndarray) -> None:
    own = xl_studio.draw(PROMPT, guidance_scale=7.5)
    other = xl_studio.draw(PROMPT, guidance_scale=7.5, vae=vae)
    assert psnr(other.pictures[0], expected) >= 45
    assert psnr(own.pictures[0], expected) < 30
    assert other.result["artefacts"]["unet"] == own.result["artefacts"]["unet"]
    assert other.result["artefacts"]["vae"] != own.result["artefacts"]["vae"]


def test_can_be_taken_from_a_model(xl_studio: Studio, vae: Path, expected: np.ndarray, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(vae, tmp_path / "model" / "vae")
    drawn = xl_studio.draw(PROMPT, guidance_scale=7.5, vae=tmp_path / "model")
    assert psnr(drawn.pictures[0], expected) >= 45


def test_a_recipe_asks_for_it_and_replays(xl_studio: Studio, vae: Path) -> None:
    drawn = xl_studio.draw(PROMPT, vae=vae)
    ended = xl_studio.here(*flags(recipe=drawn.paths[0], model=xl_studio.model), *xl_studio.folders())
    assert_refused(ended, "name it with --vae")
    again = xl_studio.draw(recipe=drawn.paths[0], vae=vae)
    assert np.array_equal(again.pictures[0], drawn.pictures[0])


def test_halved_where_its_configuration_allows_it(xl_studio: Studio, vae: Path, expected: np.ndarray) -> None:
    """SDXL's own overflows in float16 and so is computed in float32; one that was made to fit is not."""
    asked = {"engine": "torch", "precision": "fp16", "guidance_scale": 7.5}
    fits, plain = xl_studio.draw(PROMPT, vae=vae, **asked), xl_studio.draw(PROMPT, **asked)
    assert psnr(fits.pictures[0], expected) >= 30
    whole = xl_studio.draw(PROMPT, engine="torch", guidance_scale=7.5)
    assert plain.result["artefacts"]["vae"] == whole.result["artefacts"]["vae"]
    assert fits.result["artefacts"]["vae"] != xl_studio.draw(PROMPT, vae=vae, engine="torch").result["artefacts"]["vae"]


@pytest.mark.parametrize("broken", ["missing", "no vae", "truncated"])
def test_what_is_no_vae_is_refused(xl_studio: Studio, vae: Path, tmp_path: Path, broken: str) -> None:
    changes = {
        "missing": lambda folder: (folder / "diffusion_pytorch_model.safetensors").unlink(),
        "no vae": lambda folder: edit_json(folder / "config.json", _class_name="UNet2DConditionModel"),
        "truncated": lambda folder: (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"short"),
    }
    folder = changed_copy(vae, tmp_path / "vae", changes[broken])
    ended = xl_studio.here(PROMPT, *flags(model=xl_studio.model, vae=folder), *xl_studio.folders())
    assert_refused(ended)
    ended = xl_studio.here(PROMPT, *flags(model=xl_studio.model, vae=tmp_path / "nowhere"), *xl_studio.folders())
    assert_refused(ended, "nowhere")


def test_from_the_hub_without_a_network_is_one_line(xl_studio: Studio) -> None:
    ended = xl_studio.here(
        PROMPT, *flags(model=xl_studio.model, vae="madebyollin/sdxl-vae-fp16-fix"), *xl_studio.folders()
    )
    assert ended.code == 1 and one_line(ended.err) and "madebyollin/sdxl-vae-fp16-fix could not be fetched" in ended.err


@pytest.mark.parametrize("layout", ["diffusers", "original", "cut out of a checkpoint"])
def test_one_file_is_enough(
    layout: str, xl_studio: Studio, tiny_xl_model: Path, vae: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    from tests.checkpoint.original_layout import vae_tensors

    tensors = load_file(vae / "diffusion_pytorch_model.safetensors")
    if layout != "diffusers":
        prefix = "" if layout == "original" else "first_stage_model."
        tensors = {prefix + name: value for name, value in vae_tensors(tensors, levels=4).items()}
    save_file(tensors, tmp_path / "VAE.safetensors")
    drawn = xl_studio.draw(PROMPT, guidance_scale=7.5, vae=tmp_path / "VAE.safetensors")
    assert psnr(drawn.pictures[0], expected) >= 45


def test_file_that_holds_no_vae_is_refused(xl_studio: Studio, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros(1, np.float32)}, tmp_path / "other.safetensors")
    (tmp_path / "vae.pt").write_bytes(b"pickle")
    for name, words in (("other.safetensors", "holds no VAE"), ("vae.pt", "no safetensors file")):
        asked = [PROMPT, *flags(model=xl_studio.model, vae=tmp_path / name), *xl_studio.folders()]
        assert_refused(xl_studio.here(*asked), words)


@pytest.fixture(scope="module")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder of TAESD's kind with random weights."""
    import torch
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vaes") / "taesd"
    AutoencoderTiny(num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "torch"])
def test_tiny_autoencoder_makes_the_picture_of_diffusers(
    engine: str, studio: Studio, tiny_model: Path, tiny_vae: Path, tmp_path: Path
) -> None:
    """From a picture, too, of whose latents it draws no sample."""
    from dataclasses import replace

    from diffusers import AutoencoderTiny
    from PIL import Image

    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(picture)
    diffusers = Diffusers(tiny_model)
    diffusers.pipeline.vae = diffusers._from_image.vae = AutoencoderTiny.from_pretrained(tiny_vae)
    drawn = studio.draw(PROMPT, vae=tiny_vae, engine=engine)
    assert psnr(drawn.pictures[0], diffusers.draw(PROMPT)[0]) >= 45
    from_image = replace(studio, script="demo_img2img.py")
    drawn = from_image.draw(PROMPT, vae=tiny_vae, engine=engine, input_image=picture, denoising_steps=4)
    expected = diffusers.draw(PROMPT, image=Image.open(picture), denoising_steps=4, strength=0.8)
    assert psnr(drawn.pictures[0], expected[0]) >= 45
