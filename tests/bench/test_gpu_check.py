"""The command for a machine with a GPU, as far as it runs without: on the CPU, and with parts that stand in."""

import itertools
import json
import os
import select
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement

from benchmarks import gpu_cells, gpu_check, gpu_parity
from benchmarks.gpu_cells import COMPILED, EAGER, OURS_EAGER, Part, measure
from benchmarks.gpu_check import TABLE, Job, check, jobs, main, requirements
from benchmarks.gpu_contenders import Work, size_of
from benchmarks.gpu_targets import say_targets
from darkroom.bench.results import read
from darkroom.engines import RUNTIMES
from darkroom.engines.onnxruntime.providers import PACKAGES
from darkroom.engines.runtime import ON_NVIDIA
from darkroom.engines.torch.tuning import QUANTIZATIONS
from tests.bench.lines import MACHINE, line
from tests.support import ROOT, SOON, until

SCRIPT = ROOT / "tools" / "gpu_check.sh"


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


def test_dry_run_names_every_part_and_runs_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", "--output", str(tmp_path / "out")]) == 0
    said = capfd.readouterr().out
    names = [text.split(":")[0] for text in said.splitlines()]
    assert names[:2] == ["tests", "parity-torch"] and names.index("sdxl") < names.index("parity-jax")
    assert {f"parity-{part}" for part in gpu_parity.PARTS} < set(names)
    assert "1 x 30" in said and "8 x 20" in said and "sd-turbo" in said
    assert not (tmp_path / "out").exists()


