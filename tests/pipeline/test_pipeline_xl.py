"""Pictures of SDXL against diffusers' own pipeline, and the tutorials' command lines."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support import Diffusers, Studio, assert_refused, changed_copy, edit_json, psnr

PROMPT = "a red apple on the house"
RUNTIMES = ("openvino", "onnxruntime", "torch")
SAME_AS_DIFFUSERS, SAME_IN_A_BATCH = 45, 50
"""dB."""
VISIBLE = 40
"""Pictures further apart than this are different pictures."""

SCHEDULERS = ("DDIM", "DPM++Karras", "Euler", "EulerA", "Heun", "LCM", "TCD", "UniPC", None)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("engine", RUNTIMES)
def test_every_scheduler_makes_the_picture_of_diffusers(
    engine: str, scheduler: str | None, xl_studio: Studio, diffusers_tiny_xl: Diffusers
) -> None:
    drawn = xl_studio.draw(PROMPT, engine=engine, scheduler=scheduler, denoising_steps=6, guidance_scale=7.5)
    (expected,) = diffusers_tiny_xl.draw(PROMPT, scheduler=scheduler, denoising_steps=6)
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS


def test_scheduler_of_an_old_model_is_taken_as_it_is(xl_studio: Studio) -> None:
    """diffusers corrects steps_offset for Stable Diffusion alone."""

    def change(folder: Path) -> None:
        edit_json(folder / "scheduler" / "scheduler_config.json", steps_offset=90)

    model = changed_copy(xl_studio.model, xl_studio.root / "old", change)
    drawn = xl_studio.draw(PROMPT, model=model, denoising_steps=6, guidance_scale=7.5)
    (expected,) = Diffusers(model).draw(PROMPT, denoising_steps=6)
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS


ASKED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "guidance 0": ({"guidance_scale": 0}, {"guidance_scale": 0.0}),
    "guidance 3": ({"guidance_scale": 3}, {"guidance_scale": 3.0}),
    "default guidance": ({}, {"guidance_scale": 5.0}),
    "negative prompt": ({"negative_prompt": "green dog"}, {"negative_prompt": "green dog", "guidance_scale": 5.0}),
    "empty negative prompt": ({"negative_prompt": ""}, {"negative_prompt": "", "guidance_scale": 5.0}),
    "clip skip": ({"clip_skip": 1}, {"clip_skip": 1, "guidance_scale": 5.0}),
    "not square": ({"height": 96, "width": 32}, {"height": 96, "width": 32, "guidance_scale": 5.0}),
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("engine", RUNTIMES)
def test_what_is_asked_means_what_it_means_in_diffusers(
    engine: str, asked: str, xl_studio: Studio, diffusers_tiny_xl: Diffusers
) -> None:
    ours, theirs = ASKED[asked]
    drawn = xl_studio.draw(PROMPT, engine=engine, **ours)
    (expected,) = diffusers_tiny_xl.draw(PROMPT, **theirs)
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS


def test_what_is_asked_can_be_seen(diffusers_tiny_xl: Diffusers) -> None:
    (plain,) = diffusers_tiny_xl.draw(PROMPT, guidance_scale=5.0)
    for asked in ("guidance 0", "negative prompt", "empty negative prompt", "clip skip"):
        assert psnr(plain, diffusers_tiny_xl.draw(PROMPT, **ASKED[asked][1])[0]) < VISIBLE
    assert psnr(plain, diffusers_tiny_xl.draw("the blue cat", guidance_scale=5.0)[0]) < VISIBLE


def test_sizes_are_told_to_the_network(diffusers_tiny_xl: Diffusers) -> None:
    (plain,) = diffusers_tiny_xl.draw(PROMPT)
    assert psnr(plain, diffusers_tiny_xl.draw(PROMPT, original_size=(512, 512))[0]) < VISIBLE


def test_empty_prompt_instead_of_zeros_where_the_model_says_so(
    xl_studio: Studio, tiny_xl_model: Path, diffusers_tiny_xl: Diffusers, tmp_path: Path
) -> None:
    import shutil

    model = Path(shutil.copytree(tiny_xl_model, tmp_path / "no-zeros"))
    edit_json(model / "model_index.json", force_zeros_for_empty_prompt=False)
    drawn = xl_studio.draw(PROMPT, model=model, guidance_scale=7.5)
    (expected,) = Diffusers(model).draw(PROMPT)
    assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS
    assert psnr(expected, diffusers_tiny_xl.draw(PROMPT)[0]) < VISIBLE


@pytest.mark.parametrize("build", [None, "build_dynamic_batch", "build_dynamic_shape"])
@pytest.mark.parametrize("engine", RUNTIMES[:2])
def test_batches_on_every_kind_of_engine(
    engine: str, build: str | None, xl_studio: Studio, diffusers_tiny_xl: Diffusers
) -> None:
    drawn = xl_studio.draw(PROMPT, engine=engine, batch_size=3, guidance_scale=7.5, **({build: True} if build else {}))
    expected = diffusers_tiny_xl.draw(*[PROMPT] * 3)
    assert min(map(psnr, drawn.pictures, expected)) >= SAME_AS_DIFFUSERS


@pytest.mark.parametrize("engine", RUNTIMES)
def test_an_image_of_a_batch_equals_the_image_alone(engine: str, xl_studio: Studio) -> None:
    together = xl_studio.draw(PROMPT, engine=engine, scheduler="EulerA", batch_size=3, seed=40).pictures
    for index, picture in enumerate(together):
        alone = xl_studio.draw(PROMPT, engine=engine, scheduler="EulerA", seed=40 + index).pictures[0]
        assert psnr(picture, alone) >= SAME_IN_A_BATCH


@pytest.mark.slow
def test_batch_divided_over_devices_equals_images_alone(xl_studio: Studio, diffusers_tiny_xl: Diffusers) -> None:
    asked: dict[str, Any] = {"engine": "jax", "scheduler": "EulerA", "guidance_scale": 7.5}
    together = xl_studio.draw(PROMPT, batch_size=8, devices=8, **asked).pictures
    expected = diffusers_tiny_xl.draw(*[PROMPT] * 8, scheduler="EulerA")
    assert min(map(psnr, together, expected)) >= SAME_AS_DIFFUSERS
    for image in (0, 7):
        alone = xl_studio.draw(PROMPT, seed=5 + image, **asked).pictures[0]
        assert psnr(together[image], alone) >= SAME_IN_A_BATCH


def test_the_turbo_script_takes_both_families_without_guidance(
    studio: Studio, xl_studio: Studio, diffusers_tiny: Diffusers, diffusers_tiny_xl: Diffusers
) -> None:
    from dataclasses import replace

    for each, peer in ((studio, diffusers_tiny), (xl_studio, diffusers_tiny_xl)):
        drawn = replace(each, script="demo_turbo.py").draw(PROMPT, denoising_steps=None)
        assert drawn.result["request"]["denoising_steps"] == 4
        (expected,) = peer.draw(PROMPT, denoising_steps=4, guidance_scale=0.0)
        assert psnr(drawn.pictures[0], expected) >= SAME_AS_DIFFUSERS


class TestTutorialLines:
    """Copied from tutorials, with `--version` replaced by `--model`; and unchanged, without a network."""

    FIRST = (
        "art deco, realistic",
        "--hf-token=secret",
        "--batch-size",
        "1",
        "--build-static-batch",
        "--num-warmup-runs",
        "5",
        "--seed",
        "3",
        "--verbose",
        "--use-cuda-graph",
    )
    SECOND = (
        "little cute gremlin wearing a jacket, cinematic, vivid colors, intricate masterpiece, golden ratio, "
        "highly detailed",
    )
    THIRD = ("Einstein", "--denoising-steps", "1", "--scheduler", "EulerA", "--guidance-scale", "0.0")

    def test_first_line_makes_its_picture(self, xl_studio: Studio) -> None:
        ended = xl_studio.here(*self.FIRST, "--model", str(xl_studio.model), *xl_studio.folders())
        assert ended.code == 0, ended.err
        path = Path(ended.out.splitlines()[-1])
        assert path.is_file() and path.name.startswith("xl_base-fp32-art_deco,_-1-")
        assert "--use-cuda-graph" in ended.err
        assert "secret" not in ended.err + ended.out

    @pytest.mark.parametrize("line", [SECOND, (*THIRD, "--width", "64", "--height", "64")])
    def test_turbo_lines_make_their_pictures(self, line: tuple[str, ...], xl_studio: Studio) -> None:
        ended = xl_studio.here(*line, "--model", str(xl_studio.model), *xl_studio.folders())
        assert ended.code == 0, ended.err

    @pytest.mark.parametrize(
        "line",
        [
            (*FIRST, "--version", "xl-1.0"),
            (*SECOND, "--version", "xl-turbo"),
            (*THIRD, "--version", "xl-turbo", "--width", "512", "--height", "512"),
        ],
    )
    def test_without_a_network_they_end_in_one_line(self, line: tuple[str, ...], xl_studio: Studio) -> None:
        ended = xl_studio.shell(*line, *xl_studio.folders())
        assert ended.code == 1
        assert "--model" in ended.err.splitlines()[-1] and "Traceback" not in ended.err

    def test_cuda_graphs_are_refused_on_an_engine_without_cuda(self, xl_studio: Studio) -> None:
        ended = xl_studio.here(
            PROMPT, "--use-cuda-graph", "--engine=openvino", "--model", str(xl_studio.model), *xl_studio.folders()
        )
        assert_refused(ended, "--use-cuda-graph")


@pytest.mark.parametrize("part", ["text_encoder_2/model.safetensors", "tokenizer_2/merges.txt"])
def test_a_missing_part_is_named(part: str, xl_studio: Studio, tiny_xl_model: Path, tmp_path: Path) -> None:
    import shutil

    model = Path(shutil.copytree(tiny_xl_model, tmp_path / "broken"))
    (model / part).unlink()
    ended = xl_studio.here(PROMPT, "--model", str(model), *xl_studio.folders())
    assert_refused(ended, Path(part).name)


def test_each_script_refuses_the_other_family(studio: Studio, xl_studio: Studio) -> None:
    ended = studio.here(PROMPT, "--model", str(xl_studio.model), *studio.folders())
    assert_refused(ended, "StableDiffusionXLPipeline")
    ended = xl_studio.here(PROMPT, "--model", str(studio.model), *xl_studio.folders())
    assert_refused(ended, "StableDiffusionPipeline")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_make_the_picture_of_the_whole_files(
    variant: str | None, xl_studio: Studio, diffusers_tiny_xl: Diffusers, tmp_path: Path
) -> None:
    folder = tmp_path / "sharded"
    diffusers_tiny_xl.pipeline.save_pretrained(folder, variant=variant, max_shard_size="200KB")
    for network in ("unet", "text_encoder_2", "vae"):
        names = [path.name for path in (folder / network).glob("*.safetensors")]
        assert len(names) > 1 and all("fp16" in name for name in names) == bool(variant)
    (picture,) = replace(xl_studio, model=folder).draw(PROMPT, guidance_scale=7.5).pictures
    assert psnr(picture, diffusers_tiny_xl.draw(PROMPT)[0]) >= SAME_AS_DIFFUSERS
