"""What results were measured on, in what does not change from one run to the next."""

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from typing import Any

from darkroom import __version__
from darkroom.engines.cpu import processor
from darkroom.processes.child import machine_memory

PACKAGES = (
    *("numpy", "torch", "torchao", "torchax", "diffusers", "transformers"),
    *("openvino", "openvino-genai", "openvino-tokenizers"),
    *("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"),
    *("tensorrt", "tensorrt_rtx", "jax", "jaxlib"),
    *("optimum", "optimum-intel", "optimum-onnx"),
)
"""What bears on speed, where it is installed."""


def machine() -> dict[str, Any]:
    """Processor, cores that may be used, memory in bytes, system, GPU, and versions of what this process runs."""
    return {
        "processor": processor(),
        "cores": usable_cores(),
        "memory_bytes": machine_memory(),
        "system": platform.platform(),
        "gpu": _gpu(),
        "python": platform.python_version(),
        "packages": {"darkroom": __version__} | packages(),
    }


def packages(folders: Sequence[str] | None = None) -> dict[str, str]:
    """Versions of the `PACKAGES` that are installed in these folders, or else those that this process sees."""
    found = {}
    for name in PACKAGES:
        query = {"name": name} if folders is None else {"name": name, "path": [*folders]}
        for distribution in importlib.metadata.distributions(**query):
            found[name] = distribution.version
            break
    return found


def usable_cores() -> int | None:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _gpu() -> str | None:
    """The NVIDIA GPU's name and compute capability, where its driver and CUDA's bindings are there."""
    from darkroom.engines.cuda import capability, device_name, missing, runtime_api
    from darkroom.errors import DarkroomError

    try:
        api = runtime_api()
        return None if missing(api) else f"{device_name(api)} ({capability(api)})"
    except DarkroomError:
        return None
