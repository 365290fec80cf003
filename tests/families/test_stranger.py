"""A family that the package does not know runs through every door of it; see `family`, where it is defined."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from darkroom import families
from darkroom.checkpoint import catalog
from tests.support import Studio, assert_refused, flags, pixels, psnr

PROMPT = "a red apple"
SAME, VISIBLE = 45.0, 30.0
"""Least PSNR in dB between pictures that are to be the same, most between those that are to differ."""


@pytest.fixture(scope="module", autouse=True)
def stranger() -> Iterator[None]:
    """The family and its script are known while these tests run, and no longer."""
    from tests.families.family import SCRIPT, Stranger

    families.register(Stranger())
    catalog.SCRIPTS[SCRIPT.program] = SCRIPT
    yield
    del catalog.SCRIPTS[SCRIPT.program]
    families.forget("stranger")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.families.model import write_stranger

    return write_stranger(tmp_path_factory.mktemp("models") / "stranger")


@pytest.fixture(scope="module")
def plain(model: Path) -> Any:
    from tests.families.model import PlainLoop

    return PlainLoop(model)


@pytest.fixture
def strange(studio: Studio, model: Path) -> Studio:
    return replace(studio, model=model, script="stranger.py")


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "torch", "jax"])
def test_picture_is_that_of_a_plain_loop(engine: str, strange: Studio, plain: Any) -> None:
    drawn = strange.draw(PROMPT, engine=engine, guidance_scale=3.0)
    expected = plain.draw(PROMPT, 5, 3, 3.0)
    assert psnr(drawn.pictures[0], expected) >= SAME
    assert set(drawn.result["milliseconds"]) == {"Text", "Flow", "VAE-Dec", "Pipeline"}


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no guidance": ({"guidance_scale": 1.0}, {"guidance": 1.0}),
    "a negative prompt": ({"negative_prompt": "blue dog"}, {"negative": "blue dog"}),
    "more steps": ({"denoising_steps": 6}, {"steps": 6}),
    "another size": ({"height": 96, "width": 64}, {"size": (96, 64)}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_is_asked_is_what_a_plain_loop_makes(change: str, strange: Studio, plain: Any) -> None:
    ours, its = CHANGES[change]
    drawn = strange.draw(PROMPT, **{"guidance_scale": 3.0} | ours)
    expected = plain.draw(PROMPT, **{"seed": 5, "steps": 3, "guidance": 3.0} | its)
    assert psnr(drawn.pictures[0], expected) >= SAME
    if "size" not in its:
        assert psnr(drawn.pictures[0], plain.draw(PROMPT, 5, 3, 3.0)) <= VISIBLE


def test_an_engine_for_any_size_shifts_each_size_by_itself(strange: Studio, plain: Any) -> None:
    for height, width in ((64, 64), (96, 64)):
        drawn = strange.draw(PROMPT, guidance_scale=3.0, build_dynamic_shape=True, height=height, width=width)
        assert psnr(drawn.pictures[0], plain.draw(PROMPT, 5, 3, 3.0, (height, width))) >= SAME


def test_a_batch_and_a_recipe_make_the_same(strange: Studio) -> None:
    together = strange.draw(PROMPT, batch_size=2)
    alone = strange.draw(PROMPT, seed=6)
    assert psnr(together.pictures[1], alone.pictures[0]) >= SAME
    again = strange.draw(recipe=together.result["images"][1]["path"])
    assert psnr(again.pictures[0], together.pictures[1]) >= SAME


def test_a_file_of_prompts_with_mixed_steps_and_sizes(strange: Studio, plain: Any) -> None:
    rows = [
        {"prompt": PROMPT, "seed": 5, "steps": 2, "guidance_scale": 3.0},
        {"prompt": "a blue dog", "seed": 6, "steps": 5, "guidance_scale": 1.0},
        {"prompt": "green leaf", "seed": 7, "steps": 3, "guidance_scale": 2.0, "height": 96, "width": 64},
    ]
    file = strange.root / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = strange.here(*flags(prompts=file, model=strange.model, batch_size=2, json=True), *strange.folders())
    assert ended.code == 0, ended.err
    made = sorted(json.loads(ended.out)["images"], key=lambda image: image["seed"])
    for row, image in zip(rows, made, strict=True):
        size = (row.get("height", 64), row.get("width", 64))
        expected = plain.draw(row["prompt"], row["seed"], row["steps"], row["guidance_scale"], size)
        assert psnr(pixels(image["path"]), expected) >= SAME, row


def test_children_compile_it_by_the_names_that_its_stages_give(strange: Studio, model: Path, tmp_path: Path) -> None:
    """In processes that know of no stranger."""
    from darkroom.checkpoint.folder import open_checkpoint
    from darkroom.contract import Job, Profile
    from darkroom.engines.runtime import NOTHING_ASKED
    from darkroom.networks.graph import export_stage
    from darkroom.prepare import build_engine
    from darkroom.processes.child import run_in_child
    from darkroom.store.fingerprints import Fingerprints

    pytest.importorskip("tensorrt_rtx")
    checkpoint = open_checkpoint(model, Fingerprints(tmp_path / "memory.json"))
    stage = checkpoint.family.stages(checkpoint, guided=True, clip_skip=0)["flow"]
    run_in_child(export_stage, model, stage, "fp32", 17, None, checkpoint.vae_factor, tmp_path)
    job = Job(stage, Profile(1, 64, 64), "fp32")
    built = tmp_path / "engine"
    built.mkdir()
    run_in_child(build_engine, "tensorrt", NOTHING_ASKED, job, tmp_path / "model.onnx", built, progress=print)
    assert {plan.name for plan in built.iterdir()} >= {"engine.plan", "step.plan"}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"clip_skip": 1}, ("--clip-skip 1", "0 layers")),
        ({"scheduler": "DDIM"}, ("--scheduler DDIM", "FlowMatchEuler")),
        ({"height": 60}, ("--height", "multiple of 8")),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(asked: dict[str, Any], words: tuple[str, ...], strange: Studio) -> None:
    arguments = flags(model=strange.model, **{"height": 64, "width": 64} | asked)
    assert_refused(strange.here(PROMPT, *arguments, *strange.folders()), *words)


def test_other_scripts_refuse_it(studio: Studio, model: Path) -> None:
    assert_refused(studio.here(PROMPT, *flags(model=model), *studio.folders()), "StrangerPipeline")
