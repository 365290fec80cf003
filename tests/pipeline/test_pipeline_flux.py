"""Pictures of Flux against diffusers' own pipelines: the kind with embedded guidance, and the one without."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.networks.test_lora import WITHOUT_TORCH
from tests.pipeline.test_image_to_image import photograph
from tests.support import (
    SCRIPT,
    SENTENCE,
    Diffusers,
    Studio,
    assert_refused,
    changed_copy,
    edit_json,
    flags,
    pixels,
    psnr,
    write_tiny_flux_model,
)

PROMPT = "a red apple on the house"
RUNTIMES = ("openvino", "onnxruntime", "torch", "jax")
SAME_AS_DIFFUSERS, SAME_IN_A_BATCH = 45, 50
"""dB."""
VISIBLE = 40
"""Pictures further apart than this are different pictures."""
SIZE = {"height": 64, "width": 64}
KINDS = ("dev", "schnell")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: write_tiny_flux_model(root / kind, schnell=kind == "schnell") for kind in KINDS}


@pytest.fixture(scope="module")
def references(models: dict[str, Path]) -> dict[str, Diffusers]:
    return {kind: Diffusers(model) for kind, model in models.items()}


@pytest.fixture(params=KINDS)
def flux(
    request: pytest.FixtureRequest, studio: Studio, models: dict[str, Path], references: dict[str, Diffusers]
) -> tuple[Studio, Diffusers]:
    """The script on a tiny model of each kind, and diffusers on the same."""
    return replace(studio, model=models[request.param], script="demo_txt2img_flux.py"), references[request.param]


def of_diffusers(diffusers: Diffusers, *prompts: str, **more: Any) -> list:
    """At the guidance and the size that are usual here."""
    return diffusers.draw(*prompts, **{"guidance_scale": 3.5, "max_sequence_length": SENTENCE, **SIZE} | more)


@pytest.mark.parametrize("engine", RUNTIMES)
def test_picture_is_that_of_diffusers(engine: str, flux: tuple[Studio, Diffusers]) -> None:
    studio, diffusers = flux
    scale = 3.5 if diffusers.pipeline.transformer.config.guidance_embeds else 0
    drawn = studio.draw(PROMPT, engine=engine, guidance_scale=scale, **SIZE)
    (expected,) = of_diffusers(diffusers, PROMPT)
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS
    assert set(drawn.result["milliseconds"]) == {"Text", "Transformer", "VAE-Dec", "Pipeline"}


ASKED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a batch": ({"batch_size": 3}, {}),
    "not square": ({"height": 96, "width": 32}, {"height": 96, "width": 32}),
    "large, any size": ({"height": 128, "width": 96, "build_dynamic_shape": True}, {"height": 128, "width": 96}),
    "a short text": ({"max_sequence_length": 4}, {"max_sequence_length": 4}),
    "more steps": ({"denoising_steps": 8}, {"denoising_steps": 8}),
}


@pytest.mark.parametrize("asked", ASKED)
def test_what_is_asked_means_what_it_means_in_diffusers(asked: str, flux: tuple[Studio, Diffusers]) -> None:
    studio, diffusers = flux
    ours, theirs = ASKED[asked]
    scale = 3.5 if diffusers.pipeline.transformer.config.guidance_embeds else 0
    drawn = studio.draw(PROMPT, **{"guidance_scale": scale, **SIZE} | ours)
    expected = of_diffusers(diffusers, *[PROMPT] * len(drawn.pictures), **theirs)
    assert min(map(psnr, drawn.pictures, expected)) >= SAME_AS_DIFFUSERS
    if "height" not in theirs and theirs:
        assert psnr(drawn.pictures[0], of_diffusers(diffusers, PROMPT)[0]) < VISIBLE


@pytest.mark.parametrize("scale", [0, 1, 7])
def test_the_dev_kind_is_given_its_scale(scale: float, studio: Studio, models: Any, references: Any) -> None:
    studio = replace(studio, model=models["dev"], script="demo_txt2img_flux.py")
    drawn = studio.draw(PROMPT, guidance_scale=scale, **SIZE)
    (expected,) = of_diffusers(references["dev"], PROMPT, guidance_scale=float(scale))
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS
    assert psnr(of_diffusers(references["dev"], PROMPT)[0], expected) < VISIBLE


@pytest.mark.parametrize("negative", [None, "green dog"])
def test_the_schnell_kind_is_guided_by_a_negative_prompt(
    negative: str | None, studio: Studio, models: Any, references: Any
) -> None:
    """What diffusers calls true guidance."""
    studio = replace(studio, model=models["schnell"], script="demo_txt2img_flux.py")
    drawn = studio.draw(PROMPT, guidance_scale=3, negative_prompt=negative, **SIZE)
    (expected,) = of_diffusers(references["schnell"], PROMPT, true_cfg_scale=3.0, negative_prompt=negative or "")
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS
    assert psnr(of_diffusers(references["schnell"], PROMPT)[0], expected) < VISIBLE


@pytest.mark.parametrize("strength", [0.1, 0.62, 1.0])
def test_from_a_picture_too(strength: float, flux: tuple[Studio, Diffusers], tmp_path: Path) -> None:
    """Each image of a batch is the one that diffusers makes of its seed alone: in a batch, it draws the picture to
    start from once."""
    studio, diffusers = flux
    photograph().save(tmp_path / "photograph.png")
    scale = 3.5 if diffusers.pipeline.transformer.config.guidance_embeds else 0
    asked = {"guidance_scale": scale, "denoising_steps": 8, "input_image": tmp_path / "photograph.png"}
    drawn = replace(studio, script="demo_img2img_flux.py").draw(PROMPT, image_strength=strength, batch_size=2, **asked)
    start = {"image": Image.open(tmp_path / "photograph.png"), "strength": strength, "denoising_steps": 8}
    for index, picture in enumerate(drawn.pictures):
        (expected,) = of_diffusers(diffusers, PROMPT, seed=5 + index, **start)
        assert psnr(picture, expected) >= SAME_AS_DIFFUSERS


def test_a_picture_to_start_from_is_brought_to_whole_patches(studio: Studio, models: Any, tmp_path: Path) -> None:
    photograph(77, 45).save(tmp_path / "odd.png")
    studio = replace(studio, model=models["schnell"], script="demo_img2img_flux.py")
    drawn = studio.draw(PROMPT, guidance_scale=0, input_image=tmp_path / "odd.png")
    assert drawn.pictures[0].shape == (32, 64, 3)


def edited(part: str, **values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / part, **values)


REFUSED: dict[str, tuple[Callable[[Path], None], dict[str, Any], tuple[str, ...]]] = {
    "half a patch": (lambda folder: None, {"height": 72}, ("--height", "multiple of 16", "72")),
    "a negative prompt": (lambda folder: None, {"negative_prompt": "dog"}, ("--negative-prompt", "has no effect")),
    "layers left out": (lambda folder: None, {"clip_skip": 1}, ("--clip-skip 1", "0 layers")),
    "another scheduler": (lambda folder: None, {"scheduler": "DDIM"}, ("--scheduler DDIM", "FlowMatchEuler")),
    "Kontext": (edited("model_index.json", _class_name="FluxKontextPipeline"), {}, ("FluxKontextPipeline",)),
    "a control kind": (edited("model_index.json", _class_name="FluxControlPipeline"), {}, ("FluxControlPipeline",)),
    "Fill": (edited("transformer/config.json", in_channels=384), {}, ("384 channels", "Flux Fill")),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_it_cannot_do_is_refused_by_name(why: str, studio: Studio, models: Any, tmp_path: Path) -> None:
    change, asked, words = REFUSED[why]
    model = changed_copy(models["dev"], tmp_path / "changed", change)
    studio = replace(studio, script="demo_txt2img_flux.py")
    assert_refused(studio.here(PROMPT, *flags(model=model, **SIZE | asked), *studio.folders()), *words)


LAYERS: dict[str, tuple[int, dict[str, int]]] = {
    "double_blocks.0.img_attn.qkv": (48, {f"transformer_blocks.0.attn.to_{each}": 48 for each in "qkv"}),
    "double_blocks.1.txt_attn.qkv": (48, {f"transformer_blocks.1.attn.add_{each}_proj": 48 for each in "qkv"}),
    "double_blocks.0.txt_attn.proj": (48, {"transformer_blocks.0.attn.to_add_out": 48}),
    "double_blocks.1.img_mlp.0": (48, {"transformer_blocks.1.ff.net.0.proj": 192}),
    "double_blocks.0.txt_mod.lin": (48, {"transformer_blocks.0.norm1_context.linear": 288}),
    "single_blocks.0.linear1": (
        48,
        {f"single_transformer_blocks.0.attn.to_{each}": 48 for each in "qkv"}
        | {"single_transformer_blocks.0.proj_mlp": 192},
    ),
    "single_blocks.1.linear2": (240, {"single_transformer_blocks.1.proj_out": 48}),
}
"""Layers of the tiny model by their names in https://github.com/black-forest-labs/flux, with the width of what goes in,
and what they are in diffusers, with how many rows each."""
NAMINGS = {
    "kohya": lambda layer: (f"lora_unet_{layer.replace('.', '_')}", "lora_down", "lora_up"),
    "BFL": lambda layer: (layer, "lora_A", "lora_B"),
    "ComfyUI": lambda layer: (f"diffusion_model.{layer}", "lora_A", "lora_B"),
    "diffusers": lambda layer: (f"transformer.{layer}", "lora_A", "lora_B"),
}


def lora_of(naming: str, folder: Path) -> Path:
    """The same random changes, by the names of a tool."""
    chance, tensors = torch.Generator().manual_seed(0), {}
    for fused, (into, layers) in LAYERS.items():
        down = torch.randn(4, into, generator=chance) / into**0.5
        up = torch.randn(sum(layers.values()), 4, generator=chance) / 2
        whole = {fused: up}
        if naming == "diffusers":
            whole = dict(zip(layers, up.split(list(layers.values())), strict=True))
        for layer, rows in whole.items():
            name, below, above = NAMINGS[naming](layer)
            tensors |= {f"{name}.{below}.weight": down.clone(), f"{name}.{above}.weight": rows.contiguous()}
            if naming == "kohya":
                tensors[f"{name}.alpha"] = torch.tensor(4.0)
    save_file(tensors, folder / f"{naming}.safetensors")
    return folder / f"{naming}.safetensors"


@pytest.fixture(scope="module")
def with_lora(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The picture of diffusers with it."""
    diffusers = Diffusers(models["dev"])
    diffusers.pipeline.load_lora_weights(str(lora_of("diffusers", tmp_path_factory.mktemp("loras"))))
    return of_diffusers(diffusers, PROMPT)[0]


