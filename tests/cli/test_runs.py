"""What a run prints, writes, reuses and leaves alone."""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import darkroom.pipeline.pictures
from darkroom.errors import Failed
from tests.support import (
    COMPILED_MODULES,
    HEAVY,
    ROOT,
    SCRIPT,
    SOON,
    Drawn,
    Studio,
    assert_refused,
    changed_copy,
    edit_json,
    listing,
    one_line,
    pixels,
    psnr,
)

PROMPT = "a red apple"
TOKEN = "hf_VerySecretToken0123456789"


def run_flags(studio: Studio, *more: str, seed: bool = True) -> list[str]:
    steps = ["--model", str(studio.model), "--denoising-steps=2", *(["--seed=5"] if seed else [])]
    return [*steps, *studio.folders(), *more]


@pytest.fixture(scope="module")
def built(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """The tiny model and folders for whole processes, which share what they build."""
    return Studio(tmp_path_factory.mktemp("whole"), tiny_model)


FAMILIES = ("sd", "turbo", "xl", "xl with its refiner")
ON_ENGINES = [*(("openvino", family) for family in FAMILIES[:3]), ("onnxruntime", "sd"), ("torch", "sd")]


@pytest.fixture
def family_studio(request: pytest.FixtureRequest, studio: Studio, tiny_xl_model: Path) -> Studio:
    """The tiny model of each family, with the script that runs it."""
    return of_family(request.param, studio, tiny_xl_model)


def of_family(family: str, studio: Studio, xl: Path) -> Studio:
    if family.startswith("xl"):
        return replace(studio, model=xl, script="demo_txt2img_xl.py")
    return replace(studio, script="demo_turbo.py") if family == "turbo" else studio


class TestTheWholeProcess:
    """The script as the shell runs it, with nothing built and then with everything."""

    @pytest.mark.parametrize(
        ("engine", "family"),
        [
            ("openvino", "sd"),
            ("onnxruntime", "sd"),
            pytest.param("openvino", "turbo", marks=pytest.mark.slow),
            pytest.param("openvino", "xl with its refiner", marks=pytest.mark.slow),  # which is xl, too
            pytest.param("jax", "sd", marks=pytest.mark.slow),
        ],
    )
    def test_prompt_becomes_a_picture_and_again_without_torch(
        self, engine: str, family: str, built: Studio, tiny_xl_model: Path, tiny_refiner: Path
    ) -> None:
        built = of_family(family, built, tiny_xl_model)
        arguments = [PROMPT, *run_flags(built, "--engine", engine)]
        if "refiner" in family:
            arguments += ["--enable-refiner", f"--refiner-model={tiny_refiner}", "--denoising-steps=6"]
        first = built.shell(*arguments)
        assert (first.code, first.err) == (0, "")
        path = Path(first.out.splitlines()[-1])
        assert path.parent == built.output
        assert pixels(path).shape == (64, 64, 3)
        content, stores = path.read_bytes(), listing(built.onnx, built.engines)
        second = built.shell(*arguments, interpreter=("-c", COMPILED_MODULES, str(SCRIPT.with_name(built.script))))
        assert second.code == 0, second.err
        imported = set(json.loads(second.err))
        assert "numpy" in imported
        assert not imported & set(HEAVY)
        assert path.read_bytes() == content
        assert listing(built.onnx, built.engines) == stores

    def test_working_folder_does_not_matter(self, built: Studio, tmp_path: Path) -> None:
        ended = built.shell(PROMPT, *run_flags(built, "--quiet"), cwd=tmp_path)
        assert ended.code == 0, ended.err
        assert not list(tmp_path.iterdir())

    def test_torch_engine_makes_a_picture(self, built: Studio) -> None:
        ended = built.shell(PROMPT, *run_flags(built, "--engine=torch"))
        assert ended.code == 0, ended.err

    def test_token_is_neither_shown_nor_written(self, built: Studio) -> None:
        said = [
            built.shell(PROMPT, *run_flags(built, "--verbose", "--json", f"--hf-token={TOKEN}"), HF_TOKEN=TOKEN + "e"),
            built.shell(PROMPT, "--version=1.5", f"--hf-token={TOKEN}", *built.folders()),
            built.shell(PROMPT, "--version=1.5", *built.folders(), HF_TOKEN=TOKEN),
        ]
        assert [ended.code for ended in said] == [0, 1, 1]
        assert not any(TOKEN in ended.out + ended.err for ended in said)
        files = [path for path in built.root.rglob("*") if path.is_file()]
        assert any(path.suffix == ".png" for path in files)
        assert not any(TOKEN.encode() in path.read_bytes() for path in files)

    def test_hub_that_cannot_be_reached_is_said_quickly_in_one_line(self, built: Studio) -> None:
        before = listing(built.onnx, built.engines, built.output)
        for model in (["--version=2.1"], ["--model=some/repository"]):
            ended = built.shell(PROMPT, *model, *built.folders(), timeout=SOON)
            assert ended.code == 1
            assert one_line(ended.err)
            assert "--model" in ended.err
            assert ended.out == ""
        assert listing(built.onnx, built.engines, built.output) == before

    def test_schedule_that_cannot_be_made_is_refused_by_a_child_in_one_line(self, built: Studio) -> None:
        before = listing(built.onnx, built.engines, built.output)
        asked = [PROMPT, f"--model={built.model}", *built.folders()]
        assert_refused(built.shell(*asked, "--scheduler=LCM", "--denoising-steps=51"), "51")
        assert_refused(built.here(*asked, "--scheduler=DDIM", "--denoising-steps=1001"), "1001")
        assert listing(built.onnx, built.engines, built.output) == before


def test_table_has_the_form_that_people_know(studio: Studio) -> None:
    ended = studio.here(PROMPT, *run_flags(studio))
    number = r" +\d+\.\d\d ms \|"
    rule = r"\|-----------------\|--------------\|"
    expected = [
        rule,
        r"\|     Module      \|   Latency    \|",
        rule,
        r"\|      CLIP       \|" + number,
        r"\|    UNet x 3     \|" + number,
        r"\|     VAE-Dec     \|" + number,
        rule,
        r"\|    Pipeline     \|" + number,
        rule,
        r"Throughput: \d+\.\d\d image/s",
        r".+\.png",
    ]
    lines = ended.out.splitlines()
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line
    assert all(len(line) == 34 for line in lines[:9])
    assert ended.err == ""


@pytest.mark.parametrize(("scheduler", "calls"), [("DDIM", 5), ("PNDM", 6), ("Heun", 9), ("LCM", 5)])
def test_unet_is_counted_by_its_calls(scheduler: str, calls: int, studio: Studio) -> None:
    drawn = studio.draw(PROMPT, scheduler=scheduler, denoising_steps=5)
    assert drawn.result["unet_calls"] == calls
    assert f"UNet x {calls}" in drawn.err


def test_json_is_one_object_on_stdout_and_nothing_else(studio: Studio) -> None:
    ended = studio.here(PROMPT, *run_flags(studio, "--json", "--batch-size=2"))
    assert one_line(ended.out)
    result = json.loads(ended.out)
    assert [image["seed"] for image in result["images"]] == [5, 6]
    assert all(Path(image["path"]).is_file() for image in result["images"])
    assert result["request"]["denoising_steps"] == 2
    assert set(result["milliseconds"]) == {"CLIP", "UNet", "VAE-Dec", "Pipeline"}
    assert result["images_per_second"] > 0


def test_json_says_what_was_made_before_it_failed(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    save = darkroom.pipeline.pictures.save

    def full_disk(pixels: np.ndarray, folder: Path, *more: Any) -> Path:
        if list(folder.glob("*.png")):
            raise Failed("no space is left.")
        return save(pixels, folder, *more)

    monkeypatch.setattr(darkroom.pipeline.pictures, "save", full_disk)
    ended = studio.here(PROMPT, "a blue dog", "--json", *run_flags(studio))
    assert ended.code == 1
    result = json.loads(ended.out)
    (image,) = result["images"]
    assert result["error"] == "no space is left." and Path(image["path"]).is_file()


@pytest.mark.parametrize("prompt", ["--help", "-sunset", "--", "- -"])
def test_what_stands_behind_two_dashes_is_a_prompt(prompt: str, studio: Studio) -> None:
    ended = studio.here("--json", *run_flags(studio), "--", prompt)
    assert ended.code == 0, ended.err
    assert [image["prompt"] for image in json.loads(ended.out)["images"]] == [prompt]


def test_path_that_the_terminal_has_no_letters_for_is_printed_all_the_same(built: Studio) -> None:
    ended = built.shell("größe", *run_flags(built), PYTHONIOENCODING="ascii")
    assert ended.code == 0, ended.err
    assert "gr\\xf6\\xdfe" in ended.out


def test_quiet_prints_the_paths_alone(studio: Studio) -> None:
    ended = studio.here(PROMPT, *run_flags(studio, "--quiet", "--batch-count=2", seed=False))
    assert ended.err == ""
    assert [Path(line).is_file() for line in ended.out.splitlines()] == [True, True]


def test_seed_that_was_drawn_is_printed_and_makes_the_same_picture_again(studio: Studio) -> None:
    first = studio.here(PROMPT, *run_flags(studio, seed=False))
    (seed,) = re.findall(r"^seed: (\d+)$", first.out, re.MULTILINE)
    second = studio.here(PROMPT, *run_flags(studio, f"--seed={seed}", seed=False))
    assert "seed:" not in second.out
    assert first.out.splitlines()[-1] == second.out.splitlines()[-1]


def test_torch_inference_is_the_torch_engine(studio: Studio) -> None:
    people_know = studio.draw(PROMPT, engine=None, torch_inference="eager")
    assert people_know.result["request"]["engine"] == "torch"
    assert (people_know.pictures[0] == studio.draw(PROMPT, engine="torch").pictures[0]).all()


def test_zero_is_a_seed(studio: Studio) -> None:
    first, second = (studio.draw(PROMPT, seed=0) for _ in range(2))
    assert first.result["request"]["seed"] == 0
    assert first.paths == second.paths


@pytest.mark.parametrize(("engine", "family_studio"), ON_ENGINES, indirect=["family_studio"])
def test_same_seed_makes_the_same_file_bytes(engine: str, family_studio: Studio) -> None:
    (path,) = family_studio.draw(PROMPT, engine=engine).paths
    content = path.read_bytes()
    path.unlink()
    assert family_studio.draw(PROMPT, engine=engine).paths == [path]
    assert path.read_bytes() == content


def test_only_what_determines_the_pixels_is_in_the_file(studio: Studio, tmp_path: Path) -> None:
    (plain,) = studio.draw(PROMPT).paths
    content = plain.read_bytes()
    other = Studio(studio.root, studio.model.rename(tmp_path / "moved"))
    try:
        drawn = other.draw(PROMPT, num_warmup_runs=2, verbose=True, hf_token=TOKEN, output_dir=tmp_path / "out")
    finally:
        other.model.rename(studio.model)
    assert drawn.paths[0].name == plain.name
    assert drawn.paths[0].read_bytes() == content
    for word in (str(studio.root), "tmp", "moved", TOKEN):
        assert word.encode() not in content


def test_warm_up_does_not_change_the_pictures(studio: Studio) -> None:
    plain = studio.draw(PROMPT, batch_count=2).pictures
    warmed = studio.draw(PROMPT, batch_count=2, num_warmup_runs=3).pictures
    for first, second in zip(plain, warmed, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    "prompt", ["../../etc/passwd", "/", "..", "a/b", "~", "a\nb", "🍎🍎", "' OR 1=1 --", "x" * 300, "\u202e gnp"]
)
def test_no_prompt_writes_outside_the_output_folder(prompt: str, studio: Studio) -> None:
    before = set(listing(studio.root))
    (path,) = studio.draw(prompt).paths
    assert path.resolve().parent == studio.output.resolve()
    assert set(listing(studio.root)) - before <= {str(studio.output), str(path)}


def test_same_name_for_the_same_request_and_more_digits_for_a_taken_one(studio: Studio) -> None:
    (path,) = studio.draw(PROMPT).paths
    other = studio.draw("the blue cat").paths[0].read_bytes()
    assert studio.draw(PROMPT).paths == [path]
    path.write_bytes(other)
    (longer,) = studio.draw(PROMPT).paths
    assert len(longer.name) == len(path.name) + 1
    assert longer.name.startswith(path.stem)
    assert path.read_bytes() == other


def test_prompt_that_is_too_long_is_cut_with_a_warning_that_shows_what(studio: Studio) -> None:
    drawn = studio.draw("red " * 80 + "cat")
    warnings = [line for line in drawn.err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    assert "'red red red red red cat'" in warnings[0]


class TestRecipes:
    """`--recipe picture.png` remakes a picture to the same pixels."""

    @pytest.mark.parametrize(("engine", "family_studio"), ON_ENGINES, indirect=["family_studio"])
    def test_recipe_remakes_the_pixels(self, engine: str, family_studio: Studio, tmp_path: Path) -> None:
        drawn = family_studio.draw(
            PROMPT,
            engine=engine,
            scheduler="EulerA",
            guidance_scale=3.5,
            negative_prompt="blue",
            clip_skip=1,
            height=72,
            width=56,
        )
        self._remade(family_studio, drawn, 0, tmp_path)

    @pytest.mark.parametrize("number", [0, 1, 2])
    def test_recipe_remakes_any_slot_of_a_batch(self, number: int, studio: Studio, tmp_path: Path) -> None:
        self._remade(studio, studio.draw(PROMPT, batch_size=3), number, tmp_path)

    def test_recipe_remakes_any_prompt_of_a_run(self, studio: Studio, tmp_path: Path) -> None:
        self._remade(studio, studio.draw(PROMPT, "the blue cat", batch_size=3, batch_count=2), 10, tmp_path)

    def test_recipe_remakes_a_picture_of_a_dynamic_engine(self, studio: Studio, tmp_path: Path) -> None:
        self._remade(studio, studio.draw(PROMPT, batch_size=2, build_dynamic_shape=True), 1, tmp_path)

    @staticmethod
    def _remade(studio: Studio, drawn: Drawn, number: int, folder: Path) -> None:
        original = drawn.paths[number]
        again = studio.draw(recipe=original, output_dir=folder / "again")
        assert len(again.pictures) == 1
        np.testing.assert_array_equal(again.pictures[0], drawn.pictures[number])
        assert again.paths[0].read_bytes() == original.read_bytes()
        assert again.paths[0].name == original.name

    def test_recipe_of_other_weights_is_refused(self, studio: Studio, tmp_path: Path) -> None:
        (path,) = studio.draw(PROMPT).paths
        other = changed_copy(
            studio.model,
            tmp_path / "other",
            lambda folder: edit_json(folder / "scheduler/scheduler_config.json", beta_end=0.013),
        )
        ended = studio.here("--recipe", str(path), "--model", str(other), *studio.folders())
        assert_refused(ended)

    def test_recipe_of_a_model_folder_asks_for_the_folder(self, studio: Studio) -> None:
        (path,) = studio.draw(PROMPT).paths
        ended = studio.here("--recipe", str(path), *studio.folders())
        assert_refused(ended, "--model")

    @pytest.mark.parametrize(
        "more", [[PROMPT], ["--seed=5"], ["--height=64"], ["--scheduler=DDIM"], ["--guidance-scale=2"]]
    )
    def test_nothing_that_a_recipe_fixes_can_be_asked_beside_it(self, more: list[str], studio: Studio) -> None:
        (path,) = studio.draw(PROMPT).paths
        ended = studio.here("--recipe", str(path), "--model", str(studio.model), *more, *studio.folders())
        assert_refused(ended)


CHANGES = {
    "batch": {"batch_size": 2},
    "height": {"height": 80},
    "width": {"width": 48},
    "guidance off": {"guidance_scale": 1.0},
    "clip skip": {"clip_skip": 1},
    "opset": {"onnx_opset": 18},
    "engine": {"engine": "onnxruntime"},
    "dynamic batch": {"build_dynamic_batch": True},
    "dynamic shape": {"build_dynamic_shape": True},
    "steps": {"denoising_steps": 4},
    "scheduler": {"scheduler": "DDIM"},
}
DIFFERENT = {
    "batch": {"clip", "unet", "vae"},
    "height": {"unet", "vae"},
    "width": {"unet", "vae"},
    "guidance off": {"unet"},
    "clip skip": {"clip"},
    "opset": {"clip", "unet", "vae"},
    "engine": {"clip", "unet", "vae"},
    "dynamic batch": {"clip", "unet", "vae"},
    "dynamic shape": {"clip", "unet", "vae"},
    "steps": {"schedule"},
    "scheduler": {"schedule"},
}


class TestKeys:
    """No engine is ever used for what it was not built for, and none is built twice."""

    @pytest.mark.parametrize("change", CHANGES)
    def test_change_uses_other_artefacts_exactly_where_it_matters(self, change: str, studio: Studio) -> None:
        plain, changed = studio.draw(PROMPT), studio.draw(PROMPT, **CHANGES[change])
        before, after = plain.result["artefacts"], changed.result["artefacts"]
        assert {name for name in before if before[name] != after[name]} == DIFFERENT[change]

    @pytest.mark.parametrize(
        ("network", "family_studio"),
        [
            *((network, "sd") for network in ("text_encoder", "unet", "vae")),
            *((network, "xl") for network in ("text_encoder", "text_encoder_2", "unet")),
        ],
        indirect=["family_studio"],
    )
    def test_changed_weights_use_other_engines_and_show(
        self, network: str, family_studio: Studio, tmp_path: Path
    ) -> None:
        from safetensors.torch import load_file, save_file

        def change(folder: Path) -> None:
            (path,) = (folder / network).glob("*.safetensors")
            tensors = load_file(path)
            save_file({name: tensor * 1.3 for name, tensor in tensors.items()}, path, metadata={"format": "pt"})

        plain = family_studio.draw(PROMPT)
        model = changed_copy(family_studio.model, tmp_path / family_studio.model.name, change)
        other = family_studio.draw(PROMPT, model=model)
        stage = network.replace("text_encoder", "clip")
        assert other.result["artefacts"][stage] != plain.result["artefacts"][stage]
        assert psnr(plain.pictures[0], other.pictures[0]) < 40

    def test_weights_changed_in_place_are_noticed(self, empty_studio: Studio) -> None:
        from safetensors.torch import load_file, save_file

        model = changed_copy(empty_studio.model, empty_studio.root / "model", lambda folder: None)
        before = empty_studio.draw(PROMPT, model=model)
        path = model / "unet" / "diffusion_pytorch_model.safetensors"
        save_file({name: tensor * 1.3 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
        after = empty_studio.draw(PROMPT, model=model)
        assert psnr(before.pictures[0], after.pictures[0]) < 40
        expected = empty_studio.draw(PROMPT, model=model, engine="torch")
        assert psnr(after.pictures[0], expected.pictures[0]) >= 45

    def test_precision_uses_another_engine(self, studio: Studio) -> None:
        from darkroom.engines import find_runtime

        if "bf16" not in find_runtime("openvino").precisions():
            pytest.skip("this processor has no bfloat16")
        plain, half = studio.draw(PROMPT), studio.draw(PROMPT, precision="bf16")
        assert not set(plain.result["artefacts"].values()) & {
            half.result["artefacts"][stage] for stage in ("clip", "unet", "vae")
        }
        assert 20 < psnr(plain.pictures[0], half.pictures[0]) < 70

    @pytest.mark.parametrize(
        ("engine", "build", "family_studio"),
        [
            *itertools.product(
                ["openvino", "onnxruntime"], [None, "build_dynamic_batch", "build_dynamic_shape"], ["sd"]
            ),
            *(("openvino", None, family) for family in FAMILIES[1:3]),
        ],
        indirect=["family_studio"],
    )
    def test_repeated_run_builds_nothing_and_touches_nothing(
        self, engine: str, build: str | None, family_studio: Studio
    ) -> None:
        studio = family_studio
        asked = {"engine": engine} | ({build: True} if build else {})
        studio.draw(PROMPT, **asked)
        before = listing((studio.root / "onnx").resolve(), (studio.root / "engines").resolve())
        again = studio.draw(PROMPT, **asked)
        assert again.children == []
        assert listing((studio.root / "onnx").resolve(), (studio.root / "engines").resolve()) == before

    def test_runtimes_share_the_graphs(self, empty_studio: Studio) -> None:
        assert empty_studio.draw(PROMPT, engine="openvino").children.count("export_stage") == 3
        assert "export_stage" not in empty_studio.draw(PROMPT, engine="onnxruntime").children

    def test_graphs_serve_every_size_that_halves(self, empty_studio: Studio) -> None:
        empty_studio.draw(PROMPT)
        assert "export_stage" not in empty_studio.draw(PROMPT, height=96, width=32, batch_size=2).children

    @pytest.mark.parametrize(
        "pattern",
        [
            "engines/unet-*/engine.*",
            "engines/schedule-*/table.npz",
            "engines/tokenizer-*/tokenizer.json",
            "engines/clip-*/manifest.json",
        ],
    )
    def test_damaged_artefact_is_made_again(self, pattern: str, empty_studio: Studio) -> None:
        expected = empty_studio.draw(PROMPT).pictures[0]
        (path,) = empty_studio.root.glob(pattern)
        path.write_bytes(path.read_bytes()[:-64])
        drawn = empty_studio.draw(PROMPT)
        assert len(drawn.children) == 1
        np.testing.assert_array_equal(drawn.pictures[0], expected)

    def test_damaged_graph_is_not_built_from(self, empty_studio: Studio) -> None:
        expected = empty_studio.draw(PROMPT).pictures[0]
        (path,) = empty_studio.onnx.glob("unet-*/model.onnx")
        path.write_bytes(path.read_bytes()[:-64])
        (engine,) = empty_studio.engines.glob("unet-*/engine.*")
        engine.unlink()
        drawn = empty_studio.draw(PROMPT)
        assert drawn.children == ["export_stage", "build_engine"]
        np.testing.assert_array_equal(drawn.pictures[0], expected)


def test_checkout_has_default_folders_of_its_own() -> None:
    from darkroom.cli.settings import home

    assert home() == ROOT
