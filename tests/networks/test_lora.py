"""LoRA files fused at export make the pictures that diffusers makes with them, in either layout, one or several."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from darkroom.store.fingerprints import Fingerprints  # noqa: E402
from tests.support import SCRIPT, SOON, Diffusers, Studio, assert_refused, one_line, pixels, psnr  # noqa: E402

RANK, LAYOUTS = 3, ("diffusers", "kohya")
PROMPT = "a red apple on the house"
WITHOUT_TORCH = """
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
for heavy in ("torch", "diffusers", "transformers", "peft", "onnx"):
    sys.modules[heavy] = None
runpy.run_path(sys.argv[0], run_name="__main__")
"""

TARGETS = {
    "unet": ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "conv_shortcut"),
    "text_encoder": ("q_proj", "v_proj", "out_proj", "fc1"),
    "text_encoder_2": ("q_proj", "out_proj", "fc2"),
}
KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}


def write_lora(
    path: Path,
    model: Path,
    layout: str = "diffusers",
    parts: tuple[str, ...] = ("unet", "text_encoder"),
    seed: int = 0,
) -> Path:
    """Random changes to a model's layers, strong enough to see: tensors as diffusers or as kohya names them."""
    pipeline = Diffusers(model).pipeline
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for part in parts:
        for name, layer in getattr(pipeline, part).named_modules():
            if not name.endswith(TARGETS[part]) or not hasattr(layer, "weight"):
                continue
            if layout == "kohya" and name.endswith(("conv1", "conv_shortcut")):
                continue
            out, into, *kernel = layer.weight.shape
            size = layer.weight.std() * (2 / into) ** 0.5
            down = torch.randn(RANK, into, *kernel, generator=generator) * (size if part == "unet" else 1 / into**0.5)
            up = torch.randn(out, RANK, *(1 for _ in kernel), generator=generator)
            up *= 1 if part == "unet" else layer.weight.std()
            if part != "unet" and not name.startswith("text_model."):
                name = f"text_model.{name}"  # as files from before transformers 5 have it
            if layout == "diffusers":
                tensors[f"{part}.{name}.lora_A.weight"] = down
                tensors[f"{part}.{name}.lora_B.weight"] = up
            else:
                prefix = "lora_te1" if part == "text_encoder" and "text_encoder_2" in parts else KOHYA[part]
                key = f"{prefix}_{name.replace('.', '_')}"
                tensors[f"{key}.lora_down.weight"] = down
                tensors[f"{key}.lora_up.weight"] = up
                tensors[f"{key}.alpha"] = torch.tensor(2.0)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path


def drawn_by_diffusers(model: Path, loras: list[tuple[Path, float]], **asked: Any) -> np.ndarray:
    """`loras`: (file, strength) pairs."""
    diffusers = Diffusers(model)
    # What `Diffusers` adds for --clip-skip; with it, LoRA files are taken to be from another version.
    vars(diffusers.pipeline.text_encoder).pop("text_model", None)
    names = [f"lora{index}" for index in range(len(loras))]
    for name, (path, _) in zip(names, loras, strict=True):
        diffusers.pipeline.load_lora_weights(str(path), adapter_name=name)
    diffusers.pipeline.set_adapters(names, [strength for _, strength in loras])
    return diffusers.draw(PROMPT, **asked)[0]


