"""Flags -> LoRAs: which files, from where, how strongly."""

import argparse
import os
from pathlib import Path
from typing import Any

from darkroom.cli.settings import Settings
from darkroom.errors import AskedWrongly
from darkroom.fingerprints import Fingerprints
from darkroom.hub import REPOSITORY, fetch_lora
from darkroom.lora import LCM_LORAS, Lora, open_lora
from darkroom.request import LoraChoice


def check_lora_flags(flags: argparse.Namespace) -> None:
    """Raises `AskedWrongly` for flags that do not go together, before anything is fetched."""
    paths, weights = flags.lora_path or [], flags.lora_weight
    if not paths:
        for name in ("lora_weight", "lora_scale"):
            if getattr(flags, name) is not None:
                raise AskedWrongly(f"--{name.replace('_', '-')} has nothing to act on without --lora-path.")
    if weights is not None and len(weights) != len(paths):
        raise AskedWrongly(f"--lora-weight has {len(weights)} numbers for the {len(paths)} files of --lora-path.")
    for path in paths:
        if _repository(path) is None and not os.path.exists(path):
            raise AskedWrongly(
                f"the LoRA {path!r} does not exist; prompts go before --lora-path, which takes several files."
            )


def asked_loras(
    flags: argparse.Namespace, recipe: dict[str, Any] | None, settings: Settings, family: str, prints: Fingerprints
) -> tuple[tuple[Lora, ...], tuple[LoraChoice, ...]]:
    """The LoRAs that are meant, fetched where a repository is named; and what the request records of them."""
    if recipe is not None:
        return _recorded(flags, recipe, settings, prints)
    paths = flags.lora_path or []
    weights, scale = flags.lora_weight or [1.0] * len(paths), 1.0 if flags.lora_scale is None else flags.lora_scale
    asked = [(path, weight, scale) for path, weight in zip(paths, weights, strict=True)]
    if getattr(flags, "lcm_lora", None):
        asked.append((LCM_LORAS[family], 1.0, 1.0))
    loras, choices = [], []
    for source, weight, scale in asked:
        repository = _repository(source)
        lora = open_lora(_found(source, settings), weight, scale, prints)
        loras.append(lora)
        choices.append(LoraChoice(repository, lora.sha256, weight, scale))
    return tuple(loras), tuple(choices)


def _recorded(
    flags: argparse.Namespace, recipe: dict[str, Any], settings: Settings, prints: Fingerprints
) -> tuple[tuple[Lora, ...], tuple[LoraChoice, ...]]:
    """The LoRAs that a picture was made with: from the hub again, or else the files that --lora-path names."""
    files = list(flags.lora_path or [])
    choices = tuple(LoraChoice(**fields) for fields in recipe["request"]["loras"])
    loras = []
    for choice in choices:
        if choice.source is None and not files:
            raise AskedWrongly(f"--recipe {flags.recipe} was made with a LoRA file; name it with --lora-path.")
        source = choice.source or files.pop(0)
        lora = open_lora(_found(source, settings), choice.weight, choice.scale, prints)
        if lora.sha256 != choice.sha256:
            raise AskedWrongly(f"--recipe {flags.recipe} was made with another LoRA than {source}.")
        loras.append(lora)
    if files:
        raise AskedWrongly(f"--recipe {flags.recipe} was not made with the LoRA {files[0]}.")
    return tuple(loras), choices


def _repository(source: str) -> str | None:
    """The hub repository that is meant, or None for a file or folder."""
    return source if REPOSITORY.fullmatch(source) and not os.path.exists(source) else None


def _found(source: str, settings: Settings) -> Path:
    repository = _repository(source)
    return fetch_lora(repository, settings.hf_token, settings.framework_model_dir) if repository else Path(source)
