"""`--prompts`: every picture of a file is the one made alone, whatever happens on the way."""

import contextlib
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from darkroom.pipeline.pictures import read_recipe
from darkroom.prompts.journal import ROWS, Journal, Record
from darkroom.store.fingerprints import hash_json
from darkroom.store.manifest import MANIFEST
from tests.support import SCRIPT, SIZE, Diffusers, Ended, Studio, assert_refused, flags, listing, one_line, pixels, psnr

SAME_AS_ALONE = 50.0
SAME_AS_DIFFUSERS = 45.0
WIDE = SIZE + 32
WAIT = 600.0
STEPS = 30
"""So many that something can happen while an image is made."""

MIXED: list[Any] = [
    {"prompt": "a red apple", "seed": 41},
    {"prompt": "the blue cat", "steps": 5, "scheduler": "EulerA"},
    {"prompt": "a green dog", "guidance_scale": 1.0, "steps": 2},
    {"prompt": "a red house", "negative_prompt": "blue", "guidance_scale": 3},
    {"prompt": "the dog on the house", "width": WIDE, "num_images": 2},
    {"prompt": "a red apple", "steps": 4, "scheduler": "Heun"},
    {"prompt": "a cat", "scheduler": "LCM", "steps": 2, "guidance_scale": 0},
]


class Desk:
    """A studio, and a file of prompts in it that its script is run on."""

    def __init__(self, studio: Studio, rows: list[Any], name: str = "prompts.jsonl") -> None:
        self.studio = studio
        self.file = studio.root / name
        self.folder = studio.output / self.file.stem
        self.file.parent.mkdir(exist_ok=True)
        self.write(rows)

    def write(self, rows: list[Any]) -> None:
        self.file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def arguments(self, **more: Any) -> list[str]:
        asked = {"model": self.studio.model, "denoising_steps": 3, "batch_size": 2, "engine": "openvino"} | more
        devices = asked.pop("devices", None)
        return [f"--prompts={self.file}", *flags(**asked), *(["--devices", *devices] if devices else []),
                *self.studio.folders()]  # fmt: skip

    def run(self, **more: Any) -> Ended:
        return self.studio.here(*self.arguments(**more))

    def json(self, code: int = 0, **more: Any) -> dict[str, Any]:
        """What a run says to programs."""
        ended = self.run(json=True, **more)
        assert ended.code == code, ended.err
        return json.loads(ended.out) | {"err": ended.err}

    def pictures(self) -> dict[Path, int]:
        """The pictures that are there, and when each was written."""
        return {path: path.stat().st_mtime_ns for path in self.folder.glob("*.png")}

    def alone(self, row: dict[str, Any], seed: int) -> Path:
        """The picture that the script makes of a row's first image when asked for nothing else."""
        values = {"denoising_steps": 3, "seed": seed} | {name: value for name, value in row.items() if name != "prompt"}
        if "steps" in values:
            values["denoising_steps"] = values.pop("steps")
        values.pop("num_images", None)
        (path,) = self.studio.draw(row["prompt"], **values).paths
        return path


def rows_of(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"a red apple {number}"} | more for number in range(count)]


def denoisers(studio: Studio, *sizes: str) -> set[str]:
    """The keys of the UNets for batches that are named so."""
    folders = [folder for size in sizes for folder in studio.engines.glob(f"unet-*-{size}*")]
    return {hash_json(json.loads((folder / MANIFEST).read_text())["key"]) for folder in folders}


