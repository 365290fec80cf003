"""What every runtime offers: build an engine for a stage into a folder, and load it from there."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from darkroom.schedule.table import Table
from darkroom.stages.contract import Profile, Stage

PRECISIONS = ("fp32", "bf16", "fp16")

Progress = Callable[[str, int, int], bool]
"""Told while an engine is being built: what is being done, how many of its steps are, and how many there are (0 where
nobody knows). Returns False when the build is not wanted any more."""


@dataclass(frozen=True)
class Options:
    """What can be asked of some runtimes and not of others. None and False ask for nothing.

    `compute_capabilities` are those of the GPUs that engines are for, as ("8.9",); `workspace` is in GiB;
    `timing_cache` is a file; `optimization_level` from 0, builds fastest, to 5, runs fastest; `torch_inference` is
    "eager" or a mode of torch.compile; `quantization` computes part of the UNet in 8 bits.
    """

    use_cuda_graph: bool = False
    nvtx_profile: bool = False
    compute_capability: tuple[str, ...] | None = None
    optimization_level: int | None = None
    workspace: float | None = None
    timing_cache: str | None = None
    build_enable_refit: bool = False
    build_all_tactics: bool = False
    ws: bool = False
    torch_inference: str | None = None
    quantization: str | None = None

    def asked(self) -> list[str]:
        """The names of what is asked for."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return [name for name, value in values.items() if value is not None and value is not False]


NOTHING_ASKED = Options()


@dataclass(frozen=True)
class Job:
    """One engine: the stage, the sizes it is for, and the precision it computes in."""

    stage: Stage
    profile: Profile
    precision: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"stage": self.stage.as_json()}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Job":
        """The inverse of `as_json`."""
        sizes = {name: tuple(value) if isinstance(value, list) else value for name, value in fields["profile"].items()}
        return cls(Stage.from_json(fields["stage"]), Profile(**sizes), fields["precision"])


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

    `compiles` tells whether engines are built from a graph and kept; `typed`, whether they compute in the precision
    that the graph was exported in; `bounded`, whether sizes that an engine leaves free have bounds. `revision` is
    raised when `build` comes to make other engines from the same graph, and is part of every engine's key.
    `threaded` runtimes compute in as many CPU threads as they are told.
    """

    name: str
    compiles: bool
    typed: bool = False
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

    def check(self, profile: Profile) -> None:
        """Raises `AskedWrongly` for sizes that do not go with the options."""

    def facts(self) -> dict[str, Any]:
        """What else every engine's key depends on, as JSON values: the options that it is built with."""
        return {}

    def runs(self, device: str) -> bool:
        """Whether engines that were built for `device` run on the one at hand."""
        return device == self.device()

    def unusable(self) -> str | None:
        """Why engines can be built but not run here; None where they can be."""
        return None

    def keep_in(self, folder: Path) -> None:
        """Where a runtime that compiles as it runs may keep what it compiled. Told before anything is loaded."""

    def build(self, job: Job, graph: Path, folder: Path, progress: Progress) -> dict[str, Any]:
        """Compiles an ONNX graph into files in `folder`. Returns facts for the manifest."""
        ...

    def load(self, job: Job, source: Path, threads: int | None) -> Engine:
        """Loads what `build` wrote into `source`; a runtime that does not compile takes the model folder."""
        ...
