"""The command for a machine with a GPU, as far as it runs without: on the CPU, and with parts that stand in."""

import argparse
import itertools
import os
import select
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement

from benchmarks import gpu_check, parity
from benchmarks.gpu_check import PARITY, TABLE, Job, check, jobs, main, requirements
from benchmarks.parity import PROBE
from darkroom.bench.architectures import MODELS
from darkroom.bench.results import read
from darkroom.checkpoint.catalog import EMBEDDED
from darkroom.cli.benchmark import parser
from darkroom.engines import RUNTIMES
from darkroom.engines.onnxruntime.providers import PACKAGES
from darkroom.engines.runtime import ON_NVIDIA, Options
from darkroom.engines.torch.tuning import QUANTIZATIONS
from tests.support import ROOT, SOON, until

SCRIPT = ROOT / "tools" / "gpu_check.sh"


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


def test_dry_run_names_every_part_and_runs_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", "--output", str(tmp_path / "out")]) == 0
    said = capfd.readouterr().out
    names = [text.split(":")[0] for text in said.splitlines()]
    assert names[:2] == ["tests", "parity-torch"] and names.index("parity-jax") < names.index("sdxl")
    assert {f"parity-{part}" for part in PARITY} < set(names)
    assert set(TABLE) < set(names) and "--batch-size 8 --denoising-steps 20" in said
    assert not (tmp_path / "out").exists()


def asked_of_benchmark(output: Path) -> list[tuple[Job, argparse.Namespace]]:
    """What the parts ask of benchmark.py, as it reads that."""
    return [
        (job, parser().parse_args(command[2:]))
        for job in jobs(output, "default", False)
        for command in job.commands
        if command[1].endswith("benchmark.py")
    ]


def test_parity_is_asked_of_every_engine_and_provider(tmp_path: Path) -> None:
    commands = [command for job in jobs(tmp_path, "default", False) for command in job.commands]
    asked = [parity.parser().parse_args(command[2:]) for command in commands if command[1].endswith("parity.py")]
    assert {flags.engine for flags in asked} == set(RUNTIMES)
    assert {flags.provider for flags in asked} - {None} == set(ON_NVIDIA)
    assert {flags.quantization for flags in asked} - {None} == set(QUANTIZATIONS)


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
    lacking = {"parity-torch-quantized", "sdxl-int8", "sdxl-fp8"}
    assert {text.split(":")[0] for text in said if f"skipped, not here: {without}" in text} == lacking
    assert main(["--dry-run", "--parts", "sdxl-int8"]) == 1
    assert main(["--dry-run", "--parts", "sdxl"]) == 0


def test_what_is_asked_for_by_name_must_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    parts = [
        Job(
            "needy", SOON, 1, (python("print('never')"),), "lacks something", ("pip", "libnone.so.3 or no-such-package")
        ),
        Job("long", SOON, SOON, (python("print('never')"),), "does not fit"),
        Job("good", SOON, 1, (python("print('done')"),), "works", ("no-such-package or pip",)),
    ]
    assert check(tmp_path, parts, SOON - 1) == []
    said = capfd.readouterr().out
    assert "SKIP needy: not here: libnone.so.3 or no-such-package" in said
    assert "never" not in said and "done" in said
    wrong = check(tmp_path, parts, SOON - 1, by_name=True)
    assert [each.split()[1] for each in wrong] == ["needy:", "long:"] and "no-such-package" in wrong[0]


def test_exit_code_says_that_a_part_asked_for_did_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    needy = Job("needy", 60, 1, (python("print('never')"),), "lacks something", ("no-such-package",))
    monkeypatch.setattr(gpu_check, "jobs", lambda *_: [needy])
    assert main(["--tiny", "--output", str(tmp_path)]) == 0
    capfd.readouterr()
    assert main(["--tiny", "--output", str(tmp_path), "--parts", "needy"]) == 1
    said = capfd.readouterr().out.splitlines()
    assert [text for text in said[said.index("Verdicts:") :] if text.startswith("SKIP needy: ")] != []


def test_parts_ask_for_all_cells_of_the_table(tmp_path: Path) -> None:
    asked = [flags for job, flags in asked_of_benchmark(tmp_path) if job.name in TABLE]
    grid = set(itertools.product(("sd-1.5", "xl-1.0", "sd-turbo", "sdxl-turbo"), (1, 4, 8), (1, 4, 20, 30)))
    for peer in ("diffusers-bf16", "diffusers-compile-bf16"):
        parts = [flags for flags in asked if peer in flags.peer and flags.engine == ["torch-compile"]]
        works = [itertools.product(flags.full_size, flags.batch_size, flags.denoising_steps) for flags in parts]
        assert {work for each in works for work in each} == grid, peer
    assert all(flags.keep_loaded and flags.precision == ["bf16"] and flags.repeat >= 5 for flags in asked)
    assert {name for flags in asked for name in flags.full_size} <= set(MODELS)


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


