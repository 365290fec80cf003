"""One file per runtime, and the store of what was built."""

import importlib
import importlib.util
from dataclasses import dataclass

from darkroom.engines.runtime import Runtime
from darkroom.errors import AskedWrongly, near_matches


@dataclass(frozen=True)
class Listed:
    """Where a runtime's file is, the package it needs, and how to get that."""

    module: str
    package: str
    install: str


RUNTIMES = {
    "openvino": Listed("openvino", "openvino", "pip install openvino"),
    "onnxruntime": Listed("onnxruntime", "onnxruntime", "pip install onnxruntime"),
    "torch": Listed("torch", "torch", "pip install torch==2.13.0"),
    "torch-compile": Listed("torch", "torch", "pip install torch==2.13.0"),
}
"""In the order of preference of `--engine auto`."""


def find_runtime(name: str) -> Runtime:
    """The runtime called `name`; "auto" takes the first whose package is installed."""
    if name == "auto":
        name = next((name for name, listed in RUNTIMES.items() if _installed(listed)), "openvino")
    if name not in RUNTIMES:
        known = ", ".join(["auto", *RUNTIMES])
        raise AskedWrongly(f"--engine {name!r} is not known here.{near_matches(name, list(RUNTIMES))} Known: {known}.")
    listed = RUNTIMES[name]
    if not _installed(listed):
        raise AskedWrongly(f"--engine {name} needs the package {listed.package}: {listed.install}")
    return importlib.import_module(f"darkroom.engines.{listed.module}").runtime(name)


def _installed(listed: Listed) -> bool:
    spec = importlib.util.find_spec(listed.package)
    return spec is not None and spec.origin is not None
