"""What results are measured on, and how much of its memory is left: contenders that wait for their turn hold theirs."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from darkroom import __version__
from darkroom.engines.cpu import processor
from darkroom.processes.memory import machine_memory

PACKAGES = (
    *("numpy", "torch", "torchao", "torchax", "diffusers", "transformers"),
    *("openvino", "openvino-genai", "openvino-tokenizers"),
    *("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"),
    *("tensorrt", "tensorrt_rtx", "jax", "jaxlib"),
    *("optimum", "optimum-intel", "optimum-onnx"),
)
"""What bears on speed, where it is installed."""

SECONDS_TO_ANSWER = 20
SAVED_ROOM = 0.15
"""The share of the memory that is left free."""


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


def nvidia(*asked: str) -> list[str] | None:
    """What the driver says of the NVIDIA GPU that programs here take first; None without one. Asking CUDA itself would
    take some of its memory."""
    if (program := shutil.which("nvidia-smi")) is None:
        return None
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    query = [program, "-i", device, f"--query-gpu={','.join(asked)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=SECONDS_TO_ANSWER, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    said = [each.strip() for each in answer.split(",")]
    return said if len(said) == len(asked) else None


def _gpu() -> str | None:
    """The NVIDIA GPU's name and compute capability."""
    said = nvidia("name", "compute_cap")
    return said and f"{said[0]} ({said[1]})"


class Room:
    """Made before anybody is loaded: what is taken by then is others'."""

    def __init__(self) -> None:
        self._before = [free for _, free in _places()]

    def for_another(self, running: int) -> bool:
        """Whether memory is left for one more like those that are running. True where the system does not say."""
        places = zip(_places(), self._before, strict=False)
        return all(free - (before - free) / running > SAVED_ROOM * total for (total, free), before in places)


def _places() -> list[tuple[int, int]]:
    """All there is and what is free: of the host in kilobytes, and of the GPU in megabytes."""
    device = nvidia("memory.total", "memory.free")
    return [place for place in (_host(), device and (int(device[0]), int(device[1]))) if place]


def _host() -> tuple[int, int] | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kilobytes = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
    return kilobytes["MemTotal"], kilobytes["MemAvailable"]
