"""The command for a machine with a GPU, as far as it runs without: on the CPU, and with parts that stand in."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_cells import COMPILED, EAGER, OURS_EAGER, Part, measure
from benchmarks.gpu_check import TABLE, Job, check, jobs, main
from benchmarks.gpu_contenders import Work, size_of
from benchmarks.gpu_targets import say_targets
from darkroom.bench.results import read
from tests.bench.lines import line
from tests.support import ROOT

SCRIPT = ROOT / "tools" / "gpu_check.sh"


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


def test_dry_run_names_every_part_and_runs_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", "--output", str(tmp_path / "out")]) == 0
    said = capfd.readouterr().out
    assert [text.split(":")[0] for text in said.splitlines()[:3]] == ["tests", "parity", "sdxl"]
    assert "1 x 30" in said and "8 x 20" in said and "sd-turbo" in said
    assert not (tmp_path / "out").exists()


def test_parts_ask_for_all_cells_of_the_table(tmp_path: Path) -> None:
    asked = {(of[0], batch, steps) for _, of, cells, *_ in TABLE for batch, steps in cells}
    for model, steps in (("xl-1.0", (20, 30)), ("sd-1.5", (20, 30)), ("sdxl-turbo", (1, 4)), ("sd-turbo", (1, 4))):
        assert {(model, batch, count) for batch in (1, 4, 8) for count in steps} <= asked
    for job in jobs(tmp_path, "default", False)[2:]:
        part = Part.from_json(job.command[-1])
        assert Part.from_json(part.as_json()) == part
        assert part.repeat >= 5
        assert part.work.size == size_of(part.work.model)


def test_wheels_are_those_that_are_pinned(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--wheels"]) == 0
    said = capfd.readouterr().out
    assert f"torch=={torch.__version__.split('+')[0]}" in said
    assert "torchao==" in said and "pip download" in said


def test_script_finds_its_way_and_refuses_a_machine_without_a_gpu(tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        [SCRIPT, "--output", tmp_path / "out"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1 and "no CUDA device" in ended.stderr
    assert not (tmp_path / "out").exists()


def test_part_that_is_not_there_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--parts", "sdxxl"])
    assert ended.value.code == 2 and "sdxl-throughput" in capfd.readouterr().err


def test_part_that_fails_or_hangs_stops_no_other(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    endless = (
        "print('begun', flush=True); import subprocess, sys, time; "
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); time.sleep(60)"
    )
    parts = [
        Job("broken", 60, 1, python("raise ValueError('of memory')"), "fails"),
        Job("endless", 10, 1, python(endless), "hangs"),
        Job("long", 600, 600, python("print('never')"), "does not fit"),
        Job("good", 60, 1, python("print('done')"), "works"),
    ]
    start = time.perf_counter()
    wrong = check(tmp_path, parts, 45)
    assert time.perf_counter() - start < 40
    said = capfd.readouterr().out
    assert [each.split()[0] for each in wrong] == ["broken", "endless"]
    assert "of memory" in wrong[0] and "stopped" in wrong[1]
    assert "long: skipped" in said and "never" not in said
    assert "begun" in said and "done" in said and "== good: " in said


@pytest.fixture
def part(tmp_path: Path) -> Part:
    work = Work("tiny", 32, 7.5, "fp32", "cpu")
    file = str(tmp_path / "results.jsonl")
    return Part(work, ((2, 2),), (EAGER, COMPILED, OURS_EAGER), file, "default", trace=str(tmp_path / "trace.json"))


def test_contenders_make_the_same_pictures(
    part: Part, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: asked.append(how) or function)
    assert measure(part) == 0
    assert asked == [{"mode": "default", "fullgraph": True}] * 2
    rows = read([Path(part.results)])
    assert [row.contender for row in rows] == ["diffusers eager", "diffusers, torch.compile", "Darkroom (torch fp32)"]
    assert rows[0].psnr is None and all(row.psnr >= 60 for row in rows[1:])
    for row in rows:
        assert set(row.stages) == {"CLIP", "UNet", "VAE-Dec", "Pipeline"}
        assert (row.unet_calls, row.pipeline.count, row.settings.batch_size) == (2, 5, 2)
        assert sum(sample.least for name, sample in row.stages.items() if name != "Pipeline") <= row.pipeline.most
    assert json.loads(Path(part.trace).read_text())["traceEvents"]
    assert "aten::" in Path(part.trace).with_suffix(".txt").read_text()
    content = Path(part.results).read_bytes()
    capfd.readouterr()
    assert measure(part) == 0  # goes on where it was: nothing is left
    assert Path(part.results).read_bytes() == content and capfd.readouterr().out == ""


def test_contender_that_fails_fails_alone(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr("benchmarks.gpu_contenders.Darkroom.run", broken)
    assert measure(part) == 3  # both cells, and the trace of one
    eager, ours = read([Path(part.results)])
    assert eager.error is None and ours.error == "RuntimeError: no kernel"


def test_targets_are_held_against_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.jsonl"
    say_targets(file)
    assert capsys.readouterr().out.count("not measured") == 5
    asked = {"version": "xl-1.0", "denoising_steps": 30, "batch_size": 1, "height": 1024, "width": 1024}
    ours = line("Darkroom (torch-compile bf16)", 1190.0, **asked) | {"psnr": 34.0}
    file.write_text("\n".join(map(json.dumps, [ours, line("diffusers, torch.compile", 1500.0, **asked)])) + "\n")
    say_targets(file)
    said = capsys.readouterr().out.splitlines()
    assert "1190.0 ms, reached" in said[0] and "not measured" in said[1]
    assert "1.26 to 1.26, reached" in said[3] and "34.0 dB at the least, MISSED" in said[4]


@pytest.mark.slow
def test_tiny_check_runs_from_end_to_end(tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "HOME": str(tmp_path)}
    ended = subprocess.run(
        [SCRIPT, "--tiny", "--output", tmp_path / "out"], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "torch fp32:" in ended.stdout and "== tiny-trace: " in ended.stdout
    assert len(read([tmp_path / "out" / "results.jsonl"])) == 4