@pytest.mark.parametrize("naming", NAMINGS)
def test_a_lora_makes_the_picture_of_diffusers(
    naming: str, studio: Studio, models: Any, references: Any, with_lora: np.ndarray, tmp_path: Path
) -> None:
    studio = replace(studio, model=models["dev"], script="demo_txt2img_flux.py")
    drawn = studio.draw(PROMPT, guidance_scale=3.5, lora_path=lora_of(naming, tmp_path), engine="torch", **SIZE)
    assert psnr(drawn.pictures[0], with_lora) >= SAME_AS_DIFFUSERS
    assert psnr(of_diffusers(references["dev"], PROMPT)[0], with_lora) < VISIBLE


def test_an_image_of_a_batch_equals_the_image_alone_and_its_recipe_remakes_it(flux: tuple[Studio, Diffusers]) -> None:
    studio, _ = flux
    together = studio.draw(PROMPT, batch_size=2, engine="torch", **SIZE)
    assert (
        psnr(together.pictures[1], studio.draw(PROMPT, seed=6, engine="torch", **SIZE).pictures[0]) >= SAME_IN_A_BATCH
    )
    again = studio.draw(recipe=together.paths[1])
    assert psnr(again.pictures[0], together.pictures[1]) >= SAME_IN_A_BATCH


