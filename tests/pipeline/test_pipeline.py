"""Pictures equal those of diffusers' StableDiffusionPipeline in float32 with a CPU generator, on every runtime."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from darkroom.pipeline.pipeline import TextEncoder
from darkroom.text.reading import Chunk
from tests.support import NOISE_SCHEDULERS, Diffusers, Studio, changed_copy, edit_json, psnr

RUNTIMES = ["openvino", "onnxruntime", "torch"]
EVERY_RUNTIME = [*RUNTIMES, "jax"]
"""JAX compiles for fixed sizes alone, and for longer than the others: where a size is not the point, it is there."""
JAX_SCHEDULERS = ("EulerA", "Heun", "LCM", "UniPC")
"""Of its loop, which is the same program for all: noise, more calls than steps, few steps, a long history."""

PROMPT = "a red apple, noto style"

SAME_AS_DIFFUSERS = 45.0
SAME_AS_ALONE = 50.0
"""Least PSNR in dB between two pictures that are to be the same."""

VISIBLE = 30.0
"""Most PSNR in dB between two pictures that are to differ: without such tests, equality would prove nothing."""


@pytest.mark.parametrize(
    ("engine", "scheduler"),
    [
        *((engine, scheduler) for engine in RUNTIMES for scheduler in (None, *NOISE_SCHEDULERS)),
        *(("jax", scheduler) for scheduler in (None, *JAX_SCHEDULERS)),
    ],
)
def test_picture_equals_diffusers(
    engine: str, scheduler: str | None, studio: Studio, diffusers_tiny: Diffusers
) -> None:
    drawn = studio.draw(PROMPT, engine=engine, scheduler=scheduler, denoising_steps=6)
    (expected,) = diffusers_tiny.draw(PROMPT, scheduler=scheduler, denoising_steps=6)
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS


@pytest.mark.parametrize("scheduler", ["EulerA", "PNDM", "DPM++Karras", "Heun"])
def test_picture_of_many_steps_equals_diffusers(scheduler: str, studio: Studio, diffusers_tiny: Diffusers) -> None:
    drawn = studio.draw(PROMPT, scheduler=scheduler, denoising_steps=30)
    (expected,) = diffusers_tiny.draw(PROMPT, scheduler=scheduler, denoising_steps=30)
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS


@pytest.mark.parametrize("scheduler", ["DPM++", "KDPM2A"])
def test_picture_with_sigmas_equals_diffusers(scheduler: str, studio: Studio, diffusers_tiny: Diffusers) -> None:
    drawn = studio.draw(PROMPT, scheduler=scheduler, sigmas="exponential", denoising_steps=6)
    (expected,) = diffusers_tiny.draw(
        PROMPT, scheduler=scheduler, denoising_steps=6, spacing={"use_exponential_sigmas": True}
    )
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS


ASKED = {
    "guidance 0": ({"guidance_scale": 0.0}, {"guidance_scale": 0.0}),
    "guidance 1": ({"guidance_scale": 1.0}, {"guidance_scale": 1.0}),
    "guidance 1.5": ({"guidance_scale": 1.5}, {"guidance_scale": 1.5}),
    "guidance 15": ({"guidance_scale": 15.0}, {"guidance_scale": 15.0}),
    "negative prompt": ({"negative_prompt": "blue dog"}, {"negative_prompt": "blue dog"}),
    "clip skip": ({"clip_skip": 1, "guidance_scale": 1.0}, {"clip_skip": 1, "guidance_scale": 1.0}),
    "clip skip, guided": ({"clip_skip": 1}, {"clip_skip": 1}),
    "clip skip, negative prompt": (
        {"clip_skip": 2, "negative_prompt": "cat"},
        {"clip_skip": 2, "negative_prompt": "cat"},
    ),
    "wide": ({"height": 64, "width": 96}, {"height": 64, "width": 96}),
    "tall": ({"height": 128, "width": 32}, {"height": 128, "width": 32}),
    "odd size": ({"height": 72, "width": 56}, {"height": 72, "width": 56}),
    "least size": ({"height": 16, "width": 8}, {"height": 16, "width": 8}),
    "one step": ({"denoising_steps": 1}, {"denoising_steps": 1}),
    "largest seed": ({"seed": 2**64 - 2}, {"seed": 2**64 - 2}),
    "seed 0": ({"seed": 0}, {"seed": 0}),
}
"""Darkroom's flags, and diffusers' names for the same."""


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("engine", RUNTIMES)
def test_what_is_asked_means_what_it_means_in_diffusers(
    engine: str, asked: str, studio: Studio, diffusers_tiny: Diffusers
) -> None:
    ours, theirs = ASKED[asked]
    drawn = studio.draw(PROMPT, engine=engine, **ours)
    (expected,) = diffusers_tiny.draw(PROMPT, **theirs)
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS


@pytest.mark.parametrize("asked", ["guidance 1", "guidance 15", "negative prompt", "clip skip, guided", "largest seed"])
def test_what_is_asked_can_be_seen(asked: str, diffusers_tiny: Diffusers) -> None:
    (plain,), (changed,) = diffusers_tiny.draw(PROMPT), diffusers_tiny.draw(PROMPT, **ASKED[asked][1])
    assert psnr(plain, changed) < VISIBLE


def test_prompts_and_seeds_can_be_seen(diffusers_tiny: Diffusers) -> None:
    (plain,) = diffusers_tiny.draw(PROMPT)
    assert psnr(plain, diffusers_tiny.draw("the blue cat")[0]) < VISIBLE
    assert psnr(plain, diffusers_tiny.draw(PROMPT, seed=6)[0]) < VISIBLE


@pytest.mark.parametrize("text", ["", "größe 🍎 日本, it's  3.5!", "apple cat " * 60], ids=["empty", "odd", "too long"])
def test_any_negative_prompt_means_what_it_means_in_diffusers(
    text: str, studio: Studio, diffusers_tiny: Diffusers
) -> None:
    drawn = studio.draw(PROMPT, negative_prompt=text)
    (expected,) = diffusers_tiny.draw(PROMPT, negative_prompt=text)
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS


@pytest.mark.parametrize("build", ["build_dynamic_batch", "build_dynamic_shape"])
@pytest.mark.parametrize("engine", RUNTIMES[:2])
def test_dynamic_engines_make_the_same_pictures(
    engine: str, build: str, studio: Studio, diffusers_tiny: Diffusers
) -> None:
    for batch in (1, 3):
        drawn = studio.draw(PROMPT, engine=engine, batch_size=batch, **{build: True})
        expected = diffusers_tiny.draw(*[PROMPT] * batch)
        assert min(map(psnr, drawn.pictures, expected)) >= SAME_AS_DIFFUSERS


@pytest.mark.parametrize("engine", RUNTIMES[:2])
def test_one_dynamic_engine_serves_every_size(engine: str, studio: Studio, diffusers_tiny: Diffusers) -> None:
    artefacts = set()
    for height, width, batch in ((64, 64, 1), (32, 96, 2), (128, 16, 1)):
        drawn = studio.draw(
            PROMPT, engine=engine, height=height, width=width, batch_size=batch, build_dynamic_shape=True
        )
        expected = diffusers_tiny.draw(*[PROMPT] * batch, height=height, width=width)
        assert min(map(psnr, drawn.pictures, expected)) >= SAME_AS_DIFFUSERS
        artefacts.add(tuple(sorted(drawn.result["artefacts"].items())))
    assert len(artefacts) == 1


@pytest.fixture(scope="module")
def velocity_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as if trained to predict v, with the schedule of Stable Diffusion 2.x."""

    def change(folder: Path) -> None:
        edit_json(
            folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction", _class_name="DDIMScheduler"
        )
        edit_json(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])

    return changed_copy(tiny_model, tmp_path_factory.mktemp("models") / "velocity", change)