class TestPictures:
    """Each is the one that its row asks for."""

    def test_every_picture_is_the_one_made_alone_to_its_recipe(self, studio: Studio, diffusers_tiny: Diffusers) -> None:
        desk = Desk(studio, MIXED)
        result = desk.json(seed=5)
        images = result["images"]
        assert [image["seed"] for image in images] == [41, 6, 7, 8, 9, 10, 11, 12]
        assert [image["line"] for image in images] == [1, 2, 3, 4, 5, 5, 6, 7]
        by_line = {image["line"]: image for image in reversed(images)}
        for line, row in enumerate(MIXED, 1):
            path, alone = Path(by_line[line]["path"]), desk.alone(row, by_line[line]["seed"])
            assert psnr(pixels(path), pixels(alone)) >= SAME_AS_ALONE, row
            here, there = read_recipe(path), read_recipe(alone)
            # The denoisers of a shared batch are named by themselves: here those for one, two and four images.
            assert denoisers(studio, "b1-", "b2-", "b4-") >= set(here.pop("denoised_by")) != set()
            assert there["artefacts"].pop("unet") in denoisers(studio, "b1-")
            assert here == there
        (expected,) = diffusers_tiny.draw("the blue cat", seed=6, denoising_steps=5, scheduler="EulerA")
        assert psnr(pixels(by_line[2]["path"]), expected) >= SAME_AS_DIFFUSERS
        assert psnr(pixels(images[4]["path"]), pixels(images[5]["path"])) < SAME_AS_ALONE
        assert result["counts"] == {"asked": 8, "there_already": 0, "made": 8, "failed": 0, "missing": 0}

    def test_a_picture_replays_without_a_warning(self, studio: Studio, tmp_path: Path) -> None:
        (image, _) = Desk(studio, rows_of(2, scheduler="EulerA")).json(seed=5)["images"]
        replayed = studio.draw(recipe=image["path"], output_dir=tmp_path / "again")
        assert "warning" not in replayed.err
        assert psnr(replayed.pictures[0], pixels(image["path"])) >= SAME_AS_ALONE

    @pytest.mark.parametrize("asked", [{"engine": "torch"}, {"engine": "onnxruntime", "build_dynamic_shape": True}])
    def test_other_engines_make_the_same(self, asked: dict[str, Any], studio: Studio) -> None:
        rows = [{"prompt": "a red apple"}, {"prompt": "the blue cat", "steps": 2}, {"prompt": "a dog", "width": WIDE}]
        desk = Desk(studio, rows)
        images = desk.json(seed=5, **asked)["images"]
        for row, image in zip(rows, images, strict=True):
            assert psnr(pixels(image["path"]), pixels(desk.alone(row, image["seed"]))) >= SAME_AS_DIFFUSERS

    def test_sdxl_too(self, xl_studio: Studio) -> None:
        rows = [{"prompt": "a red apple"}, {"prompt": "the blue cat", "steps": 2}]
        desk = Desk(xl_studio, rows)
        images = desk.json(seed=5, engine="torch")["images"]
        for row, image in zip(rows, images, strict=True):
            assert Path(image["path"]).name.startswith("xl_base-")
            alone = desk.alone(row | {"engine": "torch"}, image["seed"])
            assert psnr(pixels(image["path"]), pixels(alone)) >= SAME_AS_ALONE

    def test_turbo_too_with_its_own_steps(self, studio: Studio) -> None:
        desk = Desk(replace(studio, script="demo_turbo.py"), rows_of(2))
        result = desk.json(seed=5, denoising_steps=None)
        assert result["request"]["denoising_steps"] == 4 and len(result["images"]) == 2

    def test_flags_of_all_rows_act(self, studio: Studio, tiny_xl_model: Path) -> None:
        import torch
        from safetensors.torch import save_file

        layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
        shapes = {f"{layer}.lora_A.weight": (2, 32), f"{layer}.lora_B.weight": (32, 2)}
        chance = torch.Generator().manual_seed(0)
        change = {name: torch.randn(shape, generator=chance) for name, shape in shapes.items()}
        save_file(change, studio.root / "lora.safetensors")
        changes = {"clip_skip": 1, "sigmas": "karras", "vae": tiny_xl_model}
        changes |= {"lora_path": studio.root / "lora.safetensors"}
        desk = Desk(studio, rows_of(1))
        (image,) = desk.json(seed=5, engine="torch", threads=1, scheduler="Euler", **changes)["images"]
        for left_out in (None, *changes):
            asked = {"scheduler": "Euler"} | {name: value for name, value in changes.items() if name != left_out}
            alone = desk.alone({"prompt": "a red apple 0", "engine": "torch"} | asked, 5)
            assert (psnr(pixels(image["path"]), pixels(alone)) >= SAME_AS_ALONE) == (left_out is None), left_out

    def test_only_engines_that_rows_need_are_built(self, studio: Studio) -> None:
        before = set(studio.engines.glob("unet-*"))
        Desk(studio, rows_of(1, guidance_scale=1.0, width=80)).json(seed=5, batch_size=1)
        assert len(set(studio.engines.glob("unet-*")) - before) == 1
        stores = listing(studio.engines.resolve(), studio.onnx.resolve())
        Desk(studio, rows_of(3, guidance_scale=1.0, width=80), "again.jsonl").json(seed=5, batch_size=1)
        assert listing(studio.engines.resolve(), studio.onnx.resolve()) == stores


