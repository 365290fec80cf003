"""ControlNets beside a model: where the published ones are, and what makes a file or folder one."""

import json
import os
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from darkroom.checkpoint.combined import link
from darkroom.checkpoint.folder import SAFETENSORS, in_lower_case, read_header, weight_files
from darkroom.checkpoint.original import OriginalFile, empty_network
from darkroom.errors import InvalidRequest, near_on_disk, unknown
from darkroom.files import read_json
from darkroom.processes.child import run_in_child
from darkroom.store.store import Key, Store

KIND, STEM = "ControlNetModel", "diffusion_pytorch_model"

MAP_LAYERS = "controlnet_cond_embedding."
"""What begins the names of the layers that read maps."""

ORIGINAL = ("control_model.", "")
"""What begins the names of a ControlNet's tensors in the original layout (https://github.com/lllyasviel/ControlNet):
within a checkpoint, or alone."""

EDGES = "canny"
"""The type whose maps are drawn here of a picture; maps of the others are passed as they are."""

PUBLISHED = {
    ("1.4", "1.5", "dreamshaper-7"): {
        name: f"lllyasviel/sd-controlnet-{name}"
        for name in (EDGES, "depth", "hed", "mlsd", "normal", "openpose", "scribble", "seg")
    },
    ("xl-1.0", "xl-turbo"): {name: f"diffusers/controlnet-{name}-sdxl-1.0" for name in (EDGES, "depth")},
}
"""Repositories by the versions that they fit, and by their types, as NVIDIA's demo calls them."""


def published(kind: str, version: str) -> str:
    """The repository of a type of ControlNet for a version. Raises `InvalidRequest` where there is none."""
    known = next((types for versions, types in PUBLISHED.items() if version in versions), None)
    if known is None:
        fitting = ", ".join(name for versions in PUBLISHED for name in versions)
        raise InvalidRequest(f"--controlnet-type goes with --version {fitting}; beside others, name a --controlnet.")
    if kind not in known:
        raise InvalidRequest(f"--controlnet-type {unknown(kind, list(known))}.")
    return known[kind]


def check_controlnet(path: Path) -> Path:
    """The file or folder itself. Raises `InvalidRequest` for one that holds no ControlNet."""
    if path.is_file():
        _layout(path)
        return path
    if not os.path.isdir(path):
        raise InvalidRequest(f"--controlnet {path} is not there.{near_on_disk(path)}")
    if not (path / "config.json").is_file():
        raise InvalidRequest(f"--controlnet {path} holds no config.json: it is no ControlNet in the diffusers layout.")
    kind = str(read_json(path / "config.json").get("_class_name"))
    if kind != KIND:
        raise InvalidRequest(f"--controlnet {path} holds a {kind}, not a {KIND}.")
    weight_files(path, STEM)
    return path


def _layout(file: Path) -> str:
    """What a file's tensors are named after: KIND in diffusers, or else a prefix of ORIGINAL.

    Raises `InvalidRequest` for a file that holds no ControlNet.
    """
    if file.suffix.lower() != SAFETENSORS:
        raise InvalidRequest(f"--controlnet {file} is no safetensors file: no other kind is loaded.")
    names = read_header(file)
    if f"{MAP_LAYERS}conv_in.weight" in names:
        return KIND
    for prefix in ORIGINAL:
        if f"{prefix}input_hint_block.0.weight" in names:
            return prefix
    raise InvalidRequest(
        f"--controlnet {file} holds no ControlNet: it has neither {MAP_LAYERS}conv_in nor input_hint_block.0."
    )


def controlnet_folder(controlnet: Path, unet: dict[str, Any], store: Store, verbose: bool = False) -> Path:
    """The folder of a ControlNet: made once of a file, and kept in `store`. A ControlNet is the first half of the UNet
    that it is for, and is configured as that is."""
    if controlnet.is_dir():
        return controlnet
    layout = _layout(controlnet)
    config = unet | {"_class_name": KIND, "conditioning_embedding_out_channels": _map_channels(controlnet, layout)}
    facts = {"kind": "controlnet", "file": store.fingerprints.sha256(controlnet), "config": config}

    def build(folder: Path) -> dict[str, Any]:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        if layout == KIND:
            link(controlnet.resolve(), folder / f"{STEM}{SAFETENSORS}")
        else:
            run_in_child(_convert, controlnet, folder, layout, verbose=verbose)
        return {}

    return store.make(Key(f"controlnet-{controlnet.stem}", facts), build)


def _map_channels(file: Path, layout: str) -> list[int]:
    """The channels of the layers that bring a map to the size of the latents: every other one is wider and halves."""
    header = read_header(file)
    if layout == KIND:
        first, later = f"{MAP_LAYERS}conv_in.weight", (f"{MAP_LAYERS}blocks.{n}.weight" for n in count(1, 2))
    else:
        hint = f"{layout}input_hint_block."
        last = max(int(name.removeprefix(hint).split(".")[0]) for name in header if name.startswith(hint))
        first, later = f"{hint}0.weight", (f"{hint}{n}.weight" for n in range(4, last, 4))
    return [header[name]["shape"][0] for name in (first, *takewhile(header.__contains__, later))]


def _convert(file: Path, folder: Path, prefix: str) -> None:
    """Runs in a child: writes a ControlNet's weights under diffusers' names beside the configuration in the folder."""
    from safetensors.torch import save_file

    like = empty_network(f"diffusers:{KIND}", folder).state_dict()
    with in_lower_case(file) as readable:
        config = read_json(folder / "config.json")
        tensors = OriginalFile(readable).network("ControlNet", like, config, ((prefix, "controlnet"),))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / f"{STEM}{SAFETENSORS}")
