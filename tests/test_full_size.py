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


@pytest.mark.parametrize("stage", ["clip", "clip_2", "unet", "vae"])
@pytest.mark.parametrize("model", ["sd-1.5", "sd-2.1", "xl-1.0", "xl-refiner-1.0"])
def test_each_network_alone_gives_what_torch_gives(model: str, stage: str, models: Path) -> None:
    from benchmarks.full_size import NETWORK_OF, Setting, measure

    network = NETWORK_OF[stage]
    if network not in MODELS[model] and network != "vae":
        pytest.skip(f"{model} has no {network}")
    folder = write_model(model, models / model, [network])
    try:
        result = measure(Setting(model, stage, 256, "openvino"), models)
    finally:
        shutil.rmtree(folder)
    assert result["error"] <= RELATIVE_ERROR
    for job in ("export", "build", "call"):
        assert result[job]["peak_gib"] < MEMORY_LIMIT / GIB, (job, result[job])