def test_parity_is_asked_of_every_engine_and_provider() -> None:
    asked = [way for part in gpu_parity.PARTS.values() for way in part]
    assert {way.engine for way in asked} == set(RUNTIMES)
    assert {way.options.provider for way in asked} - {None} == set(ON_NVIDIA)
    assert {way.options.quantization for way in asked} - {None} == set(QUANTIZATIONS)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that gpu_check does not find."""
    missing, is_here = "torchao", gpu_check.is_here
    monkeypatch.setattr(gpu_check, "is_here", lambda name: name != missing and is_here(name))
    return missing


def test_part_that_lacks_a_package_is_named_and_wrong_only_by_name(
    without: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["--dry-run"]) == 0
    said = capfd.readouterr().out.splitlines()
    lacking = {"parity-torch-quantized", "sdxl-quantized"}
    assert {text.split(":")[0] for text in said if f"skipped, not here: {without}" in text} == lacking
    assert main(["--dry-run", "--parts", "sdxl-quantized"]) == 1
    assert main(["--dry-run", "--parts", "sdxl"]) == 0


def test_what_is_asked_for_by_name_must_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    parts = [
        Job("needy", SOON, 1, python("print('never')"), "lacks something", ("pip", "libnone.so.3 or no-such-package")),
        Job("long", SOON, SOON, python("print('never')"), "does not fit"),
        Job("good", SOON, 1, python("print('done')"), "works", ("no-such-package or pip",)),
    ]
    assert check(tmp_path, parts, SOON - 1) == []
    said = capfd.readouterr().out
    assert "needy: skipped, not here: libnone.so.3 or no-such-package" in said
    assert "never" not in said and "done" in said
    wrong = check(tmp_path, parts, SOON - 1, by_name=True)
    assert [each.split()[0] for each in wrong] == ["needy", "long"] and "no-such-package" in wrong[0]


def test_exit_code_says_that_a_part_asked_for_did_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    needy = Job("needy", 60, 1, python("print('never')"), "lacks something", ("no-such-package",))
    monkeypatch.setattr(gpu_check, "jobs", lambda *_: [needy])
    assert main(["--tiny", "--output", str(tmp_path)]) == 0
    capfd.readouterr()
    assert main(["--tiny", "--output", str(tmp_path), "--parts", "needy"]) == 1
    assert [text for text in capfd.readouterr().out.splitlines() if text.startswith("WRONG: needy ")] != []


def test_parts_ask_for_all_cells_of_the_table(tmp_path: Path) -> None:
    for contender in ("eager", "compiled", "ours"):
        asked = {(of[0], *cell) for _, of, cells, contenders, _ in TABLE for cell in cells if contender in contenders}
        grid = itertools.product(("sd-1.5", "xl-1.0", "sd-turbo", "sdxl-turbo"), (1, 4, 8), (1, 4, 20, 30))
        assert asked == set(grid), contender
    for job in (job for job in jobs(tmp_path, "default", False) if "gpu_cells.py" in job.command[1]):
        part = Part.from_json(job.command[-1])
        assert Part.from_json(part.as_json()) == part
        assert part.repeat >= 5
        assert part.work.size == size_of(part.work.model)


def test_wheels_are_those_that_are_pinned(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--wheels"]) == 0
    said = capfd.readouterr().out
    assert f'"torch=={torch.__version__.split("+")[0]}"' in said
    assert said.count('"onnxruntime-gpu[cuda,cudnn]==') == 2 and '"onnxruntime=' not in said
    assert "pip wheel" in said and gpu_check.TENSORRT_10 in said


def test_wheels_are_all_that_the_parts_need_and_go_with_what_is_tested(tmp_path: Path) -> None:
    asked = requirements()
    needs = [need for job in jobs(tmp_path, "default", False) for need in job.needs]
    assert [need for need in needs if not {*asked, gpu_check.LIBRARY} & set(need.split(" or "))] == []
    assert asked["onnxruntime-gpu"].startswith(PACKAGES["cuda"])
    installed = {"onnxruntime-gpu": "onnxruntime", "jax-cuda13-plugin": "jax", "tensorrt": "tensorrt-cu13-bindings"}
    for name, requirement in asked.items():
        allowed, tested = Requirement(requirement).specifier, installed.get(name, name)
        assert allowed, name
        if gpu_check.is_here(tested):  # TensorRT is not, on some systems
            assert allowed.contains(version(tested), prereleases=True), name


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


def test_part_that_fails_or_hangs_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    begun, hour = tmp_path / "begun", 3600
    # What it starts has the write end of a pipe, which is closed when the last of them is gone.
    read, write = os.pipe()
    nap = f"import time; time.sleep({hour})"
    endless = (
        "print('begun', flush=True); import subprocess, sys, time; from pathlib import Path; "
        f"subprocess.Popen([sys.executable, '-c', {nap!r}], pass_fds=[{write}]); Path({str(begun)!r}).touch(); {nap}"
    )
    parts = [
        Job("broken", hour, 1, python("raise ValueError('of memory')"), "fails"),
        Job("endless", 10, 1, python(endless), "hangs"),
        Job("long", 2 * hour, 2 * hour, python("print('never')"), "does not fit"),
        Job("good", hour, 1, python("print('done')"), "works"),
    ]

    class Impatient(subprocess.Popen):
        """Whose time is over when it has begun, and not before."""

        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **more, pass_fds=[write])

        def wait(self, timeout: float | None = None) -> int:
            if timeout != 10:
                return super().wait(timeout)
            until(begun.exists)
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(gpu_check.subprocess, "Popen", Impatient)
    wrong = check(tmp_path, parts, 1.5 * hour)
    said = capfd.readouterr().out
    assert [each.split()[0] for each in wrong] == ["broken", "endless"]
    assert "of memory" in wrong[0] and "stopped" in wrong[1]
    assert "long: skipped" in said and "never" not in said
    assert "begun" in said and "done" in said and "== good: " in said
    os.close(write)
    assert select.select([read], [], [], SOON)[0] and os.read(read, 1) == b"", "what it had started is gone, too"
    os.close(read)


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
    with Path(part.results).open("a", encoding="utf-8") as file:
        file.write('{"the half of')
    content = Path(part.results).read_bytes()
    capfd.readouterr()
    assert measure(part) == 0  # goes on where it was: nothing is left
    assert Path(part.results).read_bytes() == content and capfd.readouterr().out == ""
    Path(part.trace).with_suffix(".txt").unlink()
    assert measure(part) == 0  # a trace that was lost is made again, and nothing else
    assert Path(part.results).read_bytes() == content and "aten::" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("name", "value"), [("gpu", "another"), ("cores", 1), ("packages", {"torch": "2.0"}), ("settings", {"repeat": 3})]
)
def test_what_another_machine_or_version_measured_is_measured_again(
    name: str, value: object, part: Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(gpu_cells, "machine_with", lambda _: MACHINE)
    monkeypatch.setattr(gpu_cells, "Model", lambda *_: None)
    monkeypatch.setattr(gpu_cells, "_all_of", lambda part, name, model, cells, here: asked.append((name, cells)) or 0)
    settings = gpu_cells._settings(part, EAGER, 2, 2) | {"options": None}
    done = {"measured_by": [EAGER, "default"], "settings": settings, "machine": MACHINE, "error": None}
    changed = done | ({name: settings | value} if name == "settings" else {"machine": MACHINE | {name: value}})
    for lines, left in (((changed,), [EAGER, COMPILED, OURS_EAGER]), ((changed, done), [COMPILED, OURS_EAGER])):
        Path(part.results).write_text("\n".join(map(json.dumps, lines)) + "\n")
        assert measure(part) == 0
        assert asked == [(each, [(2, 2)]) for each in left]
        asked.clear()


def test_results_name_the_versions_they_depend_on() -> None:
    assert gpu_cells.machine_with("cpu")["packages"]["torchao"] == version("torchao")


def test_contender_that_fails_fails_alone(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr("benchmarks.gpu_contenders.Darkroom.run", broken)
    assert measure(part) == 3  # both cells, and the trace of one
    eager, ours = read([Path(part.results)])
    assert eager.error is None and ours.error == "RuntimeError: no kernel"


def test_targets_are_held_against_what_was_measured_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.jsonl"
    say_targets(file, MACHINE)
    assert capsys.readouterr().out.count("not measured") == 5
    asked = {"version": "xl-1.0", "denoising_steps": 30, "batch_size": 1, "height": 1024, "width": 1024}
    ours = line("Darkroom (torch-compile bf16)", 1190.0, **asked) | {"psnr": 34.0}
    file.write_text("\n".join(map(json.dumps, [ours, line("diffusers, torch.compile", 1500.0, **asked)])) + "\n")
    say_targets(file, MACHINE)
    said = capsys.readouterr().out.splitlines()
    assert "1190.0 ms, reached" in said[0] and "not measured" in said[1]
    assert "1.26 to 1.26, reached" in said[3] and "34.0 dB at the least, MISSED" in said[4]
    say_targets(file, MACHINE | {"packages": MACHINE["packages"] | {"torch": "2.13.1"}})
    assert capsys.readouterr().out.count("not measured") == 5


class TestParity:
    def test_keeps_its_reference_for_the_next_part(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        made = [np.full((1, 2, 2, 3), shade, np.uint8) for shade in (7, 8)]
        monkeypatch.setattr(gpu_parity, "_by_diffusers", lambda: made.pop(0))
        folder = tmp_path / "new"
        assert gpu_parity.expected(folder).max() == gpu_parity.expected(folder).min() == 7
        monkeypatch.setattr(gpu_parity, "STEPS", gpu_parity.STEPS + 1)
        assert gpu_parity.expected(folder).max() == 8

    def test_of_what_is_not_here_says_why_and_fails(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        assert gpu_parity.main(tmp_path, 60, "onnxruntime-cuda") == 1
        said = capfd.readouterr()
        assert said.out.startswith("onnxruntime fp32 cuda: skipped, --provider cuda is not in this ONNX Runtime")
        assert said.err.splitlines()[-1].startswith("onnxruntime fp32 cuda: skipped")

    @pytest.mark.parametrize(("found", "code"), [(45.1, 0), (44.9, 1)])
    def test_holds_pictures_against_the_precision(
        self, found: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gpu_parity, "expected", lambda folder: None)
        monkeypatch.setattr(gpu_parity, "likeness", lambda *_: found)
        assert gpu_parity.main(tmp_path, 60, "openvino") == code

    @pytest.mark.parametrize("meant", [True, False])
    def test_expects_nothing_of_a_gpu_that_the_library_is_not_for(
        self, meant: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        runtime = SimpleNamespace(device=lambda: "a GPU", unusable=lambda: None, is_meant_for_this_gpu=lambda: meant)
        monkeypatch.setattr(gpu_parity, "find_runtime", lambda *_: runtime)
        monkeypatch.setattr(gpu_parity, "expected", lambda folder: None)
        monkeypatch.setattr(gpu_parity, "likeness", lambda *_: 10.0)
        assert gpu_parity.main(tmp_path, 60, "tensorrt") == int(meant)
        assert ("skipped, a GPU is no GPU that TensorRT-RTX says" in capfd.readouterr().out) != meant

    def test_fails_where_a_gpu_is_there_and_the_engine_is_on_the_cpu(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert gpu_parity.main(tmp_path, 60, "jax") == 1
        assert capfd.readouterr().out.count("it finds no GPU") == 2


@pytest.mark.slow
def test_tiny_check_runs_from_end_to_end(tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "HOME": str(tmp_path)}
    ended = subprocess.run(
        [SCRIPT, "--tiny", "--output", tmp_path / "out"], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "torch fp32:" in ended.stdout and "== tiny-trace: " in ended.stdout
    assert len(read([tmp_path / "out" / "results.jsonl"])) == 4
