"""Pictures of prompts of any length, with weights, on every engine: as diffusers makes them of the same embeddings."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import Diffusers, Studio, assert_refused, changed_copy, pixels, psnr
from tests.text.test_reading import reference

RUNTIMES = ("openvino", "onnxruntime", "torch")
SAME_AS_DIFFUSERS, SAME, VISIBLE = 45, 60, 40
"""dB."""

PARTS = [("the red cat " * 15, 1.0), ("blue dog " * 20, 1.3), ("noto style", 1.0)]
PROMPT = "the red cat " * 15 + "(" + "blue dog " * 20 + ":1.3)noto style"
ASKED: dict[str, Any] = {"prompt_syntax": "a1111", "guidance_scale": 5.0, "negative_prompt": "(green:0.6) house"}


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose embeddings have a mean, as those of trained models have: weights restore it."""
    from safetensors.torch import load_file, save_file

    def change(folder: Path) -> None:
        path = folder / "text_encoder" / "model.safetensors"
        tensors = load_file(path)
        name = next(name for name in tensors if name.endswith("final_layer_norm.bias"))
        tensors[name] = tensors[name] + torch.linspace(0, 1, len(tensors[name]))
        save_file(tensors, path, metadata={"format": "pt"})

    return changed_copy(tiny_model, tmp_path_factory.mktemp("models") / "mean", change)


@pytest.fixture(scope="module")
def expected(model: Path) -> np.ndarray:
    """By guidance over two calls: the prompt's 154 tokens, and the negative prompt's 77 alone."""
    theirs = Diffusers(model).pipeline
    text = reference(PARTS, theirs.tokenizer, theirs.text_encoder, per_chunk=True)
    away = reference([("green", 0.6), (" house", 1.0)], theirs.tokenizer, theirs.text_encoder, per_chunk=True)
    call = theirs.unet.forward

    def two_calls(latents: torch.Tensor, timestep: Any, encoder_hidden_states: torch.Tensor, **more: Any) -> Any:
        halves = zip(latents.chunk(2), (away, text), strict=True)
        made = [
            call(half, timestep, encoder_hidden_states=torch.from_numpy(own)[None], return_dict=False)[0]
            for half, own in halves
        ]
        return (torch.cat(made),)

    theirs.unet.forward = two_calls
    shown = torch.from_numpy(text)[None]
    (image,) = theirs(
        prompt_embeds=shown,
        negative_prompt_embeds=shown,
        num_inference_steps=3,
        guidance_scale=5.0,
        generator=torch.Generator("cpu").manual_seed(5),
    ).images
    return np.array(image)


@pytest.mark.parametrize("engine", RUNTIMES)
def test_long_weighted_prompt_is_what_its_embeddings_make(
    engine: str, studio: Studio, model: Path, expected: np.ndarray
) -> None:
    asked = {"model": model, "engine": engine, "precision": "fp32"} | ASKED
    drawn = studio.draw(PROMPT, **asked)
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS
    assert "cut off" not in drawn.err
    replayed = studio.draw(model=model, recipe=drawn.paths[0])
    assert psnr(replayed.pictures[0], drawn.pictures[0]) == float("inf")
    beside = studio.draw("a cat", PROMPT, **asked, batch_size=2).pictures[2]
    assert psnr(beside, studio.draw(PROMPT, **asked, seed=7).pictures[0]) >= SAME


def test_graph_is_exported_once_for_any_length(empty_studio: Studio, model: Path) -> None:
    for count in (1, 2, 3):
        drawn = empty_studio.draw(" BREAK ".join(["a red cat"] * count), model=model, prompt_syntax="a1111")
    assert drawn.children == ["build_engine"]
    names = {folder.name.split("-64x64")[1][:4] for folder in empty_studio.engines.glob("unet-*")}
    assert names == {"-ope", "-154", "-231"}


def test_plain_prompt_is_the_same_in_both(studio: Studio, model: Path) -> None:
    plain = studio.draw("a red cat", model=model)
    assert psnr(plain.pictures[0], studio.draw("a red cat", model=model, prompt_syntax="a1111").pictures[0]) == np.inf
    weighed = studio.draw("a (red:1.6) cat", model=model, prompt_syntax="a1111").pictures[0]
    assert psnr(plain.pictures[0], weighed) < VISIBLE
    assert "cut off" in studio.draw(PROMPT, model=model).err


def test_rows_of_several_lengths(studio: Studio, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darkroom.serving.planning.run_in_child", lambda call, *arguments, verbose: call(*arguments))
    rows = [{"prompt": PROMPT, "seed": 5}, {"prompt": "a cat", "seed": 6}, {"prompt": PROMPT, "seed": 7}]
    file = studio.root / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in ASKED.items()]
    ended = studio.here(f"--prompts={file}", f"--model={model}", "--denoising-steps=3", "--engine=openvino",
                        "--batch-size=2", "--json", *flags, *studio.folders())  # fmt: skip
    assert ended.code == 0, ended.err
    for image, row in zip(json.loads(ended.out)["images"], rows, strict=True):
        alone = studio.draw(row["prompt"], model=model, seed=row["seed"], **ASKED)
        assert psnr(pixels(image["path"]), alone.pictures[0]) >= SAME


def test_second_prompts_of_sdxl(xl_studio: Studio, diffusers_tiny_xl: Diffusers) -> None:
    asked = {"prompt_2": "the blue cat", "negative_prompt": "green", "negative_prompt_2": "dog", "guidance_scale": 5.0}
    (theirs,) = diffusers_tiny_xl.draw("a red apple", **asked)
    drawn = xl_studio.draw("a red apple", **asked)
    assert psnr(drawn.pictures[0], theirs) >= SAME_AS_DIFFUSERS
    for name in ("prompt_2", "negative_prompt_2"):
        other = xl_studio.draw("a red apple", **asked | {name: None}).pictures[0]
        assert psnr(other, theirs) < VISIBLE
    replayed = xl_studio.draw(recipe=drawn.paths[0])
    assert psnr(replayed.pictures[0], drawn.pictures[0]) == np.inf


def test_second_prompt_is_refused_where_one_encoder_reads(studio: Studio) -> None:
    for name in ("prompt-2", "negative-prompt-2"):
        ended = studio.here("a cat", f"--{name}=a dog", f"--model={studio.model}", *studio.folders())
        assert_refused(ended, f"--{name} has no effect: this model has one text encoder")
    assert_refused(studio.here("a cat", "--prompt-2= ", f"--model={studio.model}", *studio.folders()), "--prompt-2")
