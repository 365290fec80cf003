"""A request is validated where it is made, and cut into batches prompt by prompt."""

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

from darkroom.errors import InvalidRequest
from darkroom.families.stable_diffusion import StableDiffusion
from darkroom.request import NEWER, ControlChoice, EmbeddingChoice, LoraChoice, MaskChoice, Request, draw_seed
from darkroom.store.fingerprints import hash_json


def request(**changes: Any) -> Request:
    fields: dict[str, Any] = dict(
        model="1.5",
        prompts=("a red apple",),
        negative_prompt="",
        batch_size=1,
        batch_count=1,
        height=512,
        width=512,
        denoising_steps=20,
        guidance_scale=7.5,
        clip_skip=0,
        scheduler=None,
        seed=0,
        engine="openvino",
        precision="fp32",
        build="static-batch",
        onnx_opset=17,
    )
    return Request(**fields | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompts": ()}, "prompt"),
        ({"prompts": ("",)}, "prompt"),
        ({"prompts": ("a cat", " \n\t")}, "prompt"),
        ({"batch_size": 0}, "--batch-size"),
        ({"batch_size": -3}, "-3"),
        ({"batch_count": 0}, "--batch-count"),
        ({"denoising_steps": 0}, "--denoising-steps"),
        ({"denoising_steps": -1}, "--denoising-steps"),
        ({"height": 0}, "--height"),
        ({"height": -512}, "--height"),
        ({"height": 513}, "513"),
        ({"width": 4}, "--width"),
        ({"width": 516}, "--width"),
        ({"guidance_scale": float("nan")}, "--guidance-scale"),
        ({"guidance_scale": float("inf")}, "--guidance-scale"),
        ({"guidance_scale": -1.0}, "--guidance-scale"),
        ({"guidance_scale": 1e39}, "from 0 to 3.4e+38, not 1e+39"),
        ({"guidance_scale": 10**400}, "--guidance-scale"),
        ({"clip_skip": -1}, "--clip-skip"),
        ({"scheduler": "Euller"}, "'Euler'"),
        ({"scheduler": "euler"}, "'Euler'"),
        ({"seed": -1}, "--seed"),
        ({"seed": 2**64}, "--seed"),
        ({"seed": 2**64 - 3, "batch_size": 4}, "--seed"),
        ({"build": "sometimes"}, "sometimes"),
    ],
)
def test_request_that_cannot_be_meant_is_refused_in_one_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        request(**changes)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("weight", "scale", "said"), [(-1e39, 1.0, "--lora-weight"), (1.0, 1e39, "--lora-scale")])
def test_lora_beyond_float32_is_refused(weight: float, scale: float, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        LoraChoice(None, "00", weight, scale)
    with pytest.raises(InvalidRequest, match=r"--lora-weight -1e\+20 times --lora-scale 1e\+20"):
        LoraChoice(None, "00", -1e20, 1e20)


def test_bound_of_numbers_is_that_of_float32() -> None:
    largest = float(np.finfo(np.float32).max)
    assert request(guidance_scale=largest).guided and LoraChoice(None, "00", -largest, 1.0)
    with pytest.raises(InvalidRequest):
        request(guidance_scale=np.nextafter(largest, np.inf))


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1])
def test_every_64_bit_number_is_a_seed(seed: int) -> None:
    assert request(seed=seed).seed == seed


@pytest.mark.parametrize(("scale", "guided"), [(0.0, False), (0.5, False), (1.0, False), (1.01, True), (7.5, True)])
def test_guidance_is_on_above_one(scale: float, guided: bool) -> None:
    assert request(guidance_scale=scale).guided is guided


def test_prompts_times_batch_size_times_batch_count_images_prompt_by_prompt() -> None:
    asked = request(prompts=("a", "b", "c"), batch_size=2, batch_count=2, seed=100)
    batches = list(asked.batches())
    assert asked.image_count == 12
    assert [batch.prompts for batch in batches] == [
        ("a", "a"),
        ("a", "a"),
        ("b", "b"),
        ("b", "b"),
        ("c", "c"),
        ("c", "c"),
    ]
    assert [seed for batch in batches for seed in batch.seeds] == list(range(100, 112))
    assert [batch.first for batch in batches] == [0, 2, 4, 6, 8, 10]


