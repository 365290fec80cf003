"""Stable Diffusion 3 and 3.5 against diffusers' own pipelines, and through every door of the package."""

import contextlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.support import (
    COMPILED_MODULES,
    HEAVY,
    SCRIPT,
    SOON,
    Diffusers,
    Studio,
    assert_refused,
    changed_copy,
    children_inline,
    edit_json,
    flags,
    pixels,
    psnr,
    write_tiny_sd3_model,
)

PROMPT = "a red apple on the house"
RUNTIMES = ("openvino", "onnxruntime", "torch", pytest.param("jax", marks=pytest.mark.slow))
SAME_AS_DIFFUSERS, SAME_IN_A_BATCH = 45, 50
"""dB."""
VISIBLE = 40


@pytest.fixture
def sd3(studio: Studio, tiny_sd3_model: Path) -> Studio:
    return replace(studio, model=tiny_sd3_model, script="demo_txt2img_sd35.py")


@pytest.fixture(scope="module")
def diffusers(tiny_sd3_model: Path) -> Diffusers:
    return Diffusers(tiny_sd3_model)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    noise = np.random.default_rng(7).integers(0, 255, (8, 8, 3), np.uint8)
    Image.fromarray(noise).resize((64, 64)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.mark.parametrize("engine", RUNTIMES)
def test_every_engine_makes_the_picture_of_diffusers(engine: str, sd3: Studio, diffusers: Diffusers) -> None:
    drawn = sd3.draw(PROMPT, engine=engine, guidance_scale=7.5)
    (expected,) = diffusers.draw(PROMPT)
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS
    assert set(drawn.result["milliseconds"]) == {"Text", "Transformer", "VAE-Dec", "Pipeline"}


ASKED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no guidance": ({"guidance_scale": 1}, {"guidance_scale": 1.0}),
    "the default guidance": ({}, {"guidance_scale": 4.5}),
    "a negative prompt": ({"negative_prompt": "green dog", "guidance_scale": 7.5}, {"negative_prompt": "green dog"}),
    "second prompts": (
        {"prompt_2": "the blue cat", "negative_prompt": "dog", "negative_prompt_2": "green", "guidance_scale": 7.5},
        {"prompt_2": "the blue cat", "negative_prompt": "dog", "negative_prompt_2": "green"},
    ),
    "layers left out": ({"clip_skip": 1, "guidance_scale": 7.5}, {"clip_skip": 1}),
    "a short text": ({"max_sequence_length": 6, "guidance_scale": 7.5}, {"max_sequence_length": 6}),
    "another shift": (
        {"shift": 1.5, "guidance_scale": 7.5},
        {"scheduler": "FlowMatchEuler", "spacing": {"shift": 1.5}},
    ),
    "Heun's steps": ({"scheduler": "FlowMatchHeun", "guidance_scale": 7.5}, {"scheduler": "FlowMatchHeun"}),
}


@pytest.mark.parametrize("asked", ASKED)
def test_what_is_asked_means_what_it_means_in_diffusers(asked: str, sd3: Studio, diffusers: Diffusers) -> None:
    ours, theirs = ASKED[asked]
    drawn = sd3.draw(PROMPT, **ours)
    (expected,) = diffusers.draw(PROMPT, **theirs)
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS
    assert psnr(diffusers.draw(PROMPT)[0], expected) < VISIBLE


def test_its_blocks_are_computed_in_8_bits(sd3: Studio, diffusers: Diffusers) -> None:
    drawn = sd3.draw(PROMPT, engine="torch", quantization="int8", guidance_scale=7.5)
    assert 70 > psnr(drawn.pictures[0], diffusers.draw(PROMPT)[0]) >= 30


@pytest.mark.parametrize("size", [(96, 32), (64, 64)])
def test_an_engine_for_any_size_makes_each(size: tuple[int, int], sd3: Studio, diffusers: Diffusers) -> None:
    height, width = size
    asked: dict[str, Any] = {"guidance_scale": 7.5, "build_dynamic_shape": True, "batch_size": 2}
    drawn = sd3.draw(PROMPT, height=height, width=width, **asked)
    expected = diffusers.draw(PROMPT, PROMPT, height=height, width=width)
    assert min(map(psnr, drawn.pictures, expected)) >= SAME_AS_DIFFUSERS
    alone = sd3.draw(PROMPT, height=height, width=width, seed=6, **asked | {"batch_size": 1})
    assert psnr(drawn.pictures[1], alone.pictures[0]) >= SAME_IN_A_BATCH


