"""What every runtime offers: build an engine for a stage into a folder, and load it from there."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from darkroom.contract import FREE, PLACES, Job, Profile, Stage
from darkroom.errors import InvalidRequest
from darkroom.schedule.table import Table
from darkroom.store.store import Store

Progress = Callable[[str, int, int], bool]
"""Called while an engine is built, with what is being done, how many of its steps are done, and how many there are (0
where that is unknown). Returns False when the build is no longer wanted."""


@dataclass(frozen=True)
class Options:
    """What some runtimes take and others do not. None and False stand for nothing.

    `compute_capabilities` are those of the GPUs that engines are for, as ("8.9",); `workspace` is in GiB;
    `timing_cache` is a file; `optimization_level` from 0, builds fastest, to 5, runs fastest; `torch_inference` is
    "eager" or a mode of torch.compile; `quantization` computes part of the UNet in 8 bits; `provider` is one of ONNX
    Runtime's, as "cuda", and `device` one of OpenVINO's, as "GPU.1" or "AUTO:GPU,CPU"; `devices` is how many make a
    batch together, or "all". `ws` streams weights, with the percentages of them that stay on the GPU; `low_vram` loads
    one stage at a time.
    """

    use_cuda_graph: bool = False
    nvtx_profile: bool = False
    compute_capability: tuple[str, ...] | None = None
    optimization_level: int | None = None
    workspace: float | None = None
    timing_cache: str | None = None
    build_enable_refit: bool = False
    int8: bool = False
    fp8: bool = False
    quantization_level: float | None = None
    ws: bool = False
    t5_ws_percentage: int | None = None
    transformer_ws_percentage: int | None = None
    low_vram: bool = False
    torch_inference: str | None = None
    quantization: str | None = None
    provider: str | None = None
    device: str | None = None
    devices: str | None = None

    def asked(self) -> list[str]:
        """The names of those that are set."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return [name for name, value in values.items() if value is not None and value is not False]

    def ws_percentage(self, stage: str) -> int | None:
        """How much of the weights of a stage stays on the device where weights are streamed; None for what has room."""
        return getattr(self, f"{stage}_ws_percentage", None)

    def place(self) -> dict[str, str]:
        """Those that set where networks run: manifests have them too."""
        return {name: value for name in PLACES if (value := getattr(self, name)) is not None}

    def recorded(self) -> dict[str, str]:
        """What of them recipes hold, because pixels depend on it."""
        mode = self.torch_inference
        return self.place() | ({} if mode in (None, *UNTUNED) else {"torch_inference": mode})


RECORDED = (*PLACES, "torch_inference")
"""The options that recipes hold."""

UNTUNED = ("eager", "default")
"""The modes of torch that the engine's name says already."""

ON_NVIDIA = ("cuda", "tensorrt")
"""The providers whose GPUs are CUDA's to choose."""

NOTHING_ASKED = Options()


@dataclass(frozen=True)
class Place:
    """What `flag` can name here, and what that is; where it cannot be used, why not and what would change that."""

    flag: str
    name: str
    about: str
    why_not: str | None = None
    command: str | None = None


class Engine(Protocol):
    """A loaded stage. Arrays go in and come out by the names and shapes of its contract.

    `milliseconds` is what its calls took by its device's clock since someone set it to None; it stays None where the
    host's clock tells.
    """

    milliseconds: float | None = None

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs the stage once: float32 out at every precision. The arrays are the caller's to keep."""
        ...

    def forget(self) -> None:
        """Drops what was kept of earlier inputs, so that the next call does all of its work."""


@runtime_checkable
class Denoiser(Protocol):
    """A UNet that keeps the samples, and the schedule's step, on its device for the whole loop."""

    def denoise(
        self, table: Table, sample: np.ndarray, noises: list[np.ndarray], conditions: dict[str, np.ndarray]
    ) -> Iterator[np.ndarray | None]:
        """From the first sample (B, C, h, w) to the last: yields None for each call but the last, then that sample.

        `noises` are those that the schedule draws, in its order: (B, C, h, w) each.
        """
        ...