@pytest.fixture(scope="module")
def diffusers_velocity(velocity_model: Path) -> Diffusers:
    return Diffusers(velocity_model)


@pytest.mark.parametrize("scheduler", [None, "Euler", "DPM++", "PNDM", "UniPC", "LCM"])
def test_v_prediction_model_equals_diffusers(
    scheduler: str | None,
    studio: Studio,
    velocity_model: Path,
    diffusers_velocity: Diffusers,
    diffusers_tiny: Diffusers,
) -> None:
    drawn = studio.draw(PROMPT, model=velocity_model, scheduler=scheduler, denoising_steps=6)
    (expected,) = diffusers_velocity.draw(PROMPT, scheduler=scheduler, denoising_steps=6)
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS
    assert psnr(expected, diffusers_tiny.draw(PROMPT, scheduler=scheduler, denoising_steps=6)[0]) < VISIBLE


def _scheduler(own: str | None = None, **settings: Any) -> Any:
    """Other settings in the scheduler's file, none for None; and another class in the index, if asked."""

    def change(folder: Path) -> None:
        path = folder / "scheduler" / "scheduler_config.json"
        config = json.loads(path.read_text()) | {"timestep_spacing": "leading"} | settings
        path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
        if own:
            edit_json(folder / "model_index.json", scheduler=["diffusers", own])

    return change