@pytest.mark.parametrize("strength", [None, 1.0])
def test_a_picture_to_start_from(strength: float | None, sd3: Studio, diffusers: Diffusers, picture: Path) -> None:
    asked: dict[str, Any] = {"denoising_steps": 4, "guidance_scale": 7.5, "input_image": picture}
    drawn = sd3.draw(PROMPT, image_strength=strength, **asked)
    (expected,) = diffusers.draw(PROMPT, denoising_steps=4, image=Image.open(picture), strength=strength or 0.6)
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS
    again = sd3.draw(recipe=drawn.paths[0], input_image=picture)
    np.testing.assert_array_equal(again.pictures[0], drawn.pictures[0])
    assert_refused(sd3.here(*flags(recipe=drawn.paths[0], model=sd3.model), *sd3.folders()), "--input-image is needed")


def test_the_first_of_them_has_neither_dual_attention_nor_norms_of_queries(studio: Studio, tmp_path: Path) -> None:
    model = write_tiny_sd3_model(tmp_path / "sd3")
    drawn = replace(studio, model=model, script="demo_txt2img_sd3.py").draw(PROMPT, guidance_scale=7.5)
    assert psnr(drawn.pictures[0], Diffusers(model).draw(PROMPT)[0]) >= SAME_AS_DIFFUSERS


@pytest.mark.parametrize("named", [True, False], ids=["named in the index", "not in the index"])
def test_without_t5_there_are_zeros(named: bool, sd3: Studio, diffusers: Diffusers, tmp_path: Path) -> None:
    def change(folder: Path) -> None:
        shutil.rmtree(folder / "text_encoder_3")
        if not named:
            shutil.rmtree(folder / "tokenizer_3")
            edit_json(folder / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])

    model = changed_copy(sd3.model, tmp_path / "no-t5", change)
    drawn = sd3.draw(PROMPT, model=model, guidance_scale=7.5, max_sequence_length=32)
    without = Diffusers(model, text_encoder_3=None, tokenizer_3=None)
    (expected,) = without.draw(PROMPT, max_sequence_length=32)
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS
    assert psnr(expected, diffusers.draw(PROMPT, max_sequence_length=32)[0]) < VISIBLE


