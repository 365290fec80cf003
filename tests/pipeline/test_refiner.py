"""SDXL with its refiner against diffusers' two pipelines, one after the other."""

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from darkroom.prepare import Prepared, Preparer
from tests.support import Studio, assert_refused, changed_copy, edit_json, listing, psnr, silence_libraries

PROMPT = "a red apple on the house"
SAME_AS_DIFFUSERS = 45
"""dB."""
VISIBLE = 40


@pytest.fixture(scope="module")
def pipelines(tiny_xl_model: Path, tiny_refiner: Path) -> tuple[Any, Any]:
    from diffusers import DiffusionPipeline

    silence_libraries()
    both = [DiffusionPipeline.from_pretrained(folder) for folder in (tiny_xl_model, tiny_refiner)]
    for each in both:
        each.set_progress_bar_config(disable=True)
    return both[0], both[1]


def expected(
    pipelines: tuple[Any, Any], scheduler: str | None = None, strength: float = 0.5, images: int = 1, **more: Any
) -> list[np.ndarray]:
    """Base to latents, refiner from them, the same generators through both."""
    import diffusers
    import torch

    from darkroom.schedule import SCHEDULERS

    base, refiner = pipelines
    for each in pipelines:
        if scheduler:
            each.scheduler = getattr(diffusers, SCHEDULERS[scheduler][0]).from_config(each.scheduler.config)
    generators = [torch.Generator("cpu").manual_seed(5 + image) for image in range(images)]
    asked = {"num_inference_steps": 6, "guidance_scale": 5.0, "generator": generators} | more
    latents = base([PROMPT] * images, output_type="latent", **asked).images
    made = refiner([PROMPT] * images, image=latents, strength=strength, **asked).images
    return [np.array(image) for image in made]


@pytest.fixture
def refined(xl_studio: Studio, tiny_refiner: Path) -> dict[str, Any]:
    return {"enable_refiner": True, "refiner_model": tiny_refiner, "denoising_steps": 6, "image_strength": 0.5}


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "torch"])
@pytest.mark.parametrize("scheduler", ["Euler", "EulerA", "DDIM"])
def test_refined_picture_is_the_one_of_diffusers(
    scheduler: str, engine: str, xl_studio: Studio, refined: dict[str, Any], pipelines: tuple[Any, Any]
) -> None:
    drawn = xl_studio.draw(PROMPT, scheduler=scheduler, engine=engine, **refined)
    (picture,) = expected(pipelines, scheduler)
    assert psnr(drawn.pictures[0], picture) >= SAME_AS_DIFFUSERS
    assert psnr(xl_studio.draw(PROMPT, scheduler=scheduler, denoising_steps=6).pictures[0], picture) < VISIBLE


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"guidance_scale": 0}, {"guidance_scale": 0.0}),
        ({"negative_prompt": "green dog"}, {"negative_prompt": "green dog"}),
        ({"image_strength": 0.9}, {"strength": 0.9}),
    ],
    ids=["without guidance", "negative prompt", "stronger"],
)
def test_what_is_asked_of_both(
    ours: dict, theirs: dict, xl_studio: Studio, refined: dict[str, Any], pipelines: tuple[Any, Any]
) -> None:
    drawn = xl_studio.draw(PROMPT, scheduler="Euler", **refined | ours)
    (picture,) = expected(pipelines, "Euler", **theirs)
    assert psnr(drawn.pictures[0], picture) >= SAME_AS_DIFFUSERS


def test_batches_recipes_and_tables(
    xl_studio: Studio, refined: dict[str, Any], pipelines: tuple[Any, Any], tiny_refiner: Path, tmp_path: Path
) -> None:
    drawn = xl_studio.draw(PROMPT, scheduler="EulerA", batch_size=2, **refined)
    assert min(map(psnr, drawn.pictures, expected(pipelines, "EulerA", images=2))) >= SAME_AS_DIFFUSERS
    assert drawn.err.count("Module") == 2 and "e2e" in drawn.err
    again = xl_studio.draw(recipe=drawn.paths[1], refiner_model=tiny_refiner, output_dir=tmp_path / "again")
    np.testing.assert_array_equal(again.pictures[0], drawn.pictures[1])
    recipe = ["--recipe", str(drawn.paths[0]), "--model", str(xl_studio.model), *xl_studio.folders()]
    for flags, said in (([], "--refiner-model"), (["--refiner-model", str(xl_studio.model)], "--refiner-model")):
        ended = xl_studio.here(*recipe, *flags)
        assert_refused(ended, said)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "torch"])
def test_for_a_single_batch_the_first_model_is_gone_before_the_refiner_is_loaded(
    engine: str, xl_studio: Studio, refined: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[list[str]] = []
    engines: dict[str, weakref.ref[Any]] = {}
    load = Preparer.load

    def watched(self: Preparer, *arguments: Any) -> Prepared:
        held.append([name for name, each in engines.items() if each() is not None])
        prepared = load(self, *arguments)
        pipeline = prepared.pipeline
        engines.update({"unet": weakref.ref(pipeline.denoiser), "clip": weakref.ref(pipeline.encoders[0].engine)})
        return prepared

    monkeypatch.setattr(Preparer, "load", watched)
    xl_studio.draw(PROMPT, engine=engine, **refined)
    assert held == [[], []]
    for more in ({"batch_count": 2}, {"num_warmup_runs": 1}):
        held.clear()
        engines.clear()
        drawn = xl_studio.draw(PROMPT, engine=engine, **refined | more)
        assert held == [[], ["unet", "clip"]]
        assert drawn.result["refiner_unet_calls"] == 3


def test_refiner_has_folders_of_its_own_where_asked(xl_studio: Studio, refined: dict[str, Any], tmp_path: Path) -> None:
    folders = {"onnx_refiner_dir": tmp_path / "onnx-refiner", "engine_refiner_dir": tmp_path / "engine-refiner"}
    xl_studio.draw(PROMPT, **refined, **folders)
    for folder in folders.values():
        assert any("unet-tiny-refiner" in path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--image-strength=0.3"], "--image-strength"),
        (["--onnx-refiner-dir=x"], "--onnx-refiner-dir"),
        (["--engine-refiner-dir=x"], "--engine-refiner-dir"),
        (["--refiner-model=x"], "--refiner-model"),
        (["--enable-refiner", "--refiner-model=missing"], "missing"),
        (["--enable-refiner", "--refiner-model=.", "--image-strength=2"], "--image-strength"),
        (["--enable-refiner", "--refiner-model=.", "--image-strength=0.1", "--denoising-steps=5"], "--image-strength"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_refused(arguments: list[str], said: str, xl_studio: Studio) -> None:
    before = listing(xl_studio.output)
    ended = xl_studio.here(PROMPT, *arguments, "--model", str(xl_studio.model), *xl_studio.folders())
    assert_refused(ended, said)
    assert listing(xl_studio.output) == before


def test_a_refiner_that_reads_the_latents_of_another_vae_is_refused(
    xl_studio: Studio, tiny_refiner: Path, tmp_path: Path
) -> None:
    other = changed_copy(
        tiny_refiner, tmp_path / "other", lambda folder: edit_json(folder / "vae" / "config.json", scaling_factor=0.5)
    )
    asked = ["--enable-refiner", f"--refiner-model={other}", "--model", str(xl_studio.model)]
    assert_refused(xl_studio.here(PROMPT, *asked, *xl_studio.folders()), "another VAE")