def test_request_comes_back_from_json_as_it_was() -> None:
    asked = request(prompts=("größe 🍎", "b"), seed=2**64 - 9, guidance_scale=0.1, scheduler="DPM++Karras")
    assert Request.from_json(json.loads(json.dumps(asked.as_json()))) == asked


@pytest.mark.parametrize("missing", sorted({field.name for field in dataclasses.fields(Request)} - {*NEWER}))
def test_recipe_that_holds_half_a_request_is_refused(missing: str) -> None:
    fields = {name: value for name, value in request().as_json().items() if name != missing}
    with pytest.raises(InvalidRequest, match="recipe"):
        Request.from_json(fields)


@pytest.mark.parametrize("fields", [{"unknown": 1}, {"prompts": 3}, {"seed": "1"}, {"height": None}, {"seed": [1]}])
def test_recipe_that_holds_nonsense_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        Request.from_json(request().as_json() | fields)


def test_digest_knows_every_field() -> None:
    others = {
        "model": "1.4",
        "prompts": ("b",),
        "negative_prompt": "x",
        "batch_size": 2,
        "batch_count": 2,
        "height": 64,
        "width": 64,
        "denoising_steps": 3,
        "guidance_scale": 7.4,
        "clip_skip": 1,
        "scheduler": "DDIM",
        "sigmas": "karras",
        "shift": 2.5,
        "max_sequence_length": 128,
        "seed": 1,
        "engine": "torch",
        "precision": "bf16",
        "build": "dynamic-batch",
        "onnx_opset": 18,
        "input_image": "other pixels",
        "image_strength": 0.6,
        "refiner": "other",
        "refiner_strength": 0.6,
        "loras": (LoraChoice(None, "00", 1.0, 1.0),),
        "vae": "other",
        "drawn": ("e",),
        "upscale": 2.0,
        "embeddings": (EmbeddingChoice("00", "toy"),),
        "prompt_2": "c",
        "negative_prompt_2": "d",
        "prompt_syntax": "a1111",
        "mask": MaskChoice("00"),
        "controls": (ControlChoice(None, "00"),),
    }
    full = request(input_image="pixels", image_strength=0.5, refiner="one", refiner_strength=0.5)
    assert set(others) == {field.name for field in dataclasses.fields(Request)}
    digests = {hash_json(dataclasses.replace(full, **{name: value}).as_json()) for name, value in others.items()}
    assert len(digests | {hash_json(full.as_json())}) == len(others) + 1


@pytest.mark.parametrize("name", ["image_strength", "refiner_strength"])
def test_strength_counts_steps_as_diffusers_does(name: str) -> None:
    start = {"image_strength": "input_image", "refiner_strength": "refiner"}[name]
    for steps, strength, left in ((20, 0.3, 6), (50, 0.29, 14), (4, 1.0, 4), (3, 0.34, 1)):
        asked = request(denoising_steps=steps, **{start: "x", name: strength})
        if name == "refiner_strength":
            asked = asked.refining()
        assert StableDiffusion().steps_left(steps, asked.image_strength) == left
    for strength in (-0.1, 1.1, math.nan):
        with pytest.raises(InvalidRequest, match="--image-strength"):
            request(**{start: "x", name: strength})
    with pytest.raises(InvalidRequest):
        request(**{name: 0.5})


def test_a_refiner_is_left_a_step() -> None:
    with pytest.raises(InvalidRequest, match="leaves no step"):
        request(denoising_steps=3, refiner="x", refiner_strength=0.33)


def test_drawn_seeds_are_short_and_differ() -> None:
    seeds = {draw_seed() for _ in range(20)}
    assert len(seeds) > 15
    assert all(0 <= seed < 2**32 for seed in seeds)
