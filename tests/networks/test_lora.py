"""LoRA files fused at export make the pictures that diffusers makes with them, in either layout, one or several."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from darkroom.checkpoint.lora import check_lora  # noqa: E402
from darkroom.contract import Lora  # noqa: E402
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


def test_a_suffix_in_capitals_is_a_suffix(files: dict[str, Path], tmp_path: Path) -> None:
    capital = Path(shutil.copy(files["kohya"], tmp_path / "INK.SAFETENSORS"))
    path, networks = check_lora(capital)
    assert path == capital and networks >= {"unet", "text_encoder"}


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
    save_file({"lora_unet_conv_in.dora_scale": torch.zeros(32, 1)}, tmp_path / "dora.safetensors")
    save_file({"lora_unet_conv_in.alpha": torch.ones(1)}, tmp_path / "alpha.safetensors")
    flat = {f"lora_unet_conv_in.lora_{side}.weight": torch.ones(3) for side in UP_DOWN}
    save_file(flat, tmp_path / "flat.safetensors")
    save_file(
        {"lora_unet_conv_in.diff": torch.ones(32, 4, 3, 3)}
        | {f"lora_unet_conv_in.lora_{side}.weight": torch.ones(1, 1) for side in UP_DOWN},
        tmp_path / "both.safetensors",
    )
    damaged = load_file(files["kohya"])
    first = next(name for name in damaged if "lora_unet" in name and name.endswith("lora_up.weight"))
    save_file(damaged | {first: damaged[first] * float("nan")}, tmp_path / "nan.safetensors")
    save_file({name: value for name, value in damaged.items() if name != first}, tmp_path / "half.safetensors")
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
        (["--lora-path", str(tmp_path / "dora.safetensors")], "conv_in lacks"),
        (["--lora-path", str(tmp_path / "half.safetensors")], "lacks"),
        (["--lora-path", str(tmp_path / "alpha.safetensors")], "no LoRA layout"),
        (["--lora-path", str(tmp_path / "both.safetensors")], "is of two kinds at once"),
        (["--lora-path", str(tmp_path / "flat.safetensors")], "has a tensor of too few sizes"),
        (["--lora-path", str(tmp_path / "nan.safetensors")], "holds NaN or infinity in lora_unet"),
        (["--lora-path", str(tmp_path / "te2.safetensors")], "changes nothing that this model has"),
        (["--lora-path", str(of_xl)], "does not fit this model's"),
        (["--lora-path", str(tmp_path / "mixed.safetensors")], "does not fit this model's"),
        (["--lora-path", str(tmp_path / "weights.safetensors")], "no LoRA layout"),
        (["--lora-path", str(tmp_path / "biased.safetensors")], "changes a bias, and the model has none there"),
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


def fused(model: Path, path: Path, part: str = "unet", strength: float = 1.0) -> Any:
    """A part of the model with a file's changes in its weights."""
    from darkroom.networks.lora import fuse

    network = copy.deepcopy(getattr(Diffusers(model).pipeline, part))
    fuse(network, part, Lora(path, "", frozenset({part}), strength))
    return network


def assert_weights(network: Any, expected: dict[str, torch.Tensor]) -> None:
    for name, weight in network.named_parameters():
        torch.testing.assert_close(weight.detach(), expected[name], rtol=1e-5, atol=1e-5, msg=name)


