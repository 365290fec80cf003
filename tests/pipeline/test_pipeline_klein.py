"""Pictures of FLUX.2 klein against diffusers' own pipeline: the distilled kind, and the one that is guided."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support import SENTENCES, Diffusers, Studio, assert_refused, flags, pixels, psnr, write_tiny_klein_model

PROMPT = "a red apple on the house"
RUNTIMES = ("openvino", "onnxruntime", "torch", "jax")
SAME_AS_DIFFUSERS, VISIBLE = 45, 40
"""dB."""
SIZE = {"height": 64, "width": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_klein_model(tmp_path_factory.mktemp("models") / "klein", distilled=False)


@pytest.fixture(scope="module")
def diffusers(model: Path) -> Diffusers:
    return Diffusers(model)


@pytest.fixture
def klein(studio: Studio, model: Path) -> Studio:
    return replace(studio, model=model, script="demo_txt2img_flux.py")


def of_diffusers(diffusers: Diffusers, *prompts: str, **more: Any) -> list:
    return diffusers.draw(*prompts, **{"guidance_scale": 0.0, "max_sequence_length": SENTENCES, **SIZE} | more)


@pytest.mark.parametrize("engine", RUNTIMES)
def test_picture_is_that_of_diffusers(engine: str, klein: Studio, diffusers: Diffusers) -> None:
    drawn = klein.draw(PROMPT, engine=engine, guidance_scale=0, **SIZE)
    (expected,) = of_diffusers(diffusers, PROMPT)
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS
    assert psnr(of_diffusers(diffusers, "green dog")[0], expected) < VISIBLE


ASKED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "guided": ({"guidance_scale": 3}, {"guidance_scale": 3.0}),
    "a batch, not square, any size": (
        {"batch_size": 2, "height": 96, "width": 64, "build_dynamic_shape": True},
        {"height": 96, "width": 64},
    ),
    "a short text": ({"max_sequence_length": 62}, {"max_sequence_length": 62}),
    "more steps": ({"denoising_steps": 8}, {"denoising_steps": 8}),
}


@pytest.mark.parametrize("asked", ASKED)
def test_what_is_asked_means_what_it_means_in_diffusers(asked: str, klein: Studio, diffusers: Diffusers) -> None:
    ours, theirs = ASKED[asked]
    drawn = klein.draw(PROMPT, **{"guidance_scale": 0, **SIZE} | ours)
    expected = of_diffusers(diffusers, *[PROMPT] * len(drawn.pictures), **theirs)
    assert min(map(psnr, drawn.pictures, expected)) >= SAME_AS_DIFFUSERS
    if asked in ("guided", "more steps"):
        assert psnr(drawn.pictures[0], of_diffusers(diffusers, PROMPT)[0]) < VISIBLE


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"max_sequence_length": 5}, ("--max-sequence-length 5",)),
        ({"max_sequence_length": 513}, ("--max-sequence-length 513", "512")),
        ({"height": 72}, ("--height", "multiple of 16")),
        ({"prompt_2": "a dog"}, ("--prompt-2", "one text encoder")),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(asked: dict[str, Any], words: tuple[str, ...], klein: Studio) -> None:
    arguments = flags(model=klein.model, **SIZE | {"guidance_scale": 0} | asked)
    assert_refused(klein.here(PROMPT, *arguments, *klein.folders()), *words)


def test_slots_hold_images_of_other_steps(klein: Studio, diffusers: Diffusers) -> None:
    """Whose steps are shifted by their number."""
    rows = [{"prompt": PROMPT, "seed": 5, "steps": 2}, {"prompt": "green dog", "seed": 6, "steps": 5}]
    file = klein.root / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = flags(prompts=file, model=klein.model, engine="torch", guidance_scale=0, json=True, **SIZE)
    ended = klein.here(*asked, *klein.folders())
    assert ended.code == 0, ended.err
    made = sorted(json.loads(ended.out)["images"], key=lambda image: image["seed"])
    for row, image in zip(rows, made, strict=True):
        expected = of_diffusers(diffusers, row["prompt"], seed=row["seed"], denoising_steps=row["steps"])
        assert psnr(pixels(image["path"]), expected[0]) >= SAME_AS_DIFFUSERS, row