@pytest.mark.parametrize("timed", [False, True])
def test_part_that_fails_or_hangs_stops_no_other(
    timed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
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
        Job("broken", hour, 1, (python("raise ValueError('of memory')"),), "fails"),
        Job("endless", 10, 1, (python(endless),), "hangs", timed=timed),
        Job("long", 2 * hour, 2 * hour, (python("print('never')"),), "does not fit"),
        Job("good", hour, 1, (python("print('done')"),), "works"),
    ]

    class Impatient(subprocess.Popen):
        """Whose time is over when it has begun, and not before."""

        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **more, pass_fds=[write])

        def wait(self, timeout: float | None = None) -> int:
            if timeout is None or timeout > 10:
                return super().wait(timeout)
            until(begun.exists)
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(gpu_check.subprocess, "Popen", Impatient)
    wrong = check(tmp_path, parts, 1.5 * hour)
    said = capfd.readouterr().out
    assert [each.split()[:2] for each in wrong] == [["FAIL", "broken:"], ["FAIL", "endless:"]]
    assert "of memory" in wrong[0] and "stopped" in wrong[1]
    assert "SKIP long: " in said and "never" not in said
    assert "begun" in said and "done" in said and "PASS good: " in said
    os.close(write)
    assert select.select([read], [], [], SOON)[0] and os.read(read, 1) == b"", "what it had started is gone, too"
    os.close(read)


class TestParity:
    """What is held against wrong pictures: the numbers are those of images of noise."""

    @pytest.fixture
    def right(self) -> parity.Drawn:
        random = np.random.default_rng(0)
        return parity.Drawn(random.standard_normal((2, 4, 8, 8)), random.random((2, 16, 16, 3)))

    @staticmethod
    def off(drawn: parity.Drawn, decibels: float, images: slice = slice(None)) -> parity.Drawn:
        """With an error of so many dB in some of its images."""
        random, share = np.random.default_rng(1), 10 ** (-decibels / 20)
        latents, pictures = drawn.latents.copy(), drawn.pictures.copy()
        latents[images] += share * random.standard_normal(latents.shape)[images] * drawn.latents.std()
        pictures[images] += share * random.standard_normal(pictures.shape)[images]
        return parity.Drawn(latents, pictures)

    @pytest.mark.parametrize(
        ("decibels", "images", "least", "good"),
        [
            (40, slice(None), 30, True),
            (24, slice(None), None, False),  # within the margin of what is wrong
            (40, slice(None), 45, False),
            (24, slice(1, 2), None, False),  # one of two
            (np.nan, slice(1, 2), None, False),
        ],
    )
    def test_wrong_ones_are_beaten_by_a_margin(
        self, right: parity.Drawn, decibels: float, images: slice, least: float | None, good: bool
    ) -> None:
        wrong = {"far": self.off(right, 3), "near": self.off(right, 20)}
        found = self.off(right, decibels, images)
        beaten, told = parity.verdict(right, wrong, found, least)
        assert beaten == good and told.count("(near reaches ") == 2

    def test_latents_and_pictures_are_those_of_diffusers(self, tiny_model: Path, tmp_path: Path) -> None:
        (expected,) = parity.by_diffusers(tiny_model, [PROBE])
        found = parity.by_engine(tiny_model, tmp_path, "torch", "fp32", Options(), size=64)
        assert min(map(min, expected.likeness(found).values())) > parity.LEAST["fp32"]

    @pytest.mark.slow
    def test_the_probe_tells_wrong_ones_from_rounded_ones(self, tmp_path: Path) -> None:
        """What diffusers itself draws in bfloat16 passes; every control, held against the others, does not."""
        right, wrong = parity.references(EMBEDDED / "emoji", tmp_path)
        (again,) = tmp_path.glob("references-*.npz")
        before = again.stat().st_mtime_ns
        assert np.array_equal(parity.references(EMBEDDED / "emoji", tmp_path)[0].latents, right.latents)
        assert again.stat().st_mtime_ns == before
        rounded = parity.by_engine(EMBEDDED / "emoji", tmp_path, "torch", "bf16", Options())
        good, told = parity.verdict(right, wrong, rounded, parity.LEAST["bf16"])
        assert good, told
        for name, control in wrong.items():
            others = {other: each for other, each in wrong.items() if other != name}
            good, told = parity.verdict(right, others, control, None)
            assert not good, f"{name}: {told}"


@pytest.mark.slow
def test_tiny_check_runs_from_end_to_end(tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "HOME": str(tmp_path)}
    ended = subprocess.run(
        [SCRIPT, "--tiny", "--output", tmp_path / "out"], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "PASS torch fp32: " in ended.stdout
    assert [line.split(":")[0] for line in ended.stdout.partition("Verdicts:\n")[2].splitlines()[:2]] == [
        "PASS parity-torch",
        "PASS tiny",
    ]
    rows = read([tmp_path / "out" / "results.jsonl"])
    assert len(rows) == 8 and min(row["psnr"] for row in rows if row["psnr"] is not None) > 60
