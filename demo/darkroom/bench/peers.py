"""The programs that Darkroom is compared with: what each needs, its conversion of a model, and how it is started.

The same weights, prompt, steps, scheduler, size and noise, so that nobody wins by doing less.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from darkroom.bench.cell import Cell
from darkroom.bench.machine import packages
from darkroom.bench.published_names import copy_with_published_names
from darkroom.bench.turns import Entrant
from darkroom.errors import Failed
from darkroom.noise import NoiseStream, initial_latents
from darkroom.processes.environments import ensure, packages_of
from darkroom.store.store import Key, Store

CONTENDERS = Path(__file__).resolve().parent / "contenders"
READ = (".json", ".safetensors", ".txt")
"""Files of a model that a conversion may depend on."""

LOST_WEIGHTS = re.compile(r"newly initialized|\|\s*MISSING")
"""What transformers 4 and 5 say when a network's weights were not all found, and they go on with random ones."""


@dataclass(frozen=True)
class Peer:
    """A contender. `script` is what it runs, and `kind` what of that; `options` are settings of its own, see
    `contenders/protocol.py`.

    `environment` names the virtual environment that holds `requirements`, with all they ask for, and `alone`, which
    are installed without; peers with one name for it share it. `exporter` is the module, with its first arguments,
    that converts a model; empty where the peer reads it as it is published.
    """

    name: str
    environment: str
    requirements: tuple[str, ...]
    script: str
    kind: str = ""
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    alone: tuple[str, ...] = ()
    exporter: tuple[str, ...] = ()


# Every package in one version, so that what was measured once can be measured again.
DIFFUSERS = tuple(
    "torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0 numpy==2.4.6 "
    "pillow==13.0.0".split()
)
OPTIMUM_ONNX = tuple(
    "optimum-onnx[onnxruntime]==0.1.0 optimum==2.1.0 onnxruntime==1.31.1 onnx==1.23.2 torch==2.13.0 diffusers==0.39.0 "
    "transformers==4.57.6 accelerate==1.15.0 numpy==2.4.6 pillow==13.0.0".split()
)
OPENVINO = tuple(
    "openvino==2026.4.1 openvino-genai==2026.4.1.0 openvino-tokenizers==2026.4.1.0 optimum==2.3.0 nncf==3.4.0 "
    "torch==2.13.0 diffusers==0.39.0 transformers==5.5.4 huggingface_hub==1.21.0 accelerate==1.15.0 requests==2.34.2 "
    "setuptools==84.2.1 numpy==2.4.6 pillow==13.0.0".split()
)
# It insists on torchvision, which has no use here, and whose build on the package index is for CUDA alone.
OPTIMUM_INTEL = ("optimum-intel==2.2.0",)

_EXPORT = ("optimum.commands.optimum_cli", "export")
_LIKE_DIFFUSERS = "run_diffusers_like.py"
_OF_DIFFUSERS = {"environment": "diffusers", "requirements": DIFFUSERS, "script": _LIKE_DIFFUSERS, "kind": "diffusers"}
_OF_OPENVINO = {"environment": "openvino", "requirements": OPENVINO, "alone": OPTIMUM_INTEL}
_OF_OPENVINO |= {"exporter": (*_EXPORT, "openvino")}
_GENAI = "run_openvino_genai.py"
F32, BF16, COMPILED = {"precision": "f32"}, {"precision": "bf16"}, {"compile": "default"}

PEERS: dict[str, Peer] = {
    "diffusers": Peer("diffusers eager", **_OF_DIFFUSERS),
    "diffusers-default": Peer("diffusers eager (as it comes)", **_OF_DIFFUSERS, options={"channels_last": False}),
    "diffusers-compile": Peer("diffusers, torch.compile", **_OF_DIFFUSERS, options=COMPILED),
    "optimum-onnx": Peer(
        "optimum-onnx (ONNX Runtime)",
        "optimum-onnx",
        OPTIMUM_ONNX,
        _LIKE_DIFFUSERS,
        "onnxruntime",
        exporter=(*_EXPORT, "onnx"),
    ),
    "optimum-intel": Peer(
        "optimum-intel (OpenVINO, f32)", **_OF_OPENVINO, script=_LIKE_DIFFUSERS, kind="openvino", options=F32
    ),
    "openvino-genai": Peer("OpenVINO GenAI (as it comes)", **_OF_OPENVINO, script=_GENAI),
    "openvino-genai-f32": Peer("OpenVINO GenAI (f32)", **_OF_OPENVINO, script=_GENAI, options=F32),
    "diffusers-bf16": Peer("diffusers eager (bf16)", **_OF_DIFFUSERS, options=BF16),
    "diffusers-compile-bf16": Peer("diffusers, torch.compile (bf16)", **_OF_DIFFUSERS, options=BF16 | COMPILED),
}
"""By the names that flags know them by."""

