"""What takes an NVIDIA GPU: `pytest -m gpu`. References are computed by diffusers on the CPU, in float32."""

import importlib.util

import numpy as np
import pytest
import torch

from darkroom.engines import find_runtime
from darkroom.engines.torch.tuning import FP8_FROM
from tests.engines.loops import Small, by_diffusers, denoised, engine_of, schedule
from tests.gpu.likeness import LEAST, STEPS, assert_by_diffusers
from tests.support import Diffusers, Studio

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


@pytest.mark.parametrize("precision", list(LEAST))
@pytest.mark.parametrize("graphs", [False, True], ids=["launched", "replayed"])
def test_picture_equals_diffusers(graphs: bool, precision: str, studio: Studio, diffusers_tiny: Diffusers) -> None:
    drawn = studio.draw(
        PROMPT,
        engine="torch",
        precision=precision,
        scheduler="EulerA",
        batch_size=2,
        use_cuda_graph=graphs,
        num_warmup_runs=3,
        denoising_steps=STEPS,
    )
    assert_by_diffusers(drawn.pictures, diffusers_tiny, PROMPT, PROMPT, precision=precision, scheduler="EulerA")


def test_compiled_and_replayed_picture_equals_diffusers(studio: Studio, diffusers_tiny: Diffusers) -> None:
    drawn = studio.draw(PROMPT, engine="torch-compile", use_cuda_graph=True, num_warmup_runs=3, denoising_steps=STEPS)
    assert_by_diffusers(drawn.pictures, diffusers_tiny, PROMPT)


def test_compiled_sdxl_picture_equals_diffusers(xl_studio: Studio, diffusers_tiny_xl: Diffusers) -> None:
    drawn = xl_studio.draw(
        PROMPT, engine="torch-compile", torch_inference="reduce-overhead", num_warmup_runs=3, denoising_steps=STEPS
    )
    assert_by_diffusers(drawn.pictures, diffusers_tiny_xl, PROMPT, guidance_scale=5.0)


def test_replays_take_no_more_memory() -> None:
    engine, table = engine_of(Small(), use_cuda_graph=True), schedule()
    for seed in range(3):
        denoised(engine, table, seed)
    before = torch.cuda.memory_allocated()
    for seed in range(5):
        denoised(engine, table, seed)
    assert torch.cuda.memory_allocated() == before


def test_failed_capture_leaves_memory_to_be_freed() -> None:
    """What torch frees while its allocator takes a capture to be going on, it keeps."""

    class Waits(Small):
        def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            made = super().forward(latents, timestep)
            return made + 0 * made.sum().item()  # for which the host waits: no capture has that

    engine = engine_of(Waits(), use_cuda_graph=True)
    with pytest.warns(UserWarning, match="no CUDA graph"):
        for seed in range(3):
            found, expected = denoised(engine, schedule(), seed), by_diffusers(ANCESTRAL, 5, seed)
            assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(3):
        torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
        torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == before
    other = engine_of(Small(), use_cuda_graph=True)
    for seed in range(4):  # and others are captured
        denoised(other, schedule(), seed)


def test_engines_compute_side_by_side() -> None:
    """One does not wait for what another has been given."""
    slow, quick = engine_of(Small(), use_cuda_graph=True), engine_of(Small())
    assert slow._stream != quick._stream
    inputs = {"latents": np.ones((2, 4, 8, 8), np.float32), "timestep": np.zeros(2, np.float32)}
    quick(inputs)
    with torch.cuda.stream(slow._stream):
        torch.cuda._sleep(1 << 30)
    quick(inputs)
    assert not slow._stream.query()


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantized_picture_tells_its_loss(kind: str, studio: Studio, diffusers_tiny: Diffusers) -> None:
    if kind == "fp8" and torch.cuda.get_device_capability() < FP8_FROM:
        pytest.skip("this GPU multiplies in no 8-bit floats")
    drawn = studio.draw(
        PROMPT, engine="torch", precision="bf16", quantization=kind, scheduler="EulerA", denoising_steps=STEPS
    )
    assert drawn.result["quantization_psnr"] > 15
    assert_by_diffusers(drawn.pictures, diffusers_tiny, PROMPT, precision="bf16", scheduler="EulerA")
