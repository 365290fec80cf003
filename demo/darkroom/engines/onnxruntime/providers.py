"""ONNX Runtime's execution providers: which are here, what brings another, and the options of each.

Those on NVIDIA's GPUs are fed from the GPU's memory, all others from the host's. Only the CPU's, and OpenVINO's on the
CPU, have been run: nothing else was at hand.
"""

import contextlib
import ctypes
import io
import os
from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime

from darkroom.engines import distribution_of
from darkroom.errors import InvalidRequest, near_matches

CPU, CUDA, TENSORRT, OPENVINO, DIRECTML = "cpu", "cuda", "tensorrt", "openvino", "dml"
ELSEWHERE = "azure"
"""It sends what it is given to a service, and runs no network here."""

SUFFIX = "ExecutionProvider"
PACKAGE = "onnxruntime"
PACKAGES = {
    CUDA: "onnxruntime-gpu[cuda,cudnn]",
    TENSORRT: "onnxruntime-gpu[cuda,cudnn]",
    OPENVINO: "onnxruntime-openvino",
    DIRECTML: "onnxruntime-directml",
}
"""Builds of ONNX Runtime on the package index, by what they have; all are imported under one name, so only one of them
can be installed."""

ON_CPU = (CPU, OPENVINO)
HALVES = (CUDA, TENSORRT, DIRECTML)
"""Providers with kernels for float16."""

CACHE = "tensorrt"
"""The folder, beside the graph, of the engines that TensorRT builds of it."""


def short_name(name: str) -> str:
    """ "CUDAExecutionProvider" -> "cuda", as `--provider` has it."""
    return name.lower().removesuffix(SUFFIX.lower())


def available() -> list[str]:
    """The providers that this build of ONNX Runtime has."""
    return [name for each in onnxruntime.get_available_providers() if (name := short_name(each)) != ELSEWHERE]


def check_available(provider: str) -> None:
    """Raises `InvalidRequest` for a provider that this build does not have, with what would change that."""
    here = available()
    if provider in here:
        return
    known = [name for each in onnxruntime.get_all_providers() if (name := short_name(each)) != ELSEWHERE]
    if provider not in known:
        raise InvalidRequest(
            f"--provider {provider!r} is none that ONNX Runtime has here.{near_matches(provider, known)} "
            f"Here are {' and '.join(here)}."
        )
    way = f": {install(provider)}" if provider in PACKAGES else ", and no other build is known here that has it"
    raise InvalidRequest(
        f"--provider {provider} is not in this ONNX Runtime {onnxruntime.__version__}, which has "
        f"{' and '.join(here)}{way}"
    )


def install(provider: str) -> str:
    """The command that brings a build with this provider, in place of the one that is here."""
    package = PACKAGES.get(provider, PACKAGE)
    there = distribution_of(PACKAGE)
    leaves = "" if there == package.partition("[")[0] else f"pip uninstall -y {there} && "
    return f'{leaves}pip install "{package}"'


@cache
def missing_library(provider: str) -> str | None:
    """The first library that a provider on NVIDIA's GPUs lacks, in the loader's words; None where it has all.

    Loads those that came as packages, which ONNX Runtime does not find by itself. Outside of Linux nothing is known.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find, wanted or not
        onnxruntime.preload_dlls()
    library = Path(onnxruntime.__file__).parent / "capi" / f"libonnxruntime_providers_{provider}.so"
    try:
        ctypes.CDLL(str(library)) if library.exists() else None
    except OSError as error:
        # Alone it always lacks its host, which ONNX Runtime loads before it; that is looked for when all else is there.
        return None if "Provider_GetHost" in str(error) else str(error)
    return None


def stack(
    provider: str, precision: str, folder: Path, cuda_graph: bool = False, threads: int | None = None
) -> list[tuple[str, dict[str, Any]]]:
    """The providers of a session, in order of precedence, with their options. `folder` is the engine's.

    What a provider has no kernel for goes to the next.
    """
    if provider == TENSORRT and precision == "fp32":
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # as below: it has no option of its own
    cuda = (
        "CUDAExecutionProvider",
        {
            "device_id": 0,
            "use_tf32": 0,  # fp32 is to mean fp32
            "enable_cuda_graph": int(cuda_graph and provider == CUDA),
        },
    )
    tensorrt = (
        "TensorrtExecutionProvider",
        {
            "device_id": 0,
            "trt_fp16_enable": int(precision == "fp16"),
            "trt_engine_cache_enable": 1,
            "trt_engine_cache_path": str(folder / CACHE),
            "trt_cuda_graph_enable": int(cuda_graph),
        },
    )
    # Without a word it computes in whatever half precision the processor has.
    openvino = ("OpenVINOExecutionProvider", {"device_type": "CPU", "precision": "FP32"})
    if threads:
        openvino[1]["num_of_threads"] = str(threads)
    full = {short_name(name): name for name in onnxruntime.get_available_providers()}
    own = {CPU: [], CUDA: [cuda], TENSORRT: [tensorrt, cuda], OPENVINO: [openvino]}
    return [*own.get(provider, [(full.get(provider, ""), {})]), (full[CPU], {})]
