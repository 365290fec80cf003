"""`--precision auto`: what is chosen is measured, agrees with float32, is kept, recorded, and replayed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from darkroom.contract import AUTO, Job, Network, Profile, Stage, Tensor, precision_of, spelled
from darkroom.engines import choice, find_runtime
from darkroom.engines.runtime import Options
from darkroom.request import Request
from darkroom.store.manifest import read_manifest
from tests.support import Studio, assert_refused, flags, psnr

PROMPT = "red apple"

STAGE = Stage("unet", (Tensor("x", ("B", 4)),), (Tensor("y", ("B", 4)),), (Network("unet", "a:B"),), role="denoiser")


class Scripted:
    """A runtime whose engines take as long, and are as wrong, as they are told; its clock is theirs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **precisions: tuple[float, float]) -> None:
        self.now, self.loaded, self.most_loaded = 0.0, 0, 0
        self._precisions = precisions
        monkeypatch.setattr(choice, "find_runtime", lambda *_: self)
        monkeypatch.setattr(choice.time, "perf_counter", lambda: self.now)

    def load(self, job: Job, source: Path, threads: int | None) -> Any:
        assert source == Path(job.precision)
        return Loaded(self, *self._precisions[job.precision])


class Loaded:
    def __init__(self, runtime: Scripted, seconds: float, error: float) -> None:
        self._runtime, self._seconds, self._error = runtime, seconds, error
        runtime.loaded += 1
        runtime.most_loaded = max(runtime.most_loaded, runtime.loaded)

    def __del__(self) -> None:
        self._runtime.loaded -= 1

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self._runtime.now += self._seconds
        y = inputs["x"].copy()
        y.flat[0] += self._error * np.abs(y).max()
        return {"y": y}


