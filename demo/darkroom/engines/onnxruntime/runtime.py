"""ONNX Runtime, on the execution provider that `--provider` names.

For the CPU, graphs are optimised once, and the optimised graph is kept. For others the graph is kept tidied, and its
provider optimises it when it is loaded: what it would write is for its own machine, or cannot be written at all. What
TensorRT builds, it keeps beside the graph.
"""

import sys
from pathlib import Path
from typing import Any

import onnxruntime

from darkroom.contract import FREE, Job, Profile
from darkroom.engines import distribution_of
from darkroom.engines.cpu import processor
from darkroom.engines.cuda import capability, device_name, missing, runtime_api
from darkroom.engines.onnxruntime.providers import (
    CACHE,
    CPU,
    CUDA,
    DIRECTML,
    HALVES,
    ON_CPU,
    PACKAGE,
    PACKAGES,
    TENSORRT,
    available,
    check_available,
    install,
    missing_library,
    stack,
)
from darkroom.engines.onnxruntime.run import DeviceEngine, DeviceUnet, HostEngine
from darkroom.engines.runtime import CAPTURED, ON_NVIDIA, Engine, Options, Place, Progress, Runtime, refuse_free_sizes
from darkroom.errors import Failed, InvalidRequest, gist
from darkroom.networks.graph import WIDENING
from darkroom.store.producers import made_with

GRAPH = "engine.onnx"
GRAPH_DATA = "engine.onnx.data"
STEP = "step.onnx"
"""The schedule's step, beside a UNet that denoises on the GPU: see `darkroom.schedule.step`."""

MEMORY = "cuda"
"""What ONNX Runtime calls the memory of NVIDIA's GPUs."""

QUIET = 3


