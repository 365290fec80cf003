"""One file per runtime, and the store of what was built."""

import importlib
import importlib.util
import os
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any

from darkroom.contract import PLACES
from darkroom.engines.runtime import NOTHING_ASKED, Options, Runtime
from darkroom.errors import Failed, InvalidRequest, check_known
from darkroom.flags import option


@dataclass(frozen=True)
class Listed:
    """Where a runtime's file is, the packages of which it needs one, and how to get that.

    `options` are those of `Options` that it has a use for; `runs_code` tells whether loading one of its engines runs
    code that stands in it.
    """

    module: str
    packages: tuple[str, ...]
    install: str
    options: frozenset[str] = frozenset()
    runs_code: bool = False
    tools: dict[str, str] = field(default_factory=dict)
    """What is needed beside packages, by the word that a complaint has for it, and how to get that."""

    def remedy(self, complaint: str) -> str:
        """The one command that helps against a complaint."""
        return self.tool(complaint) or self.install

    def tool(self, complaint: str) -> str | None:
        """How to get what a complaint misses beside packages; None where it misses nothing of that."""
        return next((command for word, command in self.tools.items() if word in complaint), None)


TORCH = frozenset({"torch_inference", "quantization", "use_cuda_graph"})
ONNXRUNTIME = frozenset({"provider", "use_cuda_graph", "low_vram"})
OPENVINO = frozenset({"device", "low_vram"})
JAX = frozenset({"devices"})
OTHERS = frozenset({"torch_inference", "quantization", "devices", "low_vram", *PLACES})
TENSORRT = frozenset(field.name for field in fields(Options)) - OTHERS

RUNTIMES = {
    "tensorrt": Listed(
        "tensorrt",
        ("tensorrt", "tensorrt_rtx"),
        "pip install tensorrt-rtx cuda-python",
        TENSORRT,
        tools={"NVIDIA driver": "for a machine with an NVIDIA GPU: https://www.nvidia.com/drivers"},
    ),
    "openvino": Listed("openvino", ("openvino",), "pip install openvino", OPENVINO),
    "onnxruntime": Listed("onnxruntime", ("onnxruntime",), "pip install onnxruntime", ONNXRUNTIME),
    "torch": Listed("torch", ("torch",), "pip install torch==2.13.0", TORCH | {"low_vram"}),
    "torch-compile": Listed(
        "torch",
        ("torch",),
        "pip install torch==2.13.0",
        TORCH,
        tools={"compiler": "apt-get install g++", "package triton": "pip install triton"},
    ),
    "jax": Listed(
        "jax",
        ("jax",),
        "pip install jax==0.10.2 torchax==0.0.14.dev20261026 flatbuffers safetensors",
        JAX,
        runs_code=True,
    ),
}
"""In the order of preference of `--engine auto`, which takes TensorRT where there is an NVIDIA GPU."""

NVIDIA_DEVICES = ("/dev/nvidiactl", "/dev/dxg", r"C:\Windows\System32\nvcuda.dll")
"""What is there where there is an NVIDIA driver: asking CUDA takes an import that others need not pay for."""


def find_runtime(name: str, options: Options = NOTHING_ASKED) -> Runtime:
    """The runtime called `name`, or what `automatic` says.

    Raises `InvalidRequest` for a name that is not known, a package that is missing, and options it has no use for.
    """
    if name == "auto":
        name = automatic(options)
    check_known("--engine", name, ["auto", *RUNTIMES])
    listed = RUNTIMES[name]
    if not _installed(listed):
        raise InvalidRequest(f"--engine {name} needs the package {listed.packages[-1]}: {listed.install}")
    for asked in options.asked():
        if asked not in listed.options:
            able = " or ".join(name for name, each in RUNTIMES.items() if asked in each.options)
            raise InvalidRequest(f"{option(asked)} has no effect with --engine {name}: it is for {able}.")
    return importlib.import_module(f"darkroom.engines.{listed.module}.runtime").runtime(name, options)


def runs_code(key: dict[str, Any]) -> bool:
    """Whether loading the artefact of this key runs code that stands in it: XLA's executables are unpickled, and what
    inductor compiled is machine code and Python."""
    listed = RUNTIMES.get(str(key.get("runtime")))
    return key.get("kind") == "compiled" or (listed is not None and listed.runs_code)


def has_cuda_graphs(name: str, options: Options) -> bool:
    """Whether this engine, with these options, has a use for --use-cuda-graph."""
    return "use_cuda_graph" in RUNTIMES[name].options and (name != "onnxruntime" or options.provider is not None)


def options_for(name: str, options: Options, among: list[str]) -> Options:
    """The options without those that this engine has no use for, but another one `among` those named has."""
    if name not in RUNTIMES:
        return options
    others = [other for other in among if other in RUNTIMES]
    unused = {option for other in others for option in RUNTIMES[other].options} - RUNTIMES[name].options
    if not has_cuda_graphs(name, options) and any(has_cuda_graphs(other, options) for other in others):
        unused.add("use_cuda_graph")
    return replace(options, **{option: getattr(NOTHING_ASKED, option) for option in unused})


def automatic(options: Options = NOTHING_ASKED) -> str:
    """The one runtime that knows the requested place, or the first that is installed and has what it needs."""
    for place in options.place():
        return next(name for name, listed in RUNTIMES.items() if place in listed.options)
    if any(os.path.exists(device) for device in NVIDIA_DEVICES) and _installed(RUNTIMES["tensorrt"]):
        try:
            if find_runtime("tensorrt", options).is_meant_for_this_gpu():
                return "tensorrt"
        except Failed:  # half of it is missing: others are there
            pass
    others = (name for name, listed in RUNTIMES.items() if name != "tensorrt" and _installed(listed))
    return next(others, "openvino")


@cache
def distribution_of(module: str) -> str:
    """What the package that a module came from is called on the package index: some have several builds there."""
    import importlib.metadata  # not above: few runs need it

    return next(iter(importlib.metadata.packages_distributions().get(module, ())), module)


def _installed(listed: Listed) -> bool:
    specs = map(importlib.util.find_spec, listed.packages)
    return any(spec is not None and spec.origin is not None for spec in specs)
