"""A model folder in the diffusers layout: its networks, their configurations, and what identifies their weights."""

import hashlib
import json
import math
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from darkroom.errors import InvalidRequest, near_on_disk
from darkroom.families import every_family, family_of
from darkroom.families.family import LEAST_CONTEXT, Family
from darkroom.files import read_json
from darkroom.schedule import Chosen, chosen
from darkroom.store.fingerprints import Fingerprints
from darkroom.text.tokenizer import tokenizer_files

SAFETENSORS = ".safetensors"
TOKENIZER_CONFIG = "tokenizer_config.json"

LARGE = 10**9
"""Weights from which on a network's are kept in float16, and computed with in float32: SDXL's UNet."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete and readable model folder; made by `open_checkpoint`, which checks that it is.

    `digests` maps each network to a hash of its configuration and weights, `tokenizers` each text encoder to those of
    its tokenizer's files, by name. `text_length` is how many tokens of a prompt are to be read by encoders that can
    read more or fewer; None for as many as is usual.
    """

    folder: Path
    family: Family
    digests: dict[str, str]
    tokenizers: dict[str, dict[str, str]]
    revision: str
    text_length: int | None = None

    def config(self, part: str) -> dict[str, Any]:
        """The JSON configuration of a network or of the scheduler, with what its library takes for what is missing."""
        if part not in self._configs:
            known = self.family.parts.get(part)
            found = read_json(self.folder / part / _config_name(part))
            self._configs[part] = (known.defaults if known else {}) | found
        return self._configs[part]

    @cached_property
    def _configs(self) -> dict[str, dict[str, Any]]:
        return {}

    @cached_property
    def index(self) -> dict[str, Any]:
        """What the model index says: see `read_index`."""
        return read_index(self.folder)

    def scheduler(self, name: str | None, sigmas: str | None = None, shift: float | None = None) -> Chosen:
        """What `--scheduler name --sigmas sigmas --shift shift` means for this model, whose own scheduler the index
        names."""
        said = {key: value for key, value in self.config("scheduler").items() if key != "_diffusers_version"}
        return chosen(name, self.index["scheduler"][1], said, self.family.corrects(self), sigmas, shift)

    @cached_property
    def texts(self) -> dict[str, dict[str, Any]]:
        """The configurations of the text encoders, in the order in which prompts are read."""
        return {part: self.config(part) for part in self.family.texts(self)}

    def tokenizer(self, part: str) -> Path:
        """The folder of the tokenizer whose ids a text encoder reads."""
        return self.folder / str(self.family.parts[part].tokenizer)

    def context(self, part: str) -> int:
        """How many tokens a text encoder reads of a prompt."""
        return self.family.context(self, part)

    def padded(self, part: str) -> int | None:
        """The length that a text encoder's tokenizer pads prompts to; None where its configuration does not say."""
        file = self.tokenizer(part) / TOKENIZER_CONFIG
        padded = read_json(file).get("model_max_length") if file.is_file() else None
        if padded is None:
            return None
        if not isinstance(padded, int | float) or not padded >= LEAST_CONTEXT:
            raise InvalidRequest(f"{file}: model_max_length must be a count from {LEAST_CONTEXT} up, not {padded!r}.")
        return int(padded)

    def tokenizer_source(self, part: str) -> tuple[Path, str, int, int, bool]:
        """What a text encoder's tokenizer is compiled from: its folder, its class in transformers (CLIP's where the
        model index names none), the tokens that are read, how many the encoder knows, and whether it is a `chat`
        model."""
        folder = self.tokenizer(part)
        match self.index.get(folder.name):
            case ["transformers", str(name)]:
                class_name = name
            case _:
                class_name = "CLIPTokenizer"
        known, chat = self.texts[part]["vocab_size"], self.family.parts[part].chat
        return folder, class_name, self.context(part), known, chat

    def is_large(self, part: str) -> bool:
        """Whether the weights of a network hold more than `LARGE` numbers."""
        files = weight_files(self.folder / part, self.family.parts[part].stem)
        if sum(path.stat().st_size for path in files) < 2 * LARGE:  # bytes: nothing is stored in less than two
            return False
        return self.weights(part) > LARGE

    def weights(self, part: str) -> int:
        """How many numbers the weights of a network hold."""
        return sum(map(math.prod, self.sizes(part).values()))

    def sizes(self, part: str) -> dict[str, list[int]]:
        """The sizes of each of the weights of a network."""
        files = weight_files(self.folder / part, self.family.parts[part].stem)
        return {name: tensor["shape"] for path in files for name, tensor in read_header(path).items()}

    @property
    def vae_factor(self) -> int:
        """Pixels per latent, along each side."""
        return self.family.vae_factor(self)

    @property
    def free_multiple(self) -> int:
        """A graph with free sizes takes multiples of this many pixels."""
        return self.family.free_multiple(self)

    @property
    def default_sizes(self) -> tuple[int, int]:
        """Height and width in pixels that the denoiser was trained for."""
        return self.family.default_sizes(self)

    @property
    def default_size(self) -> int:
        """That height; the width too, but for those that say another."""
        return self.default_sizes[0]

    @property
    def latent_space(self) -> list[Any]:
        """What must be the same for two models that hand latents to each other."""
        vae = self.config(self.family.vae)
        return [self.vae_factor, *(vae.get(name) for name in ("latent_channels", "scaling_factor", "shift_factor"))]


