"""OpenVINO, on the CPU or the device that `--device` names: graphs are compiled once and the compiled blob is kept, so
that loading is all a run does.

Large networks are kept as a model, and compiled when they are loaded: see `darkroom.engines.openvino.weights`. So are
those for devices that write no blobs, and for several at once.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from darkroom.contract import Job, Profile, Stage
from darkroom.engines.openvino.devices import CPU, NPU, computes_in, described, is_single, keeps_blobs, members, places
from darkroom.engines.runtime import Engine, Options, Place, Progress, Runtime, refuse_free_sizes

CONVERTER = "openvino.tools.ovc"
"""A third of the package's import, which takes it where it is there. It is not needed here: so it is not there."""

sys.modules.setdefault(CONVERTER, None)  # type: ignore[arg-type]
import openvino  # noqa: E402
from openvino import properties  # noqa: E402
from openvino.properties import hint  # noqa: E402

from darkroom.engines.openvino.weights import widen_late  # noqa: E402

if sys.modules[CONVERTER] is None:
    del sys.modules[CONVERTER]

BLOB = "engine.blob"
BEFOREHAND = "beforehand.blob"
"""What an engine computes once a picture: see `darkroom.engines.openvino.split`."""
UNCOMPILED = ".xml"
"""What a model is kept as in a blob's place: see above."""

# By default OpenVINO computes in bfloat16 where the processor can: precision is always set.
HINTS = {"fp32": openvino.Type.f32, "bf16": openvino.Type.bf16, "fp16": openvino.Type.f16}


class OpenVino(Runtime):
    name = "openvino"
    compiles = True
    revision = 6

    def __init__(self, options: Options) -> None:
        self.options = options
        self._core = openvino.Core()
        self._device = CPU if options.device is None else options.device
        self._members = members(self._core, self._device)
        self.threaded = self._device == CPU

    def version(self) -> str:
        return openvino.get_version()

    def device(self) -> str:
        if is_single(self._device):
            return described(self._core, self._device)
        return f"{self._device}: {' and '.join(described(self._core, each) for each in self._members)}"

    def precisions(self) -> tuple[str, ...]:
        return computes_in(self._core, self._members)

    def places(self) -> list[Place]:
        return places(self._core)

    def serves_any_precision(self, stage: Stage) -> bool:
        """What is kept as a model is compiled when it is loaded."""
        return self._keeps_model(stage)

    def _keeps_model(self, stage: Stage) -> bool:
        large = stage.half_weights or (stage.large and self._device == CPU)
        return large or not keeps_blobs(self._core, self._device)

    def check(self, profile: Profile) -> None:
        if NPU in self._members:
            refuse_free_sizes(profile, f"--device {self._device}", "an NPU's shapes are fixed")

    def build(self, job: Job, graph: Path, folder: Path, progress: Progress) -> dict[str, Any]:
        model = self._core.read_model(graph)
        shapes = {tensor.name: openvino.PartialShape(list(job.profile.shape(tensor))) for tensor in job.stage.inputs}
        model.reshape(shapes)
        if self._device == CPU:
            from darkroom.engines.openvino.gates import part_gates
            from darkroom.engines.openvino.norms import fold_scales, keep_layouts
            from darkroom.engines.openvino.split import split
            from darkroom.engines.openvino.upsampling import convolve_before_doubling

            if not job.stage.half_weights:  # it folds constants, and so would make them float32
                keep_layouts(model)
                part_gates(model)
                fold_scales(model)
                convolve_before_doubling(model)
            # Elsewhere what is kept would have to travel at every step.
            if halves := split(model, set(job.stage.steady)):
                self._keep(halves[0], job, folder / BEFOREHAND)
                model = halves[1]
        self._keep(model, job, folder / BLOB)
        return {}

    def load(self, job: Job, source: Path, threads: int | None) -> Engine:
        engine = self._load(job, source / BLOB, threads)
        if not any(source.glob(f"{Path(BEFOREHAND).stem}.*")):
            return _Engine(engine, job.stage)
        return _SplitEngine(engine, self._load(job, source / BEFOREHAND, threads), job.stage)

    def _keep(self, model: openvino.Model, job: Job, path: Path) -> None:
        """Writes what `_load` reads: a blob, or a model in its place."""
        if self._keeps_model(job.stage):
            openvino.save_model(model, path.with_suffix(UNCOMPILED), compress_to_fp16=False)
            return
        compiled = self._core.compile_model(model, self._device, self._settings(job, None))
        with path.open("wb") as file:
            file.write(compiled.export_model().getbuffer())

    def _load(self, job: Job, path: Path, threads: int | None) -> openvino.InferRequest:
        settings = self._settings(job, threads)
        if path.exists():
            # Mapped, not read: its weights are paged in as they are used.
            blob = openvino.Tensor(np.memmap(path, np.uint8, mode="r"))
            return self._core.import_model(blob, self._device, settings).create_infer_request()
        model = self._core.read_model(path.with_suffix(UNCOMPILED))
        if job.stage.half_weights and self._device == CPU:
            widen_late(model)
        return self._core.compile_model(model, self._device, settings).create_infer_request()

    def _settings(self, job: Job, threads: int | None) -> dict[Any, Any]:
        settings: dict[Any, Any] = {
            hint.inference_precision: HINTS[job.precision],
            hint.performance_mode: hint.PerformanceMode.LATENCY,
        }
        if threads:
            settings[properties.inference_num_threads] = threads
            # Or else the threads of every process are tied to the first cores, where they wait for each other.
            settings[hint.enable_cpu_pinning] = False
        return settings


class _Engine(Engine):
    def __init__(self, request: openvino.InferRequest, stage: Stage) -> None:
        self._request = request
        self._names = _output_names(request, {tensor.name for tensor in stage.outputs})

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self._names, self._request.infer(inputs, share_inputs=True).values(), strict=True))


class _SplitEngine(_Engine):
    """Computes what depends on the `steady` inputs alone when they change, and keeps it until they change again."""

    def __init__(self, request: openvino.InferRequest, beforehand: openvino.InferRequest, stage: Stage) -> None:
        super().__init__(request, stage)
        self._takes = {name for port in request.model_inputs for name in port.get_names()}
        self._beforehand = beforehand
        self._kept_names = _output_names(beforehand, self._takes)
        self._steady = stage.steady
        self._seen: dict[str, np.ndarray] = {}
        self._kept: dict[str, np.ndarray] = {}

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        steady = {name: inputs[name] for name in self._steady}
        # By value: an array of the caller's may hold other numbers the next time.
        if not self._seen or any(not np.array_equal(self._seen[name], value) for name, value in steady.items()):
            self._kept = dict(zip(self._kept_names, self._beforehand.infer(steady).values(), strict=True))
            self._seen = {name: value.copy() for name, value in steady.items()}
        taken = {name: value for name, value in inputs.items() if name in self._takes}
        return super().__call__(taken | self._kept)

    def forget(self) -> None:
        self._seen = {}


def _output_names(request: openvino.InferRequest, known: set[str]) -> list[str]:
    """The known name of each output, which may have others too."""
    return [min(output.get_names() & known) for output in request.model_outputs]


def runtime(_: str, options: Options) -> OpenVino:
    return OpenVino(options)
