"""What a picture is going to look like, while it is made: a linear map from latents to colours, no network.

The decoders of diffusion models are close to linear in colour (https://huggingface.co/blog/TimothyAlexisVass/explaining-the-sdxl-latent-space):
so what one makes of random patches gives, by least squares, a colour for each latent. The map is fitted once for a
decoder and kept in the store.
"""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from darkroom.contract import DECODER
from darkroom.engines.runtime import Engine
from darkroom.schedule.table import Trajectory
from darkroom.serving.service import Service
from darkroom.store.store import Key

REVISION = 1
PATCH = 4
"""Latents along the side of a patch of one value: decoders look at neighbours, and most of a picture is flat."""

PATCHES = 256
"""That the map is fitted to: many for its few numbers."""

FILE = "colours.npy"


def colours_for(service: Service) -> np.ndarray:
    """The map of a service's decoder, the same for pictures of any size: (C + 1, 3) float32, the last row what is
    added."""
    request, traits = service.plan.request, service.plan.traits
    decoder = next(part for part in service.plan.lane_for(request).parts.values() if part.job.stage.role == DECODER)
    shape = (traits.latent_channels, request.height // traits.vae_factor, request.width // traits.vae_factor)

    def fit(folder: Path) -> dict[str, Any]:
        np.save(folder / FILE, fitted(service.lane_of(request).vae, shape))
        return {"latents": list(shape)}

    wanted = Key("preview", {"kind": "preview", "decoder": decoder.key, "revision": REVISION})
    return np.load((service.store.find(wanted) or service.store.make(wanted, fit)) / FILE)


def fitted(decoder: Engine, latent_shape: tuple[int, int, int]) -> np.ndarray:
    """Least squares over random patches of unit variance, and the means of what the decoder makes under each latent."""
    channels, height, width = latent_shape
    chance = np.random.default_rng(0)
    rows, columns = -(-height // PATCH), -(-width // PATCH)
    shown, means = [], []
    for _ in range(-(-PATCHES // (rows * columns))):
        coarse = chance.standard_normal((channels, rows, columns), np.float32)
        latents = coarse.repeat(PATCH, 1).repeat(PATCH, 2)[:, :height, :width]
        made = np.clip(decoder({"latents": latents[None]})["images"][0] / 2 + 0.5, 0, 1)
        side = made.shape[1] // height
        shown.append(latents.reshape(channels, -1).T)
        means.append(made.reshape(3, height, side, width, side).mean((2, 4)).reshape(3, -1).T)
    design = np.concatenate(shown)
    design = np.concatenate([design, np.ones((len(design), 1), np.float32)], axis=1)
    return np.linalg.lstsq(design, np.concatenate(means), rcond=None)[0].astype(np.float32)


def preview(colours: np.ndarray, trajectory: Trajectory, call: int, size: tuple[int, int]) -> Image.Image:
    """What the picture, of (width, height) pixels, looks like by what is known after so many calls."""
    latents = trajectory.foreseen(call)[0]
    pixels = np.tensordot(latents, colours[:-1], axes=(0, 0)) + colours[-1]
    small = Image.fromarray((np.clip(pixels, 0, 1) * 255).round().astype(np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)
