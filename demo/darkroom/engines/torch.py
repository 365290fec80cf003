"""PyTorch: eager, the reference that every other runtime is checked against; compiled, the baseline to beat."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from darkroom.engines.cpu import processor
from darkroom.engines.runtime import Engine, Job, Options, Progress, Runtime
from darkroom.errors import AskedWrongly, near_matches
from darkroom.export.modules import DTYPES, load_module
from darkroom.stages.contract import Stage

EAGER = "eager"
TORCH_MODES = (EAGER, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""What `--torch-inference` takes: no compilation, or a mode of torch.compile."""


class Torch(Runtime):
    """Nothing is built ahead: the model folder itself is loaded. Compiled code is cached by torch's inductor."""

    compiles = False
    from_graph = False
    revision = 1

    def __init__(self, name: str, options: Options) -> None:
        self.name = name
        self.options = options
        mode = options.torch_inference
        if mode is not None and mode not in TORCH_MODES:
            near = near_matches(mode, list(TORCH_MODES))
            raise AskedWrongly(f"--torch-inference {mode!r} is not known here.{near} Known: {', '.join(TORCH_MODES)}.")
        if name == "torch-compile" and not (shutil.which("g++") or shutil.which("clang++")):
            raise AskedWrongly("--engine torch-compile needs a C++ compiler (g++ or clang++); --engine torch does not.")

    def version(self) -> str:
        return torch.__version__

    def device(self) -> str:
        return f"CPU: {processor()}"

    def precisions(self) -> tuple[str, ...]:
        return tuple(DTYPES)

    def build(self, job: Job, graph: Path, folder: Path, progress: Progress) -> dict[str, Any]:
        raise NotImplementedError("torch runs the model folder as it is")

    def load(self, job: Job, source: Path, threads: int | None) -> Engine:
        if threads:
            torch.set_num_threads(threads)
        module = load_module(job.stage, source, DTYPES[job.precision])
        if self.name == "torch-compile":
            module = torch.compile(module, mode=self.options.torch_inference)
        return _Engine(module, job.stage)


class _Engine(Engine):
    def __init__(self, module: torch.nn.Module, stage: Stage) -> None:
        self._module = module
        self._stage = stage

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            tensors = [torch.from_numpy(np.ascontiguousarray(inputs[tensor.name])) for tensor in self._stage.inputs]
            made = self._module(*tensors)
        values = made if isinstance(made, tuple) else (made,)
        return {tensor.name: value.numpy() for tensor, value in zip(self._stage.outputs, values, strict=True)}


def runtime(name: str, options: Options) -> Torch:
    return Torch(name, options)
