"""What results were measured on, in what does not change from one run to the next."""

import importlib.metadata
import os
import platform
from typing import Any

from darkroom import __version__
from darkroom.engines.cpu import processor

PACKAGES = ("numpy", "torch", "diffusers", "transformers", "openvino", "onnxruntime", "tensorrt", "tensorrt_rtx", "jax")


def machine() -> dict[str, Any]:
    """Processor, cores that may be used, memory in bytes, system, GPU, and versions."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        memory = None
    return {
        "processor": processor(),
        "cores": usable_cores(),
        "memory_bytes": memory,
        "system": platform.platform(),
        "gpu": _gpu(),
        "python": platform.python_version(),
        "packages": {"darkroom": __version__} | {name: found for name in PACKAGES if (found := _version(name))},
    }


def usable_cores() -> int | None:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> str | None:
    """The NVIDIA GPU's name and compute capability, where its driver and CUDA's bindings are there."""
    from darkroom.engines.cuda import capability, device_name, missing, runtime_api
    from darkroom.errors import DarkroomError

    try:
        api = runtime_api()
        return None if missing(api) else f"{device_name(api)} ({capability(api)})"
    except DarkroomError:
        return None
