"""The programs that Darkroom is compared with: what each needs, its conversion of a model, and how it is started."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from darkroom.bench.published_names import copy_with_published_names
from darkroom.errors import Failed
from darkroom.store.store import Key, Store

CONTENDERS = Path(__file__).resolve().parent / "contenders"
READ = (".json", ".safetensors", ".txt")
"""Files of a model that a conversion may depend on."""

LOST_WEIGHTS = re.compile(r"newly initialized|\|\s*MISSING")
"""What transformers 4 and 5 say when a network's weights were not all found, and they go on with random ones."""


@dataclass(frozen=True)
class Peer:
    """A contender. `options` are settings of its own, see `contenders/protocol.py`.

    `environment` names the virtual environment that holds `requirements`, with all they ask for, and `alone`, which
    are installed without; peers with one name for it share it. `exporter` is the module, with its first arguments,
    that converts a model; empty where the peer reads it as it is published.
    """

    name: str
    environment: str
    requirements: tuple[str, ...]
    script: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    alone: tuple[str, ...] = ()
    exporter: tuple[str, ...] = ()

    @property
    def needs_conversion(self) -> bool:
        return bool(self.exporter)


DIFFUSERS = (
    "torch==2.13.0",
    "diffusers==0.42.1",
    "transformers==5.23.0",
    "accelerate==1.15.0",
    "safetensors==0.8.0",
    "numpy==2.4.6",
    "pillow==13.0.0",
)

OPTIMUM_ONNX = (
    "optimum-onnx[onnxruntime]==0.1.0",
    "optimum==2.1.0",
    "onnxruntime==1.31.1",
    "onnx==1.23.2",
    "torch==2.13.0",
    "diffusers==0.39.0",
    "transformers==4.57.6",
    "accelerate==1.15.0",
    "numpy==2.4.6",
    "pillow==13.0.0",
)

OPENVINO = (
    "openvino==2026.4.1",
    "openvino-genai==2026.4.1.0",
    "openvino-tokenizers==2026.4.1.0",
    "optimum==2.3.0",
    "nncf==3.4.0",
    "torch==2.13.0",
    "diffusers==0.39.0",
    "transformers==5.5.4",
    "huggingface_hub==1.21.0",
    "accelerate==1.15.0",
    "requests==2.34.2",
    "setuptools==84.2.1",
    "numpy==2.4.6",
    "pillow==13.0.0",
)

# It insists on torchvision, which has no use here, and whose build on the package index is for CUDA alone.
OPTIMUM_INTEL = ("optimum-intel==2.2.0",)

_EXPORT = ("optimum.commands.optimum_cli", "export")
_OF_DIFFUSERS = {"environment": "diffusers", "requirements": DIFFUSERS, "script": "run_diffusers.py"}
_OF_OPENVINO = {
    "environment": "openvino",
    "requirements": OPENVINO,
    "alone": OPTIMUM_INTEL,
    "exporter": (*_EXPORT, "openvino"),
}

PEERS: dict[str, Peer] = {
    "diffusers": Peer("diffusers eager", **_OF_DIFFUSERS),
    "diffusers-default": Peer("diffusers eager (as it comes)", **_OF_DIFFUSERS, options={"channels_last": False}),
    "diffusers-compile": Peer("diffusers, torch.compile", **_OF_DIFFUSERS, options={"compile": True}),
    "optimum-onnx": Peer(
        "optimum-onnx (ONNX Runtime)",
        "optimum-onnx",
        OPTIMUM_ONNX,
        "run_optimum_onnx.py",
        exporter=(*_EXPORT, "onnx"),
    ),
    "optimum-intel": Peer(
        "optimum-intel (OpenVINO, f32)", **_OF_OPENVINO, script="run_optimum_intel.py", options={"precision": "f32"}
    ),
    "openvino-genai": Peer("OpenVINO GenAI (as it comes)", **_OF_OPENVINO, script="run_openvino_genai.py"),
    "openvino-genai-f32": Peer(
        "OpenVINO GenAI (f32)", **_OF_OPENVINO, script="run_openvino_genai.py", options={"precision": "f32"}
    ),
}
"""By the names that flags know them by."""


def prepare(peer: Peer, python: Path, model: Path, folder: Path, settings: Mapping[str, Any]) -> Path:
    """The folder that the peer loads: `model` itself, or its conversion, which is made once and kept in `folder`.

    Raises `Failed` in one line.
    """
    if not peer.needs_conversion:
        return model
    store = Store(folder)
    arguments = _export_arguments(peer, settings)
    facts = {
        "kind": "conversion",
        "model": {path.relative_to(model).as_posix(): store.fingerprints.sha256(path) for path in _read(model)},
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


def command(peer: Peer, python: Path, folder: Path, settings: Mapping[str, Any], cold: Path | None = None) -> list[str]:
    """What starts the contender on what `prepare` returned; see `contenders/protocol.py` for what it says and hears.

    `settings` are those of the protocol without the model; the peer's own options come before them. With `cold`, it
    makes one batch, saves its first picture there, and ends.
    """
    said = {**settings, **peer.options, "model": folder}
    # -E -s: neither PYTHONPATH nor packages of the user's may put other versions in the place of those installed.
    started = [str(python), "-E", "-s", str(CONTENDERS / peer.script), json.dumps(said, default=str)]
    return started if cold is None else [*started, "--cold", str(cold)]


def _read(model: Path) -> list[Path]:
    """The files that a conversion may depend on, those in linked folders too: models may share networks."""
    files = (Path(folder) / name for folder, _, names in os.walk(model, followlinks=True) for name in names)
    return sorted(path for path in files if path.suffix in READ)


def _export_arguments(peer: Peer, settings: Mapping[str, Any]) -> list[str]:
    """The module that converts, and all it is told but the model and the folder."""
    arguments = [*peer.exporter, "--task", "text-to-image"]
    if peer.exporter[-1] == "openvino" and {**settings, **peer.options}.get("precision") == "f32":
        arguments += ["--weight-format", "fp32"]
    return arguments


def _convert(peer: Peer, arguments: list[str]) -> None:
    ended = subprocess.run(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    if ended.returncode:
        lines = [line.strip() for line in ended.stdout.splitlines() if line.strip()]
        raise Failed(
            f"{peer.name} could not convert the model: {lines[-1] if lines else f'exit code {ended.returncode}'}"
        )
    if LOST_WEIGHTS.search(ended.stdout):
        raise Failed(f"{peer.name} did not find all weights of the model; what it made of it is not used.")
