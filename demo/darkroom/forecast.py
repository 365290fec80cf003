"""What making and running engines will take of disk and memory, from configurations and the headers of weight files.

The memory of a process is forecast as what its libraries take, a multiple of the bytes of the network's weights, and a
multiple of the bytes of its widest layer's activations. The multiples are in `COSTS`; the
lines that they were fitted to are in benchmarks/results/memory/.
"""

import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from darkroom.checkpoint.folder import Checkpoint, read_header, weight_files
from darkroom.contract import DECODER, DENOISER, ENCODER, NEGATIVE, TEXT, Job, Profile
from darkroom.errors import InvalidRequest
from darkroom.processes.memory import machine_memory

MARGIN = 0.25
"""How far measurements may be from a forecast."""

SURE = 0.35
"""The share of a forecast of memory that has to fit. The rest may be pages of mapped weights, which the system can drop
and read again: of the 12.3 GiB of SDXL's export 4.5 are its own (benchmarks/README.md)."""

STORE_FLAGS = "--onnx-dir, --engine-dir and --framework-model-dir"

MB = 10**6


@dataclass(frozen=True)
class Cost:
    """The peak of a kind of process: `base` bytes, and so many times the bytes of the network's weights and of the
    activations of its first block, by the stage's role. It holds for networks with less than `below` bytes of weights.
    """

    base: int
    weights: float
    activations: dict[str, float] = field(default_factory=dict)
    below: float = math.inf


SERIALISED = 2 * 2**30
"""Bytes from which the exporter writes weights one by one: below, it serialises all of them in memory."""

KEPT_AS_MODEL = 2**28
"""Bytes from which OpenVINO's engines are models that are compiled when loaded: below, compiled blobs."""

IN_OPENVINO = {DENOISER: 50.0, DECODER: 6.6, ENCODER: 6.6}

COSTS: dict[str, tuple[Cost, ...]] = {
    # torch, diffusers and transformers; the module, and the graph that is written and checked
    "export": (Cost(575 * MB, 2.7, below=SERIALISED), Cost(575 * MB, 2.04)),
    # weights in float16, which are widened as they are used: one module, never all of them in float32
    "export, halved": (Cost(575 * MB, 2.42),),
    # the graph, what it is compiled to, and the blob of that; or else what ONNX Runtime and the engine, which the check
    # of the engine runs, have of the weights. A build of halved weights was not measured
    "openvino build": (Cost(150 * MB, 4.2, IN_OPENVINO, below=KEPT_AS_MODEL), Cost(150 * MB, 3.0, IN_OPENVINO)),
    # the weights as they lie in the file, which are mapped, and as they are packed for the processor
    "openvino run": (Cost(110 * MB, 2.0, IN_OPENVINO),),
    # in the file in float16, packed in float32
    "openvino run, halved": (Cost(110 * MB, 3.0, IN_OPENVINO),),
}


@dataclass(frozen=True)
class Planned:
    """An artefact that a run needs: the `folder` of one that is there, or else the `place` it will go to, the bytes of
    `disk` it will take there, and the peak memory of making it (`make`) and of running it (`run`); None where that
    is not known."""

    what: str
    folder: Path | None
    place: Path | None = None
    disk: int | None = None
    make: int | None = None
    run: int | None = None
    remark: str = ""

    def as_json(self) -> dict[str, Any]:
        paths = {"folder": self.folder and str(self.folder), "place": self.place and str(self.place)}
        return vars(self) | paths


def memory_of(work: str, checkpoint: Checkpoint, job: Job, sizes: Profile) -> int | None:
    """The peak in bytes of a process that does `work` ("export", "openvino build", ...) on a stage; None where that was
    never measured. `sizes` are those of the run, all of them given."""
    halved = job.stage.half_weights
    costs = COSTS.get(f"{work}, halved" if halved else work) if job.precision == "fp32" else None
    activations = _activations(checkpoint, job, sizes)
    if costs is None or activations is None:
        return None
    weights = (2 if halved else 4) * _numbers(checkpoint, job, whole=work == "export")
    cost = next(each for each in costs if weights < each.below)
    return round(cost.base + cost.weights * weights + cost.activations.get(job.stage.role, 0.0) * activations)


def disk_of(checkpoint: Checkpoint, job: Job, precision: str) -> int:
    """Bytes of a stage's graph in a precision, or of an engine made of it: they hold little beside the weights."""
    halved = job.stage.half_weights or precision != "fp32"
    return (2 if halved else 4) * _numbers(checkpoint, job)


def refuse_what_cannot_fit(planned: Iterable[Planned]) -> None:
    """Raises `InvalidRequest` where the disk or memory that this takes is clearly more than there is."""
    there = machine_memory()
    needs: dict[Path, int] = {}
    for each in planned:
        # A build is not asked: of its memory hardly any is its own, but for the engine, which it runs once.
        for work, takes in (("exporting", None if each.run else each.make), ("running", each.run)):
            if takes is not None and there is not None and takes * SURE > there:
                raise InvalidRequest(
                    f"{work} {each.what} takes about {takes / 1e9:.1f} GB of memory, and this machine has "
                    f"{there / 1e9:.1f}: take a smaller --height, --width or --batch-size, or a machine with more."
                )
        if each.place and each.disk:
            place = existing(each.place)
            needs[place] = needs.get(place, 0) + each.disk
    for place, takes in needs.items():
        if takes * (1 - MARGIN) > (free := free_space(place)):
            raise InvalidRequest(
                f"this run would write about {takes / 1e9:.1f} GB to {place}, where {free / 1e9:.1f} GB are free: make "
                f"room, or name folders elsewhere with {STORE_FLAGS}."
            )


def _numbers(checkpoint: Checkpoint, job: Job, whole: bool = False) -> int:
    """How many numbers the weights of a stage hold; `whole`, those of its networks: a VAE is two stages."""
    others = () if whole else tuple(f"{role}." for role in (DECODER, ENCODER) if role != job.stage.role)
    total = 0
    for network in job.stage.networks:
        stem = checkpoint.family.parts[network.part].stem
        for file in weight_files(checkpoint.folder / network.part, stem):
            header = read_header(file).items()
            total += sum(math.prod(tensor["shape"]) for name, tensor in header if not name.startswith(others))
    return total


def _activations(checkpoint: Checkpoint, job: Job, sizes: Profile) -> int | None:
    """Bytes of what the first block of a network hands on, at its full resolution; None for a network of no blocks.
    Those of a text encoder do not count: a prompt is short."""
    if job.stage.role == TEXT:
        return 0
    channels = checkpoint.config(job.stage.networks[0].part).get("block_out_channels")
    if channels is None:
        return None
    named = sizes.sizes()
    high, wide = ("H", "W") if job.stage.role in (DECODER, ENCODER) else ("h", "w")
    # Guidance doubles the batch inside the graph.
    doubled = any(tensor.name.startswith(NEGATIVE) for tensor in job.stage.inputs)
    return 4 * channels[0] * named["B"] * (1 + doubled) * named[high] * named[wide]


def existing(place: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(each for each in (place.absolute(), *place.absolute().parents) if each.is_dir())


def free_space(place: Path) -> int:
    """Bytes that are free where a folder is or will be."""
    return shutil.disk_usage(existing(place)).free
