#!/usr/bin/env python3
"""The published architectures at full size with random weights: export, build, load and one call of each network.

python benchmarks/full_size.py [--models sd-1.5 xl-1.0] [--networks unet] [--size 256] [--engine openvino]

Each network goes alone, and each job is a process of its own whose largest memory is measured; one call is compared
with torch on the same inputs. Models are written into --work (SDXL takes 7 GB, its graph and engine 5 GB each).
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "demo"))

from darkroom.bench.architectures import MODELS, write_model  # noqa: E402
from darkroom.checkpoint.folder import Checkpoint, open_checkpoint  # noqa: E402
from darkroom.contract import PRECISIONS, Profile, Stage  # noqa: E402
from darkroom.engines import find_runtime  # noqa: E402
from darkroom.engines.runtime import Job  # noqa: E402
from darkroom.processes.child import MEMORY  # noqa: E402
from darkroom.store.fingerprints import Fingerprints  # noqa: E402

NETWORK_OF = {"clip": "text_encoder", "clip_2": "text_encoder_2", "unet": "unet", "vae": "vae"}
OPSET = 17
SECONDS_BETWEEN_LOOKS = 0.02
GIB = 2**30


@dataclass(frozen=True)
class Setting:
    """One network of a model at one size, on one engine."""

    model: str
    stage: str
    size: int
    engine: str
    precision: str = "fp32"
    dynamic: bool = False
    guided: bool = True


@dataclass(frozen=True)
class Work:
    """Where a network's graph, engine and inputs are."""

    setting: Setting
    models: Path

    @property
    def folder(self) -> Path:
        return self.models / f"{self.setting.model}-{self.setting.stage}"

    def checkpoint(self) -> Checkpoint:
        fingerprints = Fingerprints(self.models / "fingerprints.json")
        checkpoint = open_checkpoint(self.models / self.setting.model, fingerprints)
        fingerprints.remember()  # hashing gigabytes is no part of what the jobs are timed at
        return checkpoint

    def job(self) -> Job:
        checkpoint = self.checkpoint()
        stage: Stage = checkpoint.family.stages(checkpoint, self.setting.guided, 0)[self.setting.stage]
        if checkpoint.is_large(stage.networks[0].part):
            stage = replace(stage, half_weights=True)
        size = self.setting.size
        free = Profile(None, None, None, pixels=(size, size, size * 3 // 2))
        return Job(stage, free if self.setting.dynamic else Profile(1, size, size), self.setting.precision)

    def inputs(self) -> dict[str, np.ndarray]:
        from darkroom.networks.load import example_inputs

        job, size = self.job(), self.setting.size
        sizes = Profile(1, size, size).sizes()
        return {name: value.numpy() for name, value in example_inputs(job.stage, sizes, 7).items()}


def export(work: Work) -> dict[str, float]:
    """Export to ONNX, checked against torch."""
    from darkroom.networks.graph import export_stage

    folder = work.folder / "onnx"
    folder.mkdir(parents=True)
    checkpoint = work.checkpoint()
    stage, precision = work.job().stage, work.setting.precision
    made = export_stage(checkpoint.folder, stage, precision, OPSET, None, checkpoint.vae_factor, folder)
    return {"error": made["error_against_torch"]}


def build(work: Work) -> dict[str, float]:
    """Build the engine."""
    folder = work.folder / work.setting.engine
    folder.mkdir()
    find_runtime(work.setting.engine).build(work.job(), work.folder / "onnx" / "model.onnx", folder, lambda *_: True)
    return {}


def call(work: Work) -> dict[str, float]:
    """Load the engine and call it."""
    runtime, job = find_runtime(work.setting.engine), work.job()
    start = time.perf_counter()
    engine = runtime.load(job, work.folder / work.setting.engine, None)
    return {"load_seconds": time.perf_counter() - start} | _called(work, engine, "found.npz")


def torch(work: Work) -> dict[str, float]:
    """The same call in torch."""
    engine = find_runtime("torch").load(work.job(), work.checkpoint().folder, None)
    return _called(work, engine, "expected.npz")


def _called(work: Work, engine: Any, file: str) -> dict[str, float]:
    inputs = work.inputs()
    engine(inputs)
    start = time.perf_counter()
    outputs = engine(inputs)
    seconds = time.perf_counter() - start
    np.savez(work.folder / file, **outputs)
    return {"call_seconds": seconds}


JOBS: dict[str, Callable[[Work], dict[str, float]]] = {
    "export": export,
    "build": build,
    "call": call,
    "torch": torch,
}


def measure(setting: Setting, models: Path) -> dict[str, Any]:
    """Seconds and peak memory in GiB of every job, and the largest difference from torch relative to the largest value.

    `own_gib` is without what is mapped from files, and what a machine must have.

    Graph and engine are deleted afterwards.
    """
    work = Work(setting, models)
    shutil.rmtree(work.folder, ignore_errors=True)
    result: dict[str, Any] = asdict(setting)
    runs = find_runtime(setting.engine).unusable() is None
    try:
        for name in JOBS if runs else ("export", "build"):
            start = time.perf_counter()
            command = [sys.executable, __file__, "--worker", name, json.dumps(asdict(setting)), str(models)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=MEMORY | os.environ)
            own = _own_memory(process.pid)
            assert process.stdout
            said = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                raise RuntimeError(f"{name} of {setting} failed")
            result[name] = json.loads(said.splitlines()[-1]) | {
                "seconds": time.perf_counter() - start,
                "peak_gib": usage.ru_maxrss * 1024 / GIB,
                "own_gib": own.result() / GIB,
            }
        if not runs:
            return result
        found, expected = np.load(work.folder / "found.npz"), np.load(work.folder / "expected.npz")
        result["error"] = max(
            float(np.abs(found[name] - expected[name]).max() / np.abs(expected[name]).max()) for name in expected.files
        )
    finally:
        shutil.rmtree(work.folder, ignore_errors=True)
    return result


def _own_memory(pid: int) -> Future[int]:
    """The most bytes that a process has had of its own until it ends. Pages of files are not among them, as of weights
    that are mapped: the system takes those back where memory is short."""
    most: Future[int] = Future()

    def watch() -> None:
        largest = 0
        with contextlib.suppress(OSError):
            while found := re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M):
                largest = max(largest, sum(map(int, found)) * 1024)
                time.sleep(SECONDS_BETWEEN_LOOKS)
        most.set_result(largest)

    threading.Thread(target=watch, daemon=True).start()
    return most


def line(result: dict[str, Any]) -> str:
    """A row of the report."""
    jobs = [f"{result[job]['seconds']:.0f} s, {_memory(result[job])}" for job in ("export", "build")]
    what = f"{result['model']} {result['stage']}, {result['size']} pixels, {result['engine']} {result['precision']}"
    what += ", free sizes" * result["dynamic"]
    if "call" not in result:
        return f"| {what} | {jobs[0]} | {jobs[1]} | not here | not here | |"
    loaded = f"{result['call']['load_seconds']:.1f} s, {_memory(result['call'])}"
    calls = f"{result['call']['call_seconds']:.2f} s / {result['torch']['call_seconds']:.2f} s"
    return f"| {what} | {jobs[0]} | {jobs[1]} | {loaded} | {calls} | {result['error']:.1e} |"


def _memory(job: dict[str, float]) -> str:
    return f"{job['own_gib']:.1f} ({job['peak_gib']:.1f}) GiB"


HEADER = """| network | export | build | load | call / torch's call | error |
| --- | --- | --- | --- | --- | --- |"""


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        name, setting, models = sys.argv[2:]
        print(json.dumps(JOBS[name](Work(Setting(**json.loads(setting)), Path(models)))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--networks", nargs="+", metavar="STAGE", help="clip, clip_2, unet, vae; default: all")
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels")
    parser.add_argument("--engine", default="openvino")
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS)
    parser.add_argument("--dynamic", action="store_true", help="with a free batch and free sizes")
    parser.add_argument("--work", type=Path, help="where models are written and kept; default: a temporary folder")
    parser.add_argument("--output", type=Path, help="also write the results here, as JSON")
    flags = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = flags.work or Path(temporary)
        print(HEADER)
        for model in flags.models:
            write_model(model, folder / model)
            checkpoint = Work(Setting(model, "unet", flags.size, flags.engine), folder).checkpoint()
            every = checkpoint.family.stages(checkpoint, True, 0)
            for stage in flags.networks or [name for name in every if name != "vae_encoder"]:
                if stage in every:
                    setting = Setting(model, stage, flags.size, flags.engine, flags.precision, flags.dynamic)
                    results.append(measure(setting, folder))
                    print(line(results[-1]), flush=True)
    if flags.output:
        flags.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