CONFIGS = {
    "lora": lambda peft, **to: peft.LoraConfig(r=3, lora_alpha=2, **to),
    "rank-stabilised": lambda peft, **to: peft.LoraConfig(r=3, lora_alpha=2, use_rslora=True, **to),
    "patterns": lambda peft, **to: peft.LoraConfig(r=3, rank_pattern={"to_q": 5}, alpha_pattern={"conv1": 7}, **to),
    "biases": lambda peft, **to: peft.LoraConfig(r=3, lora_bias=True, **to | {"target_modules": ["conv1", "to_out.0"]}),
    "dora": lambda peft, **to: peft.LoraConfig(r=3, lora_alpha=2, use_dora=True, **to),
    "loha": lambda peft, **to: peft.LoHaConfig(r=3, alpha=2, **to),
    "loha-tucker": lambda peft, **to: peft.LoHaConfig(r=3, alpha=2, use_effective_conv2d=True, **to),
    "lokr": lambda peft, **to: peft.LoKrConfig(r=2, alpha=3, **to),
    "lokr-both": lambda peft, **to: peft.LoKrConfig(r=2, alpha=3, decompose_both=True, **to),
    "lokr-tucker": lambda peft, **to: peft.LoKrConfig(r=2, alpha=3, use_effective_conv2d=True, **to),
}


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT takes its own biases for damage
@pytest.mark.parametrize("kind", CONFIGS)
def test_each_kind_changes_weights_as_peft_does(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    to = {"target_modules": ["to_q", "to_out.0", "proj_in", "conv1", "conv_shortcut"]}
    unet = copy.deepcopy(Diffusers(tiny_model).pipeline.unet)
    adapted = peft.get_peft_model(unet, config := CONFIGS[kind](peft, **to))
    torch.manual_seed(3)
    for name, weight in adapted.named_parameters():
        if ".default" in name:
            weight.data += 0.2 * torch.rand_like(weight)
    tensors = {n.removeprefix("base_model.model."): w for n, w in peft.get_peft_model_state_dict(adapted).items()}
    metadata = {}
    if "lo" in kind[:2] and kind != "lora":  # PEFT keeps the alphas of these elsewhere; LyCORIS beside them
        layers = {name.rpartition(".")[0] for name in tensors}
        alpha = {f"lora_unet_{layer.replace('.', '_')}.alpha": torch.tensor(float(config.alpha)) for layer in layers}
        tensors = {
            f"lora_unet_{n.rpartition('.')[0].replace('.', '_')}.{n.rpartition('.')[2]}": w for n, w in tensors.items()
        }
        tensors |= alpha
    else:
        tensors = {f"unet.{name}": weight for name, weight in tensors.items()}
        said = {f"unet.{key}": value for key, value in config.to_dict().items() if not isinstance(value, set)}
        metadata = {"lora_adapter_metadata": json.dumps(said, default=str)}
    save_file(
        {name: weight.detach().contiguous() for name, weight in tensors.items()}, tmp_path / "a.safetensors", metadata
    )
    merged = dict(adapted.merge_and_unload().named_parameters())
    plain = dict(Diffusers(tiny_model).pipeline.unet.named_parameters())
    assert sum(not torch.allclose(weight, plain[name], atol=1e-3) for name, weight in merged.items()) > 5
    assert_weights(fused(tiny_model, tmp_path / "a.safetensors"), {name: w.detach() for name, w in merged.items()})


def _kohya(prefix: str) -> Callable[[str], str]:
    return lambda layer: f"{prefix}_{layer.replace('.', '_')}"


TO_OUT = "transformer_blocks.0.attn1.to_out.0"
ORIGINAL = {  # in a UNet of two levels, each of one layer
    f"down_blocks.0.attentions.0.{TO_OUT}": f"input_blocks.1.1.{TO_OUT}",
    "up_blocks.1.resnets.1.conv_shortcut": "output_blocks.3.0.skip_connection",
    "mid_block.attentions.0.proj_in": "middle_block.1.proj_in",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
}
UP_DOWN, A_B = ("up", "down"), ("B", "A")
NAMINGS = {
    "kohya": ("unet", _kohya("lora_unet"), ".lora_{}.weight", UP_DOWN),
    "dotted": ("unet", "unet.{}".format, ".lora_{}.weight", UP_DOWN),
    "diffusers": ("unet", "unet.{}".format, ".lora.{}.weight", UP_DOWN),
    "PEFT": ("unet", "unet.{}".format, ".lora_{}.weight", A_B),
    "PEFT, with an adapter's name": ("unet", "unet.{}".format, ".lora_{}.default.weight", A_B),
    "attention processors": ("unet", "unet.{}".format, "_lora.{}.weight", UP_DOWN),
    "attention processors alone": ("unet", "{}".format, "_lora.{}.weight", UP_DOWN),
    "original": ("unet", _kohya("lora_unet"), ".lora_{}.weight", UP_DOWN),
    "original, dotted": ("unet", "diffusion_model.{}".format, ".lora_{}.weight", UP_DOWN),
    "kohya's text": ("text_encoder", _kohya("lora_te_text_model"), ".lora_{}.weight", UP_DOWN),
    "kohya's first text": ("text_encoder", _kohya("lora_te1_text_model"), ".lora_{}.weight", UP_DOWN),
    "diffusers' text": ("text_encoder", "text_encoder.text_model.{}".format, ".lora_linear_layer.{}.weight", UP_DOWN),
    "PEFT's text": ("text_encoder", "text_encoder.text_model.{}".format, ".lora_{}.weight", A_B),
    "its text now": ("text_encoder", "text_encoder.{}".format, ".lora_{}.weight", A_B),
    "processors of text": ("text_encoder", "text_encoder.text_model.{}".format, "_lora.{}.weight", UP_DOWN),
}


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("alpha", [True, False], ids=["alpha", "no-alpha"])
def test_every_name_of_a_layer_is_known(naming: str, alpha: bool, tiny_model: Path, tmp_path: Path) -> None:
    """A few layers alone are changed: which others are there says nothing."""
    part, named, ends, sides = NAMINGS[naming]
    network = getattr(Diffusers(tiny_model).pipeline, part)
    if part == "unet":
        wanted = list(ORIGINAL)[:1]
        wanted += [] if "processors" in naming else list(ORIGINAL)[1:]
    else:
        wanted = ["encoder.layers.1.self_attn.out_proj"]
    weights = {name.removeprefix("text_model."): weight.detach() for name, weight in network.named_parameters()}
    generator, expected, tensors = torch.Generator().manual_seed(1), dict(weights), {}
    for number, layer in enumerate(wanted, start=2):
        out, into, *kernel = weights[f"{layer}.weight"].shape
        up = torch.randn(out, number, *(1 for _ in kernel), generator=generator).to(torch.float16)
        down = torch.randn(number, into, *kernel, generator=generator).to(torch.float16)
        change = (up.float().flatten(1) @ down.float().flatten(1)).reshape(out, into, *kernel)
        expected[f"{layer}.weight"] = (
            weights[f"{layer}.weight"] + 0.7 * change * (number + 1 if alpha else number) / number
        )
        name = layer
        if "processors" in naming:
            name = layer.replace("to_out.0", "processor.to_out").replace("out_proj", "to_out")
        if "original" in naming:
            name = ORIGINAL[layer]
        name = named(name)
        tensors |= {name + ends.format(side): value for side, value in zip(sides, (up, down), strict=True)}
        if alpha:
            tensors[f"{name}.alpha"] = torch.tensor(number + 1.0)
    save_file(tensors, tmp_path / "a.safetensors")
    assert part in check_lora(tmp_path / "a.safetensors")[1]
    made = fused(tiny_model, tmp_path / "a.safetensors", part, 0.7)
    assert_weights(made, {name: expected[name.removeprefix("text_model.")] for name, _ in made.named_parameters()})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_whole_differences_and_products_of_whole_factors(dtype: torch.dtype, tiny_model: Path, tmp_path: Path) -> None:
    """As LyCORIS has them: neither has a rank for an alpha to be divided by."""
    weights = {name: weight.detach() for name, weight in Diffusers(tiny_model).pipeline.unet.named_parameters()}
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = {
        "lora_unet_conv_in.diff": random(*weights["conv_in.weight"].shape),
        "lora_unet_conv_in.diff_b": random(32),
        "lora_unet_conv_norm_out.w_norm": random(32),
        "lora_unet_conv_norm_out.b_norm": random(32),
        "lora_unet_time_embedding_linear_1.lokr_w1": random(4, 2),
        "lora_unet_time_embedding_linear_1.lokr_w2": random(32, 16),
        "lora_unet_time_embedding_linear_1.alpha": torch.tensor(9.0),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    *whole, first, second, _ = (value.float() for value in tensors.values())
    changes = dict(
        zip(("conv_in.weight", "conv_in.bias", "conv_norm_out.weight", "conv_norm_out.bias"), whole, strict=True)
    )
    changes["time_embedding.linear_1.weight"] = torch.kron(first, second)
    made = fused(tiny_model, tmp_path / "a.safetensors", strength=0.5)
    assert_weights(made, {name: weight + 0.5 * changes.get(name, 0.0) for name, weight in weights.items()})


def test_tucker_cores_and_lengths_of_rows_and_of_columns(tiny_model: Path, tmp_path: Path) -> None:
    """LyCORIS's LoCon with a core, and its DoRA: https://github.com/KohakuBlueleaf/LyCORIS, modules/locon.py."""
    weights = {name: weight.detach() for name, weight in Diffusers(tiny_model).pipeline.unet.named_parameters()}
    generator = torch.Generator().manual_seed(4)
    tensors, expected = {}, dict(weights)
    for layer, axis in (("mid_block.resnets.0.conv1", None), ("conv_in", 0), ("up_blocks.0.upsamplers.0.conv", 1)):
        weight = weights[f"{layer}.weight"]
        out, into, *kernel = weight.shape
        up, mid, down = (
            torch.randn(*shape, generator=generator) / 8 for shape in ((out, 2, 1, 1), (2, 2, *kernel), (2, into, 1, 1))
        )
        tensors |= {f"unet.{layer}.lora_{side}.weight": x for side, x in (("up", up), ("mid", mid), ("down", down))}
        tensors[f"unet.{layer}.alpha"] = torch.tensor(1.0)
        changed = sum(
            up[:, r, 0, 0, None, None, None] * mid[r, s] * down[s, :, 0, 0, None, None] for r in (0, 1) for s in (0, 1)
        )
        expected[f"{layer}.weight"] = made = weight + changed / 2
        if axis is not None:
            others = tuple({0, 1, 2, 3} - {axis})
            sizes = [made.shape[axis] if each == axis else 1 for each in range(4)]
            tensors[f"unet.{layer}.dora_scale"] = lengths = 1 + torch.rand(sizes, generator=generator)
            expected[f"{layer}.weight"] = made * lengths / made.pow(2).sum(others, keepdim=True).sqrt()
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "a.safetensors")
    assert_weights(fused(tiny_model, tmp_path / "a.safetensors"), expected)


def test_what_has_no_use_is_named_and_the_rest_used(
    studio: Studio, tiny_model: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    tensors = load_file(files["kohya"])
    more = {f"lora_unet_x{number}.oft_blocks": torch.ones(2, 2) for number in range(5)}
    more |= {f"lora_te_text_model_encoder_layers_11_mlp_fc1.lora_{side}.weight": torch.ones(2, 2) for side in UP_DOWN}
    more["lora_unet_nothing_is_left_of_this.alpha"] = torch.tensor(1.0)
    save_file(tensors | more, tmp_path / "more.safetensors")
    drawn = studio.draw(PROMPT, lora_path=tmp_path / "more.safetensors")
    assert np.array_equal(drawn.pictures[0], studio.draw(PROMPT, lora_path=files["kohya"]).pictures[0])
    (line,) = (line for line in drawn.err.splitlines() if line.startswith("warning:"))
    assert "lora_unet_x0.oft_blocks and 5 more" in line and len(line) < 300


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
