"""A model with another VAE than its own, such as the SDXL VAE whose weights were made to fit float16."""

import json
from pathlib import Path
from typing import Any

from darkroom.checkpoint.combined import link
from darkroom.checkpoint.folder import SAFETENSORS, in_lower_case, read_header, weight_files
from darkroom.checkpoint.original import OriginalFile, empty_network
from darkroom.errors import InvalidRequest
from darkroom.files import read_json
from darkroom.processes.child import run_in_child
from darkroom.store.store import Key, Store

PART, STEM = "vae", "diffusion_pytorch_model"

KINDS = ("AutoencoderKL", "AutoencoderTiny")
"""The autoencoders that there are for Stable Diffusion: its own, and TAESD's kind, which is small."""

ORIGINAL = ("first_stage_model.", "")
"""What begins the names of a VAE's tensors in a file in the original layout: cut out of a checkpoint, or alone."""

TINY = {"_class_name": "AutoencoderTiny", "block_out_channels": [64, 64, 64, 64], "scaling_factor": 1.0}
"""The configuration that files of TAESD's kind have: https://github.com/madebyollin/taesd."""


def check_vae(path: Path) -> Path:
    """The file or folder itself, or the VAE in a model's folder. Raises `InvalidRequest` for one that holds no VAE."""
    if path.is_file():
        _layout(path)
        return path
    if not path.is_dir():
        raise InvalidRequest(
            f"--vae {path} is not there: it is a safetensors file, the folder of a VAE or a model, or a hub repository."
        )
    vae = path / PART if (path / PART / "config.json").is_file() else path
    kind = str(read_json(vae / "config.json").get("_class_name"))
    if kind not in KINDS:
        raise InvalidRequest(f"--vae {path} holds a {kind}, not an {' or an '.join(KINDS)}.")
    weight_files(vae, STEM)
    return vae


def _layout(file: Path) -> str:
    """What a file's tensors are named after: one of KINDS in diffusers, or else a prefix of ORIGINAL.

    Raises `InvalidRequest` for a file that holds no VAE.
    """
    if file.suffix.lower() != SAFETENSORS:
        raise InvalidRequest(f"--vae {file} is no safetensors file: no other kind is loaded.")
    names = read_header(file)
    if "decoder.layers.0.weight" in names or "decoder.layers.1.weight" in names:
        return KINDS[1]
    if any(name.startswith("decoder.up_blocks.") for name in names):
        return KINDS[0]
    for prefix in ORIGINAL:
        if any(name.startswith(f"{prefix}decoder.up.") for name in names):
            return prefix
    raise InvalidRequest(f"--vae {file} holds no VAE: it has neither decoder.up nor decoder.up_blocks.")


def vae_folder(vae: Path, model: Path, store: Store, verbose: bool = False) -> Path:
    """The folder of a VAE: made once of a file, and kept in `store`, with the configuration of the model's own."""
    if vae.is_dir():
        return vae
    layout = _layout(vae)
    config = TINY if layout == KINDS[1] else read_json(model / PART / "config.json") | {"_class_name": KINDS[0]}
    facts = {"kind": "vae", "file": store.fingerprints.sha256(vae), "config": config}

    def build(folder: Path) -> dict[str, Any]:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        if layout in KINDS:
            link(vae.resolve(), folder / f"{STEM}{SAFETENSORS}")
        else:
            run_in_child(convert, vae, folder, layout, verbose=verbose)
        return {}

    return store.make(Key(f"vae-{vae.stem}", facts), build)


def convert(file: Path, folder: Path, prefix: str) -> None:
    """Runs in a child: writes a VAE's weights under diffusers' names beside the configuration in the folder."""
    from safetensors.torch import save_file

    like = empty_network(f"diffusers:{KINDS[0]}", folder).state_dict()
    with in_lower_case(file) as readable:
        original = OriginalFile(readable)
        tensors = original.network("VAE", like, read_json(folder / "config.json"), ((prefix, "vae"),))
        if prefix == "":
            original.check_all_used()
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / f"{STEM}{SAFETENSORS}")
