"""LoRA files (Hu et al. 2021) and their relatives: which weights of a model each of their tensors changes.

Tools name tensors in many ways. All of them are read here, from headers alone: what a file changes is known before a
network is loaded, and does not depend on which other layers are in it.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from darkroom.checkpoint.folder import SAFETENSORS, Checkpoint, read_header, read_metadata
from darkroom.checkpoint.original import LAYOUTS, some, whole
from darkroom.contract import Lora
from darkroom.errors import InvalidRequest
from darkroom.families import every_family
from darkroom.store.fingerprints import Fingerprints

REVISION = 2
"""Raised when a change fuses other weights of the same file."""

DEFAULT_NAME = "pytorch_lora_weights.safetensors"
"""What diffusers calls the file in a folder or repository."""

METADATA = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's configuration of each part, in which are the alphas that no tensor holds."""

FACTOR = re.compile(
    r"(.+?)(?:\.lora_|\.lora\.|\.lora_linear_layer\.|_lora\.)(up|down|mid|A|B)(?:\.(?!weight$|bias$)\w+)?(?:\.(weight|bias))?"
)
"""kohya's `.lora_up.weight`; diffusers' `.lora.up.weight`, `.lora_linear_layer.up.weight` and `to_q_lora.up.weight`;
PEFT's `.lora_B.weight`, with or without an adapter's name within."""

OTHER = re.compile(
    r"(.+?)\.(alpha|dora_scale|lora_magnitude_vector|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|diff(?:_b)?"
    r"|[wb]_norm)(?:\.\w+)?"
)
"""What LyCORIS adds, and DoRA's magnitudes as LyCORIS and as PEFT name them."""

SAME = {"A": "down", "B": "up", "w_norm": "diff", "b_norm": "diff_b"}

MISFIT = "the LoRA {} does not fit this model{}: {}."


@dataclass(frozen=True)
class Change:
    """What a file holds for one layer.

    `layer` is its name in the network; `tensors` are the file's names by kind. `scaling` is what PEFT's configuration
    says that the change is multiplied by, None without one. `rows` takes the layer's own of the file's rows, where one
    layer there is several here.
    """

    layer: str
    tensors: dict[str, str]
    scaling: float | None
    rows: Callable[[Any], Any] = whole


def open_lora(path: Path, weight: float, scale: float, fingerprints: Fingerprints) -> Lora:
    """Checks a LoRA as `check_lora` does, and identifies it."""
    path, networks = check_lora(path)
    try:
        return Lora(path.absolute(), fingerprints.sha256(path), networks, weight, scale)
    except OSError as error:
        raise InvalidRequest(f"the LoRA {path} cannot be read: {error.strerror}.") from None


def check_lora(path: Path) -> tuple[Path, frozenset[str]]:
    """The LoRA's file, where a folder is given the one in it; and the networks that it holds changes for.

    Raises `InvalidRequest` for what is not a whole LoRA of a known layout.
    """
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1 and not (path / DEFAULT_NAME).is_file():
            raise InvalidRequest(
                f"the folder {path} holds {len(files)} safetensors files: name the LoRA that is meant."
            )
        path = path / DEFAULT_NAME if len(files) != 1 else files[0]
    if not path.is_file():
        raise InvalidRequest(
            f"the LoRA {path} does not exist; prompts go before --lora-path, which takes several files."
        )
    if path.suffix.lower() != SAFETENSORS:
        raise InvalidRequest(f"the LoRA {path} is not a safetensors file: no other kind is loaded.")
    header = read_header(path)
    if not header:
        raise InvalidRequest(f"{path} holds no tensors.")
    parts, unknown = _read(header)
    if not parts:
        raise InvalidRequest(
            f"{path} holds {some(unknown or list(header))}: no LoRA layout that is known here has such tensors."
        )
    return path, frozenset(parts)


