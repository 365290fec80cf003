"""Not fitted to small models: the published architectures, at their full sizes, go the same road."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.support import SCRIPT, Studio, edit_json, pixels, silence_libraries

pytestmark = pytest.mark.slow

GIB = 2**30
MEMORY_LIMIT = 20 * GIB
RELATIVE_ERROR = 1e-3


def write_full_size_model(tiny_model: Path, folder: Path) -> Path:
    """Stable Diffusion 1.5's published configurations with random weights, in half precision to spare the disk."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    silence_libraries()
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(tiny_model / name, folder / name)
    shutil.copy(tiny_model / "model_index.json", folder)
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    begin, end = len(vocabulary) - 2, len(vocabulary) - 1
    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            projection_dim=768,
            max_position_embeddings=77,
            bos_token_id=begin,
            eos_token_id=end,
            pad_token_id=end,
        )
    )
    text.half().save_pretrained(folder / "text_encoder")
    del text
    unet = UNet2DConditionModel(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=(320, 640, 1280, 1280),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=768,
        attention_head_dim=8,
    )
    assert 859e6 < sum(weight.numel() for weight in unet.parameters()) < 860e6
    unet.half().save_pretrained(folder / "unet")
    del unet
    vae = AutoencoderKL(
        sample_size=512,
        latent_channels=4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.18215,
    )
    vae.half().save_pretrained(folder / "vae")
    edit_json(folder / "model_index.json", _name_or_path="random")
    return folder


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
def test_full_size_model_makes_the_picture_that_torch_makes(tiny_model: Path, tmp_path: Path) -> None:
    model = write_full_size_model(tiny_model, tmp_path / "full-size")
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
    from benchmarks.full_size import MODELS, NETWORK_OF, Setting, measure, write_model

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
