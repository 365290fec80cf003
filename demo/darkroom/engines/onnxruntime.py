"""ONNX Runtime on the CPU: graphs are optimised once, and the optimised graph is kept."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from darkroom.engines.cpu import processor
from darkroom.engines.runtime import Engine, Job, Options, Progress, Runtime
from darkroom.stages.contract import FREE

OPTIMISED = "engine.onnx"
OPTIMISED_DATA = "engine.onnx.data"
PROVIDERS = ["CPUExecutionProvider"]
QUIET = 3

WIDENING = ["ConstantFolding", "FuseFp16InitializerToFp32NodeTransformer"]
"""The optimisers that would make float32 of weights that are kept in float16 and cast where they are used."""


class OnnxRuntime(Runtime):
    name = "onnxruntime"
    compiles = True
    revision = 1

    def version(self) -> str:
        return onnxruntime.__version__

    def device(self) -> str:
        return f"CPU: {processor()}"

    def precisions(self) -> tuple[str, ...]:
        # Its CPU kernels have no half-precision convolutions.
        return ("fp32",)

    def build(self, job: Job, graph: Path, folder: Path, progress: Progress) -> dict[str, Any]:
        options = _options(job, None)
        options.optimized_model_filepath = str(folder / OPTIMISED)
        # Weights beside the graph at any size: protobuf ends at 2 GiB, and a separate file is mapped, not copied.
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", OPTIMISED_DATA)
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        onnxruntime.InferenceSession(
            str(graph),
            options,
            providers=PROVIDERS,
            disabled_optimizers=WIDENING if job.stage.half_weights else None,
        )
        return {}

    def load(self, job: Job, source: Path, threads: int | None) -> Engine:
        options = _options(job, threads)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return _Engine(onnxruntime.InferenceSession(str(source / OPTIMISED), options, providers=PROVIDERS))


class _Engine(Engine):
    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self._outputs = [output.name for output in session.get_outputs()]

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self._outputs, self._session.run(None, inputs), strict=True))


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
    return OnnxRuntime()