def left_out(lora: Lora, checkpoint: Checkpoint) -> list[str]:
    """The tensors that nothing is done with in this model, one of each layer.

    Raises `InvalidRequest` where the LoRA was made for another model.
    """
    parts, unused = _read(read_header(lora.path))
    own = parts.keys() & checkpoint.digests.keys()
    if not own:
        raise InvalidRequest(f"the LoRA {lora.path} changes nothing that this model has.")
    made, strangers = 0, []
    used = {min(tensors.values()) for part in own for tensors in parts[part].values()}
    for part, layers in parts.items():
        if part in checkpoint.digests:
            found, missing = changes(lora.path, part, checkpoint.sizes(part), checkpoint.config(part))
            made += len(found)
            strangers += missing
        else:
            unused += {min(tensors.values()) for tensors in layers.values()} - used
    if made < max(len(strangers), 1):
        there = f"of the {made + len(strangers)} layers that it changes, the model lacks {some(strangers)}"
        raise InvalidRequest(MISFIT.format(lora.path, "", there))
    return unused + strangers


def changes(path: Path, part: str, sizes: Mapping[str, list[int]], config: Any) -> tuple[list[Change], list[str]]:
    """What a file changes of a part with weights of these names and sizes, and this configuration; and a tensor of
    each layer that is not there.

    Raises `InvalidRequest` where the sizes are others, or a layer lacks a tensor.
    """
    header, known = read_header(path), _layers(part, sizes, config)
    made, strangers, read, metadata = [], [], _read(header)[0].get(part, {}), read_metadata(path)
    for name, tensors in read.items():
        layers = known.get(_flat(name), {})
        if not layers:
            strangers.append(min(tensors.values()))
        try:
            for layer, rows in layers.items():
                _check({kind: header[tensor]["shape"] for kind, tensor in tensors.items()}, layer, sizes, rows)
        except KeyError as error:
            raise InvalidRequest(MISFIT.format(path, f"'s {part}", f"{name} lacks {error.args[0]}")) from None
        except IndexError:
            raise InvalidRequest(MISFIT.format(path, f"'s {part}", f"{name} has a tensor of too few sizes")) from None
        except ValueError as error:
            raise InvalidRequest(MISFIT.format(path, f"'s {part}", f"{name} {error}")) from None
        rank = header[tensors["down"]]["shape"][0] if "down" in tensors else 1
        scaling = _scaling(metadata, part, name, rank)
        made += [Change(layer, tensors, scaling, rows) for layer, rows in layers.items()]
    return made, strangers


def _read(header: Mapping[str, Any]) -> tuple[dict[str, dict[str, dict[str, str]]], list[str]]:
    """The tensors' names by part, layer and kind; and the names that say nothing that is known here."""
    parts: dict[str, dict[str, dict[str, str]]] = {}
    unknown = []
    for name in header:
        if match := FACTOR.fullmatch(name):
            layer, kind, what = match.groups()
            kind = SAME.get(kind, kind) + ("_bias" if what == "bias" else "")
        elif match := OTHER.fullmatch(name):
            layer, kind = match.groups()
            kind = SAME.get(kind, kind)
        else:
            kind = None
        if kind in (None, "down_bias", "mid_bias"):
            unknown.append(name)
            continue
        layer, of = _parts(layer)
        if any(parts.setdefault(part, {}).setdefault(layer, {}).setdefault(kind, name) != name for part in of):
            unknown.append(name)  # of a second adapter in the file
    # An alpha alone changes nothing: tools leave it behind where they drop a layer.
    parts = {part: {k: v for k, v in layers.items() if v.keys() != {"alpha"}} for part, layers in parts.items()}
    return {part: layers for part, layers in parts.items() if layers}, unknown


def _parts(name: str) -> tuple[str, set[str]]:
    """A layer's name in its part, and that part's name in each family that it may be of. Some files are of the denoiser
    alone, and say no part."""
    every = [(prefix, part) for family in every_family() for part, of in family.parts.items() for prefix in of.lora]
    prefix = next((prefix for prefix, _ in every if name.startswith(prefix)), "")
    parts = {part for each, part in every if each == prefix} or {family.denoiser for family in every_family()}
    name = name.removeprefix(prefix).replace(".processor.", ".").removesuffix("_lora")
    # What diffusers' attention processors called their layers.
    name = re.sub(r"self_attn\.to_(q|k|v|out)$", r"self_attn.\1_proj", name)
    return re.sub(r"\.to_out$", ".to_out.0", name), parts


def _layers(part: str, sizes: Mapping[str, Any], config: Any) -> dict[str, dict[str, Callable[[Any], Any]]]:
    """The layers of a part by all the names that files have for them, flat; and of each the rows that are its own."""
    layouts = {layout for family in every_family() if part in family.parts for _, layout in family.parts[part].original}
    known: dict[str, dict[str, Callable[[Any], Any]]] = {}
    for name in sizes:
        stem, _, what = name.rpartition(".")
        for layout in layouts:
            for source in LAYOUTS[layout](name, config):
                if source.name.endswith(f".{what}"):
                    known.setdefault(_flat(source.name.removesuffix(f".{what}")), {})[stem] = source.change
        known[_flat(stem)] = {stem: whole}
    return known


