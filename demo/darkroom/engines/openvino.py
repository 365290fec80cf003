"""OpenVINO on the CPU: graphs are compiled once and the compiled blob is kept, so that loading is all a run does."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from darkroom.engines.cpu import processor
from darkroom.engines.runtime import Engine, Job

CONVERTER = "openvino.tools.ovc"
"""A third of the package's import, which takes it where it is there. It is not needed here: so it is not there."""

sys.modules.setdefault(CONVERTER, None)  # type: ignore[arg-type]
import openvino  # noqa: E402
from openvino import properties  # noqa: E402
from openvino.properties import hint  # noqa: E402

if sys.modules[CONVERTER] is None:
    del sys.modules[CONVERTER]

BLOB = "engine.blob"
BEFOREHAND = "beforehand.blob"
"""What an engine computes once a picture: see `openvino_split`."""

DEVICE = "CPU"

# Without a word OpenVINO computes in bfloat16 where the processor can: precision is always said.
HINTS = {"fp32": openvino.Type.f32, "bf16": openvino.Type.bf16, "fp16": openvino.Type.f16}
CAPABILITIES = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16"}


class OpenVino:
    name = "openvino"
    compiles = True
    revision = 2

    def __init__(self) -> None:
        self._core = openvino.Core()

    def version(self) -> str:
        return openvino.get_version()

    def device(self) -> str:
        return f"{DEVICE}: {processor()}"

    def precisions(self) -> tuple[str, ...]:
        offered = self._core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
        return tuple(precision for precision, capability in CAPABILITIES.items() if capability in offered)

    def build(self, job: Job, graph: Path, folder: Path) -> None:
        model = self._core.read_model(graph)
        shapes = {tensor.name: openvino.PartialShape(list(job.profile.shape(tensor))) for tensor in job.stage.inputs}
        model.reshape(shapes)
        from darkroom.engines.openvino_norms import keep_layouts
        from darkroom.engines.openvino_split import split

        keep_layouts(model)
        if halves := split(model, set(job.stage.steady)):
            self._compile(halves[0], job, folder / BEFOREHAND)
            model = halves[1]
        self._compile(model, job, folder / BLOB)

    def load(self, job: Job, source: Path, threads: int | None) -> Engine:
        engine = self._import(job, source / BLOB, threads)
        if not (source / BEFOREHAND).exists():
            return _Engine(engine)
        return _SplitEngine(engine, self._import(job, source / BEFOREHAND, threads), job.stage.steady)

    def _compile(self, model: openvino.Model, job: Job, path: Path) -> None:
        compiled = self._core.compile_model(model, DEVICE, self._settings(job, None))
        with path.open("wb") as file:
            file.write(compiled.export_model().getbuffer())

    def _import(self, job: Job, path: Path, threads: int | None) -> openvino.InferRequest:
        # Mapped, not read: a large engine's weights are paged in as they are used.
        blob = openvino.Tensor(np.memmap(path, np.uint8, mode="r"))
        return self._core.import_model(blob, DEVICE, self._settings(job, threads)).create_infer_request()

    def _settings(self, job: Job, threads: int | None) -> dict[Any, Any]:
        settings: dict[Any, Any] = {
            hint.inference_precision: HINTS[job.precision],
            hint.performance_mode: hint.PerformanceMode.LATENCY,
        }
        if threads:
            settings[properties.inference_num_threads] = threads
        return settings


class _Engine:
    def __init__(self, request: openvino.InferRequest) -> None:
        self._request = request

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return _by_name(self._request.infer(inputs, share_inputs=True))

    def forget(self) -> None:
        pass


class _SplitEngine:
    """Computes what depends on the `steady` inputs alone when they change, and keeps it until they change again."""

    def __init__(self, request: openvino.InferRequest, beforehand: openvino.InferRequest, steady: tuple[str, ...]):
        self._request = request
        self._beforehand = beforehand
        self._steady = steady
        self._takes = {name for port in request.model_inputs for name in port.get_names()}
        self._seen: dict[str, np.ndarray] = {}
        self._kept: dict[str, np.ndarray] = {}

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        steady = {name: inputs[name] for name in self._steady}
        # By value: an array of the caller's may hold other numbers the next time.
        if not self._seen or any(not np.array_equal(self._seen[name], value) for name, value in steady.items()):
            self._kept = _by_name(self._beforehand.infer(steady))
            self._seen = {name: value.copy() for name, value in steady.items()}
        taken = {name: value for name, value in inputs.items() if name in self._takes}
        return _by_name(self._request.infer(taken | self._kept, share_inputs=True))

    def forget(self) -> None:
        self._seen = {}


def _by_name(results: Any) -> dict[str, np.ndarray]:
    return {output.get_any_name(): array for output, array in results.items()}


def runtime(_: str) -> OpenVino:
    return OpenVino()