def test_a_tiny_autoencoder_takes_the_place_of_its_own(sd3: Studio, tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    torch.manual_seed(3)
    sizes = {f"{half}_block_out_channels": (8,) * 4 for half in ("encoder", "decoder")}
    tiny = AutoencoderTiny(latent_channels=16, scaling_factor=1.0, shift_factor=0.0, **sizes)
    tiny.save_pretrained(tmp_path / "tiny")
    drawn = sd3.draw(PROMPT, vae=tmp_path / "tiny", engine="torch", guidance_scale=7.5)
    (expected,) = Diffusers(sd3.model, vae=tiny.eval()).draw(PROMPT)
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS


def test_the_shift_follows_the_size_where_the_scheduler_says_so(sd3: Studio, tmp_path: Path) -> None:
    def change(folder: Path) -> None:
        edit_json(folder / "scheduler" / "scheduler_config.json", use_dynamic_shifting=True, base_shift=-0.5)

    model = changed_copy(sd3.model, tmp_path / "dynamic", change)
    peer, asked = Diffusers(model), {"model": model, "guidance_scale": 7.5}
    (expected,) = peer.draw(PROMPT)
    assert psnr(sd3.draw(PROMPT, **asked).pictures[0], expected) >= SAME_AS_DIFFUSERS
    fixed = {"shift": 3.0, "use_dynamic_shifting": False}
    (still,) = peer.draw(PROMPT, scheduler="FlowMatchEuler", spacing=fixed)
    assert psnr(sd3.draw(PROMPT, shift=3.0, **asked).pictures[0], still) >= SAME_AS_DIFFUSERS
    assert psnr(still, expected) < VISIBLE


def test_rows_of_a_file_share_batches_and_make_the_pictures_of_diffusers(sd3: Studio, diffusers: Diffusers) -> None:
    rows = [
        {"prompt": PROMPT, "seed": 5, "steps": 2, "guidance_scale": 3.0},
        {"prompt": "the blue cat", "seed": 6, "steps": 4, "guidance_scale": 1.0},
        {"prompt": "a green dog", "seed": 7, "steps": 3, "guidance_scale": 7.0, "scheduler": "FlowMatchHeun"},
    ]
    file = sd3.root / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = sd3.here(*flags(prompts=file, model=sd3.model, batch_size=3, json=True), *sd3.folders())
    assert ended.code == 0, ended.err
    made = sorted(json.loads(ended.out)["images"], key=lambda image: image["seed"])
    for row, image in zip(rows, made, strict=True):
        asked = {"seed": row["seed"], "denoising_steps": row["steps"], "guidance_scale": row["guidance_scale"]}
        (expected,) = diffusers.draw(row["prompt"], scheduler=row.get("scheduler"), **asked)
        assert psnr(pixels(image["path"]), expected) >= SAME_AS_DIFFUSERS, row


def test_a_run_that_finds_its_engines_makes_the_same_pixels_and_imports_no_torch(sd3: Studio) -> None:
    asked = {"seed": 5, "denoising_steps": 3, "precision": "fp32", "engine": "openvino", "guidance_scale": 7.5}
    drawn = sd3.draw(PROMPT, **asked)
    interpreter = ("-c", COMPILED_MODULES, str(SCRIPT.with_name(sd3.script)))
    again = sd3.shell(PROMPT, *flags(model=sd3.model, **asked), *sd3.folders(), interpreter=interpreter)
    assert again.code == 0, again.err
    assert not set(json.loads(again.err)) & set(HEAVY)
    np.testing.assert_array_equal(pixels(again.out.splitlines()[-1]), drawn.pictures[0])


@pytest.mark.parametrize(
    ("asked", "others"),
    [({"shift": 2.0}, {"schedule"}), ({"max_sequence_length": 6}, {"t5", "transformer"})],
    ids=["shift", "length"],
)
def test_keys_are_others_where_what_they_stand_for_is(asked: dict[str, Any], others: set[str], sd3: Studio) -> None:
    plain, found = (sd3.draw(PROMPT, **more).result["artefacts"] for more in ({}, asked))
    assert {name for name in plain if plain[name] != found[name]} == others


def test_a_repository_for_triton_makes_pictures_of_its_own_schedulers(sd3: Studio, diffusers: Diffusers) -> None:
    from darkroom.cli.triton_repository import run
    from darkroom.serving.service import PLAN, Plan, Service

    repository, err = sd3.root / "models", io.StringIO()
    named = {"model": "3.5-medium", "model_path": sd3.model, "model_repository": repository, "engine": "openvino"}
    sizes = {"max_steps": 3, "steps": 3, "max_batch_size": 2, "precision": "fp32"}
    stores = flags(onnx_dir=sd3.onnx, engine_dir=sd3.engines)
    with children_inline(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        code = run([*flags(**named, **sizes), *stores])
    assert code == 0, err.getvalue()
    service = Service(Plan.read(repository / "3.5-medium" / "1" / PLAN))
    with contextlib.closing(service.batcher(slots=2, queue=2)) as batcher:
        rows = [{"scheduler": "FlowMatchHeun", "guidance_scale": 1.0}, {"steps": 2, "guidance_scale": 7.0}]
        made = [batcher.submit(service.requests({"prompt": PROMPT, "seed": 5} | row))[0] for row in rows]
        for row, future in zip(rows, made, strict=True):
            theirs = {"denoising_steps": row.pop("steps", 3)} | row
            (expected,) = diffusers.draw(PROMPT, **theirs)
            assert psnr(future.result(SOON).pixels, expected) >= SAME_AS_DIFFUSERS


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"height": 72}, ("--height", "multiple of 16", "72")),
        ({"width": 208}, ("--width 208", "192")),
        ({"max_sequence_length": 600}, ("--max-sequence-length 600", "512")),
        ({"max_sequence_length": 1}, ("--max-sequence-length", "2 or more")),
        ({"shift": 0}, ("--shift 0",)),
        ({"prompt_syntax": "a1111"}, ("--prompt-syntax a1111", "CLIP alone")),
        ({"clip_skip": 3}, ("--clip-skip 3", "2 layers")),
        ({"scheduler": "Euler"}, ("--scheduler Euler", "FlowMatchEuler")),
        ({"image_strength": 0.5}, ("--image-strength has no effect without --input-image",)),
        ({"bf16": True, "precision": "fp32"}, ("--bf16", "--precision bf16, not fp32")),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(asked: dict[str, Any], words: tuple[str, ...], sd3: Studio) -> None:
    assert_refused(sd3.here(PROMPT, *flags(model=sd3.model, **asked), *sd3.folders()), *words)


