"""Flags -> LoRAs: which files, from where, how strongly."""

import argparse
from pathlib import Path
from typing import Any

from darkroom.checkpoint.catalog import LCM_LORAS
from darkroom.checkpoint.hub import fetch_lora, repository_of
from darkroom.checkpoint.lora import check_lora, left_out, open_lora
from darkroom.checkpoint.original import some
from darkroom.cli.console import Console
from darkroom.cli.flags import refuse_without
from darkroom.cli.settings import Settings
from darkroom.contract import Lora
from darkroom.errors import InvalidRequest
from darkroom.prepare import Preparer
from darkroom.request import LoraChoice


def check_lora_flags(flags: argparse.Namespace) -> None:
    """Raises `InvalidRequest` for what is known to be wrong before a model is fetched."""
    paths, weights = flags.lora_path or [], flags.lora_weight
    if not paths:
        refuse_without(flags, "lora_path")
    if weights is not None and len(weights) != len(paths):
        raise InvalidRequest(f"--lora-weight has {len(weights)} numbers for the {len(paths)} files of --lora-path.")
    scale = 1.0 if flags.lora_scale is None else flags.lora_scale
    for weight in weights or [1.0]:
        LoraChoice(None, "", weight, scale)  # which refuses what is no number
    for path in paths:
        if not repository_of(path):
            check_lora(Path(path))


def loras_of(
    flags: argparse.Namespace,
    recipe: dict[str, Any] | None,
    settings: Settings,
    preparer: Preparer,
    console: Console,
) -> tuple[tuple[Lora, ...], tuple[LoraChoice, ...]]:
    """The LoRAs that are meant, which fit the model; and what the request records of them. Names what is left out."""
    loras, choices = _meant(flags, recipe, settings, preparer, console)
    for lora in loras:
        if unused := left_out(lora, preparer.checkpoint):
            console.warn(f"the LoRA {lora.path} is used without {some(unused)}: this model has no use for it.")
    return loras, choices


def _meant(
    flags: argparse.Namespace,
    recipe: dict[str, Any] | None,
    settings: Settings,
    preparer: Preparer,
    console: Console,
) -> tuple[tuple[Lora, ...], tuple[LoraChoice, ...]]:
    """The LoRAs that are meant, fetched where a repository is named; and what the request records of them."""

    def opened(source: str, weight: float = 1.0, scale: float = 1.0) -> Lora:
        path = Path(source)
        if repository := repository_of(source):
            with console.job(f"fetching {repository}"):
                path = fetch_lora(repository, settings.hf_token, settings.framework_model_dir)
        return open_lora(path, weight, scale, preparer.engines.fingerprints)

    paths = flags.lora_path or []
    if recipe is not None:
        choices = tuple(LoraChoice(**fields) for fields in recipe["request"].get("loras", ()))
        given = {lora.sha256: lora for lora in map(opened, paths)}
        if strangers := given.keys() - {choice.sha256 for choice in choices}:
            raise InvalidRequest(f"--recipe {flags.recipe} was not made with the LoRA {given[min(strangers)].path}.")
        loras = []
        for choice in choices:
            if choice.sha256 not in given and choice.source is None:
                raise InvalidRequest(f"--recipe {flags.recipe} was made with a LoRA file; name it with --lora-path.")
            source = str(given[choice.sha256].path) if choice.sha256 in given else choice.source or ""
            loras.append(opened(source, choice.weight, choice.scale))
            if loras[-1].sha256 != choice.sha256:
                raise InvalidRequest(f"--recipe {flags.recipe} was made with another LoRA than {source} holds now.")
        return tuple(loras), choices
    weights, scale = flags.lora_weight or [1.0] * len(paths), 1.0 if flags.lora_scale is None else flags.lora_scale
    asked = [(path, weight, scale) for path, weight in zip(paths, weights, strict=True)]
    if getattr(flags, "lcm_lora", None):
        asked.append((LCM_LORAS[preparer.family.name], 1.0, 1.0))
    loras = [opened(*each) for each in asked]
    return tuple(loras), tuple(
        LoraChoice(repository_of(source), lora.sha256, lora.weight, lora.scale)
        for (source, _, _), lora in zip(asked, loras, strict=True)
    )
