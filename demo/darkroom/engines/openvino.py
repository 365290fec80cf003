"""OpenVINO on the CPU: graphs are compiled once and the compiled blob is kept, so that loading is all a run does."""

from pathlib import Path
from typing import Any

import numpy as np
import openvino
from openvino import properties
from openvino.properties import hint

from darkroom.engines.cpu import processor
from darkroom.engines.runtime import Engine, Job

BLOB = "engine.blob"
DEVICE = "CPU"

# Without a word OpenVINO computes in bfloat16 where the processor can: precision is always said.
HINTS = {"fp32": openvino.Type.f32, "bf16": openvino.Type.bf16, "fp16": openvino.Type.f16}
CAPABILITIES = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16"}


class OpenVino:
    name = "openvino"
    compiles = True
    revision = 1

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

        keep_layouts(model)
        compiled = self._core.compile_model(model, DEVICE, self._settings(job, None))
        with (folder / BLOB).open("wb") as file:
            file.write(compiled.export_model().getbuffer())

    def load(self, job: Job, source: Path, threads: int | None) -> Engine:
        # Mapped, not read: a large engine's weights are paged in as they are used.
        blob = openvino.Tensor(np.memmap(source / BLOB, np.uint8, mode="r"))
        return _Engine(self._core.import_model(blob, DEVICE, self._settings(job, threads)))

    def _settings(self, job: Job, threads: int | None) -> dict[Any, Any]:
        settings: dict[Any, Any] = {
            hint.inference_precision: HINTS[job.precision],
            hint.performance_mode: hint.PerformanceMode.LATENCY,
        }
        if threads:
            settings[properties.inference_num_threads] = threads
        return settings


class _Engine:
    def __init__(self, compiled: openvino.CompiledModel) -> None:
        self._request = compiled.create_infer_request()

    def __call__(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        return self._request.infer(inputs, share_inputs=True)[0]


def runtime(_: str) -> OpenVino:
    return OpenVino()