def _flat(layer: str) -> str:
    """kohya's form of a name. Since its version 5, transformers leaves out what all names of a text encoder begin
    with."""
    return layer.replace(".", "_").removeprefix("text_model_")


def _scaling(metadata: Mapping[str, str], part: str, layer: str, rank: int) -> float | None:
    """What PEFT's configuration says that a layer's change is multiplied by."""
    try:
        config = json.loads(metadata.get(METADATA, "{}"))
        alpha = config[f"{part}.lora_alpha"]
        for pattern, own in (config.get(f"{part}.alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", layer):
                alpha = own
                break
        return float(alpha) / (rank**0.5 if config.get(f"{part}.use_rslora") else rank)
    except (ValueError, TypeError, KeyError, AttributeError, re.error):
        return None


def _check(
    shapes: Mapping[str, list[int]], layer: str, sizes: Mapping[str, list[int]], rows: Callable[[Any], Any]
) -> None:
    """Raises KeyError for a tensor that is missing, and ValueError, in half a sentence, for one that does not fit."""

    def left(count: int) -> int:
        return len(rows(np.arange(count)))

    if prod(shapes.get("alpha", ())) != 1:
        raise ValueError("has more than one alpha")
    if (change := _shape(shapes)) is not None:
        weight = sizes[f"{layer}.weight"]
        if (left(change[0]), change[1]) != (weight[0], prod(weight[1:])):
            raise ValueError(f"is {change[0]}x{change[1]}, where the model has {weight[0]}x{prod(weight[1:])}")
        for kind in {"dora_scale", "lora_magnitude_vector"} & shapes.keys():
            count = prod(shapes[kind])
            of_columns = rows is whole and shapes[kind][:1] == [1] and count == weight[1]
            if not of_columns and left(count) != weight[0]:
                raise ValueError(f"has {count} magnitudes for {weight[0]} rows")
    for kind in {"up_bias", "diff_b"} & shapes.keys():
        if f"{layer}.bias" not in sizes:
            raise ValueError("changes a bias, and the model has none there")
        if left(prod(shapes[kind])) != prod(sizes[f"{layer}.bias"]):
            raise ValueError(f"changes a bias of {prod(shapes[kind])} numbers, not {prod(sizes[f'{layer}.bias'])}")


def _shape(shapes: Mapping[str, list[int]]) -> tuple[int, int] | None:
    """Rows and columns of what is added to a weight, all but its first size being columns; None where nothing is."""

    def product(left: list[int], right: list[int], core: list[int] | None) -> tuple[int, int]:
        if core is not None:
            left = left[::-1]
        if left[1] != right[0] or (core is not None and core[:2] != [left[1], right[0]]):
            raise ValueError("has factors that do not fit one another")
        return left[0], prod(right[1:]) * (prod(core[2:]) if core else 1)

    def factor(name: str, core: str) -> tuple[int, int]:
        if name in shapes:
            return shapes[name][0], prod(shapes[name][1:])
        return product(shapes[f"{name}_a"], shapes[f"{name}_b"], shapes.get(core))

    kinds = {kind.partition("_")[0] for kind in shapes}
    if ("diff" in shapes) + ("down" in shapes) + ("hada" in kinds) + ("lokr" in kinds) > 1:
        raise ValueError("is of two kinds at once")
    if "diff" in shapes:
        return shapes["diff"][0], prod(shapes["diff"][1:])
    if "hada" in kinds:
        first, second = factor("hada_w1", "hada_t1"), factor("hada_w2", "hada_t2")
        if first != second:
            raise ValueError("has factors that do not fit one another")
        return first
    if "lokr" in kinds:
        (rows, columns), second = factor("lokr_w1", ""), factor("lokr_w2", "lokr_t2")
        return rows * second[0], columns * second[1]
    if kinds <= {"diff", "alpha"}:
        return None
    up, down, mid = shapes["up"][:2], shapes["down"], shapes.get("mid")
    return product(up if mid is None else up[::-1], down, mid)
