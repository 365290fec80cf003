"""One file in the original layout is the same model as the folder it was written from."""

import inspect
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from darkroom.checkpoint.single_file import published_config  # noqa: E402
from darkroom.errors import InvalidRequest  # noqa: E402
from tests.checkpoint.original_layout import bfl, mmdit, write  # noqa: E402
from tests.support import (  # noqa: E402
    SENTENCE,
    SOON,
    Diffusers,
    Studio,
    assert_refused,
    changed_copy,
    edit_json,
    one_line,
    psnr,
    write_tiny_flux_model,
)

PROMPT = "a red apple on the house"
SAME_AS_DIFFUSERS = 45


@pytest.fixture(scope="module")
def file(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(Diffusers(tiny_model).pipeline, tmp_path_factory.mktemp("single") / "tiny.safetensors")


@pytest.fixture(autouse=True)
def unpacking_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child's work in this process, where torch is loaded already."""
    monkeypatch.setattr(
        "darkroom.checkpoint.single_file.run_in_child", lambda function, *given, verbose: function(*given)
    )


def test_stable_diffusion(studio: Studio, tiny_model: Path, file: Path, diffusers_tiny: Diffusers) -> None:
    drawn = studio.draw(PROMPT, model=file, config=tiny_model)
    assert psnr(drawn.pictures[0], diffusers_tiny.draw(PROMPT)[0]) >= SAME_AS_DIFFUSERS
    again = studio.draw(PROMPT, model=file, config=tiny_model)
    assert again.children == [] and again.paths == drawn.paths
    remade = studio.draw(model=file, config=tiny_model, recipe=drawn.paths[0])
    assert psnr(remade.pictures[0], drawn.pictures[0]) == float("inf")


def test_sdxl(xl_studio: Studio, tiny_xl_model: Path, diffusers_tiny_xl: Diffusers, tmp_path: Path) -> None:
    file = write(diffusers_tiny_xl.pipeline, tmp_path / "xl.safetensors")
    drawn = xl_studio.draw(PROMPT, model=file, config=tiny_xl_model, guidance_scale=7.5)
    assert psnr(drawn.pictures[0], diffusers_tiny_xl.draw(PROMPT)[0]) >= SAME_AS_DIFFUSERS


def test_stable_diffusion_3(studio: Studio, tiny_sd3_model: Path, tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    diffusers, sd3 = Diffusers(tiny_sd3_model), replace(studio, script="demo_txt2img_sd3.py")
    transformer = diffusers.pipeline.transformer.state_dict()
    made = convert_sd3_transformer_checkpoint_to_diffusers(mmdit(diffusers.pipeline.transformer))
    assert made.keys() == transformer.keys() and all(torch.equal(made[name], transformer[name]) for name in made)
    file = write(diffusers.pipeline, tmp_path / "sd3.safetensors")
    drawn = sd3.draw(PROMPT, model=file, config=tiny_sd3_model, guidance_scale=7.5, engine="torch")
    assert psnr(drawn.pictures[0], diffusers.draw(PROMPT)[0]) >= SAME_AS_DIFFUSERS
    save_file({name: value for name, value in load_file(file).items() if "t5xxl" not in name}, file)
    without = sd3.draw(PROMPT, model=file, config=tiny_sd3_model, guidance_scale=7.5, engine="torch")
    (expected,) = Diffusers(tiny_sd3_model, text_encoder_3=None, tokenizer_3=None).draw(PROMPT)
    assert psnr(without.pictures[0], expected) >= SAME_AS_DIFFUSERS


def test_flux(studio: Studio, tmp_path: Path) -> None:
    from diffusers.loaders import single_file_utils

    model, flux = write_tiny_flux_model(tmp_path / "flux"), replace(studio, script="demo_txt2img_flux.py")
    diffusers = Diffusers(model)
    transformer = diffusers.pipeline.transformer.state_dict()
    convert = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    exec(convert.replace("3072", "48"), scope := dict(vars(single_file_utils)))  # it is for one width
    made = scope["convert_flux_transformer_checkpoint_to_diffusers"](bfl(diffusers.pipeline.transformer))
    assert made.keys() == transformer.keys() and all(torch.equal(made[name], transformer[name]) for name in made)
    file, size = write(diffusers.pipeline, tmp_path / "flux.safetensors"), {"height": 64, "width": 64}
    drawn = flux.draw(PROMPT, model=file, config=model, guidance_scale=3.5, engine="torch", **size)
    (expected,) = diffusers.draw(PROMPT, guidance_scale=3.5, max_sequence_length=SENTENCE, **size)
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS


def test_its_own_precision_is_kept(studio: Studio, tiny_model: Path, file: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.safetensors"
    save_file({name: value.half() for name, value in load_file(file).items()}, half)
    studio.draw(PROMPT, model=half, config=tiny_model)
    (folder,) = studio.onnx.glob("model-half-*")
    assert {value.dtype for value in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").values()} == {
        torch.float16
    }


@pytest.mark.parametrize(
    "name, size, repository",
    [
        ("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", 768, "v1-5"),
        ("conditioner.embedders.1.model.positional_embedding", 1280, "xl-base-1.0"),
        ("conditioner.embedders.0.model.positional_embedding", 1280, "xl-refiner-1.0"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.bias", 4608, "3-medium-diffusers"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn2.qkv.bias", 4608, "3.5-medium"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.bias", 7296, "3.5-large"),
        ("model.diffusion_model.guidance_in.in_layer.weight", 256, "FLUX.1-dev"),
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.bias", 9216, "FLUX.1-schnell"),
    ],
)
def test_the_published_architectures_are_told_by_their_tensors(
    name: str, size: int, repository: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(1, size), "model.diffusion_model.out.2.bias": torch.zeros(4)}, path)
    assert published_config(path).endswith(repository)


@pytest.mark.parametrize(
    ("more", "metadata", "repository"),
    [
        ({}, {"modelspec.prediction_type": "epsilon"}, "stable-diffusion-2-base"),
        ({}, {"modelspec.prediction_type": "v"}, "stable-diffusion-2-1"),
        ({"v_pred": torch.zeros(0)}, {}, "stable-diffusion-2-1"),
        ({"global_step": torch.tensor(875000)}, {}, None),
    ],
)
def test_which_of_two_models_with_the_same_tensors_it_is_has_to_be_said(
    more: dict, metadata: dict, repository: str | None, tmp_path: Path
) -> None:
    """Stable Diffusion 2 base predicts noise, 2.1 a velocity: the wrong one makes noise of a prompt, in silence."""
    path = tmp_path / "v2.safetensors"
    name = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    save_file({name: torch.zeros(1, 1024)} | more, path, metadata or None)
    if repository is None:
        with pytest.raises(InvalidRequest, match=r"Say which with --config .*2-base or --config .*2-1"):
            published_config(path)
    else:
        assert published_config(path).endswith(repository)


@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("rows", [False, True])
def test_weights_in_8_bits_are_multiplied_by_their_scales(
    scale: str, rows: bool, studio: Studio, tiny_model: Path, file: Path, diffusers_tiny: Diffusers, tmp_path: Path
) -> None:
    tensors, small = load_file(file), {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for name, value in tensors.items():
        small[name] = value
        if name.startswith("model.diffusion_model.") and name.endswith(".weight") and value.dim() == 2:
            factor = (value.abs().amax(1) if rows else value.abs().max()) / 448
            small[name] = (value / (factor[:, None] if rows else factor)).to(torch.float8_e4m3fn)
            small[f"{name.removesuffix('weight')}{scale}"] = factor
    save_file(small, tmp_path / "small.safetensors")
    drawn = studio.draw(PROMPT, model=tmp_path / "small.safetensors", config=tiny_model)
    assert (
        psnr(drawn.pictures[0], diffusers_tiny.draw(PROMPT)[0]) >= 30
    )  # what 8 bits leave of it; 13 dB without scales


def test_markers_say_how_it_was_trained(studio: Studio, tiny_model: Path, file: Path, tmp_path: Path) -> None:
    """As a folder whose scheduler's configuration says the same."""
    says = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    config = tiny_model / "scheduler" / "scheduler_config.json"
    folder = changed_copy(
        tiny_model, tmp_path / "v", lambda copy: edit_json(copy / "scheduler/scheduler_config.json", **says)
    )
    assert json.loads(config.read_text())["prediction_type"] == "epsilon"
    marked = tmp_path / "marked.safetensors"
    save_file(load_file(file) | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, marked)
    drawn = studio.draw(PROMPT, model=marked, config=tiny_model, scheduler="DDIM")
    assert psnr(drawn.pictures[0], studio.draw(PROMPT, model=folder, scheduler="DDIM").pictures[0]) == float("inf")


def test_text_encoder_may_be_named_as_before_2023(
    studio: Studio, tiny_model: Path, file: Path, diffusers_tiny: Diffusers, tmp_path: Path
) -> None:
    old = {name.replace(".text_model.", "."): value for name, value in load_file(file).items()}
    save_file(old, tmp_path / "old.safetensors")
    drawn = studio.draw(PROMPT, model=tmp_path / "old.safetensors", config=tiny_model)
    assert psnr(drawn.pictures[0], diffusers_tiny.draw(PROMPT)[0]) >= SAME_AS_DIFFUSERS


def test_what_training_left_in_a_file_is_of_no_use(
    studio: Studio, tiny_model: Path, file: Path, diffusers_tiny: Diffusers, tmp_path: Path
) -> None:
    names = (
        "model_ema.decay",
        "alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "global_step",
        "first_stage_model.loss.x",
    )
    names += ("cond_stage_model.transformer.text_model.embeddings.position_ids", "cond_stage_model.logit_scale")
    save_file(load_file(file) | {name: torch.zeros(1) for name in names}, tmp_path / "left.safetensors")
    drawn = studio.draw(PROMPT, model=tmp_path / "left.safetensors", config=tiny_model)
    assert psnr(drawn.pictures[0], diffusers_tiny.draw(PROMPT)[0]) >= SAME_AS_DIFFUSERS


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.output_blocks.0.9.weight",
        "model.diffusion_model.input_blocks.1.1.adapter.weight",
        "edm_mean",
        "edm_vpred.sigma_max",
        "control_model.input_blocks.0.0.weight",
        "clip_vision.weight",
    ],
)
def test_tensors_that_may_mean_something_are_named(
    name: str, studio: Studio, tiny_model: Path, file: Path, tmp_path: Path
) -> None:
    save_file(load_file(file) | {name: torch.ones(1)}, tmp_path / "more.safetensors")
    asked = (PROMPT, f"--model={tmp_path / 'more.safetensors'}", f"--config={tiny_model}", "--denoising-steps=1")
    assert_refused(studio.here(*asked, *studio.folders()), name)


def test_file_without_a_vae_runs_with_another(
    studio: Studio, tiny_model: Path, file: Path, diffusers_tiny: Diffusers, tmp_path: Path
) -> None:
    bare = tmp_path / "bare.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "first_stage" not in name}, bare)
    asked = (PROMPT, f"--model={bare}", f"--config={tiny_model}", "--denoising-steps=1", *studio.folders())
    assert_refused(studio.here(*asked), "name one with --vae")
    drawn = studio.draw(PROMPT, model=bare, config=tiny_model, vae=tiny_model)
    assert psnr(drawn.pictures[0], diffusers_tiny.draw(PROMPT)[0]) >= SAME_AS_DIFFUSERS


def test_its_configuration_is_fetched_from_the_hub(studio: Studio, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    name = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    save_file({name: torch.zeros(1, 768)}, path)
    ended = studio.shell(PROMPT, f"--model={path}", *studio.folders(), timeout=SOON)
    assert ended.code == 1 and one_line(ended.err) and "stable-diffusion-v1-5 could not be fetched" in ended.err
    assert "model.safetensors: taken for a model like stable-diffusion-v1-5" in ended.out


def test_what_its_header_tells_is_said_before_the_hub_is_asked(studio: Studio, tmp_path: Path) -> None:
    attention = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    first = "model.diffusion_model.input_blocks.0.0.weight"
    inpainting, xl = tmp_path / "inpainting.safetensors", tmp_path / "xl.safetensors"
    save_file({attention: torch.zeros(1, 768), first: torch.zeros(1, 9, 3, 3)}, inpainting)
    second = "conditioner.embedders.1.model.positional_embedding"
    save_file({second: torch.zeros(1, 1280), first: torch.zeros(1, 4, 3, 3)}, xl)
    for file, words in ((inpainting, "9 channels"), (xl, "SDXL")):
        assert_refused(studio.here(PROMPT, f"--model={file}", *studio.folders()), words)


def test_a_suffix_in_capitals_is_a_suffix(studio: Studio, file: Path, tiny_model: Path, tmp_path: Path) -> None:
    capital = Path(shutil.copy(file, tmp_path / "MODEL.SAFETENSORS"))
    lower, upper = (studio.draw(PROMPT, model=each, config=tiny_model).pictures[0] for each in (file, capital))
    assert psnr(lower, upper) == float("inf")


def test_what_is_wrong_with_a_file_is_said_in_a_line(
    studio: Studio, tiny_model: Path, tiny_xl_model: Path, file: Path, tmp_path: Path
) -> None:
    tensors = load_file(file)
    unet = next(name for name in tensors if name.startswith("model.diffusion_model.middle"))
    save_file({name: value for name, value in tensors.items() if name != unet}, tmp_path / "less.safetensors")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-9])
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    (tmp_path / "model.txt").write_text("text")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    described = f"--config={tiny_model}"
    for model, arguments, words in (
        (tmp_path / "less.safetensors", [described], "less.safetensors"),
        (tmp_path / "other.safetensors", [described], "not a whole Stable Diffusion"),
        (tmp_path / "cut.safetensors", [described], "truncated"),
        (tmp_path / "model.ckpt", [described], "is a pickle"),
        (tmp_path / "model.txt", [described], "is no model"),
        (file, [], "of no architecture that is known"),
        (file, [f"--config={bare}"], "is missing"),
        (file, [f"--config={tmp_path / 'none'}"], "is missing"),
        (tiny_model, [described], "--config describes a single-file model"),
    ):
        ended = studio.here(PROMPT, f"--model={model}", *arguments, "--denoising-steps=1", *studio.folders())
        assert_refused(ended, words)
    ended = replace(studio, script="demo_txt2img_xl.py").here(
        PROMPT, f"--model={file}", described, "--denoising-steps=1", *studio.folders()
    )
    assert_refused(ended, "SDXL")
    assert not [path for path in studio.onnx.iterdir() if path.name.startswith(".model") and path.is_dir()]
