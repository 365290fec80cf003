"""benchmark.py run: what it measures, in which order, and what it leaves behind."""

import contextlib
import io
import json
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from darkroom.bench.contender import Contender, seconds_to_picture
from darkroom.bench.machine import Room
from darkroom.bench.turns import Entrant, sample, take_turns
from darkroom.cli.benchmark import run
from darkroom.errors import Failed
from tests.cli.test_prebuild import scale_weights as scale
from tests.support import Ended, Studio, changed_copy, children_inline, flags, one_line, until

ANSWERS = """
import json, os, sys, time
log = open(sys.argv[1], "a", buffering=1)
print(json.dumps({"loaded": 0.25}), flush=True)
runs = iter(json.loads(sys.argv[3]))
for line in sys.stdin:
    if line.strip() == "run":
        log.write(sys.argv[2] + "\\n")
        took = next(runs)
        stream = {"stages": {"UNet": 1.0, "Pipeline": took}, "unet_calls": 3}
        print(json.dumps({"streams": [stream], "wall": took}), flush=True)
    elif line.startswith("set "):
        log.write(line[4:].replace(" ", "")) if json.loads(line[4:])["batch_size"] != 2 else None
        print(json.dumps({"set": json.loads(line[4:])}), flush=True)
    elif line.strip() == "memory":
        print(json.dumps({"peak_bytes": 1000}), flush=True)
"""


def entrant(name: str, program: str, *arguments: str, warmup: int = 1, repeat: int = 5) -> Entrant:
    settings = {"warmup_runs": warmup, "repeat": repeat, "batch_size": 2, "denoising_steps": 3}
    return Entrant(name, name, (settings,), [sys.executable, "-c", textwrap.dedent(program), *arguments], None, {})


def measured(*entrants: Entrant) -> list[dict[str, Any]]:
    found = {each.name: result for each, _, result in take_turns(entrants, 0, lambda text: None)}
    return [found[each.name] for each in entrants]


def bench(studio: Studio, *arguments: str, **values: Any) -> Ended:
    """Runs benchmark.py in this process, on the tiny model."""
    out, err = io.StringIO(), io.StringIO()
    folders = flags(onnx_dir=studio.onnx, engine_dir=studio.engines, output=studio.root / "results.jsonl")
    with children_inline(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(["run", *arguments, *flags(model=studio.model, **values), *folders])
    return Ended(code, out.getvalue(), err.getvalue())


def lines(studio: Studio) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (studio.root / "results.jsonl").read_text().splitlines()]


def until_stopped(process: int) -> None:
    """Returns when no thread of a process runs any more: a signal takes its time."""
    threads = Path(f"/proc/{process}/task")
    until(lambda: all(each.read_text().rpartition(")")[2].split()[0] == "T" for each in threads.glob("*/stat")))


@pytest.fixture(autouse=True)
def room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all contenders at once, whatever else fills this machine's memory; but where memory is what is tested."""
    if request.cls is not None:
        monkeypatch.setattr(Room, "for_another", lambda *_: True)