LAYERS = {
    "joint_blocks.0.x_block.attn.qkv": (32, {f"transformer_blocks.0.attn.to_{each}": 32 for each in "qkv"}),
    "joint_blocks.1.context_block.attn.qkv": (32, {f"transformer_blocks.1.attn.add_{each}_proj": 32 for each in "qkv"}),
    "joint_blocks.1.x_block.attn2.proj": (32, {"transformer_blocks.1.attn2.to_out.0": 32}),
    "joint_blocks.0.context_block.mlp.fc1": (32, {"transformer_blocks.0.ff_context.net.0.proj": 128}),
    "joint_blocks.2.x_block.adaLN_modulation.1": (32, {"transformer_blocks.2.norm1.linear": 192}),
    "context_embedder": (64, {"context_embedder": 32}),
}
"""Layers of the tiny model by their names in Stability AI's files, with the width of what goes in, and what they are in
diffusers, with how many rows each."""
NAMINGS = {
    "diffusers": lambda layer: (f"transformer.{layer}", "lora_A", "lora_B"),
    "kohya": lambda layer: (f"lora_unet_{layer.replace('.', '_')}", "lora_down", "lora_up"),
    "ComfyUI": lambda layer: (f"diffusion_model.{layer}", "lora_A", "lora_B"),
}


def lora_of(naming: str, folder: Path) -> Path:
    """The same random changes, by the names of a tool."""
    chance, tensors = torch.Generator().manual_seed(0), {}
    for fused, (into, layers) in LAYERS.items():
        down = torch.randn(4, into, generator=chance) / into**0.5
        up = torch.randn(sum(layers.values()), 4, generator=chance) / 4
        split = dict(zip(layers, up.split(list(layers.values())), strict=True))
        for layer, rows in (split if naming == "diffusers" else {fused: up}).items():
            name, below, above = NAMINGS[naming](layer)
            tensors |= {f"{name}.{below}.weight": down.clone(), f"{name}.{above}.weight": rows.contiguous()}
    save_file(tensors, folder / f"{naming}.safetensors")
    return folder / f"{naming}.safetensors"


@pytest.mark.parametrize("naming", NAMINGS)
def test_a_lora_makes_the_picture_of_diffusers(naming: str, sd3: Studio, diffusers: Diffusers, tmp_path: Path) -> None:
    drawn = sd3.draw(PROMPT, guidance_scale=7.5, lora_path=lora_of(naming, tmp_path), engine="torch")
    (without,) = diffusers.draw(PROMPT)
    diffusers.pipeline.load_lora_weights(str(lora_of("diffusers", tmp_path)))
    try:
        (expected,) = diffusers.draw(PROMPT, height=64)
    finally:
        diffusers.pipeline.unload_lora_weights()
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS
    assert psnr(without, expected) < VISIBLE


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("transformer", {"in_channels": 8}, "8 channels, where 16 are given"),
        ("transformer", {"pooled_projection_dim": 64}, "64 numbers of a prompt's gist, where 48 are given"),
        ("text_encoder_3", {"d_model": 80}, "64 numbers of a word, where 80 are given"),
        ("vae", {"latents_mean": [0.0] * 16}, "VAE"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(
    part: str, change: dict[str, Any], words: str, sd3: Studio, tmp_path: Path
) -> None:
    model = changed_copy(sd3.model, tmp_path / "odd", lambda folder: edit_json(folder / part / "config.json", **change))
    assert_refused(sd3.here(PROMPT, *flags(model=model), *sd3.folders()), words)


def test_models_of_other_families_are_refused_with_its_flags(sd3: Studio, tiny_model: Path) -> None:
    assert_refused(sd3.here(PROMPT, *flags(model=tiny_model), *sd3.folders()), "StableDiffusionPipeline")
    from darkroom.errors import InvalidRequest
    from darkroom.schedule import chosen

    with pytest.raises(InvalidRequest, match="--shift has no effect with PNDM"):
        chosen(None, "PNDMScheduler", {}, shift=2.0)
