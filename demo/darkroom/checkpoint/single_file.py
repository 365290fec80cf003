"""Single-file checkpoints in the original layout of Stable Diffusion: which model they are, and their diffusers folder.

Such a file holds a model's weights alone. The rest, configurations and tokenizers, is that of the published model it
descends from, or of one that the user names.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from darkroom.checkpoint.catalog import SD, SDXL
from darkroom.checkpoint.folder import SAFETENSORS, in_lower_case, read_header
from darkroom.errors import InvalidRequest, gist
from darkroom.families import family_of, find_family
from darkroom.families.family import Part
from darkroom.files import read_json
from darkroom.processes.child import run_in_child
from darkroom.store.store import Key, Store
from darkroom.text.tokenizer import tokenizer_files

REVISION = 1
"""Raised when a change makes other folders from the same file."""

CROSS_ATTENTION = "model.diffusion_model.input_blocks.{}.1.transformer_blocks.0.attn2.to_k.weight"
PUBLISHED = (
    ("conditioner.embedders.1.model.positional_embedding", 1280, SDXL, "stabilityai/stable-diffusion-xl-base-1.0"),
    ("conditioner.embedders.0.model.positional_embedding", 1280, SDXL, "stabilityai/stable-diffusion-xl-refiner-1.0"),
    (CROSS_ATTENTION.format(1), 768, SD, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    (CROSS_ATTENTION.format(1), 1024, SD, "stabilityai/stable-diffusion-2-1"),
)
"""A tensor that tells an architecture, the last of its sizes, its family, and the repository that has its
configuration."""

FIRST_CONVOLUTION = "model.diffusion_model.input_blocks.0.0.weight"
CHANNELS = 4
"""Of the latents that it takes in all of them, but for inpainting."""


def check_single_file(path: Path) -> dict[str, dict[str, Any]]:
    """The header of a whole checkpoint in the original layout; `InvalidRequest` for any other file."""
    if path.suffix.lower() in (".ckpt", ".bin", ".pt", ".pth"):
        raise InvalidRequest(f"{path} is a pickle, which can run code when read: only safetensors files are loaded.")
    if path.suffix.lower() != SAFETENSORS:
        raise InvalidRequest(
            f"{path} is no model: a model is a folder in the diffusers layout, or one safetensors file in the original."
        )
    header = read_header(path)
    if not any(name.startswith("model.diffusion_model.") for name in header):
        raise InvalidRequest(
            f"{path} is not a whole Stable Diffusion in the original layout: it has no model.diffusion_model."
        )
    shape = header.get(FIRST_CONVOLUTION, {}).get("shape", [0, CHANNELS])
    if len(shape) > 1 and shape[1] != CHANNELS:
        raise InvalidRequest(
            f"{path} takes {shape[1]} channels, not the {CHANNELS} of latents: inpainting models are not supported."
        )
    return header


def published_config(path: Path, families: tuple[str, ...] | None = None) -> str:
    """The hub repository whose configuration a checkpoint has, by its tensors' names and shapes.

    Raises `InvalidRequest` for one of no architecture that is known, or of none of the families, by their names.
    """
    header = check_single_file(path)
    for name, size, family, repository in PUBLISHED:
        if name in header and header[name]["shape"][-1] == size:
            if families is None or family in families:
                return repository
            raise InvalidRequest(f"{path} holds an {find_family(family).title} model, which this script does not run.")
    raise InvalidRequest(
        f"{path} is of no architecture that is known from it: name a diffusers folder or repository that has its "
        f"configuration with --config."
    )


def unpacked(path: Path, config: Path, store: Store, verbose: bool = False) -> Path:
    """The diffusers folder of a checkpoint, made once and kept in `store`. `config` is a folder like it."""
    facts = {
        "kind": "model",
        "file": store.fingerprints.sha256(path),
        "config": _digest(config),
        "revision": REVISION,
    }

    def build(folder: Path) -> dict[str, Any]:
        run_in_child(unpack, path, config, folder, verbose=verbose)
        return {}

    return store.make(Key(f"model-{path.stem}", facts), build)


def _digest(config: Path) -> str:
    """A hash of the configurations and tokenizers in a diffusers folder, whose weights do not matter."""
    index = read_json(config / "model_index.json")
    files = [config / "model_index.json", config / "scheduler" / "scheduler_config.json"]
    for name, part in _parts(index, config).items():
        files.append(config / name / "config.json")
        if part.tokenizer:
            files += [config / part.tokenizer / file for file in tokenizer_files(config / part.tokenizer)]
    contents = [[file.relative_to(config).as_posix(), hashlib.sha256(_read(file)).hexdigest()] for file in files]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def _parts(index: dict[str, Any], config: Path) -> dict[str, Part]:
    if family := family_of(index):
        return family.parts_of(index)
    raise InvalidRequest(f"{config} describes a {index.get('_class_name')}, which Darkroom does not support.")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}; --config needs it.") from None


def unpack(path: Path, config: Path, folder: Path) -> None:
    """Runs in a child: writes the diffusers folder, its weights in the file's own precision."""
    import diffusers
    import torch

    dtypes = {tensor["dtype"] for tensor in read_header(path).values()}
    index = read_json(config / "model_index.json")
    kind = getattr(diffusers, index["_class_name"])
    left_out = {name: None for name in ("safety_checker", "feature_extractor", "image_encoder") if name in index}
    try:
        with in_lower_case(path) as file:
            pipeline = kind.from_single_file(
                str(file),
                config=str(config),
                local_files_only=True,
                torch_dtype=torch.float16 if "F16" in dtypes and "F32" not in dtypes else torch.float32,
                **left_out,
            )
    except Exception as error:  # three libraries' ways of saying that a file and a configuration do not fit
        raise InvalidRequest(f"{path} does not fit the configuration in {config}: {gist(error)}.") from None
    for part in _parts(index, config):
        stray = [name for name, weight in getattr(pipeline, part).named_parameters() if weight.is_meta]
        if stray:
            raise InvalidRequest(f"{path} has no weights for {stray[0]} of the {part} that {config} describes.")
    pipeline.save_pretrained(folder, safe_serialization=True)
