"""The same work by Darkroom and by what a user would take instead: same weights, prompt, steps, noise and size."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from darkroom.bench.cell import Cell, Place
from darkroom.bench.machine import packages
from darkroom.bench.peers import Peer, command, prepare
from darkroom.bench.sweep import Entrant, entrant_of
from darkroom.errors import Failed, InvalidRequest
from darkroom.noise import NoiseStream, initial_latents
from darkroom.processes.environments import ensure, packages_of

REFERENCE = "diffusers eager"
"""Whose pictures the others' are compared with: float32 torch."""


def ourselves(cell: Cell, place: Place, cold: list[str] | None, facts: dict[str, Any]) -> Entrant:
    """Darkroom, under a label that tells it from the others."""
    entrant = entrant_of(cell, place, cold, facts)
    label = f"Darkroom ({cell.contender})"
    return replace(entrant, name=label, label=label)


def other(peer: Peer, cell: Cell, environments: Path, noise: Path, cold: bool, show: Callable[[str], None]) -> Entrant:
    """A peer that does what the cell says, its environment and its conversion of the model made where they are not.

    `noise` is the initial noise, see `write_noise`. What keeps it from taking part is the `error` among its facts.
    """
    settings = {
        "prompt": cell.prompt,
        "negative_prompt": "",
        "batch_size": cell.batch_size,
        "denoising_steps": cell.denoising_steps,
        "guidance_scale": cell.guidance_scale,
        "height": cell.height,
        "width": cell.width,
        "seed": cell.seed,
        "threads": cell.threads,
        "latents": str(noise),
    }
    its_own = {"engine": None, "precision": None, "build": None, "onnx_opset": None, "options": None}
    its_own |= {"use_cuda_graph": False, "devices": 1}
    said = cell.settings() | its_own | ({"options": json.dumps(peer.options, sort_keys=True)} if peer.options else {})
    offline = {"HF_HUB_OFFLINE": "1"}
    try:
        python = ensure(peer, environments, show)
        show(f"{peer.name}: converting {cell.version}" if peer.needs_conversion else peer.name)
        folder = prepare(peer, python, Path(cell.folder), environments / "converted", settings)
    except Failed as error:
        return Entrant(peer.name, peer.name, said, [], None, {"error": str(error).rstrip(".")}, offline)
    start = command(peer, python, folder, settings)
    cold_start = [*start, "--cold"] if cold else None
    return Entrant(peer.name, peer.name, said, start, cold_start, {}, offline, packages(packages_of(python)))


def write_noise(cell: Cell, vae_factor: int, file: Path) -> Path:
    """The noise that the images of a cell start from, (B, 4, h, w) float32, as .npy; the seeds' own streams give it."""
    streams = [NoiseStream(cell.seed + image) for image in range(cell.batch_size)]
    latents = initial_latents(streams, (4, cell.height // vae_factor, cell.width // vae_factor))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, latents)
    except OSError as error:
        raise Failed(f"{file} cannot be written: {error.strerror or error}.") from None
    return file


def add_likeness(found: dict[str, Any], expected: list[str]) -> None:
    """Gives a result that has pictures its `psnr` in dB against the `expected` ones: the least of its images."""
    if not (expected and found.get("pictures")):
        return
    from darkroom.pipeline.pictures import psnr, read_pixels

    try:
        pairs = zip(found["pictures"], expected, strict=True)
        found["psnr"] = round(min(psnr(*(read_pixels(Path(path), None, None) for path in pair)) for pair in pairs), 2)
    except (InvalidRequest, ValueError) as error:
        found["error"] = f"its pictures cannot be compared: {error}"
