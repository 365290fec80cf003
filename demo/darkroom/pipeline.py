"""The walk of a prompt: text -> CLIP -> noise -> (schedule, UNet) x steps -> VAE -> pictures.

Knows contracts, tables and loaded engines; which runtime an engine belongs to is none of its business.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from darkroom.engines.runtime import Engine
from darkroom.noise import NoiseStream, initial_latents
from darkroom.request import Batch
from darkroom.schedule.table import Table, Trajectory
from darkroom.text import ClipTokenizer
from darkroom.timing import StageClock

KEPT_PROMPTS = 4


@dataclass
class Pipeline:
    """Loaded engines and a compiled schedule for batches of one size.

    `clip_negative` encodes negative prompts; it is `clip` itself unless layers are skipped. `latent_shape` is
    (4, h, w), of one image. `guidance_scale` is None where the UNet's engine has no guidance.
    """

    tokenizer: ClipTokenizer
    clip: Engine
    clip_negative: Engine
    unet: Engine
    vae: Engine
    table: Table
    latent_shape: tuple[int, int, int]
    guidance_scale: float | None
    negative_prompt: str = ""
    _encoded: dict[tuple[bool, tuple[str, ...]], np.ndarray] = field(default_factory=dict)

    def run(self, batch: Batch, clock: StageClock, on_call: Callable[[], None] = lambda: None) -> np.ndarray:
        """Makes the pictures of one batch: (B, H, W, 3) float32 in [0, 1]. `on_call` is called after each step."""
        start = time.perf_counter()
        with clock.time("CLIP"):
            text = self.encode(self.clip, batch.prompts)
            negative = None
            if self.guidance_scale is not None:
                negative = self.encode(self.clip_negative, (self.negative_prompt,) * len(batch.prompts))
        streams = [NoiseStream(seed) for seed in batch.seeds]
        with clock.time("UNet"):
            for step in self.denoise(streams, text, negative):
                latents = step
                clock.unet_calls += 1
                on_call()
        with clock.time("VAE-Dec"):
            pictures = self.decode(latents)
        clock.pipeline += 1000 * (time.perf_counter() - start)
        return pictures

    def forget(self) -> None:
        """Drops the prompts encoded so far, so that the next run is timed with all of its work."""
        self._encoded.clear()

    def encode(self, clip: Engine, prompts: tuple[str, ...]) -> np.ndarray:
        """Prompts, one an image -> text embeddings (B, 77, D). The same prompts are encoded once."""
        key = (clip is self.clip, prompts)
        if key not in self._encoded:
            # Kept for the next batches, but not without bound: the last few are the ones that come again.
            while len(self._encoded) >= KEPT_PROMPTS:
                self._encoded.pop(next(iter(self._encoded)))
            self._encoded[key] = clip({"input_ids": self.tokenizer.encode(list(prompts)).ids})
        return self._encoded[key]

    def denoise(
        self, streams: list[NoiseStream], text: np.ndarray, negative: np.ndarray | None
    ) -> Iterator[np.ndarray]:
        """Yields the latents (B, 4, h, w) after every network call.

        An image's stream gives its initial noise, and then whatever its scheduler draws, in diffusers' order.
        """
        trajectory = Trajectory(self.table, initial_latents(streams, self.latent_shape))
        inputs = {"text_embeddings": text}
        if negative is not None:
            inputs["negative_embeddings"] = negative
            inputs["guidance_scale"] = np.full(len(streams), self.guidance_scale, np.float32)
        for call, timestep in enumerate(self.table.timesteps):
            inputs["latents"] = trajectory.network_input(call)
            inputs["timestep"] = np.full(len(streams), timestep, np.float32)
            output = self.unet(inputs)
            noise = initial_latents(streams, self.latent_shape) if self.table.noise_drawn[call] else None
            trajectory.advance(call, output, noise)
            yield trajectory.sample

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents (B, 4, h, w) -> pictures (B, H, W, 3) float32 in [0, 1]; NaN stays NaN."""
        images = self.vae({"latents": latents})
        return np.clip(images / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)
