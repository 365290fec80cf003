"""Textual inversions: words from files, as diffusers' load_textual_inversion reads them."""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import Diffusers, Studio, assert_refused, pixels, psnr

SAME_AS_DIFFUSERS, VISIBLE = 45, 40
"""dB."""

WIDTHS = {"clip_l": 24, "clip_g": 32}
PROMPT = "a red {} on the house"


def vectors(count: int, width: int = 32) -> torch.Tensor:
    """As loud as the words that the small models know."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count + width)) * 0.8


def written(path: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors, path)
    return path


LAYOUTS: dict[str, tuple[str, dict[str, torch.Tensor]]] = {
    "one of A1111": ("easynegative", {"emb_params": vectors(1)}),
    "several of A1111": ("Style-5", {"emb_params": vectors(4)}),
    "one of diffusers": ("<toy>", {"<toy>": vectors(1)[0]}),
    "several of diffusers": ("<toy>", {"<toy>": vectors(3)}),
}


@pytest.mark.parametrize("syntax", ["plain", "a1111"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_picture_is_that_of_diffusers(
    layout: str, syntax: str, studio: Studio, tiny_model: Path, tmp_path: Path
) -> None:
    word, tensors = LAYOUTS[layout]
    path = written(tmp_path / f"{'learned' if word[0] == '<' else word}.safetensors", **tensors)
    theirs = Diffusers(tiny_model)
    theirs.pipeline.load_textual_inversion(str(path), token=word)
    prompt = PROMPT.format(word)
    (expected,) = theirs.draw(prompt, negative_prompt=f"{word} cat")
    asked = {"embedding": path, "negative_prompt": f"{word} cat", "prompt_syntax": syntax}
    drawn = studio.draw(prompt, **asked)
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS
    assert psnr(studio.draw(prompt, **asked | {"embedding": None}).pictures[0], expected) < VISIBLE


@pytest.mark.parametrize("count", [1, 3])
def test_sdxl_has_vectors_for_both_encoders(count: int, xl_studio: Studio, tiny_xl_model: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "toy-1.safetensors", **{name: vectors(count, width) for name, width in WIDTHS.items()})
    theirs, tensors = Diffusers(tiny_xl_model), load_file(path)
    for name, encoder in (("clip_l", ""), ("clip_g", "_2")):
        parts = {part: getattr(theirs.pipeline, f"{part}{encoder}") for part in ("text_encoder", "tokenizer")}
        theirs.pipeline.load_textual_inversion(tensors[name], token="toy-1", **parts)
    (expected,) = theirs.draw(PROMPT.format("toy-1"), guidance_scale=5.0)
    drawn = xl_studio.draw(PROMPT.format("toy-1"), embedding=path, guidance_scale=5.0)
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS


def test_recipe_wants_the_file_whatever_it_is_called_now(studio: Studio, tmp_path: Path) -> None:
    path = written(tmp_path / "toy.safetensors", emb_params=vectors(2))
    drawn = studio.draw(PROMPT.format("toy"), embedding=path)
    moved = path.rename(tmp_path / "other.safetensors")
    again = studio.draw(recipe=drawn.paths[0], embedding=moved)
    assert psnr(again.pictures[0], drawn.pictures[0]) == np.inf
    recipe = [f"--recipe={drawn.paths[0]}", f"--model={studio.model}", *studio.folders()]
    assert_refused(studio.here(*recipe), "was made with an embedding for toy")
    stranger = written(tmp_path / "toy.safetensors", emb_params=vectors(3))
    assert_refused(studio.here(*recipe, f"--embedding={stranger}"), "was not made with the embedding")


def test_two_in_one_prompt(studio: Studio, tiny_model: Path, tmp_path: Path) -> None:
    paths = [
        written(tmp_path / f"{name}.safetensors", emb_params=vectors(2 + (name == "toy"))) for name in ("toy", "zap")
    ]
    theirs = Diffusers(tiny_model)
    for path in paths:
        theirs.pipeline.load_textual_inversion(str(path), token=path.stem)
    (expected,) = theirs.draw("zap and a toy")
    ended = studio.here("zap and a toy", f"--model={tiny_model}", "--seed=5", "--denoising-steps=3", "--quiet",
                        "--engine=torch", "--embedding", *map(str, paths), *studio.folders())  # fmt: skip
    assert ended.code == 0, ended.err
    assert psnr(pixels(ended.out.strip()), expected) >= SAME_AS_DIFFUSERS


REFUSED: dict[str, tuple[str, dict[str, torch.Tensor], str]] = {
    "width": (
        "toy.safetensors",
        {"emb_params": vectors(1, 48)},
        "its vectors have 48 numbers, and the text_encoder's 32",
    ),
    "of SDXL": ("toy.safetensors", {"clip_l": vectors(1, 24), "clip_g": vectors(1)}, "24 numbers"),
    "of something else": ("toy.safetensors", {"a": vectors(1), "b": vectors(1)}, "holds a and 1 more"),
    "no vectors": ("toy.safetensors", {"emb_params": torch.zeros(1, 1, 32)}, "no vectors"),
    "known word": ("c.safetensors", {"emb_params": vectors(1)}, "knows 'c' already"),
    "not numbers": ("toy.safetensors", {"emb_params": vectors(1) * float("nan")}, "NaN"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_refused(kind: str, studio: Studio, tmp_path: Path) -> None:
    name, tensors, said = REFUSED[kind]
    path = written(tmp_path / name, **tensors)
    arguments = ["a cat", f"--model={studio.model}", "--engine=openvino", *studio.folders()]
    assert_refused(studio.here(*arguments, f"--embedding={path}"), said)


def test_pickle_is_refused_with_what_converts_it(studio: Studio, tmp_path: Path) -> None:
    path = tmp_path / "toy.pt"
    torch.save({"string_to_param": {"*": vectors(2)}, "name": "toy"}, path)
    arguments = ["a toy", f"--model={studio.model}", "--engine=openvino", "--seed=5", *studio.folders()]
    ended = studio.here(*arguments, f"--embedding={path}")
    assert_refused(ended, "not a safetensors file", "python -c")
    command = shlex.split(ended.err[ended.err.index("python -c") :])
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True)
    assert torch.equal(load_file(tmp_path / "toy.safetensors")["emb_params"], vectors(2))


def test_missing_file_is_refused(studio: Studio) -> None:
    arguments: list[Any] = ["a toy", f"--model={studio.model}", *studio.folders()]
    assert_refused(studio.here(*arguments, "--embedding=nothing.safetensors"), "nothing.safetensors does not exist")
