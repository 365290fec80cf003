"""PyTorch, on an NVIDIA GPU where CUDA sees one and else on the CPU.

Eager it is the reference that every other runtime is checked against; compiled by inductor it is an engine of its own.
What inductor compiled is kept beside the engines, and found there by the next process: see `torch_cache`.
"""

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from darkroom.contract import Job
from darkroom.engines import NVIDIA_DEVICES
from darkroom.engines.cpu import processor
from darkroom.engines.runtime import Engine, Options, Place, Progress, Runtime
from darkroom.engines.torch.cache import keep_compiled
from darkroom.engines.torch.run import LoopStep, TorchEngine, TorchUnet, out_of_memory
from darkroom.engines.torch.tuning import ROWS_OF_INT8, check_quantization, fuse_projections, least_rows, quantize
from darkroom.errors import InvalidRequest, check_known
from darkroom.networks.load import DTYPES, load_module
from darkroom.store.store import Store

EAGER = "eager"
TORCH_MODES = (EAGER, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""What `--torch-inference` takes: no compilation, or a mode of torch.compile."""

WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
"""Modes in which inductor would capture CUDA graphs, a call at a time, and what is left of them when the whole loop is
captured around it."""

SHAPES = 1000
"""Shapes and models that one process may compile for; torch would run what comes after the eighth as it is."""


class Torch(Runtime):
    """Nothing is built ahead: the model folder itself is loaded, and compiled when it is first called."""

    compiles = False
    from_graph = False
    revision = 3

    def __init__(self, name: str, options: Options) -> None:
        self.name = name
        self.options = options
        # CUDA_VISIBLE_DEVICES says which GPU is the first; an empty one hides them all.
        self._device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self._check_options()
        if self._on_gpu:
            torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32: torch's convolutions would round to TF32

    def version(self) -> str:
        return torch.__version__

    def device(self) -> str:
        if not self._on_gpu:
            return f"CPU: {processor()}"
        major, minor = torch.cuda.get_device_capability(self._device)
        return f"{torch.cuda.get_device_name(self._device)} ({major}.{minor})"

    def facts(self) -> dict[str, Any]:
        return {"quantization": self.options.quantization} if self.options.quantization else {}

    def places(self) -> list[Place]:
        """The GPU that a torch without CUDA leaves idle."""
        if self._on_gpu or torch.version.cuda or not any(map(os.path.exists, NVIDIA_DEVICES)):
            return []
        command = "pip install --force-reinstall torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"
        reason = f"torch {torch.__version__} is built without CUDA"
        return [Place("CUDA_VISIBLE_DEVICES", "NVIDIA GPU", "", reason, command)]

    def precisions(self) -> tuple[str, ...]:
        """fp8 products with a scale for each row come out in bfloat16 alone."""
        return ("bf16",) if self.options.quantization == "fp8" else tuple(DTYPES)

    def native(self) -> tuple[str, ...]:
        """On the CPU torch is what others are held against, and builds nothing that could be measured once for all."""
        return super().native() if self._on_gpu and not self._compiled else ()

    def keep_in(self, store: Store) -> None:
        if self._compiled:
            facts = {"runtime": self.name, "version": self.version(), "revision": self.revision}
            keep_compiled(store, facts | {"device": self.device()})

    def build(self, job: Job, graph: Path, folder: Path, progress: Progress) -> dict[str, Any]:
        raise NotImplementedError("torch runs the model folder as it is")

    def load(self, job: Job, source: Path, threads: int | None) -> Engine:
        if threads:
            torch.set_num_threads(threads)
        return self.engine(job, load_module(job.stage, source, DTYPES[job.precision]))

    def engine(self, job: Job, module: nn.Module) -> TorchEngine:
        """The engine of a module of `export.modules`, which it changes. Raises `Failed` where it has no room."""
        stage, quantized = job.stage, self.options.quantization if job.stage.denoises else None
        try:
            if self._compiled or quantized:
                fuse_projections(module)
            module.to(self._device, memory_format=torch.channels_last)
            if quantized:
                self._check_rows(job, module)
                quantize(module, quantized)
        except torch.OutOfMemoryError:
            raise out_of_memory(stage, self._device) from None
        run = self._made(module, dynamic=None if job.profile.batch is None or job.profile.height is None else False)
        stream = self._stream()
        if not stage.denoises:
            return TorchEngine(run, stage, self._device, self._graphs, stream)
        step = self._made(LoopStep(module), dynamic=False)
        return TorchUnet(run, step, stage, self._device, self._graphs, stream)

    def _stream(self) -> Any:
        """A stream of an engine's own, behind what has loaded its weights; None on the CPU."""
        if not self._on_gpu:
            return None
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        return stream

    @property
    def _on_gpu(self) -> bool:
        return self._device.type == "cuda"

    @property
    def _compiled(self) -> bool:
        return self.name == "torch-compile"

    @property
    def _graphs(self) -> bool:
        """Whether CUDA graphs are captured: by their flag, or by a mode of torch.compile that has them."""
        return self._on_gpu and (self.options.use_cuda_graph or self.options.torch_inference in WITHOUT_GRAPHS)

    def _made(self, module: nn.Module, dynamic: bool | None) -> Any:
        """The module as it is run."""
        if not self._compiled:
            return module
        mode = self.options.torch_inference or "default"
        torch._dynamo.config.recompile_limit = SHAPES
        torch._dynamo.config.accumulated_recompile_limit = SHAPES
        options = torch._inductor.list_mode_options(WITHOUT_GRAPHS.get(mode, mode), dynamic)
        # A convolution of single pixels is a product: as one, what comes after it is computed along with it.
        options = options | {"conv_1x1_as_mm": True}
        return torch.compile(module, dynamic=dynamic, options=options)

    def _check_rows(self, job: Job, module: nn.Module) -> None:
        """Raises `InvalidRequest` where inductor would have to choose a kernel that CUDA has for more rows alone."""
        if not (self._on_gpu and self._compiled and self.options.quantization == "int8"):
            return
        rows = least_rows(job, module.levels)
        if rows is not None and rows < ROWS_OF_INT8:
            raise InvalidRequest(
                f"--quantization int8 with --engine torch-compile multiplies {ROWS_OF_INT8} rows or more on a GPU, and "
                f"a part of this picture has {rows}: take a larger --batch-size, or --engine torch."
            )

    def _check_options(self) -> None:
        """Raises `InvalidRequest` for what is not known, or cannot be had on this machine."""
        mode = self.options.torch_inference
        if mode is not None:
            check_known("--torch-inference", mode, TORCH_MODES)
        if self.options.use_cuda_graph and not self._on_gpu:
            raise InvalidRequest(f"--use-cuda-graph needs an NVIDIA GPU, and --engine {self.name} finds none here.")
        if self.options.quantization is not None:
            check_quantization(self.options.quantization, self._device)
            if self.options.quantization == "int8" and self.options.use_cuda_graph and not self._compiled:
                raise InvalidRequest(
                    "--use-cuda-graph cannot capture the int8 products of --engine torch: take --engine torch-compile."
                )
        if not self._compiled:
            return
        if not (shutil.which("g++") or shutil.which("clang++")):
            raise InvalidRequest(
                "--engine torch-compile needs a C++ compiler (g++ or clang++); --engine torch does not."
            )
        if self._on_gpu and importlib.util.find_spec("triton") is None:
            raise InvalidRequest("--engine torch-compile needs the package triton on a GPU: pip install triton")


def runtime(name: str, options: Options) -> Torch:
    return Torch(name, options)
