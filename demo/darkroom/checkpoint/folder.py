"""A model folder in the diffusers layout: its networks, their configurations, and what identifies their weights."""

import hashlib
import json
import math
import os
import re
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from darkroom.errors import InvalidRequest, near_on_disk
from darkroom.files import read_json
from darkroom.schedule import Chosen, chosen
from darkroom.store.fingerprints import Fingerprints
from darkroom.text.vocabulary import check_vocabulary, tokenizer_files

NETWORKS = {
    "text_encoder": "model",
    "text_encoder_2": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
"""The networks that a model may have, and the stem of their weight files."""

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
"""Whose token ids each text encoder reads."""

SD, SDXL = "Stable Diffusion 1.x or 2.x", "SDXL"
FAMILIES = {
    "StableDiffusionPipeline": SD,
    "StableDiffusionImg2ImgPipeline": SD,
    "LatentConsistencyModelPipeline": SD,
    "LatentConsistencyModelImg2ImgPipeline": SD,
    "StableDiffusionXLPipeline": SDXL,
    "StableDiffusionXLImg2ImgPipeline": SDXL,
}
"""The pipeline classes that a model index names, and the family whose networks they hold."""

CORRECTING = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
"""Those that put right what old configurations of a scheduler and of a UNet say (diffusers 0.42)."""

UNSUPPORTED = {"vae": ("latents_mean", "latents_std"), "unet": ("class_embed_type", "encoder_hid_dim_type")}
"""Settings of other families' networks: without them pictures would come out wrong, and nobody be told."""

SWITCHES = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")
"""What in a model index changes pictures."""

TOKENIZER_CONFIG = "tokenizer_config.json"
LEAST_CONTEXT = 3
"""Tokens of a prompt's beginning, of one word, and of its end."""

LARGE = 10**9
"""Weights from which on a network's are kept in float16, and computed with in float32: SDXL's UNet."""

CLIP_DEFAULTS = {
    "max_position_embeddings": 77,
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "projection_dim": 512,
    "num_attention_heads": 8,
    "vocab_size": 49408,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "text_encoder": CLIP_DEFAULTS,
    "text_encoder_2": CLIP_DEFAULTS,
    "unet": {"block_out_channels": [320, 640, 1280, 1280], "in_channels": 4, "sample_size": None},
    "vae": {"block_out_channels": [64], "latent_channels": 4, "scaling_factor": 0.18215},
}
"""What the libraries take for a key that a configuration leaves out; they leave out their own defaults."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete and readable model folder; made by `open_checkpoint`, which checks that it is.

    `family` is SD or SDXL; `digests` maps each network to a hash of its configuration and weights.
    """

    folder: Path
    family: str
    digests: dict[str, str]
    revision: str

    def config(self, part: str) -> dict[str, Any]:
        """The JSON configuration of a network or of the scheduler."""
        return DEFAULTS.get(part, {}) | read_json(self.folder / part / _config_name(part))

    @cached_property
    def unet(self) -> dict[str, Any]:
        return self.config("unet")

    @cached_property
    def vae(self) -> dict[str, Any]:
        return self.config("vae")

    @cached_property
    def index(self) -> dict[str, Any]:
        """What the model index says beside the names of the parts."""
        return read_json(self.folder / "model_index.json")

    def scheduler(self, name: str | None) -> Chosen:
        """What `--scheduler name` means for this model; its own without a name, of the class that the index names."""
        said = {key: value for key, value in self.config("scheduler").items() if key != "_diffusers_version"}
        return chosen(name, self.index["scheduler"][1], said, self.index["_class_name"] in CORRECTING)

    @cached_property
    def texts(self) -> dict[str, dict[str, Any]]:
        """The configurations of the text encoders, in the order in which their embeddings stand."""
        return {part: self.config(part) for part in TOKENIZERS if part in self.digests}

    def context(self, part: str) -> int:
        """How many tokens a text encoder reads of a prompt: what its tokenizer pads to, or less if it has less room."""
        room, file = self.texts[part]["max_position_embeddings"], self.folder / TOKENIZERS[part] / TOKENIZER_CONFIG
        padded = read_json(file).get("model_max_length") if file.is_file() else None
        if padded is None:
            return room
        if not isinstance(padded, int | float) or not padded >= LEAST_CONTEXT:
            raise InvalidRequest(f"{file}: model_max_length must be a count from {LEAST_CONTEXT} up, not {padded!r}.")
        return int(min(room, padded))

    def is_large(self, network: str) -> bool:
        """Whether the weights of a network hold more than `LARGE` numbers."""
        files = weight_files(self.folder / network, NETWORKS[network])
        if sum(path.stat().st_size for path in files) < 2 * LARGE:  # bytes: nothing is stored in less than two
            return False
        return self.weights(network) > LARGE

    def weights(self, network: str) -> int:
        """How many numbers the weights of a network hold."""
        files = weight_files(self.folder / network, NETWORKS[network])
        return sum(math.prod(tensor["shape"]) for path in files for tensor in read_header(path).values())

    @property
    def wants_aesthetic_score(self) -> bool:
        """SDXL's refiner was trained on ratings of its pictures, and is told one."""
        return bool(self.index.get("requires_aesthetics_score"))

    @property
    def embeds_guidance(self) -> bool:
        """Whether the UNet is told the guidance scale instead of being called twice, as distilled ones are."""
        return self.unet.get("time_cond_proj_dim") is not None

    @property
    def spreads_steps(self) -> bool:
        """Whether all steps are made from a picture too, over the timesteps that its strength leaves, as in diffusers'
        pipelines for latent consistency models. The others leave steps out."""
        return str(self.index.get("_class_name")).startswith("LatentConsistencyModel")

    @property
    def vae_factor(self) -> int:
        """Pixels per latent, along each side: 8 for every Stable Diffusion model."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    @property
    def free_multiple(self) -> int:
        """A graph with free sizes takes multiples of this many pixels: latents must halve at every UNet level."""
        return self.vae_factor * 2 ** (len(self.unet["block_out_channels"]) - 1)

    @property
    def default_size(self) -> int:
        """The height in pixels that the UNet was trained for; the width too, but for those that say another."""
        return self.default_sizes[0]

    @property
    def default_sizes(self) -> tuple[int, int]:
        """Height and width in pixels that the UNet was trained for.

        Before its version 0.9 diffusers wrote less than it was; its pipeline puts that right.
        """
        size = self.unet["sample_size"] or 64
        if isinstance(size, int) and self.index["_class_name"] in CORRECTING and _before_0_9(self.unet):
            size = max(size, 64)
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae_factor, width * self.vae_factor


def open_checkpoint(folder: Path, fingerprints: Fingerprints, families: tuple[str, ...] = (SD,)) -> Checkpoint:
    """Checks that `folder` holds a complete model of one of the families, and identifies its weights.

    Raises `InvalidRequest` naming the first file that is missing, truncated, unreadable or of a refused kind.
    """
    if not os.path.isdir(folder):
        raise InvalidRequest(f"the model folder {folder} does not exist.{near_on_disk(folder)}")
    index = read_json(folder / "model_index.json")
    kind = str(index.get("_class_name"))
    family = FAMILIES.get(kind)
    if family not in families:
        raise InvalidRequest(f"{folder} holds a {kind}; this script runs {' and '.join(families)} models.")
    digests: dict[str, str] = {}
    for part in networks(index):
        stem = NETWORKS[part]
        config = folder / part / "config.json"
        described = read_json(config)
        _check_config(config, {name: described.get(name, usual) for name, usual in DEFAULTS[part].items()})
        if part in TOKENIZERS:
            _check_heads(config, DEFAULTS[part] | described)
        contents = [json.dumps(described, sort_keys=True)]
        for weights in weight_files(folder / part, stem):
            try:
                contents.append(fingerprints.sha256(weights, check=check_safetensors))
            except OSError as error:
                raise InvalidRequest(f"{weights} cannot be read: {error.strerror}.") from None
        digests[part] = hashlib.sha256("\n".join(contents).encode()).hexdigest()
    scheduler = read_json(config := folder / "scheduler" / "scheduler_config.json")
    _check_config(config, {"num_train_timesteps": scheduler.get("num_train_timesteps", 1000)})
    rest = [json.dumps(scheduler, sort_keys=True)]
    match index.get("scheduler"):
        case ["diffusers", str(own)]:
            rest += [f"scheduler={own}"] if own != scheduler.get("_class_name") else []
        case other:
            raise InvalidRequest(f"{folder / 'model_index.json'} names no scheduler of diffusers, but {other!r}.")
    rest += [f"{switch}={index[switch]}" for switch in SWITCHES if switch in index]
    for part, tokenizer in TOKENIZERS.items():
        if part in digests:
            rest += _tokenizer_digests(folder / tokenizer, fingerprints)
    revision = hashlib.sha256("\n".join([*digests.values(), *rest]).encode()).hexdigest()
    checkpoint = Checkpoint(folder, family, digests, revision)
    if len(contexts := {checkpoint.context(part) for part in checkpoint.texts}) > 1:
        raise InvalidRequest(f"the text encoders of {folder} read {' and '.join(map(str, sorted(contexts)))} tokens.")
    if (channels := checkpoint.unet["in_channels"]) != checkpoint.vae["latent_channels"]:
        raise InvalidRequest(f"the UNet of {folder} takes {channels} channels (inpainting?), not the VAE's latents.")
    added = checkpoint.unet.get("addition_embed_type")
    if added != ("text_time" if family == SDXL else None):
        raise InvalidRequest(f"the UNet of {folder} wants the added conditions {added!r}, which {family} has not.")
    if family == SD and checkpoint.texts["text_encoder"].get("use_attention_mask"):  # SDXL's pipelines do not look
        raise InvalidRequest(f"the text_encoder of {folder} has use_attention_mask, which Darkroom does not support.")
    for part, names in UNSUPPORTED.items():
        for name in names:
            if checkpoint.config(part).get(name) is not None:
                raise InvalidRequest(
                    f"the {part} of {folder} has {name} in its configuration, which Darkroom does not support."
                )
    return checkpoint


def _tokenizer_digests(folder: Path, fingerprints: Fingerprints) -> list[str]:
    """A hash of each file of a tokenizer, all of which are checked when one is new or has changed."""
    files = [folder / name for name in tokenizer_files(folder)]
    return [fingerprints.sha256(file, check=lambda _: check_vocabulary(folder)) for file in files]


def _check_config(file: Path, config: dict[str, Any]) -> None:
    """Raises `InvalidRequest` for a value that Darkroom reads and that is of another kind than the libraries write."""
    for name, value in config.items():
        match name:
            case "block_out_channels":
                kind, fits = "a list of counts", _are_counts(value)
            case "scaling_factor":
                kind, fits = "a number above 0", isinstance(value, int | float) and 0 < value < math.inf
            case "sample_size":
                pair = _are_counts(value) and len(value) == 2
                kind, fits = "a count or two", value is None or _is_count(value) or pair
            case _:
                kind, fits = "a count", _is_count(value)
        if not fits:
            raise InvalidRequest(f"{file}: {name} must be {kind}, not {value!r}.")


def _before_0_9(config: dict[str, Any]) -> bool:
    """Whether diffusers wrote a configuration before its version 0.9."""
    numbers = re.match(r"(\d+)(?:\.(\d+))?", str(config.get("_diffusers_version", "")))
    return numbers is not None and (int(numbers[1]), int(numbers[2] or 0)) < (0, 9)


def _check_heads(file: Path, text: dict[str, Any]) -> None:
    width, heads = text["hidden_size"], text["num_attention_heads"]
    if width % heads:
        raise InvalidRequest(f"{file}: hidden_size {width} cannot be divided among {heads} num_attention_heads.")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_count, value))


def networks(index: dict[str, Any]) -> list[str]:
    """The networks of the model that an index describes, in the order of NETWORKS.

    SDXL's refiner has the second text encoder alone, and says so.
    """
    if FAMILIES.get(str(index.get("_class_name"))) != SDXL:
        return [part for part in NETWORKS if part != "text_encoder_2"]
    return [part for part in NETWORKS if part != "text_encoder" or (index.get(part) or [None])[0]]


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of one network: the plain one, a sharded set, or else the fp16 variant."""
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / name.replace(".safetensors", ".safetensors.index.json")
        if not index.is_file():
            index = folder / f"{stem}.safetensors.index.fp16.json" if ".fp16." in name else index
        if index.is_file():
            try:
                shards = sorted(set(read_json(index)["weight_map"].values()))
                whole = bool(shards) and all(isinstance(shard, str) for shard in shards)
            except (KeyError, AttributeError, TypeError):
                whole = False
            if not whole:
                raise InvalidRequest(f"{index} names no weight files.")
            for shard in shards:
                if not (folder / shard).is_file():
                    raise InvalidRequest(f"{folder / shard} is missing; {index.name} names it.")
            return [folder / shard for shard in shards]
    pickles = sorted(path.name for kind in ("*.bin", "*.ckpt", "*.pt") for path in folder.glob(kind))
    if pickles:
        raise InvalidRequest(
            f"{folder / pickles[0]} is a pickle, which can run code when read: only safetensors files are loaded. "
            f"Save the model again with save_pretrained(..., safe_serialization=True)."
        )
    raise InvalidRequest(f"{folder / (stem + '.safetensors')} is missing.")


def check_safetensors(path: Path) -> None:
    """Raises `InvalidRequest` unless all the bytes that a safetensors file's header promises are there."""
    read_header(path)


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """What a safetensors file says of its tensors, by name: `dtype`, `shape`, `data_offsets`.

    Raises `InvalidRequest` for a file that is not whole.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError("the header is cut off")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((int(tensor["data_offsets"][1]) for tensor in header.values()), default=0)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise InvalidRequest(f"{path} is not a whole safetensors file ({error}); fetch it again.") from None
    if size != 8 + length + end:
        raise InvalidRequest(
            f"{path} is truncated or damaged: {size} bytes, where {8 + length + end} belong; fetch it again."
        )
    return header


def _config_name(part: str) -> str:
    return "scheduler_config.json" if part == "scheduler" else "config.json"