class OnnxRuntime(Runtime):
    name = "onnxruntime"
    compiles = True
    typed = True
    revision = 3

    def __init__(self, options: Options) -> None:
        self.options = options
        self._provider = CPU if options.provider is None else options.provider
        check_available(self._provider)
        self.threaded = self._provider in ON_CPU
        self._cuda_api = runtime_api() if self._provider in ON_NVIDIA else None
        if options.use_cuda_graph and self._cuda_api is None:
            raise InvalidRequest(
                f"--use-cuda-graph has no effect with --engine onnxruntime on its provider {self._provider}: "
                f"it is for --provider {' and '.join(ON_NVIDIA)}."
            )

    def version(self) -> str:
        return onnxruntime.__version__

    def device(self) -> str:
        if self._provider == CPU:
            return f"CPU: {processor()}"
        if self._cuda_api is None:
            return f"{self._provider}: {processor()}"
        if self._provider != TENSORRT or missing(self._cuda_api):
            return f"{self._provider}: an NVIDIA GPU"  # a tidied graph is for any
        return f"{self._provider}: {device_name(self._cuda_api)} ({capability(self._cuda_api)})"

    def facts(self) -> dict[str, Any]:
        return {} if self._provider == CPU else made_with("onnx-graphsurgeon")

    def precisions(self) -> tuple[str, ...]:
        # The CPU's kernels have no half-precision convolutions.
        return ("fp32", "fp16") if self._provider in HALVES else ("fp32",)

    def places(self) -> list[Place]:
        here = available()
        there = [_place(name) for name in here]
        absent = (name for name in PACKAGES if name not in here and (name != DIRECTML or sys.platform == "win32"))
        reason = f"{distribution_of(PACKAGE)} does not have it"
        return there + [Place("--provider", name, "", reason, install(name)) for name in absent]

    def check(self, profile: Profile) -> None:
        if self.options.use_cuda_graph:
            refuse_free_sizes(profile, *CAPTURED)
        if self._provider == TENSORRT:
            why = "what it builds is for one shape"
            refuse_free_sizes(profile, "--provider tensorrt", why, ", or --engine tensorrt")

    def unusable(self) -> str | None:
        if self._cuda_api is None or (reason := _unusable(self._provider, self._cuda_api)) is None:
            return None
        return f"they are ready for a machine with an NVIDIA GPU and CUDA; {reason}"

    def build(self, job: Job, graph: Path, folder: Path, progress: Progress) -> dict[str, Any]:
        if self._provider == CPU:
            self._optimise(job, graph, folder)
            return {}
        from darkroom.engines.tensorrt.graph import read_graph, tidy

        if self._provider == TENSORRT and (reason := _unusable(TENSORRT, self._cuda_api)):
            raise Failed(f"--provider tensorrt builds on the GPU that its engines are for, and {reason}.")
        tidy(read_graph(graph, job.stage), graph.parent, job.stage, folder / GRAPH)
        if self._cuda_api is not None and job.stage.denoises:
            from darkroom.schedule.step_onnx import write_step

            write_step(job.stage.latents, folder / STEP)
        if self._provider == TENSORRT:
            (folder / CACHE).mkdir()
            self._session(job, folder, None)  # which builds what is not in its folder
        return {}

    def load(self, job: Job, source: Path, threads: int | None) -> Engine:
        session = self._session(job, source, threads)
        if self._cuda_api is None:
            return HostEngine(session, job)
        if not job.stage.denoises:
            return DeviceEngine(session, job, MEMORY)
        providers = stack(CUDA, "fp32", source)  # never captured: its buffers change places at every step
        return DeviceUnet(session, job, MEMORY, self._open(source / STEP, _options(job, None), providers))

    def _optimise(self, job: Job, graph: Path, folder: Path) -> None:
        options = _options(job, None)
        options.optimized_model_filepath = str(folder / GRAPH)
        # Weights beside the graph at any size: protobuf ends at 2 GiB, and a separate file is mapped, not copied.
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", GRAPH_DATA)
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        self._open(graph, options, stack(CPU, job.precision, folder), job.stage.half_weights)

    def _session(self, job: Job, source: Path, threads: int | None) -> onnxruntime.InferenceSession:
        options = _options(job, threads)
        if self._provider == CPU:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        # Captured is what is called at every step: a text encoder may have nodes that only the CPU computes.
        captured = self.options.use_cuda_graph and job.stage.denoises
        providers = stack(self._provider, job.precision, source, captured, threads)
        return self._open(source / GRAPH, options, providers, job.stage.half_weights)

    def _open(
        self,
        graph: Path,
        options: onnxruntime.SessionOptions,
        providers: list[tuple[str, dict[str, Any]]],
        half_weights: bool = False,
    ) -> onnxruntime.InferenceSession:
        """A session whose first provider has really come up: ONNX Runtime would go on with the next one."""
        if self._cuda_api is not None:
            missing_library(self._provider)  # loads those that are there
        disabled = WIDENING if half_weights else None
        try:
            session = onnxruntime.InferenceSession(
                str(graph), options, providers=providers, disabled_optimizers=disabled, enable_fallback=0
            )
        except Exception as error:
            if self._provider == CPU:
                raise
            raise Failed(f"--provider {self._provider} cannot take {graph.name}: {gist(error)}.") from error
        if providers[0][0] not in session.get_providers():
            raise Failed(
                f"--provider {self._provider} could not be started, for reasons that ONNX Runtime has printed."
            )
        return session


def _unusable(provider: str, cuda_api: Any) -> str | None:
    """Why a provider on NVIDIA's GPUs cannot run here; None where it can."""
    if reason := missing(cuda_api):
        return reason
    lacks, command = missing_library(provider), _brings_libraries(provider)
    return f"{lacks} ({command})" if lacks and command else lacks


def _brings_libraries(provider: str) -> str | None:
    """The command that brings what a provider's library lacks. TensorRT's own come from elsewhere."""
    return install(provider) if provider == CUDA else None


def _place(provider: str) -> Place:
    if provider not in ON_NVIDIA:
        return Place("--provider", provider, f"on {processor()}" if provider == CPU else "")
    try:
        cuda_api = runtime_api()
    except Failed as error:
        return Place("--provider", provider, "", *str(error).split(": "))
    if reason := missing(cuda_api):
        return Place("--provider", provider, "", reason)
    name = device_name(cuda_api)
    if reason := missing_library(provider):
        return Place("--provider", provider, name, reason, _brings_libraries(provider))
    return Place("--provider", provider, name)


def _options(job: Job, threads: int | None) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = QUIET
    for symbol, size in job.profile.sizes().items():
        if size != FREE:
            options.add_free_dimension_override_by_name(symbol, size)
    if threads:
        options.intra_op_num_threads = threads
    return options


def runtime(_: str, options: Options) -> OnnxRuntime:
    return OnnxRuntime(options)