DEFAULT_PEERS = [name for name in PEERS if "bf16" not in name]
REFERENCES = [PEERS[name].name for name in ("diffusers", "diffusers-bf16")]
"""Those whose pictures the others' are compared with: the first that takes part."""


def entrant_of(
    peer: Peer,
    cells: Sequence[Cell],
    folder: Path,
    noise: Path,
    here: bool,
    show: Callable[[str], None],
    options: dict[str, Any],
) -> Entrant:
    """A peer that does what these cells say, its environment and its conversion of the model made where they are not.

    `folder` holds those, and `noise` gets the noise that pictures start from. With `here` it runs in this environment.
    `options` take the place of its own. What keeps it from taking part is the `error` among its facts.
    """
    cell = cells[0]
    options = peer.options | {name: value for name, value in options.items() if name in peer.options}
    its_own = {"engine": None, "precision": options.get("precision"), "build": None, "onnx_opset": None}
    its_own |= {"use_cuda_graph": False, "devices": 1}
    its_own["options"] = json.dumps(options, sort_keys=True) if options else None
    named = {"name": peer.name, "label": peer.name, "cells": tuple(each.settings() | its_own for each in cells)}
    named["environment"] = {"HF_HUB_OFFLINE": "1"}
    try:
        python = Path(sys.executable) if here else ensure(peer, folder, show)
        show(f"{peer.name}: converting {cell.version}" if peer.exporter else peer.name)
        model = prepare(peer, python, Path(cell.folder), folder / "converted")
    except Failed as error:
        return Entrant(**named, command=[], cold=None, facts={"error": str(error).rstrip(".")})
    said = {name: getattr(cell, name) for name in ("prompt", "batch_size", "denoising_steps", "guidance_scale")}
    said |= {name: getattr(cell, name) for name in ("height", "width", "seed", "threads")}
    start = command(peer, python, model, said | {"latents": str(noise)} | options)
    cold = [*start, "--cold"] if cell.cold_starts else None
    return Entrant(
        **named, command=start, cold=cold, facts={}, packages=packages(None if here else packages_of(python))
    )


def write_noise(cell: Cell, vae_factor: int, file: Path) -> Path:
    """The noise that the images of a cell start from, (B, 4, h, w) float32, as .npy; the seeds' own streams give it."""
    streams = [NoiseStream(cell.seed + image) for image in range(cell.batch_size)]
    latents = initial_latents(streams, (4, cell.height // vae_factor, cell.width // vae_factor))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, latents)
    except OSError as error:
        raise Failed(f"{file} cannot be written: {error.strerror or error}.") from None
    return file


def prepare(peer: Peer, python: Path, model: Path, folder: Path) -> Path:
    """The folder that the peer loads: `model` itself, or its conversion, which is made once and kept in `folder`.

    Raises `Failed` in one line.
    """
    if not peer.exporter:
        return model
    store = Store(folder)
    arguments = [*peer.exporter, "--task", "text-to-image"]
    if peer.exporter[-1] == "openvino" and peer.options.get("precision") == "f32":
        arguments += ["--weight-format", "fp32"]
    # The files that a conversion may depend on, those in linked folders too: models may share networks.
    files = (Path(within) / name for within, _, names in os.walk(model, followlinks=True) for name in names)
    read = sorted(path for path in files if path.suffix in READ)
    facts = {
        "kind": "conversion",
        "model": {path.relative_to(model).as_posix(): store.fingerprints.sha256(path) for path in read},
        "with": arguments,
        "versions": [*peer.requirements, *peer.alone],
    }

    def build(temporary: Path) -> dict[str, Any]:
        scratch = temporary / ".source"  # goes with the rest where this process is killed
        source = copy_with_published_names(model, scratch / model.name)
        _convert(peer, [str(python), "-E", "-s", "-m", *arguments, "--model", str(source), str(temporary)])
        shutil.rmtree(scratch)
        return {}

    try:
        return store.make(Key(f"{model.name}-for-{peer.environment}", facts), build)
    finally:
        store.fingerprints.remember()


def command(peer: Peer, python: Path, folder: Path, settings: dict[str, Any]) -> list[str]:
    """What starts the contender on what `prepare` returned, with `settings` of the protocol."""
    said = json.dumps(settings | {"model": str(folder), "kind": peer.kind})
    # -E -s: neither PYTHONPATH nor packages of the user's may put other versions in the place of those installed.
    return [str(python), "-E", "-s", str(CONTENDERS / peer.script), said]


def _convert(peer: Peer, arguments: list[str]) -> None:
    said = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(arguments, **said, text=True, errors="replace", env=environment)
    if ended.returncode:
        lines = [line.strip() for line in ended.stdout.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit code {ended.returncode}"
        raise Failed(f"{peer.name} could not convert the model: {reason}")
    if LOST_WEIGHTS.search(ended.stdout):
        raise Failed(f"{peer.name} did not find all weights of the model; what it made of it is not used.")