def test_slots_hold_images_of_other_steps_sizes_and_scales(flux: tuple[Studio, Diffusers]) -> None:
    studio, diffusers = flux
    embeds = diffusers.pipeline.transformer.config.guidance_embeds
    rows = [
        {"prompt": PROMPT, "seed": 5, "steps": 2, "guidance_scale": 3.5 if embeds else 0},
        {"prompt": "the blue cat", "seed": 6, "steps": 5, "guidance_scale": 7.0 if embeds else 1},
        {"prompt": "green dog", "seed": 7, "steps": 3, "guidance_scale": 1.0, "height": 96, "width": 32},
    ]
    file = studio.root / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = flags(prompts=file, model=studio.model, batch_size=2, json=True, engine="torch", **SIZE)
    ended = studio.here(*asked, *studio.folders())
    assert ended.code == 0, ended.err
    made = sorted(json.loads(ended.out)["images"], key=lambda image: image["seed"])
    for row, image in zip(rows, made, strict=True):
        size = {name: row.get(name, SIZE[name]) for name in SIZE}
        scale = float(row["guidance_scale"])
        expected = of_diffusers(
            diffusers, row["prompt"], seed=row["seed"], denoising_steps=row["steps"], guidance_scale=scale, **size
        )
        assert psnr(pixels(image["path"]), expected[0]) >= SAME_AS_DIFFUSERS, row


def test_a_run_that_finds_its_engines_needs_no_torch(studio: Studio, models: Any) -> None:
    studio = replace(studio, model=models["dev"], script="demo_txt2img_flux.py")
    drawn = studio.draw(PROMPT, **SIZE)
    asked = flags(model=studio.model, seed=5, denoising_steps=3, engine="openvino", **SIZE)
    program = str(SCRIPT.with_name(studio.script))
    ended = studio.shell(PROMPT, *asked, *studio.folders(), interpreter=("-c", WITHOUT_TORCH, program))
    assert ended.code == 0, ended.err
    np.testing.assert_array_equal(pixels(ended.out.splitlines()[-1]), drawn.pictures[0])
