"""TensorRT and TensorRT-RTX, which share an API: `tensorrt` where it can be imported, else `tensorrt_rtx`.

TensorRT-RTX builds engines on machines without a GPU, for the GPUs of others; plain TensorRT builds where it runs.
"""

import importlib
import importlib.util
import os
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

from darkroom.contract import Job, Profile
from darkroom.engines.cuda import capability, device_name, missing, runtime_api
from darkroom.engines.runtime import CAPTURED, Engine, Options, Progress, Runtime, refuse_free_sizes
from darkroom.errors import Failed, InvalidRequest, near_matches
from darkroom.schedule.step import step_stage
from darkroom.store.producers import made_with

PLAN = "engine.plan"
STEP_PLAN = "step.plan"
"""The schedule's step, beside the UNet: see `darkroom.schedule.step`."""

LATER = "8.0 and later"
"""What TensorRT-RTX builds for when no compute capability is passed."""

LEVELS = range(6)


class TensorRt(Runtime):
    name = "tensorrt"
    compiles = True
    typed = True
    bounded = True
    threaded = False
    revision = 3

    def __init__(self, options: Options, trt: Any = None, cuda_api: Any = None) -> None:
        self.options = options
        self._trt = trt or bindings()
        self._cuda_api = cuda_api or runtime_api()
        self._session: Any = None
        self._lock = Lock()
        self._check_options()

    @property
    def rtx(self) -> bool:
        """Whether this is TensorRT-RTX."""
        return hasattr(self._trt, "ComputeCapability")

    def version(self) -> str:
        return f"{self._trt.__name__} {self._trt.__version__}"

    def device(self) -> str:
        if not self.rtx and not missing(self._cuda_api):
            return f"{device_name(self._cuda_api)} ({capability(self._cuda_api)})"
        return "+".join(self._capabilities()) or LATER

    def facts(self) -> dict[str, Any]:
        options = self.options
        built_with = {
            "optimization_level": options.optimization_level,
            "workspace": options.workspace,
            "weight_streaming": options.ws,
        }
        asked = {name: value for name, value in built_with.items() if value is not None and value is not False}
        return {"built_with": asked} | made_with("onnx-graphsurgeon")

    def precisions(self) -> tuple[str, ...]:
        return ("fp32", "fp16", "bf16")

    def runs(self, device: str) -> bool:
        if missing(self._cuda_api) or not self.rtx or self.options.compute_capability:
            return device == self.device()
        own = capability(self._cuda_api)
        return own in device.split("+") or (device == LATER and _number(own) >= 8.0)

    def unusable(self) -> str | None:
        if reason := missing(self._cuda_api):
            return f"they are ready for a machine with {self._gpus()}; {reason}"
        own = capability(self._cuda_api)
        if own not in (self.options.compute_capability or (own,)):
            return f"they are ready for a machine with {self._gpus()}; the one here is of {own}"
        return None

    def is_meant_for_this_gpu(self) -> bool:
        """Whether there is a GPU, and one that the library says it is for; others may work, or not."""
        return not missing(self._cuda_api) and (not self.rtx or capability(self._cuda_api) in self._listed())

    def check(self, profile: Profile) -> None:
        if self.options.use_cuda_graph:
            refuse_free_sizes(profile, *CAPTURED)

    def build(self, job: Job, graph: Path, folder: Path, progress: Progress) -> dict[str, Any]:
        from darkroom.engines.tensorrt.build import build_engine
        from darkroom.schedule.step_onnx import write_step

        if not self.rtx and (reason := missing(self._cuda_api)):
            raise Failed(
                f"TensorRT builds engines on the GPU that they are for, and {reason}; "
                f"TensorRT-RTX builds anywhere: pip install tensorrt-rtx, without tensorrt."
            )
        capabilities = self._capabilities() if self.rtx else ()

        def build(job: Job, graph: Path, name: str) -> dict[str, Any]:
            return build_engine(self._trt, self.options, job, graph, folder / name, capabilities, progress)

        made = {PLAN: build(job, graph, PLAN)}
        if job.stage.denoises:
            latents = job.stage.latents
            step = folder / "step.onnx"
            write_step(latents, step)
            made[STEP_PLAN] = build(replace(job, stage=step_stage(latents)), step, STEP_PLAN)
            step.unlink()
        return {"engines": made}

    def load(self, job: Job, source: Path, threads: int | None) -> Engine:
        from darkroom.engines.tensorrt.run import Session

        with self._lock:  # engines are loaded side by side, and share a stream
            if self._session is None:
                self._session = Session(self._trt, self._cuda_api, self.options)
            return self._session.load(job, source / PLAN, source / STEP_PLAN)

    def _capabilities(self) -> tuple[str, ...]:
        """Of the GPUs that engines are for; none where that is left to the library."""
        if self.options.compute_capability:
            return self.options.compute_capability
        if missing(self._cuda_api):
            return ()
        own = capability(self._cuda_api)
        return (own,) if not self.rtx or own in self._listed() else ()

    def _listed(self) -> list[str]:
        """The compute capabilities that TensorRT-RTX takes."""
        names = self._trt.ComputeCapability.__members__
        return [f"{name[2:-1]}.{name[-1]}" for name in names if name.startswith("SM")]

    def _gpus(self) -> str:
        return f"an NVIDIA GPU of compute capability {' or '.join(self.device().split('+'))}"

    def _check_options(self) -> None:
        """Raises `InvalidRequest` for what this flavour, or this machine, cannot do."""
        options = self.options
        if options.compute_capability and not self.rtx:
            raise InvalidRequest(
                "--compute-capability: TensorRT builds for the GPU at hand; TensorRT-RTX for others too."
            )
        for each in options.compute_capability or ():
            if each not in (listed := self._listed()):
                raise InvalidRequest(
                    f"--compute-capability {each} is not one that TensorRT-RTX {self._trt.__version__} builds for."
                    f"{near_matches(each, listed)} Known: {', '.join(listed)}."
                )
        if options.timing_cache is not None and self.rtx:
            raise InvalidRequest(
                "--timing-cache: TensorRT-RTX times nothing while it builds, and so has no use for one."
            )
        if options.timing_cache is not None:
            _check_cache(Path(options.timing_cache))
        if options.build_enable_refit:
            raise InvalidRequest(
                "--build-enable-refit has no effect: LoRAs are fused into an engine's weights, and another LoRA makes "
                "another engine. Leave it out."
            )
        for kind in ("int8", "fp8"):
            if getattr(options, kind):
                raise InvalidRequest(
                    f"--{kind} is not supported: TensorRT engines compute in fp32, fp16 or bf16. Leave it out, or take "
                    f"--quantization {kind} with --engine torch-compile."
                )
        if options.quantization_level is not None:
            raise InvalidRequest("--quantization-level is not supported: TensorRT engines compute in no 8 bits.")
        if options.optimization_level is not None and options.optimization_level not in LEVELS:
            raise InvalidRequest(
                f"--optimization-level must be from {LEVELS[0]} to {LEVELS[-1]}, not {options.optimization_level}."
            )
        if options.workspace is not None and not 0 < options.workspace < 1024:
            raise InvalidRequest(f"--workspace is a number of GiB above 0, not {options.workspace}.")
        if options.nvtx_profile and importlib.util.find_spec("nvtx") is None:
            raise InvalidRequest("--nvtx-profile needs the package nvtx: pip install nvtx")


def _check_cache(path: Path) -> None:
    """Raises `InvalidRequest` for a timing cache that could not be written when the engine is there."""
    if not path.name or path.is_dir() or not os.access(path.parent, os.W_OK):
        raise InvalidRequest(f"--timing-cache {path} cannot be written: name a file in a folder that can be.")


def _number(compute_capability: str) -> float:
    return float(compute_capability)


def bindings() -> Any:
    """The flavour that is installed and can be imported. Raises `Failed` without either."""
    for name in ("tensorrt", "tensorrt_rtx"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise Failed("neither tensorrt nor tensorrt_rtx can be imported: pip install tensorrt-rtx")


def runtime(_: str, options: Options) -> TensorRt:
    return TensorRt(options)