def open_checkpoint(folder: Path, fingerprints: Fingerprints, families: tuple[str, ...] | None = None) -> Checkpoint:
    """Checks that `folder` holds a complete model of one of the families, by their names, None for all; and identifies
    its weights.

    Raises `InvalidRequest` naming the first file that is missing, truncated, unreadable or of a refused kind.
    """
    if not os.path.isdir(folder):
        raise InvalidRequest(f"the model folder {folder} does not exist.{near_on_disk(folder)}")
    index = read_index(folder)
    family = family_of(index)
    if family is None or (families is not None and family.name not in families):
        runs = [each.title for each in every_family() if families is None or each.name in families]
        raise InvalidRequest(
            f"{folder} holds a {index.get('_class_name')}; this script runs {' and '.join(runs)} models."
        )
    parts = family.parts_of(index)
    digests: dict[str, str] = {}
    for name, part in parts.items():
        config = folder / name / "config.json"
        described = read_json(config)
        if "quantization_config" in described:
            raise InvalidRequest(
                f"{config} has a quantization_config, which Darkroom does not support: take the model that "
                f"the quantised one was made of."
            )
        _check_config(config, {key: described.get(key, usual) for key, usual in part.defaults.items()})
        if {"hidden_size", "num_attention_heads"} <= part.defaults.keys():
            _check_heads(config, part.defaults | described)
        contents = [json.dumps(described, sort_keys=True)]
        for weights in weight_files(folder / name, part.stem):
            contents.append(_digest(weights, fingerprints, check_safetensors))
        digests[name] = hashlib.sha256("\n".join(contents).encode()).hexdigest()
    scheduler = read_json(config := folder / "scheduler" / "scheduler_config.json")
    _check_config(config, {"num_train_timesteps": scheduler.get("num_train_timesteps", 1000)})
    rest = [json.dumps(scheduler, sort_keys=True)]
    match index.get("scheduler"):
        case ["diffusers", str(own)]:
            rest += [f"scheduler={own}"] if own != scheduler.get("_class_name") else []
        case other:
            raise InvalidRequest(f"{folder / 'model_index.json'} names no scheduler of diffusers, but {other!r}.")
    rest += [f"{switch}={index[switch]}" for switch in family.switches if switch in index]
    tokenizers = {
        name: _tokenizer_digests(folder / part.tokenizer, fingerprints)
        for name, part in parts.items()
        if part.tokenizer
    }
    rest += [digest for files in tokenizers.values() for digest in files.values()]
    revision = hashlib.sha256("\n".join([*digests.values(), *rest]).encode()).hexdigest()
    checkpoint = Checkpoint(folder, family, digests, tokenizers, revision)
    try:
        family.check(checkpoint)
    except ValueError as error:
        raise InvalidRequest(f"the model in {folder} cannot be run: {error}.") from None
    return checkpoint


def _tokenizer_digests(folder: Path, fingerprints: Fingerprints) -> dict[str, str]:
    return {name: _digest(folder / name, fingerprints) for name in tokenizer_files(folder)}


def read_index(folder: Path) -> dict[str, Any]:
    """What a model index says. A part that a model can do without is not in it where its folder is not there."""
    index = read_json(folder / "model_index.json")
    family = family_of(index)
    optional = [name for name, part in family.parts.items() if part.optional] if family else []
    return index | {name: [None, None] for name in optional if not (folder / name).is_dir()}


def _digest(file: Path, fingerprints: Fingerprints, check: Callable[[Path], None] | None = None) -> str:
    try:
        return fingerprints.sha256(file, check)
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror}.") from None


def _check_config(file: Path, config: dict[str, Any]) -> None:
    """Raises `InvalidRequest` for a value that Darkroom reads and that is of another kind than the libraries write."""
    for name, value in config.items():
        match name:
            case "block_out_channels" | "conditioning_embedding_out_channels":
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


def _check_heads(file: Path, text: dict[str, Any]) -> None:
    width, heads = text["hidden_size"], text["num_attention_heads"]
    if width % heads:
        raise InvalidRequest(f"{file}: hidden_size {width} cannot be divided among {heads} num_attention_heads.")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_count, value))


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


@contextmanager
def in_lower_case(path: Path) -> Iterator[Path]:
    """A name for a safetensors file that libraries know its kind by: they take one in .SAFETENSORS for a pickle."""
    if path.suffix == SAFETENSORS:
        yield path
        return
    with tempfile.TemporaryDirectory() as place:
        link = Path(place, path.stem + SAFETENSORS)
        link.symlink_to(path.absolute())
        yield link


def check_safetensors(path: Path) -> None:
    """Raises `InvalidRequest` unless all the bytes that a safetensors file's header promises are there."""
    read_header(path)


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """What a safetensors file says of its tensors, by name: `dtype`, `shape`, `data_offsets`.

    Raises `InvalidRequest` for a file that is not whole.
    """
    return _header_and_metadata(path)[0]


def read_metadata(path: Path) -> dict[str, Any]:
    """What a safetensors file says of itself; raises as `read_header` does."""
    return _header_and_metadata(path)[1]


def _header_and_metadata(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError("the header is cut off")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", None) or {}
        end = max((int(tensor["data_offsets"][1]) for tensor in header.values()), default=0)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise InvalidRequest(f"{path} is not a whole safetensors file ({error}); fetch it again.") from None
    if size != 8 + length + end:
        raise InvalidRequest(
            f"{path} is truncated or damaged: {size} bytes, where {8 + length + end} belong; fetch it again."
        )
    return header, metadata if isinstance(metadata, dict) else {}


def _config_name(part: str) -> str:
    return "scheduler_config.json" if part == "scheduler" else "config.json"