@pytest.mark.parametrize(
    ("bf16", "fp16", "chosen"),
    [
        ((0.5, 0.01), (0.4, 0.001), "fp16"),
        ((0.4, 0.01), (0.5, 0.001), "bf16"),
        ((0.4, 0.06), (0.5, 0.001), "fp16"),
        ((0.4, 0.06), (0.3, 0.02), "fp32"),
        ((0.95, 0.0), (1.2, 0.0), "fp32"),
        ((0.4, np.nan), (0.4, np.inf), "fp32"),
    ],
    ids=["fastest", "the other", "first disagrees", "none agrees", "hardly faster", "not numbers"],
)
@pytest.mark.parametrize("large", [False, True])
def test_the_fastest_that_agrees_is_chosen(
    bf16: tuple[float, float],
    fp16: tuple[float, float],
    chosen: str,
    large: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = Scripted(monkeypatch, fp32=(1.0, 0.0), bf16=bf16, fp16=fp16)
    job = Job(replace(STAGE, half_weights=large), Profile(1, 64, 64), "fp32")
    with np.errstate(invalid="ignore"):
        made = choice.choose("any", Options(), job, {name: Path(name) for name in ("fp32", "bf16", "fp16")})
    assert made["chosen"] == chosen
    assert made["milliseconds"] == pytest.approx({"fp32": 1e3, "bf16": bf16[0] * 1e3, "fp16": fp16[0] * 1e3})
    assert runtime.most_loaded == (1 if large else 3)


def test_precisions_of_networks_are_spelled_and_read_back() -> None:
    own = {"unet": "bf16", "clip": "fp32"}
    assert spelled(own) == "clip=fp32,unet=bf16"
    assert {stage: precision_of(spelled(own), stage) for stage in own} == own
    assert precision_of(spelled(own), "vae") == "fp32"
    assert spelled(dict.fromkeys(own, "bf16")) == precision_of("bf16", "unet") == "bf16"


def test_a_refiner_has_precisions_of_its_own() -> None:
    asked = "unet=bf16,refiner.unet=fp32,refiner.clip_2=bf16"
    request = Request(
        model="a", prompts=("b",), height=64, width=64, denoising_steps=9, guidance_scale=5.0, precision=asked,
        refiner="c", refiner_strength=0.5,
    )  # fmt: skip
    assert request.refining().precision == "clip_2=bf16,unet=fp32"
    assert replace(request, precision="bf16").refining().precision == "bf16"


@pytest.fixture
def all_tried() -> Any:
    """Networks as small as the tiny model's are tried, too."""
    if "bf16" not in find_runtime("openvino").native():
        pytest.skip("this processor has no bfloat16")
    with mock.patch("darkroom.prepare.SMALL", 0):
        yield


def choices(studio: Studio) -> dict[str, dict[str, Any]]:
    manifests = [read_manifest(folder) for folder in studio.engines.glob("precision-*")]
    return {manifest["key"]["stage"]: manifest["made"] for manifest in manifests}


@pytest.mark.usefixtures("all_tried")
class TestChoices:
    @pytest.mark.parametrize(("gain", "chosen"), [(0.0, "bf16"), (1e9, "fp32")])
    def test_one_engine_is_kept_and_found_again(
        self, gain: float, chosen: str, empty_studio: Studio, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(choice, "GAIN", gain)
        drawn = empty_studio.draw(PROMPT, verbose=True)
        assert drawn.children.count("choose") == 3
        assert {made["chosen"] for made in choices(empty_studio).values()} == {chosen}
        assert f"unet: {chosen}, fp32 " in drawn.err
        engines = [folder.name for kind in ("clip", "unet", "vae") for folder in empty_studio.engines.glob(f"{kind}-*")]
        assert len(engines) == 3 and all(f"-{chosen}-" in name for name in engines)
        assert drawn.result["request"]["precision"] == chosen and drawn.paths[0].name.startswith(f"txt2img-{chosen}-")
        monkeypatch.setattr(choice, "GAIN", 1e9 - gain)  # what was measured is not measured again
        again = empty_studio.draw(PROMPT)
        asked = empty_studio.draw(PROMPT, precision=chosen)
        assert again.children == asked.children == []
        assert again.paths == asked.paths == drawn.paths
        assert np.array_equal(again.pictures[0], drawn.pictures[0])

    def test_networks_differ_and_the_recipe_replays_what_was_computed(
        self, empty_studio: Studio, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(choice, "GAIN", 0.0)
        real = choice.choose

        def choose(runtime: str, options: Options, job: Job, sources: dict[str, Path]) -> dict[str, Any]:
            made = real(runtime, options, job, sources)
            return made | {"chosen": "bf16" if job.stage.name == "unet" else "fp32"}

        monkeypatch.setattr(choice, "choose", choose)
        drawn = empty_studio.draw(PROMPT)
        mixed = "clip=fp32,unet=bf16,vae=fp32"
        assert drawn.result["request"]["precision"] == mixed
        assert drawn.paths[0].name.startswith("txt2img-bf16+fp32-")
        for folder in empty_studio.engines.glob("precision-*"):
            (folder / "manifest.json").unlink()  # another machine would choose otherwise
        monkeypatch.setattr(choice, "GAIN", 1e9)
        again = empty_studio.draw(recipe=drawn.paths[0])
        assert again.children == [] and np.array_equal(again.pictures[0], drawn.pictures[0])
        exact = empty_studio.draw(PROMPT, precision="fp32")
        assert 20 < psnr(drawn.pictures[0], exact.pictures[0]) < 80
        typed = empty_studio.draw(PROMPT, precision=mixed)
        assert np.array_equal(typed.pictures[0], drawn.pictures[0])

    def test_what_cannot_be_built_in_a_precision_is_computed_in_float32(
        self, empty_studio: Studio, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(choice, "GAIN", 0.0)
        monkeypatch.setattr("darkroom.engines.parity.TOLERANCES", {"fp32": 1e-3, "bf16": 0.0})
        drawn = empty_studio.draw(PROMPT)
        assert drawn.result["request"]["precision"] == "fp32"
        assert all("differs from its graph" in made["refused"]["bf16"] for made in choices(empty_studio).values())

    def test_pictures_that_share_a_batch_share_the_precision(
        self, empty_studio: Studio, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(choice, "GAIN", 0.0)
        rows = empty_studio.root / "rows.txt"
        rows.write_text("red apple\ngreen cat\nblue dog\n")
        more = flags(model=empty_studio.model, prompts=rows, batch_size=2, seed=5, denoising_steps=3, engine="openvino")
        ended = empty_studio.here(*more, "--json", *empty_studio.folders())
        assert ended.code == 0, ended.err
        assert json.loads(ended.out)["request"]["precision"] == "bf16"
        names = [path.name for path in (empty_studio.output / "rows").glob("*.png")]
        assert len(names) == 3 and all("-bf16-" in name for name in names)
        assert len(choices(empty_studio)) == 3
        assert {folder.name.split("-openvino-")[1][:4] for folder in empty_studio.engines.glob("unet-*")} == {"bf16"}


def test_small_networks_are_not_measured(studio: Studio) -> None:
    drawn = studio.draw(PROMPT, precision=AUTO)
    assert "choose" not in drawn.children and drawn.result["request"]["precision"] == "fp32"


@pytest.mark.parametrize(
    ("precision", "said"),
    [
        ("unet=fp99", "'fp99'"),
        ("unet=bf16,fp32", "NETWORK=PRECISION"),
        ("unet=auto", "'auto'"),
        ("nothing=fp32", "this model has no nothing, but clip, "),
    ],
)
def test_wrong_precisions_of_networks_are_refused(precision: str, said: str, studio: Studio) -> None:
    ended = studio.here(PROMPT, *flags(model=studio.model, precision=precision, engine="openvino"), *studio.folders())
    assert_refused(ended, "--precision", said)
