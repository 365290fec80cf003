"""Engines beside torch's on an NVIDIA GPU: `pytest -m gpu`. Each runs in a process of its own, as users start it: the
two TensorRTs, ONNX Runtime's providers and JAX would get into one another's way."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.likeness import STEPS, assert_by_diffusers
from tests.support import ROOT, Diffusers, Studio, flags, pixels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]

PROMPT = "a red apple, noto style"
GRAPH = {"use_cuda_graph": True}
NOT_FOR_RTX = ((8, 0), (9, 0))
"""Compute capabilities that TensorRT-RTX says it is not for."""

WAYS: dict[str, list[dict[str, Any]]] = {
    "tensorrt": [
        GRAPH,
        GRAPH | {"precision": "fp16"},
        {"precision": "bf16"},
        {"ws": True},
        {"build_dynamic_shape": True},
    ],
    "tensorrt_rtx": [
        GRAPH,
        GRAPH | {"precision": "fp16"},
        {"precision": "bf16"},
        {"ws": True},
        {"build_dynamic_shape": True},
    ],
    "onnxruntime-cuda": [{}, GRAPH, GRAPH | {"precision": "fp16"}, {"build_dynamic_shape": True}],
    "onnxruntime-tensorrt": [{}, GRAPH | {"precision": "fp16"}],
    "jax": [{}, {"precision": "bf16"}],
}
"""What is asked of each, beside the same pictures."""


def missing(name: str) -> str | None:
    """Why an engine cannot be tried here; None where it can."""
    if name == "jax":
        return None if find_spec("jax_cuda13_plugin") or find_spec("jax_cuda12_plugin") else "JAX has no CUDA here"
    if name.startswith("tensorrt"):
        if name == "tensorrt_rtx" and torch.cuda.get_device_capability() in NOT_FOR_RTX:
            return "TensorRT-RTX is not for this GPU"
        return None if find_spec(name) else f"{name} is not installed"
    from darkroom.engines.onnxruntime.providers import available, missing_library

    provider = name.partition("-")[2]
    return missing_library(provider) if provider in available() else f"this ONNX Runtime has no {provider}"


@pytest.mark.parametrize(("name", "asked"), [(name, asked) for name, ways in WAYS.items() for asked in ways], ids=str)
def test_pictures_equal_those_of_diffusers(
    name: str, asked: dict[str, Any], studio: Studio, diffusers_tiny: Diffusers, tmp_path: Path
) -> None:
    """Three batches: the second is captured, and the third replays it, with other noise."""
    if reason := missing(name):
        pytest.skip(reason)
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if name == "tensorrt_rtx":  # which comes second where both are
        (tmp_path / "tensorrt.py").write_text('raise ImportError("left out")\n')
        environment["PYTHONPATH"] = str(tmp_path)
    engine, _, provider = name.removesuffix("_rtx").partition("-")
    asked = asked | ({"provider": provider} if provider else {})
    work = {"engine": engine, "model": studio.model, "json": True, "seed": 5, "denoising_steps": STEPS, "batch_size": 2}
    work |= {"batch_count": 3, "scheduler": "EulerA", "precision": "fp32"} | asked
    ended = studio.shell(PROMPT, *flags(**work), *studio.folders(), **environment)
    assert ended.code == 0, ended.err
    pictures = [pixels(ROOT / image["path"]) for image in json.loads(ended.out)["images"]]
    prompts = [PROMPT] * len(pictures)
    assert_by_diffusers(pictures, diffusers_tiny, *prompts, precision=work["precision"], scheduler="EulerA")
