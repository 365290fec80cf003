"""Not fitted to small models: the published architectures, at their full sizes, go the same road."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from darkroom.bench.architectures import MODELS, write_model
from darkroom.checkpoint.folder import open_checkpoint
from darkroom.contract import Job
from darkroom.engines import find_runtime
from darkroom.prepare import Preparer
from darkroom.processes.child import run_in_child
from darkroom.processes.memory import peak_memory
from darkroom.request import Request
from darkroom.store.store import Store
from tests.support import SCRIPT, Studio, pixels

pytestmark = pytest.mark.slow

GIB = 2**30
MEMORY_LIMIT = 20 * GIB
RELATIVE_ERROR = 1e-3


def memory_of_group(group: int) -> int:
    """Resident bytes of all processes in a process group."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group:
            total += int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    return total


def run_measured(studio: Studio, *arguments: str) -> tuple[str, int]:
    """Runs the script; returns the path it printed last and the largest memory of it and its children together."""
    command = [sys.executable, str(SCRIPT), *arguments, "--quiet", *studio.folders()]
    process = subprocess.Popen(
        command,
        env=studio.environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    peak, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.2):
            peak = max(peak, memory_of_group(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        out, err = process.communicate(timeout=3600)
    finally:
        ended.set()
        watcher.join()
    assert process.returncode == 0, err
    return out.splitlines()[-1], peak


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures memory through /proc")
def test_full_size_model_makes_the_picture_that_torch_makes(tmp_path: Path) -> None:
    model = write_model("sd-1.5", tmp_path / "full-size")
    studio = Studio(tmp_path, model)
    asked = ["a red apple", "--model", str(model), "--denoising-steps=1", "--seed=5"]
    found, peak = run_measured(studio, *asked, "--engine=openvino")
    expected, _ = run_measured(studio, *asked, "--engine=torch")
    ours, theirs = pixels(found).astype(np.float64), pixels(expected).astype(np.float64)
    assert ours.shape == (512, 512, 3)
    assert np.linalg.norm(ours - theirs) <= RELATIVE_ERROR * np.linalg.norm(theirs)
    assert peak < MEMORY_LIMIT, f"{peak / GIB:.1f} GiB"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def called(engine: str, job: Job, source: Path, inputs: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int]:
    """What an engine gives, in a process of its own, and the largest memory of that."""
    return find_runtime(engine).load(job, source, None)(inputs), peak_memory()


def inputs_of(job: Job) -> dict[str, np.ndarray]:
    from darkroom.networks.load import example_inputs

    return {name: value.numpy() for name, value in example_inputs(job.stage, job.profile.sizes(), 7).items()}


@pytest.mark.parametrize("stage", ["clip", "clip_2", "unet", "vae"])
@pytest.mark.parametrize("model", ["sd-1.5", "sd-2.1", "xl-1.0", "xl-refiner-1.0"])
def test_each_network_alone_gives_what_torch_gives(model: str, stage: str, models: Path) -> None:
    network = {"clip": "text_encoder", "clip_2": "text_encoder_2"}.get(stage, stage)
    if network not in MODELS[model] and network != "vae":
        pytest.skip(f"{model} has no {network}")
    folder = write_model(model, models / model, [network])
    request = Request(
        model=model,
        prompts=("an apple",),
        height=256,
        width=256,
        denoising_steps=1,
        guidance_scale=7.5,
        engine="openvino",
    )
    graphs, engines = Store(models / "onnx"), Store(models / "engines")
    try:
        checkpoint = open_checkpoint(folder, engines.fingerprints)
        preparer = Preparer(checkpoint, find_runtime("openvino"), graphs, engines)
        compiled = preparer.compile(request, {stage})
        job, source = compiled.jobs[stage], compiled.sources[stage]
        inputs = run_in_child(inputs_of, job)
        found, peak = run_in_child(called, "openvino", job, source, inputs)
        expected, _ = run_in_child(called, "torch", job, folder, inputs)
        peaks = [peak, *(manifest["made"]["peak_bytes"] for _, manifest in (*graphs.manifests(),))]
    finally:
        for each in (folder, graphs.root, engines.root):
            shutil.rmtree(each, ignore_errors=True)
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() <= RELATIVE_ERROR * np.abs(value).max()
    assert max(peaks) < MEMORY_LIMIT