class Runtime(Protocol):
    """One way of running networks.

    `compiles` tells whether engines are built and kept; `from_graph`, whether they are built from an ONNX graph, and
    not from the model folder; `typed`, whether they compute in the precision that the graph was exported in;
    `free_sizes`, whether an engine can leave sizes free; `bounded`, whether those have bounds. `revision` is raised
    when `build` comes to make other engines from the same source, and is part of every engine's key. `threaded`
    runtimes compute in a given number of CPU threads.
    """

    name: str
    compiles: bool
    from_graph: bool = True
    typed: bool = False
    free_sizes: bool = True
    bounded: bool = False
    threaded: bool = True
    revision: int
    options: Options = NOTHING_ASKED

    def version(self) -> str:
        """The version of the runtime, part of every engine's key."""
        ...

    def device(self) -> str:
        """What engines are built for, part of every engine's key."""
        ...

    def precisions(self) -> tuple[str, ...]:
        """The precisions that this runtime computes in on this machine."""
        ...

    def native(self) -> tuple[str, ...]:
        """Those that its device computes by itself and may be faster in than in float32: what `auto` tries."""
        return tuple(precision for precision in self.precisions() if precision != "fp32")

    def serves_any_precision(self, stage: Stage) -> bool:
        """Whether what is built for a stage can be loaded in any precision."""
        return False

    def check(self, profile: Profile) -> None:
        """Raises `InvalidRequest` for sizes that do not go with the options."""

    def facts(self) -> dict[str, Any]:
        """What else every engine's key depends on, as JSON values: the options that it is built with."""
        return {}

    def runs(self, device: str) -> bool:
        """Whether engines that were built for `device` run on the one at hand."""
        return device == self.device()

    def short_of(self, facts: dict[str, Any]) -> str | None:
        """What this machine lacks for an engine whose key has these `facts`, in half a sentence."""
        return None

    def places(self) -> list[Place]:
        """Where on this machine networks can be run, for runtimes that leave that to the user."""
        return []

    def unusable(self) -> str | None:
        """Why engines can be built but not run here; None where they can be."""
        return None

    def keep_in(self, store: Store) -> None:
        """Where a runtime that compiles as it runs may keep what it compiled. Called before anything is loaded."""

    def release(self) -> None:
        """Lets go of a device that another process is to use. What was loaded before is of no more use."""

    def build(self, job: Job, source: Path, folder: Path, progress: Progress) -> dict[str, Any]:
        """Compiles an ONNX graph, or the model folder, into files in `folder`. Returns facts for the manifest.

        It is called in a process of its own, where a device that belongs to the asking one is out of reach.
        """
        ...

    def finish(self, job: Job, folder: Path) -> dict[str, Any]:
        """What is left to do to the files that `build` wrote, by the process that is about to run them. Returns more
        facts for the manifest."""
        return {}

    def load(self, job: Job, source: Path, threads: int | None) -> Engine:
        """Loads what `build` wrote into `source`; a runtime that does not compile takes the model folder."""
        ...


CAPTURED = "--use-cuda-graph", "a captured graph keeps its shapes"


def refuse_free_sizes(profile: Profile, flag: str, why: str, otherwise: str = "") -> None:
    """Raises `InvalidRequest` for a profile that leaves a size free, which `flag` does not go with."""
    if FREE in profile.sizes().values():
        raise InvalidRequest(
            f"{flag} needs engines of one batch and size, because {why}: take --build-static-batch{otherwise}."
        )


def asked_as(runtime: Runtime) -> str:
    """The flags that name a runtime, and where it runs networks."""
    return " ".join(
        [f"--engine {runtime.name}", *(f"--{name} {value}" for name, value in runtime.options.place().items())]
    )