OLD = {
    "steps_offset": (_scheduler(steps_offset=90), None),
    "steps_offset, --scheduler": (_scheduler(steps_offset=90), "DDIM"),
    "no clip_sample": (_scheduler("DDIMScheduler", clip_sample=None), None),
    "another class": (_scheduler("EulerDiscreteScheduler"), None),
}


def test_model_of_shorter_prompts_equals_diffusers(studio: Studio, diffusers_tiny: Diffusers) -> None:
    model = changed_copy(
        studio.model,
        studio.root / "short",
        lambda folder: edit_json(folder / "tokenizer" / "tokenizer_config.json", model_max_length=20),
    )
    drawn = studio.draw(PROMPT, model=model, denoising_steps=3)
    (expected,), (longer,) = Diffusers(model).draw(PROMPT), diffusers_tiny.draw(PROMPT)
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS
    assert psnr(longer, expected) < SAME_AS_DIFFUSERS  # padding is read too


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
@pytest.mark.parametrize("old", OLD)
def test_scheduler_of_an_old_model_is_corrected_as_diffusers_corrects_it(old: str, studio: Studio) -> None:
    change, scheduler = OLD[old]
    model = changed_copy(studio.model, studio.root / "old", change)
    drawn = studio.draw(PROMPT, model=model, scheduler=scheduler, denoising_steps=6)
    (expected,) = Diffusers(model).draw(PROMPT, scheduler=scheduler, denoising_steps=6)
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS


@pytest.mark.parametrize("scheduler", ["PNDM", "EulerA", "LCM"])
@pytest.mark.parametrize("engine", RUNTIMES)
def test_image_alone_equals_image_in_batch(
    engine: str, scheduler: str, studio: Studio, diffusers_tiny: Diffusers
) -> None:
    together = studio.draw(PROMPT, engine=engine, scheduler=scheduler, batch_size=4, seed=40).pictures
    for index, picture in enumerate(together):
        alone = studio.draw(PROMPT, engine=engine, scheduler=scheduler, seed=40 + index).pictures[0]
        assert psnr(picture, alone) >= SAME_AS_ALONE
        (expected,) = diffusers_tiny.draw(PROMPT, scheduler=scheduler, seed=40 + index)
        assert psnr(picture, expected) >= SAME_AS_DIFFUSERS
    assert psnr(together[0], together[1]) < VISIBLE


def test_batch_divided_over_devices_equals_images_alone(studio: Studio, diffusers_tiny: Diffusers) -> None:
    asked: dict[str, Any] = {"engine": "jax", "scheduler": "EulerA"}
    together = studio.draw(PROMPT, batch_size=8, devices="all", **asked)
    expected = diffusers_tiny.draw(*[PROMPT] * 8, scheduler="EulerA")
    assert min(map(psnr, together.pictures, expected)) >= SAME_AS_DIFFUSERS
    for image in (0, 7):
        alone = studio.draw(PROMPT, seed=5 + image, **asked).pictures[0]
        assert psnr(together.pictures[image], alone) >= SAME_AS_ALONE
    assert psnr(together.pictures[0], together.pictures[1]) < VISIBLE
    (again,) = studio.draw(recipe=together.paths[2], output_dir=studio.root / "again", devices=8).pictures
    np.testing.assert_array_equal(again, together.pictures[2])


