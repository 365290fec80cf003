"""JAX: each stage is one XLA program, compiled for fixed sizes and kept; a batch may be divided over several devices.

Networks come from torch by way of torchax, which traces the very modules that every runtime is checked against. The
way over ONNX is not kept up: jaxonnxruntime's last release is of 2023, and no other package goes it.
"""

import importlib.metadata
import importlib.util
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.extend.backend import clear_backends

from darkroom.contract import Job, Profile
from darkroom.engines import RUNTIMES
from darkroom.engines.cpu import processor
from darkroom.engines.runtime import Engine, Options, Progress, Runtime
from darkroom.errors import InvalidRequest

ALL = "all"
"""What `--devices` takes for as many as there are."""

BESIDE_JAX = ("torchax", "flatbuffers", "safetensors")
"""What building and loading need beside it."""


# Forks here become other programs at once, which JAX's threads are no danger to.
warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)


class Jax(Runtime):
    name = "jax"
    compiles = True
    from_graph = False
    free_sizes = False
    threaded = False
    revision = 3

    def __init__(self, options: Options) -> None:
        for package in BESIDE_JAX:
            if importlib.util.find_spec(package) is None:
                raise InvalidRequest(f"--engine jax needs the package {package}, too: {RUNTIMES[self.name].install}")
        devices = options.devices or "1"
        if devices == ALL:  # settled here: a child that builds sees the CPU alone
            devices = str(jax.device_count())
        if not (devices.isascii() and devices.isdigit() and int(devices)):
            raise InvalidRequest(f"--devices {devices!r} is neither a number of devices nor {ALL}.")
        self._devices = int(devices)
        self.options = replace(options, devices=str(self._devices))

    def version(self) -> str:
        return f"{jax.__version__} with torchax {importlib.metadata.version('torchax')}"

    def device(self) -> str:
        device = jax.devices()[0]
        if device.platform == "cpu":
            return f"CPU: {processor()}"
        return f"{device.platform.upper()}: {device.device_kind}, {' '.join(device.client.platform_version.split())}"

    def precisions(self) -> tuple[str, ...]:
        return ("fp32", "bf16", "fp16")

    def native(self) -> tuple[str, ...]:
        """None are tried: what would measure them is a process of its own, out of reach of this one's device."""
        return ()

    def check(self, profile: Profile) -> None:
        if None in (profile.batch, profile.height, profile.width):
            raise InvalidRequest(
                "--engine jax compiles for fixed sizes alone: use --build-static-batch, or another engine."
            )
        if self._devices > jax.device_count():
            raise InvalidRequest(
                f"--devices {self._devices} is more than the {jax.device_count()} that JAX finds here."
            )
        if profile.batch % self._devices:
            raise InvalidRequest(
                f"--batch-size {profile.batch} cannot be divided by the {self._devices} of --devices, which make equal "
                f"shares of it."
            )

    def facts(self) -> dict[str, Any]:
        return {"devices": self._devices}

    def short_of(self, facts: dict[str, Any]) -> str | None:
        here = jax.device_count()
        wanted = facts.get("devices", 1)
        return None if wanted <= here else f"built for {wanted} devices, of which {here} are here"

    def release(self) -> None:
        # A client keeps a TPU for its process alone, and most of a GPU's memory.
        jax.clear_caches()
        clear_backends()

    def build(self, job: Job, source: Path, folder: Path, progress: Progress) -> dict[str, Any]:
        from darkroom.engines.jax.build import write_program

        # A picture to start from is encoded alone, by one device.
        devices = 1 if job.profile.batch % self._devices else self._devices
        return write_program(job, source, devices, folder, progress)

    def finish(self, job: Job, folder: Path) -> dict[str, Any]:
        from darkroom.engines.jax.run import finish_engine

        return finish_engine(job, folder)

    def load(self, job: Job, source: Path, threads: int | None) -> Engine:
        from darkroom.engines.jax.run import load_engine

        return load_engine(job, source)


def runtime(_: str, options: Options) -> Jax:
    return Jax(options)
