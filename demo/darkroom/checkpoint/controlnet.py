"""ControlNets beside a model: where the published ones are, and what makes a folder one."""

import os
from pathlib import Path

from darkroom.checkpoint.catalog import SD, SDXL
from darkroom.checkpoint.folder import weight_files
from darkroom.errors import InvalidRequest, near_on_disk, unknown
from darkroom.files import read_json

KIND, STEM = "ControlNetModel", "diffusion_pytorch_model"

EDGES = "canny"
"""The type whose maps are drawn here of a picture; maps of the others are passed as they are."""

PUBLISHED = {
    SD: {
        name: f"lllyasviel/sd-controlnet-{name}"
        for name in (EDGES, "depth", "hed", "mlsd", "normal", "openpose", "scribble", "seg")
    },
    SDXL: {name: f"diffusers/controlnet-{name}-sdxl-1.0" for name in (EDGES, "depth")},
}
"""Repositories by the family of their models, and by their types, as NVIDIA's demo calls them."""


def published(kind: str, family: str) -> str:
    """The repository of a type of ControlNet. Raises `InvalidRequest` where there is none."""
    known = PUBLISHED[family]
    if kind not in known:
        raise InvalidRequest(f"--controlnet-type {unknown(kind, list(known))}.")
    return known[kind]


def check_controlnet(folder: Path) -> Path:
    """The folder itself. Raises `InvalidRequest` for one that holds no ControlNet."""
    if folder.is_file():
        raise InvalidRequest(
            f"--controlnet {folder} is a file: pass a folder in the diffusers layout, or a repository."
        )
    if not os.path.isdir(folder):
        raise InvalidRequest(f"--controlnet {folder} is not there.{near_on_disk(folder)}")
    if not (folder / "config.json").is_file():
        raise InvalidRequest(
            f"--controlnet {folder} holds no config.json: it is no ControlNet in the diffusers layout."
        )
    kind = str(read_json(folder / "config.json").get("_class_name"))
    if kind != KIND:
        raise InvalidRequest(f"--controlnet {folder} holds a {kind}, not a {KIND}.")
    weight_files(folder, STEM)
    return folder