class TestWhatIsSaid:
    def test_table_and_gallery_are_shown(self, studio: Studio) -> None:
        desk = Desk(studio, rows_of(3))
        ended = desk.run(seed=5)
        assert (ended.code, ended.err) == (0, "")
        lines = ended.out.splitlines()
        assert lines[-1] == str(desk.folder / "index.html")
        assert "|     Images      |            3 |" in lines
        for name in ("Seconds", "Slots in use", "CLIP", "UNet", "VAE-Dec", "Pipeline", "Throughput"):
            assert name in ended.out
        assert {len(line) for line in lines if line.startswith("|")} == {34}

    def test_quiet_prints_the_paths_in_the_order_of_the_file(self, studio: Studio) -> None:
        desk = Desk(studio, [{"prompt": f"a dog {number}", "steps": 6 - number} for number in range(5)])
        ended = desk.run(seed=5, quiet=True)
        assert ended.err == ""
        prompts = [read_recipe(Path(line))["prompt"] for line in ended.out.splitlines()]
        assert prompts == [f"a dog {number}" for number in range(5)]

    def test_json_is_one_object_on_stdout(self, studio: Studio) -> None:
        ended = Desk(studio, rows_of(2)).run(seed=5, json=True)
        assert one_line(ended.out)
        result = json.loads(ended.out)
        assert result["images_per_second"] > 0 and 1 <= result["slots_in_use"] <= result["slots"] == 2
        assert set(result["milliseconds"]) == {"CLIP", "UNet", "VAE-Dec", "Pipeline"}

    def test_a_prompt_that_is_too_long_is_cut_with_its_line(self, studio: Studio) -> None:
        desk = Desk(studio, [{"prompt": "a"}, {"prompt": "red " * 80 + "cat"}])
        ended = desk.run(seed=5)
        assert ended.err.startswith(f"warning: {desk.file}:2: ") and "red cat'" in ended.err
        assert one_line(ended.err)


