"""Flags -> the ControlNets of a run, and the maps that they are given."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from darkroom.checkpoint.catalog import Script, Version
from darkroom.checkpoint.controlnet import EDGES, published
from darkroom.checkpoint.hub import repository_of
from darkroom.cli.flags import given, refuse_without
from darkroom.errors import InvalidRequest
from darkroom.flags import option
from darkroom.request import ControlChoice, Request, pixels_digest


@dataclass(frozen=True)
class Controls:
    """ControlNets by their folders or repositories; the pictures (H, W, 3) uint8 that their maps are made of; and what
    the request holds of them."""

    sources: tuple[str, ...] = ()
    pictures: tuple[np.ndarray, ...] = ()
    choices: tuple[ControlChoice, ...] = ()

    def maps(self, height: int, width: int) -> list[np.ndarray]:
        """Their maps at a picture's size, (H, W, 3) uint8 each."""
        from darkroom.pipeline.edges import canny
        from darkroom.pipeline.pictures import resized

        fitting = (resized(picture, height, width) for picture in self.pictures)
        return [canny(each) if choice.drawn else each for each, choice in zip(fitting, self.choices, strict=True)]


def controls_of(flags: argparse.Namespace, recipe: dict[str, Any] | None, script: Script, version: Version) -> Controls:
    """What is asked for. Raises `InvalidRequest` where maps and ControlNets do not go together."""
    from darkroom.pipeline.pictures import read_picture

    if not script.controlled:
        return Controls()
    typed = bool(script.controlling and given(flags, "controlnet_type"))
    if recipe is not None:
        return _replayed(flags, recipe, script)
    if not typed:
        if script.controlling:
            refuse_without(flags, "controlnet_type")
        if not flags.controlnet:
            refuse_without(flags, "controlnet")
            if script.controlling:
                raise InvalidRequest("name what the picture is to follow: --controlnet-type TYPE, or --controlnet.")
            return Controls()
        names = flags.controlnet
    else:
        if flags.controlnet:
            raise InvalidRequest("--controlnet and --controlnet-type each name the ControlNets: leave one of them out.")
        for name, instead in (("control_image", "input_image"), ("control_scale", "controlnet_scale")):
            if given(flags, name):
                raise InvalidRequest(f"{option(name)} is for --controlnet: --controlnet-type has {option(instead)}.")
        names = [published(kind, version.name) for kind in flags.controlnet_type]
    kinds = flags.controlnet_type if typed else [None] * len(names)
    flag = "input_image" if typed else "control_image"
    files = getattr(flags, flag) or []
    if len(files) != len(names):
        raise InvalidRequest(f"{option(flag)}: {len(names)} ControlNets need as many pictures, not {len(files)}.")
    pictures = tuple(read_picture(Path(file)) for file in files)
    scales = _for_each(flags, "controlnet_scale" if typed else "control_scale", 1.0, len(names))
    starts, ends = (
        _for_each(flags, name, usual, len(names)) for name, usual in (("control_start", 0.0), ("control_end", 1.0))
    )
    choices = tuple(
        ControlChoice(repository_of(name), pixels_digest(picture), scale, start, end, kind == EDGES)
        for name, picture, scale, start, end, kind in zip(names, pictures, scales, starts, ends, kinds, strict=True)
    )
    return Controls(tuple(names), pictures, choices)


def _replayed(flags: argparse.Namespace, recipe: dict[str, Any], script: Script) -> Controls:
    from darkroom.pipeline.pictures import read_picture

    choices = Request.from_json(recipe["request"]).controls
    sources = flags.controlnet or [choice.source for choice in choices]
    if None in sources or len(sources) != len(choices):
        raise InvalidRequest(
            f"--recipe {flags.recipe} was made with {len(choices)} ControlNets, some of them folders; name them all "
            f"with --controlnet."
        )
    flag = "input_image" if script.controlling and flags.input_image else "control_image"
    files = getattr(flags, flag) or []
    if len(files) != len(choices):
        raise InvalidRequest(
            f"--recipe {flags.recipe} needs the pictures of its {len(choices)} ControlNets: {option(flag)}."
        )
    pictures = tuple(read_picture(Path(file)) for file in files)
    for file, picture, choice in zip(files, pictures, choices, strict=True):
        if pixels_digest(picture) != choice.sha256:
            raise InvalidRequest(f"{option(flag)} {file} is not the picture that {flags.recipe} was made with.")
    return Controls(tuple(sources), pictures, choices)


def _for_each(flags: argparse.Namespace, name: str, usual: float, count: int) -> Sequence[float]:
    """A value for each of so many ControlNets, of one for all or one for each."""
    values = getattr(flags, name) or [usual]
    if len(values) not in (1, count):
        raise InvalidRequest(f"{option(name)} takes one number, or one for each of the {count} ControlNets.")
    return values * count if len(values) == 1 else values
