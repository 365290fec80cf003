"""What takes an NVIDIA GPU: `pytest -m gpu`. References are computed by diffusers on the CPU, in float32."""

import importlib.util

import numpy as np
import pytest
import torch

from darkroom.engines import find_runtime
from darkroom.engines.torch.tuning import FP8_FROM
from tests.engines.loops import Small, by_diffusers, denoised, engine_of, schedule
from tests.support import Diffusers, Studio, psnr

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]

PROMPT = "a red apple, noto style"
ANCESTRAL = "EulerAncestralDiscreteScheduler"


def test_engines_are_for_this_gpu() -> None:
    assert torch.cuda.get_device_name(0) in find_runtime("torch").device()


@pytest.mark.parametrize("graphs", [False, True], ids=["launched", "replayed"])
@pytest.mark.parametrize("engine", ["torch", "torch-compile"])
def test_loop_on_the_device_equals_the_scheduler(engine: str, graphs: bool) -> None:
    made = engine_of(Small(), engine, use_cuda_graph=graphs)
    for name, size in ((ANCESTRAL, 8), ("EulerDiscreteScheduler", 8), (ANCESTRAL, 16)):
        for seed in (0, 1, 2, 0):  # launched, captured, replayed, replayed
            found, expected = denoised(made, schedule(name), seed, size), by_diffusers(name, 5, seed, size)
            assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    assert made.milliseconds > 0


@pytest.mark.parametrize(
    ("precision", "least"), [("fp32", 45.0), ("fp16", 30.0), ("bf16", 20.0)], ids=["fp32", "fp16", "bf16"]
)
@pytest.mark.parametrize("graphs", [False, True], ids=["launched", "replayed"])
def test_picture_equals_diffusers(
    graphs: bool, precision: str, least: float, studio: Studio, diffusers_tiny: Diffusers
) -> None:
    drawn = studio.draw(
        PROMPT,
        engine="torch",
        precision=precision,
        scheduler="EulerA",
        batch_size=2,
        use_cuda_graph=graphs,
        num_warmup_runs=3,
    )
    expected = diffusers_tiny.draw(PROMPT, PROMPT, scheduler="EulerA")
    assert min(map(psnr, drawn.pictures, expected)) >= least


def test_compiled_and_replayed_picture_equals_diffusers(studio: Studio, diffusers_tiny: Diffusers) -> None:
    drawn = studio.draw(PROMPT, engine="torch-compile", use_cuda_graph=True, num_warmup_runs=3)
    assert psnr(drawn.pictures[0], diffusers_tiny.draw(PROMPT)[0]) >= 45.0


def test_compiled_sdxl_picture_equals_diffusers(xl_studio: Studio, diffusers_tiny_xl: Diffusers) -> None:
    drawn = xl_studio.draw(PROMPT, engine="torch-compile", torch_inference="reduce-overhead", num_warmup_runs=3)
    assert psnr(drawn.pictures[0], diffusers_tiny_xl.draw(PROMPT, guidance_scale=5.0)[0]) >= 45.0


def test_replays_take_no_more_memory() -> None:
    engine, table = engine_of(Small(), use_cuda_graph=True), schedule()
    for seed in range(3):
        denoised(engine, table, seed)
    before = torch.cuda.memory_allocated()
    for seed in range(5):
        denoised(engine, table, seed)
    assert torch.cuda.memory_allocated() == before


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantized_picture_tells_its_loss(kind: str, studio: Studio) -> None:
    if kind == "fp8" and torch.cuda.get_device_capability() < FP8_FROM:
        pytest.skip("this GPU multiplies in no 8-bit floats")
    drawn = studio.draw(PROMPT, engine="torch", precision="bf16", quantization=kind)
    assert drawn.result["quantization_psnr"] > 15