class TestGoingOn:
    """The same command makes what is missing, and nothing else."""

    def test_what_is_there_is_kept_and_the_drawn_seed_too(self, studio: Studio) -> None:
        desk = Desk(studio, rows_of(6))
        first = desk.run()
        (seed,) = [line for line in first.out.splitlines() if line.startswith("seed: ")]
        before = desk.pictures()
        gone = sorted(before)[:2]
        gone[0].unlink()
        gone[1].write_bytes(gone[1].read_bytes()[:-50])
        result = desk.json()
        assert seed in result["err"]
        assert "4 of 6 pictures are there already." in result["err"]
        assert result["counts"]["made"] == 2
        after = desk.pictures()
        assert after.keys() == before.keys()
        assert {path for path in before if before[path] != after[path]} == set(gone)
        assert desk.json()["counts"] == {"asked": 6, "there_already": 6, "made": 0, "failed": 0, "missing": 0}

    def test_rows_that_did_not_change_are_kept(self, studio: Studio) -> None:
        rows = rows_of(4)
        desk = Desk(studio, rows)
        desk.run(seed=5)
        before = desk.pictures()
        rows[1]["prompt"] = "a green dog"
        desk.write([*rows, {"prompt": "one more", "steps": 7, "scheduler": "DDIM"}])
        result = desk.json(seed=5)
        assert "the file or the flags have changed: 3 of 5 pictures are still as requested." in result["err"]
        assert result["counts"]["made"] == 2
        assert before.items() <= desk.pictures().items()
        assert [image["prompt"] for image in result["images"]][1] == "a green dog"

    def test_files_of_one_name_have_folders_of_their_own(self, studio: Studio) -> None:
        Desk(studio, rows_of(2)).run(seed=5)
        others = [Desk(studio, [], "prompts.txt"), Desk(studio, [], "elsewhere/prompts.txt")]
        for number, other in enumerate(others, 2):
            other.file.write_text("a red house\n")
            for _ in range(2):  # the second time it is found again
                (image,) = other.json(seed=5)["images"]
                assert Path(image["path"]).parent.name == f"prompts-{number}"
        assert Desk(studio, rows_of(2)).json(seed=5)["counts"]["there_already"] == 2

    def test_a_file_that_was_moved_goes_on_where_it_was(self, studio: Studio) -> None:
        desk = Desk(studio, rows_of(2))
        desk.run(seed=5)
        moved = Desk(studio, rows_of(2), "elsewhere/prompts.jsonl")
        desk.file.unlink()
        assert moved.json(seed=5)["counts"]["there_already"] == 2

    @pytest.mark.parametrize("name", ["prompts.csv", "prompts.TSV", "prompts.json"])
    def test_tables_are_refused_by_name(self, name: str, studio: Studio) -> None:
        desk = Desk(studio, rows_of(2), name)
        assert_refused(desk.run(), name, ".jsonl")
        assert not desk.folder.exists()

    def test_other_flags_make_other_pictures_and_a_larger_batch_the_same(self, studio: Studio) -> None:
        desk = Desk(studio, rows_of(3))
        desk.run(seed=5)
        assert desk.json(seed=5, batch_size=1)["counts"]["there_already"] == 3
        other = desk.json(seed=5, guidance_scale=3)
        assert other["counts"] == {"asked": 3, "there_already": 0, "made": 3, "failed": 0, "missing": 0}
        assert len(desk.pictures()) == 6

    def test_picture_that_was_never_written_down_is_kept(self, studio: Studio) -> None:
        desk = Desk(studio, rows_of(3))
        desk.run(seed=5)
        lines = (desk.folder / ROWS).read_bytes().splitlines(keepends=True)
        (desk.folder / ROWS).write_bytes(lines[0] + lines[1] + lines[2][:30])
        (desk.folder / ".half.png.1.tmp").write_bytes(b"of a killed run")
        assert desk.json(seed=5)["counts"]["there_already"] == 3
        assert [json.loads(line)["image"] for line in (desk.folder / ROWS).read_bytes().splitlines()[1:]] == [1, 2, 3]
        assert not list(desk.folder.glob(".*.tmp"))

    def test_two_runs_do_not_fill_one_folder(self, studio: Studio) -> None:
        from filelock import FileLock

        desk = Desk(studio, rows_of(1))
        desk.folder.mkdir(parents=True)
        with FileLock(desk.folder / ".lock"):
            ended = desk.run(seed=5)
        assert ended.code == 1 and one_line(ended.err) and "another run" in ended.err

    def test_a_picture_that_is_there_counts_whenever_the_run_is_stopped(
        self, studio: Studio, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        desk = Desk(studio, rows_of(6))
        add = Journal.add

        def stopped_before(journal: Journal, record: Record) -> None:
            if len(journal) == 1:
                signal.raise_signal(signal.SIGINT)
            add(journal, record)

        monkeypatch.setattr(Journal, "add", stopped_before)
        ended = desk.run(seed=5)
        assert ended.code == 130
        left = desk.pictures()
        assert 2 <= len(left) < 6
        assert f"{len(left)} of 6 pictures are in {desk.folder}" in ended.err + ended.out
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    @pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
    def test_a_run_that_was_stopped_goes_on(self, how: signal.Signals, studio: Studio) -> None:
        Desk(studio, rows_of(1, steps=STEPS), "first.jsonl").json()  # engines and schedules are there
        rows = rows_of(8, steps=STEPS)
        desk = Desk(studio, rows)
        process = subprocess.Popen(
            [sys.executable, "-c", NEVER_THE_LAST_TWO, str(SCRIPT), *desk.arguments()],
            env=studio.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        until(lambda: len(desk.pictures()) >= 2, process)
        time.sleep(random.uniform(0, 0.1))
        process.send_signal(how)
        out, err = process.communicate(timeout=WAIT)
        assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(how, -how), err
        left = desk.pictures()
        assert 2 <= len(left) <= 6
        if how is not signal.SIGKILL:
            words = "stopped" if how is signal.SIGINT else "terminated"
            assert err == f"{SCRIPT.name}: {words}; nothing half-made was kept.\n"
            assert f"{len(left)} of 8 pictures are in {desk.folder}" in out
            assert "refresh" not in (desk.folder / "index.html").read_text()
            assert not list(desk.folder.glob(".*.tmp"))
        result = desk.json()
        assert next(line for line in out.splitlines() if line.startswith("seed: ")) in result["err"]
        made = {"asked": 8, "there_already": len(left), "made": 8 - len(left), "failed": 0, "missing": 0}
        assert result["counts"] == made
        assert left.items() <= desk.pictures().items()
        assert [image["prompt"] for image in result["images"]] == [row["prompt"] for row in rows]
        assert "8 of 8 pictures are here." in (desk.folder / "index.html").read_text()


def until(true: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    end = time.monotonic() + WAIT
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


@contextlib.contextmanager
def broken() -> Iterator[None]:
    """The image of seed 7 comes out as no numbers, that of seed 8 in one colour."""
    import darkroom.pipeline.pictures

    whole = darkroom.pipeline.pictures.to_bytes

    def to_bytes(picture: np.ndarray, what: str) -> np.ndarray:
        values = {"(seed 7)": np.nan, "(seed 8)": 0.5}
        return whole(next((0 * picture + value for name, value in values.items() if name in what), picture), what)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(darkroom.pipeline.pictures, "to_bytes", to_bytes)
        yield


class TestFailing:
    """One picture that fails is one picture."""

    def test_it_is_named_by_its_line_and_the_others_are_made(self, studio: Studio) -> None:
        desk = Desk(studio, rows_of(5))
        with broken():
            result = desk.json(code=1, seed=5)
        assert result["counts"] == {"asked": 5, "there_already": 0, "made": 3, "failed": 2, "missing": 2}
        assert [failure["line"] for failure in result["failures"]] == [3, 4]
        assert "2 of 5 pictures were not made" in result["err"]
        assert f"{desk.file}:3: the picture (seed 7) holds values that are not numbers" in result["err"]
        assert f"{desk.file}:4: the picture (seed 8) is one constant colour" in result["err"]
        page = (desk.folder / "index.html").read_text()
        assert "2 could not be made" in page and "not numbers" in page

    def test_the_next_run_makes_it(self, studio: Studio) -> None:
        desk = Desk(studio, rows_of(4))
        with broken():
            desk.json(code=1, seed=5)
        assert desk.json(seed=5)["counts"]["made"] == 2

    def test_a_fault_of_an_engine_is_that_of_its_images(self, studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
        from darkroom.engines.openvino import runtime as openvino

        run, calls = openvino._SplitEngine.__call__, []

        def call(engine: Any, inputs: Any) -> Any:
            calls.append(engine)
            if inputs["timestep"][0] < 600 and len(calls) > 20 and not failed:
                failed.append(engine)
                raise RuntimeError("out of luck")
            return run(engine, inputs)

        failed: list[Any] = []
        monkeypatch.setattr(openvino._SplitEngine, "__call__", call)
        desk = Desk(studio, rows_of(8))
        result = desk.json(code=1, seed=5)
        assert 1 <= result["counts"]["failed"] <= 2
        assert result["counts"]["made"] == 8 - result["counts"]["failed"]
        assert all("out of luck" in failure["message"] for failure in result["failures"])

    def test_a_disk_that_is_full_ends_the_run(self, studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
        from darkroom.errors import Failed

        def save(*_: Any) -> Path:
            raise Failed("the disk is full.")

        monkeypatch.setattr("darkroom.serving.workers.save", save)
        ended = Desk(studio, rows_of(20)).run(seed=5, quiet=True)
        assert (ended.code, ended.out) == (1, "")
        assert one_line(ended.err) and "the disk is full" in ended.err


class TestRefusing:
    """What cannot be meant is refused before anything is fetched, built or written."""

    def refused(self, desk: Desk, said: str, code: int = 2, **more: Any) -> None:
        before = listing(desk.studio.root)
        ended = desk.run(**more)
        assert (ended.code, ended.out) == (code, ""), ended.err
        assert one_line(ended.err) and said in ended.err
        assert listing(desk.studio.root) == before

    @pytest.mark.parametrize(
        ("asked", "said"),
        [
            ({"batch_count": 2}, "--batch-count"),
            ({"recipe": "a.png"}, "--recipe"),
            ({"num_warmup_runs": 1}, "--num-warmup-runs"),
            ({"batch_size": 0}, "--batch-size"),
            ({"seed": -1}, "seed"),
            ({"scheduler": "EulerB"}, "EulerB"),
            ({"negative_prompt": "a", "guidance_scale": 1}, "--negative-prompt"),
            ({"devices": ["gpu"]}, "'gpu'"),
            ({"devices": ["0"]}, "--devices 0 has no effect with --engine openvino"),
            ({"engine": "torch", "build_dynamic_batch": True}, "--build-dynamic-batch"),
            ({"onnx_opset": 9}, "--onnx-opset"),
            ({"model": "nobody/nothing", "height": 65}, "--height"),
        ],
        ids=str,
    )
    def test_flags_that_cannot_act(self, asked: dict[str, Any], said: str, empty_studio: Studio) -> None:
        self.refused(Desk(empty_studio, rows_of(2)), said, **asked)

    @pytest.mark.parametrize("asked", [{}, {"build_dynamic_batch": True}, {"engine": "torch"}], ids=str)
    def test_more_at_a_time_than_memory_holds(
        self, asked: dict[str, Any], empty_studio: Studio, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("darkroom.prepare.machine_memory", lambda: 10**9)
        said = f"--batch-size 100000 with {SIZE}x{SIZE} pixels: the pictures alone would take 5 GB"
        self.refused(Desk(empty_studio, rows_of(2)), said, batch_size=100_000, **asked)

    def test_a_size_that_so_many_at_a_time_leave_no_memory_for(
        self, empty_studio: Studio, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("darkroom.prepare.machine_memory", lambda: 10**9)
        desk = Desk(empty_studio, [{"prompt": "good"}, {"prompt": "a", "height": 6400, "width": 6400}])
        ended = desk.run(batch_size=10)
        assert_refused(ended, f"{desk.file}:2: ", "10 with 6400x6400 pixels: the pictures alone would take 5 GB")
        assert not list(empty_studio.engines.glob("unet-*"))

    def test_a_prompt_beside_it(self, empty_studio: Studio) -> None:
        desk = Desk(empty_studio, rows_of(1))
        ended = empty_studio.here("a red apple", *desk.arguments())
        assert_refused(ended, "beside --prompts")

    @pytest.mark.parametrize("flag", ["--devices=cpu", "--ray=local"])
    def test_flags_that_act_on_files_alone(self, flag: str, empty_studio: Studio) -> None:
        ended = empty_studio.here("a red apple", flag, *empty_studio.folders())
        assert_refused(ended, "without --prompts")

    @pytest.mark.parametrize("name", ["-", "", "nothing.txt", "..jsonl"])
    def test_what_is_no_file(self, name: str, empty_studio: Studio) -> None:
        ended = empty_studio.here(f"--prompts={name}", *empty_studio.folders())
        assert_refused(ended, "--prompts")

    def test_image_to_image_has_none(self, empty_studio: Studio) -> None:
        ended = replace(empty_studio, script="demo_img2img.py").here("--prompts=a.txt")
        assert_refused(ended, "--prompts is not a flag of this script")

    def test_sdxl_refiner_makes_none(self, empty_studio: Studio) -> None:
        desk = Desk(replace(empty_studio, script="demo_txt2img_xl.py"), rows_of(1))
        self.refused(desk, "--enable-refiner", enable_refiner=True)
        self.refused(desk, "--image-strength has no effect", image_strength=0.3)

    @pytest.mark.parametrize(
        ("row", "said"),
        [
            ({"prompt": "a", "steps": "many"}, "steps must be a whole number, not 'many'"),
            ({"prompt": "a", "colour": "red"}, "'colour' is not a field"),
            ({"prompt": "a", "height": 100}, "height must be a multiple of 8"),
            ({"prompt": "a", "guidance_scale": 1, "negative_prompt": "b"}, "negative_prompt"),
        ],
        ids=str,
    )
    def test_a_bad_line_before_the_model_is_opened(self, row: dict[str, Any], said: str, empty_studio: Studio) -> None:
        desk = Desk(empty_studio, [{"prompt": "good"}, row])
        self.refused(desk, f"{desk.file}:2: {said}", model="/nowhere")

    @pytest.mark.parametrize(
        ("row", "said"),
        [
            ({"prompt": "a", "steps": 51, "scheduler": "LCM"}, "LCM cannot make 51"),
            ({"prompt": "a", "steps": 1001, "scheduler": "DDIM"}, "1001 is more than the 1000"),
            ({"prompt": "a", "steps": 10**30, "scheduler": "DDIM"}, "is more than the 1000"),
        ],
        ids=str,
    )
    def test_a_schedule_that_cannot_be_made_before_an_engine_is_built(
        self, row: dict[str, Any], said: str, empty_studio: Studio
    ) -> None:
        desk = Desk(empty_studio, [{"prompt": "good"}, row])
        ended = desk.run()
        assert_refused(ended, f"{desk.file}:2: ", said)
        assert "--" not in ended.err.partition(":2:")[2]
        assert not list(empty_studio.engines.glob("unet-*")) and not empty_studio.output.exists()

    def test_a_size_that_a_free_engine_cannot_take(self, empty_studio: Studio) -> None:
        desk = Desk(empty_studio, [{"prompt": "good"}, {"prompt": "a", "height": 72}])
        ended = desk.run(build_dynamic_shape=True)
        assert_refused(ended, f"{desk.file}:2: height 72")
        assert not list(empty_studio.engines.glob("unet-*"))


class TestWorkers:
    """The same pictures, whoever makes them."""

    def test_two_processes_make_the_pictures_of_one(self, studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
        from darkroom.serving.workers import Crew

        hand_out = Crew._hand_out
        when_all_are = lambda crew, tasks: all(post.ready for post in crew._posts) and hand_out(crew, tasks)  # noqa: E731
        monkeypatch.setattr(Crew, "_hand_out", when_all_are)
        rows = rows_of(8, steps=STEPS)
        result = Desk(studio, rows, "two.jsonl").json(seed=5, devices=["cpu", "cpu"])
        assert result["counts"]["made"] == 8
        assert sorted(result["workers"]) == ["worker 1 (cpu)", "worker 2 (cpu)"] and min(result["workers"].values()) > 0
        assert 1 <= result["slots_in_use"] <= 2
        one = Desk(studio, rows, "one.jsonl").json(seed=5)
        for ours, theirs in zip(result["images"], one["images"], strict=True):
            assert psnr(pixels(ours["path"]), pixels(theirs["path"])) >= SAME_AS_ALONE
            assert Path(ours["path"]).name == Path(theirs["path"]).name

    def test_a_worker_that_is_killed_is_replaced_by_the_others(
        self, studio: Studio, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self._kill_one(monkeypatch, after=3)
        desk = Desk(studio, rows_of(10, steps=STEPS))
        result = desk.json(seed=5, devices=["cpu", "cpu"])
        assert result["counts"]["made"] == len(desk.pictures()) == 10
        assert re.search(r"warning: worker [12] \(cpu\) has ended \(it was killed", result["err"])

    def test_when_all_are_killed_the_run_ends_and_goes_on_later(
        self, studio: Studio, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        desk = Desk(studio, rows_of(6, steps=STEPS))
        with monkeypatch.context() as patch:
            self._kill_one(patch, after=5)
            ended = desk.run(seed=5, devices=["cpu"])
        assert ended.code == 1 and "no other is left: it was killed" in ended.err
        left = len(desk.pictures())
        assert 0 < left < 6
        assert desk.json(seed=5)["counts"] == {"asked": 6, "there_already": left, "made": 6 - left, "failed": 0,
                                               "missing": 0}  # fmt: skip

    def test_engines_that_cannot_be_loaded_are_said_once(self, studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
        from darkroom.serving.workers import Process

        begin = Process.__init__

        def with_broken_plan(worker: Any, name: str, orders: Any, variables: Any, tell: Any) -> None:
            broken_plan = replace(orders.plan, runtime_version="another")
            begin(worker, name, replace(orders, plan=broken_plan), variables, tell)

        monkeypatch.setattr(Process, "__init__", with_broken_plan)
        ended = Desk(studio, rows_of(1)).run(seed=5, quiet=True, devices=["cpu"])
        assert ended.code == 1 and one_line(ended.err) and "another" in ended.err

    @staticmethod
    def _kill_one(patch: pytest.MonkeyPatch, after: int) -> None:
        """The first worker to be given so many tasks dies of them."""
        from darkroom.serving.workers import Process

        give, given = Process.give, Counter()

        def give_and_kill(worker: Any, task: Any) -> None:
            give(worker, task)
            given[worker.name] += 1
            if given[worker.name] == after and max(given.values()) == after:
                os.kill(worker.process.pid, signal.SIGKILL)
                given[worker.name] += 1

        patch.setattr(Process, "give", give_and_kill)


def in_a_network_of_its_own() -> list[str]:
    """What runs a command where nobody else can reach the ports that it opens; [] where that cannot be had."""
    command = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    with contextlib.suppress(OSError):
        if subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    return []


NEVER_THE_LAST_TWO = """
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
from darkroom.serving.workers import Maker
make = Maker.make
Maker.make = lambda maker, task, tell: task.number > 6 or make(maker, task, tell)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""The script, of whose first eight pictures two stay undone, however late it is stopped."""

WHEN_ALL_ARE_READY = """
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
from darkroom.serving.workers import Crew
hand_out = Crew._hand_out
Crew._hand_out = lambda crew, tasks: all(post.ready for post in crew._posts) and hand_out(crew, tasks)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class TestRay:
    def test_without_ray_it_says_what_to_install(self, studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *more: None if name == "ray" else find(name, *more)
        )
        ended = Desk(studio, rows_of(1)).run(ray="local")
        assert_refused(ended, "pip install")

    def test_a_gpu_is_not_chosen_for_ray(self, studio: Studio) -> None:
        pytest.importorskip("ray")
        ended = Desk(studio, rows_of(1)).run(ray="local", devices=["0"])
        assert_refused(ended)

    @pytest.mark.slow  # to start Ray takes longer than all else here
    def test_two_actors_make_the_pictures_of_one_process(self, studio: Studio) -> None:
        pytest.importorskip("ray")
        if not (apart := in_a_network_of_its_own()):
            pytest.skip("Ray listens on every address, and no network of its own can be had here")
        rows = rows_of(8, steps=STEPS)
        one = Desk(studio, rows, "one.jsonl").json(seed=5)
        desk = Desk(studio, rows, "actors.jsonl")
        command = [
            *apart,
            sys.executable,
            "-c",
            WHEN_ALL_ARE_READY,
            str(SCRIPT),
            *desk.arguments(seed=5, ray="local", devices=["cpu", "cpu"], json=True),
        ]
        # Whoever else fills this machine's memory is none of Ray's business here.
        environment = studio.environment(RAY_memory_monitor_refresh_ms="0")
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WAIT)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert sorted(result["workers"]) == ["actor 1", "actor 2"] and min(result["workers"].values()) > 0
        for ours, theirs in zip(result["images"], one["images"], strict=True):
            assert psnr(pixels(ours["path"]), pixels(theirs["path"])) >= SAME_AS_ALONE
