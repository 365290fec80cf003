"""What every runtime offers: build an engine for a stage into a folder, and load it from there."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from darkroom.stages.contract import Profile, Stage

PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Job:
    """One engine: the stage, the sizes it is for, and the precision it computes in."""

    stage: Stage
    profile: Profile
    precision: str


class Engine(Protocol):
    """A loaded stage. Arrays go in and come out by the names and shapes of its contract."""

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs the stage once: float32 out at every precision. The arrays are the caller's to keep."""
        ...

    def forget(self) -> None:
        """Drops what was kept of earlier inputs, so that the next call does all of its work."""
        ...


class Runtime(Protocol):
    """One way of running networks.

    `compiles` tells whether engines are built from a graph and kept; `revision` is raised when `build` comes to
    make other engines from the same graph, and is part of every engine's key.
    """

    name: str
    compiles: bool
    revision: int

    def version(self) -> str:
        """The version of the runtime, part of every engine's key."""
        ...

    def device(self) -> str:
        """What engines are built for, part of every engine's key."""
        ...

    def precisions(self) -> tuple[str, ...]:
        """The precisions that this runtime computes in on this machine."""
        ...

    def build(self, job: Job, graph: Path, folder: Path) -> None:
        """Compiles an ONNX graph into files in `folder`."""
        ...

    def load(self, job: Job, source: Path, threads: int | None) -> Engine:
        """Loads what `build` wrote into `source`; a runtime that does not compile takes the model folder."""
        ...