class TestTurns:
    def test_contenders_take_turns_and_the_first_run_does_not_count(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        times = {"a": [900, 10, 30, 20, 50, 40], "b": [900, 2, 2, 2, 2, 2]}
        first, second = measured(
            *(entrant(name, ANSWERS, str(log), name, json.dumps(runs)) for name, runs in times.items())
        )
        assert log.read_text().split() == ["a", "b"] * 6
        assert first["stages"]["Pipeline"] == {"median": 30, "p90": 50, "least": 10, "most": 50, "count": 5}
        assert first["first_run_ms"] == 900 and first["load_seconds"] == 0.25 and first["peak_host_bytes"] == 1000
        assert first["images_per_second"] == pytest.approx(2 / 0.030, rel=1e-4)
        assert second["images_per_second"] == 1000 and second["unet_calls"] == 3

    def test_one_that_fails_is_named_and_the_others_go_on(self, tmp_path: Path) -> None:
        good = entrant("good", ANSWERS, str(tmp_path / "log"), "good", json.dumps([1] * 6))
        programs = {
            "it ended with 1: ValueError: no weights": "raise ValueError('no weights')",
            "it ran out of memory, most likely": "import os; os.kill(os.getpid(), 9)",
            "no such model": """print('{"error": "no such model"}', flush=True)""",
            "gave an answer that was not understood": "print('garbage', flush=True)",
            "it ended with 3": """print('{"loaded": 1}', flush=True); raise SystemExit(3)""",
        }
        found = measured(*(entrant(name, program) for name, program in programs.items()), good)
        for each, expected in zip(found, programs, strict=False):
            assert expected in each["error"] and "\n" not in each["error"]
        assert "error" not in found[-1] and found[-1]["images_per_second"] > 0

    def test_what_is_known_is_given_before_those_that_memory_has_no_room_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Room, "for_another", lambda _, running: running < 2)
        log = tmp_path / "log"
        entrants = [entrant(name, ANSWERS, str(log), name, json.dumps([1] * 6)) for name in "abc"]
        turns = take_turns(entrants, 0, lambda text: None)
        (first, _, found), (second, _, _) = next(turns), next(turns)
        assert (first.name, second.name) == ("a", "b") and found["images_per_second"] > 0
        assert log.read_text().split() == ["a", "b"] * 6
        ((third, _, late),) = turns
        # The first is there again, so that those it was measured without can be compared with it.
        assert third.name == "c" and log.read_text().split() == ["a", "b"] * 6 + ["a", "c"] * 6
        beside = {"contender": "a", "settings": entrants[0].cells[0], "images_per_second": 2000}
        assert late["beside"] == beside | {"stages": {"UNet": 1, "Pipeline": 1}}
        assert "beside" not in found

    def test_a_first_that_fails_is_nobodys_company(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        room = {1: True, 2: False}
        monkeypatch.setattr(Room, "for_another", lambda _, running: room[running])
        log = str(tmp_path / "log")
        good = [entrant(name, ANSWERS, log, name, json.dumps([1] * 6)) for name in "bcd"]
        broken, *others, last = measured(entrant("a", "raise ValueError('no')"), *good)
        assert "no" in broken["error"] and last["beside"]["contender"] == "b"
        room[1] = False
        *_, last = measured(*good)
        assert all("beside" not in each for each in (*others, last)) and last["images_per_second"] > 0

    def test_whoever_waits_computes_nothing(self, tmp_path: Path) -> None:
        counting = """
            import sys, threading, time
            print('{"loaded": 0}', flush=True)
            def count():
                while True:
                    open(sys.argv[1], "a").write(".")
                    time.sleep(0.005)
            threading.Thread(target=count, daemon=True).start()
            for line in sys.stdin:
                print('{"streams": [], "wall": 1}', flush=True)
        """
        file = tmp_path / "ticks"
        with Contender("one", entrant("one", counting, str(file)).command) as contender:
            contender.loaded()
            contender.run()
            until_stopped(contender._process.pid)
            before = file.stat().st_size if file.exists() else 0
            time.sleep(0.2)
            assert (file.stat().st_size if file.exists() else 0) == before

    def test_cold_starts_are_whole_processes(self, tmp_path: Path) -> None:
        nap = [sys.executable, "-c", "import time, sys; time.sleep(0.2); open(sys.argv[1], 'w')", str(tmp_path / "x")]
        assert seconds_to_picture("nap", nap) > 0.2 and (tmp_path / "x").exists()
        with pytest.raises(Failed, match=r"^nap: ValueError: no\.$"):
            seconds_to_picture("nap", [sys.executable, "-c", "raise ValueError('no')"])


def test_a_sample_is_what_a_hand_computes() -> None:
    assert sample([float(n) for n in range(1, 11)]) == {
        "median": 5.5,
        "p90": 9,
        "least": 1,
        "most": 10,
        "count": 10,
    }


@pytest.mark.skipif(sys.platform != "linux", reason="a script stands in for nvidia-smi")
def test_contenders_wait_in_the_memory_of_the_gpu_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("darkroom.bench.machine._host", lambda: (100, 90))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    asked, answer = tmp_path / "asked", tmp_path / "nvidia-smi"

    def free(megabytes: int) -> None:
        answer.write_text(f'#!/bin/sh\necho "$@" > {asked}\necho "100000, {megabytes}"\n')
        answer.chmod(0o755)

    free(60_000)  # what is taken before is not a contender's
    room = Room()
    for left, enough in ((40_000, True), (35_000, False)):
        free(left)
        assert room.for_another(1) is enough
        assert asked.read_text().startswith("-i 2 ")
    answer.write_text("#!/bin/sh\necho no devices were found\nexit 6\n")
    assert Room().for_another(1)
    monkeypatch.setattr("darkroom.bench.machine._host", lambda: (100, 50))
    assert not room.for_another(1)


class TestRun:
    def test_measures_every_cell_and_a_second_run_resumes(self, studio: Studio) -> None:
        asked = dict(denoising_steps=2, cold_starts=0, price_per_hour=2)
        lists = ("--batch-size", "1", "2", "--engine", "openvino", "torch")
        first = bench(studio, *lists, **asked)
        assert first.code == 0, first.err
        rows = lines(studio)
        cells = [(row["settings"]["batch_size"], row["contender"]) for row in rows]
        assert cells == [(size, engine) for size in (1, 2) for engine in ("openvino auto", "torch auto")]
        for row in rows:
            stages = row["stages"]
            assert {"CLIP", "UNet", "VAE-Dec", "Pipeline"} == stages.keys() and stages["UNet"]["count"] == 5
            parts = sum(stages[name]["least"] for name in ("CLIP", "UNet", "VAE-Dec"))
            assert parts <= stages["Pipeline"]["most"]
            rate = row["settings"]["batch_size"] * 1000 / stages["Pipeline"]["median"]
            assert row["images_per_second"] == pytest.approx(rate, rel=0.01)
            assert row["images_per_unit"] == pytest.approx(row["images_per_second"] * 1800, rel=1e-3)
            assert row["peak_host_bytes"] > 2**26 and row["load_seconds"] > 0
            assert (row["build_seconds"] is None) == (row["contender"] == "torch auto") == (row["engine_bytes"] is None)
        assert "2 of 3" not in first.out
        again = bench(studio, *lists, "--precision", "auto", **asked)
        assert again.code == 0 and "4 of 4 cells are in" in again.out and len(lines(studio)) == 4
        assert again.out.count("openvino auto") == first.out.count("openvino auto") - 2, "the results are shown again"
        dearer = bench(studio, *lists, **asked | {"price_per_hour": 4})
        assert dearer.code == 0 and [row["price_per_hour"] for row in lines(studio)] == [2] * 4 + [4] * 4
        for before, after in zip(lines(studio)[:4], lines(studio)[4:], strict=True):
            assert after["images_per_unit"] == pytest.approx(before["images_per_unit"] / 2, abs=0.01)
            assert after["stages"] == before["stages"] and after["finished"] == before["finished"]
        mistyped = bench(studio, *lists, "--baseline", "tensorflow", **asked)
        assert mistyped.code == 2 and "'tensorflow'" in mistyped.err and not mistyped.out

    def test_two_models_of_one_name_are_two_cells(self, studio: Studio, tmp_path: Path) -> None:
        twin = changed_copy(studio.model, tmp_path / "twin" / studio.model.name, lambda folder: scale(folder / "vae"))
        out, err = io.StringIO(), io.StringIO()
        asked = ("--engine=openvino", "--denoising-steps=1", "--cold-starts=0", f"--output={tmp_path / 'x.jsonl'}")
        with children_inline(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            folders = flags(onnx_dir=studio.onnx, engine_dir=studio.engines)
            assert run(["run", "--model", str(studio.model), str(twin), *asked, *folders]) == 0, err.getvalue()
        first, second = map(json.loads, (tmp_path / "x.jsonl").read_text().splitlines())
        assert first["settings"]["weights"] != second["settings"]["weights"]
        assert first["stages"] != second["stages"]

    def test_the_place_is_in_the_line_and_in_the_name(self, studio: Studio) -> None:
        asked = dict(denoising_steps=1, cold_starts=0, provider="CPUExecutionProvider")
        ended = bench(studio, "--engine", "openvino", "onnxruntime", **asked)
        assert ended.code == 0, ended.err
        openvino, onnxruntime = lines(studio)
        assert (openvino["contender"], onnxruntime["contender"]) == ("openvino auto", "onnxruntime (cpu) auto")
        assert openvino["settings"]["options"] is None
        assert json.loads(onnxruntime["settings"]["options"]) == {"provider": "cpu"}

    def test_cold_starts_streams_and_overlap(self, studio: Studio) -> None:
        asked = dict(denoising_steps=1, cold_starts=1, engine="onnxruntime")
        ended = bench(studio, "--streams", "1", "2", "--async", **asked)
        assert ended.code == 0, ended.err
        alone, overlapped, two = lines(studio)
        assert alone["cold_start"]["median"] > 0 < alone["load_seconds"] and alone["cold_start"]["count"] == 1
        assert overlapped["settings"]["async"] and overlapped["stages"]["Pipeline"]["count"] == 5 * 4
        assert two["settings"]["streams"] == 2 and two["stages"]["Pipeline"]["count"] == 5 * 2

    def test_a_cell_that_cannot_be_is_a_line_with_its_reason(self, studio: Studio) -> None:
        steps = ("--denoising-steps", "1000", "2")
        ended = bench(studio, "--scheduler", "DPM++", *steps, engine="openvino", cold_starts=0)
        assert ended.code == 1 and "1 of 2 cells could not be measured" in ended.err
        assert [row["error"] is None for row in lines(studio)] == [False, True]

    @pytest.mark.parametrize(
        "arguments,said",
        [
            (["--repeat", "4"], "--repeat must be 5 or more"),
            (["--streams", "0"], "--streams"),
            (["--threads", "0"], "--threads"),
            (["--cold-starts", "-1"], "--cold-starts"),
            (["--num-warmup-runs", "-1"], "--num-warmup-runs"),
            (["--price-per-hour", "0"], "--price-per-hour"),
            (["--max-latency", "0"], "--max-latency"),
            (["--batch-size", "0"], "--batch-size"),
            (["--engine", "opnvino"], "'openvino'"),
            (["--engine", "onnxruntime", "--precision", "fp16"], "--precision fp16"),
            (["--engine", "openvino", "--use-cuda-graph"], "--use-cuda-graph"),
            (["--version", "emojy"], "'emoji'"),
            (["--size", "63"], "--height"),
            (["--output", "/"], "--output"),
            (["--prompt", ""], "prompt"),
            (["--baselin", "x"], "'--baseline'"),
            (["--baseline", "tensorflow"], "'tensorflow'"),
            (["--engine", "torch", "torch-compile", "--baseline", "torch"], "'torch auto' or 'torch-compile auto'"),
            (["--engine", "jax", "--threads", "1"], "--threads"),
            (["--async", "--streams", "2"], "--async"),
            (["--output", "/proc/no/such/file"], "--output"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_what_cannot_be_done_is_refused(self, arguments: list[str], said: str, tmp_path: Path) -> None:
        out, err = io.StringIO(), io.StringIO()
        more = [] if "--output" in arguments else [f"--output={tmp_path / 'x.jsonl'}"]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(["run", *arguments, *more])
        assert code == 2 and one_line(err.getvalue()) and said in err.getvalue() and not out.getvalue()
        assert list(tmp_path.iterdir()) == []

    def test_tensorrt_without_a_gpu_says_so(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorrt_rtx")
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            code = run(["run", "--engine", "tensorrt", f"--output={tmp_path / 'x.jsonl'}"])
        assert code in (0, 1) and (code == 0 or "there is no NVIDIA" in err.getvalue())


def test_the_report_is_made_of_what_was_run(studio: Studio) -> None:
    pytest.importorskip("matplotlib")
    bench(studio, "--engine", "openvino", denoising_steps=1, cold_starts=0)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert (
            run(["report", str(studio.root / "results.jsonl"), "--baseline", "openvino", "--max-latency", "1e6"]) == 0
        )
    made = {path.name for path in (studio.root / "results-report").iterdir()}
    assert {"results.csv", "results.md"} < made and any(name.endswith(".png") for name in made)
    assert "most images with a p90 within" in out.getvalue()


def test_overlapped_batches_are_the_same_pictures(studio: Studio) -> None:
    from darkroom.bench.cell import Cell
    from darkroom.bench.worker import preparer_of
    from darkroom.engines.runtime import NOTHING_ASKED
    from darkroom.pipeline.timing import StageClock
    from darkroom.request import Batch

    cell = Cell(
        version="tiny", folder=str(studio.model), weights="", engine="openvino", precision="fp32", build="static-batch",
        batch_size=1, denoising_steps=2, height=64, width=64, scheduler="EulerA", guidance_scale=4.0, streams=1,
        threads=None, asynchronous=True, warmup_runs=1, repeat=5, prompt="a cat", seed=3, onnx_opset=17,
        batches=(1, 1, 8), pixels=None, cold_starts=0, options=NOTHING_ASKED, onnx_dir=str(studio.onnx),
        engine_dir=str(studio.engines),
    )  # fmt: skip
    with children_inline():
        pipeline = preparer_of(cell).prepare(cell.request()).pipeline
    batches = [Batch(turn, (prompt,), (turn,)) for turn, prompt in enumerate(["red apple", "cat", "dog", "red apple"])]
    alone = [pipeline.run(batch, StageClock()) for batch in batches]
    clocks = [StageClock() for _ in batches]
    together = list(pipeline.run_overlapped(batches, clocks))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)
    assert all(clock.unet_calls == 2 and clock.pipeline > 0 for clock in clocks)