@pytest.fixture(scope="module")
def files(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    return {layout: write_lora(folder / f"{layout}.safetensors", tiny_model, layout) for layout in LAYOUTS}


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("engine", ["openvino", "torch"])
def test_one_lora_gives_diffusers_picture(
    studio: Studio, tiny_model: Path, files: dict[str, Path], layout: str, engine: str
) -> None:
    expected = drawn_by_diffusers(tiny_model, [(files[layout], 0.7)])
    drawn = studio.draw(PROMPT, engine=engine, lora_path=files[layout], lora_weight=0.7)
    assert psnr(drawn.pictures[0], expected) >= 45
    assert psnr(drawn.pictures[0], studio.draw(PROMPT, engine=engine).pictures[0]) < 30


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_a_suffix_in_capitals_is_a_suffix(
    layout: str, studio: Studio, tiny_model: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    capital = Path(shutil.copy(files[layout], tmp_path / "INK.SAFETENSORS"))
    drawn = studio.draw(PROMPT, lora_path=capital, lora_weight=0.7)
    assert psnr(drawn.pictures[0], drawn_by_diffusers(tiny_model, [(files[layout], 0.7)])) >= 45


def test_several_loras_with_weights_and_a_scale(studio: Studio, tiny_model: Path, files: dict[str, Path]) -> None:
    expected = drawn_by_diffusers(tiny_model, [(files["kohya"], 0.25), (files["diffusers"], 0.4)])
    arguments = ["--lora-path", str(files["kohya"]), str(files["diffusers"]), "--lora-weight", "0.5", "0.8"]
    ended = studio.here(
        PROMPT, *arguments, "--lora-scale=0.5", f"--model={tiny_model}", "--seed=5", "--denoising-steps=3",
        "--engine=openvino", *studio.folders(),
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert psnr(pixels(ended.out.splitlines()[-1]), expected) >= 45


def test_sdxl_with_both_text_encoders(xl_studio: Studio, tiny_xl_model: Path, tmp_path: Path) -> None:
    parts = ("unet", "text_encoder", "text_encoder_2")
    for layout in ("diffusers", "kohya"):
        path = write_lora(tmp_path / f"{layout}.safetensors", tiny_xl_model, layout, parts)
        expected = drawn_by_diffusers(tiny_xl_model, [(path, 1.0)])
        drawn = xl_studio.draw(PROMPT, lora_path=path, guidance_scale=7.5)
        assert psnr(drawn.pictures[0], expected) >= 45, layout


def test_the_refiner_goes_on_from_what_a_lora_made(
    xl_studio: Studio, tiny_xl_model: Path, tiny_refiner: Path, tmp_path: Path
) -> None:
    path = write_lora(tmp_path / "xl.safetensors", tiny_xl_model, parts=("unet", "text_encoder", "text_encoder_2"))
    from diffusers import DiffusionPipeline

    base, refiner = Diffusers(tiny_xl_model).pipeline, DiffusionPipeline.from_pretrained(tiny_refiner)
    vars(base.text_encoder).pop("text_model", None)
    base.load_lora_weights(str(path))
    asked = {"num_inference_steps": 6, "guidance_scale": 5.0, "generator": torch.Generator("cpu").manual_seed(5)}
    latents = base(PROMPT, output_type="latent", **asked).images
    expected = np.array(refiner(PROMPT, image=latents, strength=0.5, **asked).images[0])
    refined = {"enable_refiner": True, "refiner_model": tiny_refiner, "denoising_steps": 6, "image_strength": 0.5}
    drawn = xl_studio.draw(PROMPT, lora_path=path, **refined)
    assert psnr(drawn.pictures[0], expected) >= 45
    assert psnr(xl_studio.draw(PROMPT, **refined).pictures[0], expected) < 30


def test_engines_are_kept_apart_by_file_weight_and_scale_and_shared_otherwise(
    studio: Studio, tiny_model: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    def artefacts(**asked: Any) -> dict[str, str]:
        drawn = studio.draw(PROMPT, **asked)
        from darkroom.pipeline.pictures import read_recipe

        return read_recipe(drawn.paths[0])["artefacts"]

    one = artefacts(lora_path=files["kohya"])
    again = studio.draw(PROMPT, lora_path=files["kohya"])
    assert again.children == []
    plain = artefacts()
    for other in (
        artefacts(lora_path=files["kohya"], lora_weight=0.5),
        artefacts(lora_path=files["kohya"], lora_scale=0.5),
        artefacts(lora_path=files["diffusers"]),
        plain,
    ):
        assert other["unet"] != one["unet"] and other["clip"] != one["clip"]
        assert other["vae"] == one["vae"]
    unet_alone = write_lora(tmp_path / "unet.safetensors", tiny_model, parts=("unet",))
    assert artefacts(lora_path=unet_alone)["clip"] == plain["clip"]


def test_a_recipe_remakes_the_picture_with_the_same_file_and_no_other(studio: Studio, files: dict[str, Path]) -> None:
    drawn = studio.draw(PROMPT, lora_path=files["kohya"], lora_weight=0.6)
    recipe = {"recipe": drawn.paths[0]}
    again = studio.draw(lora_path=files["kohya"], **recipe)
    assert np.array_equal(again.pictures[0], drawn.pictures[0])
    for more, words in (
        ([], "name it with --lora-path"),
        ([f"--lora-path={files['diffusers']}"], "was not made with the LoRA"),
        ([f"--lora-path={files['kohya']}", "--lora-weight=1"], "--lora-weight cannot be given beside --recipe"),
        (["--lora-path", str(files["kohya"]), str(files["diffusers"])], "was not made with the LoRA"),
    ):
        ended = studio.here(f"--recipe={drawn.paths[0]}", f"--model={studio.model}", *more, *studio.folders())
        assert_refused(ended, words)


def test_what_is_wrong_with_a_lora_is_said_in_a_line(
    studio: Studio, tiny_model: Path, tiny_xl_model: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    truncated = tmp_path / "cut.safetensors"
    truncated.write_bytes(files["kohya"].read_bytes()[:-100])
    (tmp_path / "lora.ckpt").write_bytes(b"a pickle")
    save_file({"weight": torch.zeros(1)}, tmp_path / "strange.safetensors")
    save_file({"lora_unet_x.dora_scale": torch.zeros(1)}, tmp_path / "dora.safetensors")
    save_file({"lora_te2_x.lora_down.weight": torch.zeros(1)}, tmp_path / "te2.safetensors")
    of_xl = write_lora(tmp_path / "xl.safetensors", tiny_xl_model, parts=("unet", "text_encoder", "text_encoder_2"))
    save_file({"unet.conv_in.weight": torch.zeros(1)}, tmp_path / "weights.safetensors")
    mixed = {f"unet.conv_in.lora_{side}.weight": torch.zeros(3, 3) for side in "AB"}
    mixed |= {f"lora_te_x.lora_{side}.weight": torch.zeros(3, 3) for side in ("down", "up")}
    save_file(mixed, tmp_path / "mixed.safetensors")
    biased = load_file(write_lora(tmp_path / "unbiased.safetensors", tiny_model, parts=("unet",)))
    sides = [name for name in biased if name.endswith("lora_B.weight")]
    biased |= {name.replace("weight", "bias"): torch.zeros(len(biased[name])) for name in sides}
    save_file(biased, tmp_path / "biased.safetensors")
    (tmp_path / "two").mkdir()
    for name in ("one", "other"):
        save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, tmp_path / "two" / f"{name}.safetensors")
    for arguments, words in (
        (["--lora-path", str(tmp_path / "none.safetensors")], "does not exist"),
        (["--lora-path", str(truncated)], "truncated"),
        (["--lora-path", str(tmp_path / "lora.ckpt")], "not a safetensors file"),
        (["--lora-path", str(tmp_path / "strange.safetensors")], "no LoRA layout"),
        (["--lora-path", str(tmp_path / "dora.safetensors")], "DoRA"),
        (["--lora-path", str(tmp_path / "te2.safetensors")], "changes nothing that this model has"),
        (["--lora-path", str(of_xl)], "does not fit this model's unet"),
        (["--lora-path", str(tmp_path / "mixed.safetensors")], "does not fit this model's"),
        (["--lora-path", str(tmp_path / "weights.safetensors")], "no LoRA layout"),
        (["--lora-path", str(tmp_path / "biased.safetensors")], "the base layer has no bias"),
        (["--lora-path", str(tmp_path / "two")], "holds 2 safetensors files"),
        (["--lora-path", "loras/ink.safetensors"], "does not exist"),
        (["--lora-weight", "1"], "--lora-weight has no effect"),
        (["--lora-scale", "1"], "--lora-scale has no effect"),
        (["--lora-path", str(files["kohya"]), "--lora-weight", "1", "2"], "2 numbers for the 1 files"),
        (["--lora-path", str(files["kohya"]), "--lora-weight", "nan"], "--lora-weight must be a number"),
        (["--lora-path", str(files["kohya"]), "--lora-scale", "inf"], "--lora-scale must be a number"),
        (["--lora-path", str(files["kohya"]), "--lora-weight", "1e39"], "--lora-weight must be a number up to 3.4e+38"),
        (["--lora-path", str(files["kohya"]), "a prompt"], "prompts go before --lora-path"),
    ):
        made = Studio(tmp_path / "house", tiny_model)
        ended = made.here(PROMPT, *arguments, f"--model={tiny_model}", "--engine=openvino", *made.folders())
        assert_refused(ended, words)
        assert not made.output.exists()
        # What is found out late is found out at the first network that it touches.
        assert not made.onnx.exists() or not list(made.onnx.glob("clip-*"))


def test_every_layer_of_a_kohya_file_has_its_own_alpha(
    tiny_model: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    from darkroom.checkpoint.lora import open_lora
    from darkroom.networks.lora import fuse

    tensors = load_file(files["kohya"])
    layers = sorted({name.partition(".")[0] for name in tensors if name.startswith("lora_unet")})
    for alpha, layer in enumerate(layers):
        tensors[f"{layer}.alpha"] = torch.tensor(float(alpha % 5))
    save_file(tensors, tmp_path / "alphas.safetensors")
    lora = open_lora(tmp_path / "alphas.safetensors", 0.5, 0.5, Fingerprints(tmp_path / "memory.json"))
    plain, fused = (Diffusers(tiny_model).pipeline.unet for _ in range(2))
    fuse(fused, "unet", lora, tiny_model)
    changed = 0
    for name, weight in plain.named_parameters():
        key = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        expected = weight.detach()
        if f"{key}.alpha" in tensors:
            down, up = tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"]
            delta = up.flatten(1) @ down.flatten(1) * (tensors[f"{key}.alpha"] / RANK) * 0.25
            expected = expected + delta.reshape(expected.shape)
            changed += 1
        torch.testing.assert_close(fused.get_parameter(name).detach(), expected)
    assert changed == len(layers) > 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_alphas_round_nothing_in_a_file_of_few_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    from darkroom.networks.lora import _without_alphas

    generator = torch.Generator().manual_seed(0)
    up = (torch.randn(32, 7, generator=generator) / 32).to(dtype)
    layer = {"lora_down.weight": torch.ones(7, 5).to(dtype), "lora_up.weight": up, "alpha": torch.tensor(2**-6)}
    save_file({f"lora_unet_x.{name}": value for name, value in layer.items()}, tmp_path / "few.safetensors")
    made = _without_alphas(load_file(tmp_path / "few.safetensors"))
    assert made is not None
    torch.testing.assert_close(made["lora_unet_x.lora_up.weight"].float(), up.float() * 2**-6 / 7, rtol=1e-6, atol=0)


def test_a_lora_from_the_hub_is_found_on_disk_whatever_its_name(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from darkroom.checkpoint.hub import fetch_lora

    folder = tmp_path / "some--lora"
    folder.mkdir()
    shutil.copy(files["kohya"], folder / "style.safetensors")
    assert fetch_lora("some/lora", None, tmp_path) == folder / "style.safetensors"


@pytest.mark.parametrize(
    "lora", [{"source": 5}, {"weight": "1"}, {"weight": 10**400}, {"scale": float("nan")}, {"x": 1}]
)
def test_damaged_recipe_is_refused_in_a_line(lora: dict[str, Any]) -> None:
    from darkroom.errors import InvalidRequest
    from darkroom.request import Request
    from tests.test_request import request

    whole = {"source": None, "sha256": "00", "weight": 1.0, "scale": 1.0}
    fields = request().as_json()
    assert Request.from_json(fields | {"loras": [whole]}).loras[0].weight == 1.0
    with pytest.raises(InvalidRequest):
        Request.from_json(fields | {"loras": [whole | lora]})


def test_recipes_from_before_loras_can_be_replayed() -> None:
    from darkroom.request import Request
    from tests.test_request import request

    fields = request().as_json()
    del fields["loras"]
    assert Request.from_json(fields) == request()


def test_from_a_picture_and_without_torch_when_all_is_built(
    studio: Studio, tiny_model: Path, files: dict[str, Path], diffusers_tiny: Diffusers, tmp_path: Path
) -> None:
    from PIL import Image

    image = Image.fromarray(diffusers_tiny.draw(PROMPT)[0])
    image.save(tmp_path / "start.png")
    from_image = replace(studio, script="demo_img2img.py")
    asked = {"input_image": tmp_path / "start.png", "image_strength": 0.7, "lora_path": files["kohya"]}
    drawn = from_image.draw(PROMPT, denoising_steps=6, **asked)
    expected = drawn_by_diffusers(
        tiny_model, [(files["kohya"], 1.0)], image=image, strength=0.7, denoising_steps=6, guidance_scale=7.5
    )
    assert psnr(drawn.pictures[0], expected) >= 45
    plain = studio.draw(PROMPT, lora_path=files["kohya"])
    command = [PROMPT, f"--model={tiny_model}", f"--lora-path={files['kohya']}", "--seed=5", "--denoising-steps=3"]
    ended = studio.shell(
        *command, "--engine=openvino", *studio.folders(), interpreter=("-c", WITHOUT_TORCH, str(SCRIPT))
    )
    assert ended.code == 0, ended.err
    assert np.array_equal(pixels(ended.out.splitlines()[-1]), plain.pictures[0])


def test_lcm_lora_makes_four_unguided_steps_of_lcm(
    studio: Studio, tiny_model: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from darkroom.pipeline.pictures import read_recipe

    asked = []
    monkeypatch.setattr(
        "darkroom.cli.loras.fetch_lora", lambda repository, *_: asked.append(repository) or files["kohya"]
    )
    turbo = replace(studio, script="demo_turbo.py")
    drawn = turbo.draw(PROMPT, denoising_steps=None, lcm_lora=True)
    assert asked == ["latent-consistency/lcm-lora-sdv1-5"]
    request = read_recipe(drawn.paths[0])["request"]
    assert (request["scheduler"], request["denoising_steps"], request["guidance_scale"]) == ("LCM", 4, 0.0)
    expected = drawn_by_diffusers(
        tiny_model, [(files["kohya"], 1.0)], scheduler="LCM", denoising_steps=4, guidance_scale=0
    )
    assert psnr(drawn.pictures[0], expected) >= 45
    again = turbo.draw(recipe=drawn.paths[0])
    assert np.array_equal(again.pictures[0], drawn.pictures[0])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--version=1.5"], "--version 1.5 needs many steps"),
        (["--version=sd-turbo", "--lcm-lora"], "--lcm-lora has no effect with sd-turbo"),
    ],
)
def test_lcm_lora_is_for_models_of_many_steps(studio: Studio, arguments: list[str], words: str) -> None:
    ended = replace(studio, script="demo_turbo.py").here(PROMPT, *arguments, *studio.folders())
    assert_refused(ended, words)


def test_lora_that_cannot_be_fetched_is_said_in_a_line(studio: Studio) -> None:
    ended = studio.shell(PROMPT, f"--model={studio.model}", "--lora-path=some/lora", *studio.folders(), timeout=SOON)
    assert ended.code == 1 and one_line(ended.err) and "some/lora could not be fetched" in ended.err