def test_images_come_prompt_by_prompt_with_successive_seeds(studio: Studio, diffusers_tiny: Diffusers) -> None:
    prompts = ("a red apple", "the blue cat")
    drawn = studio.draw(*prompts, batch_size=3, batch_count=2, seed=70)
    assert [image["seed"] for image in drawn.result["images"]] == list(range(70, 82))
    assert [image["image"] for image in drawn.result["images"]] == list(range(1, 13))
    assert [image["prompt"] for image in drawn.result["images"]] == [prompts[0]] * 6 + [prompts[1]] * 6
    for index, picture in enumerate(drawn.pictures):
        (expected,) = diffusers_tiny.draw(prompts[index // 6], seed=70 + index)
        assert psnr(picture, expected) >= SAME_AS_DIFFUSERS


@pytest.mark.parametrize("more", [{}, {"clip_skip": 1}], ids=["", "clip_skip"])
def test_a_prompt_that_is_the_negative_one_too_equals_diffusers(
    more: dict[str, int], studio: Studio, diffusers_tiny: Diffusers
) -> None:
    prompts = ("a red apple", "the blue cat")
    asked: dict[str, Any] = {"negative_prompt": "the blue cat", "seed": 12} | more
    drawn = studio.draw(*prompts, batch_size=2, **asked)
    expected = diffusers_tiny.draw(*np.repeat(prompts, 2).tolist(), **asked)
    assert min(map(psnr, drawn.pictures, expected)) >= SAME_AS_DIFFUSERS
    assert psnr(drawn.pictures[0], drawn.pictures[2]) < VISIBLE


TEXTS = ("", "apple", "cat", "dog", "tree")


def chunks_of(text: str) -> tuple[Chunk, ...]:
    """A text's only token is its number among TEXTS."""
    return (Chunk((TEXTS.index(text),)),)


class Reader:
    """Stands for a text encoder's engine: a token's embedding is the token."""

    def __init__(self) -> None:
        self.read: list[list[int]] = []

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.read.append(inputs["input_ids"][:, 0].tolist())
        return {"text_embeddings": inputs["input_ids"][..., None]}


@pytest.mark.parametrize(
    ("prompts", "negative", "read"),
    [
        ("cat", "", [[2], [0]]),
        ("cat cat cat cat", "", [[2, 0, 0, 0]]),
        ("cat dog cat cat", "tree", [[2, 3, 4, 4]]),
        ("cat dog cat cat", "dog", [[2, 3, 3, 3]]),
        ("apple cat dog tree", "", [[1, 2, 3, 4], [0, 0, 0, 0]]),
        ("cat dog cat cat", None, [[2, 3, 3, 3]]),
    ],
)
def test_no_text_is_read_twice_for_a_batch(prompts: str, negative: str | None, read: list[list[int]]) -> None:
    reader = Reader()
    encoder = TextEncoder(None, reader, reader)  # type: ignore[arg-type]
    texts = [*prompts.split(), *([] if negative is None else [negative])]
    own = [chunks_of(text) for text in prompts.split()]
    for _ in range(2):  # and none at all for the same batch again
        made = encoder(own, None if negative is None else chunks_of(negative))
        assert [each["text_embeddings"].item() for each in made] == [TEXTS.index(text) for text in texts]
        assert reader.read == read
    encoder.forget()
    encoder(own, None if negative is None else chunks_of(negative))
    assert reader.read == 2 * read


def test_negative_prompts_have_an_engine_of_their_own_with_clip_skip() -> None:
    reader, other = Reader(), Reader()
    encoder = TextEncoder(None, reader, other)  # type: ignore[arg-type]
    encoder([chunks_of("cat")] * 2, chunks_of("dog"))
    assert (reader.read, other.read) == ([[2, 2]], [[3, 3]])


def test_batch_count_makes_what_batch_size_makes(studio: Studio) -> None:
    by_count = studio.draw(PROMPT, batch_count=3).pictures
    by_size = studio.draw(PROMPT, batch_size=3).pictures
    assert min(map(psnr, by_count, by_size)) >= SAME_AS_ALONE


def _spoil(tensor_name: str, value: float) -> Any:
    """Sets one tensor of the VAE's decoder to `value`."""

    def change(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = folder / "vae" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        tensors[tensor_name] = tensors[tensor_name] * 0 + value
        save_file(tensors, path, metadata={"format": "pt"})

    return change


@pytest.mark.parametrize(
    ("tensor", "value"),
    [("decoder.conv_out.bias", np.nan), ("decoder.conv_out.bias", np.inf), ("decoder.conv_out.weight", 0.0)],
    ids=["NaN", "infinity", "constant"],
)
@pytest.mark.parametrize("engine", RUNTIMES)
def test_broken_picture_is_not_kept(
    engine: str, tensor: str, value: float, empty_studio: Studio, tiny_model: Path
) -> None:
    model = changed_copy(tiny_model, empty_studio.root / "broken", _spoil(tensor, value))
    if value == 0.0:
        _spoil("decoder.conv_out.bias", 0.25)(model)
    ended = empty_studio.here(
        PROMPT, "--model", str(model), "--engine", engine, "--denoising-steps=2", *empty_studio.folders()
    )
    assert ended.code == 1
    assert ended.err.count("\n") == 1
    assert not list(empty_studio.root.rglob("*.png*"))
