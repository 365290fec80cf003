"""The walk of a prompt: text -> encoders -> noise -> (schedule, denoiser) x steps -> VAE -> pictures.

Knows contracts, tables and loaded engines; which runtime an engine belongs to is none of its business.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from darkroom.contract import CONTROL_SCALES, GUIDANCE_SCALE, MASK, MASKED, NEGATIVE
from darkroom.engines.runtime import Denoiser, Engine
from darkroom.noise import NoiseStream, initial_latents
from darkroom.pipeline.timing import StageClock
from darkroom.request import Batch
from darkroom.schedule.table import Table, Trajectory
from darkroom.text.reading import Chunk, Ids, Reading
from darkroom.text.tokenizer import Tokenizer

KEPT_READINGS = 8


@dataclass
class TextEncoder:
    """A tokenizer and the engine that reads its ids; `negative` reads negative prompts, and may be the same."""

    tokenizer: Tokenizer
    engine: Engine
    negative: Engine
    _kept: dict[tuple[int, tuple[Ids, ...]], dict[str, np.ndarray]] = field(default_factory=dict)

    def __call__(
        self, prompts: Sequence[tuple[Chunk, ...]], negative: tuple[Chunk, ...] | None = None
    ) -> list[dict[str, np.ndarray]]:
        """The chunks of prompts, one prompt an image -> the embeddings of each, by the contract's names; and those of
        the negative prompt behind them, if there is one. (T, D) of tokens are all chunks' in a row, others (P,) the
        first one's.

        What several images have in common is read once, and the negative prompt beside it if there is room. Which
        chunks stand together depends on this batch alone, so that it is made again with the same bits.
        """
        texts = [*prompts, *([] if negative is None else [negative])]
        own = self.negative is self.engine or negative is None
        made = self._read(self.engine, texts if own else texts[:-1], len(prompts))
        if own:
            return made
        return made + self._read(self.negative, texts[-1:], len(prompts))

    def _read(self, engine: Engine, texts: list[tuple[Chunk, ...]], batch: int) -> list[dict[str, np.ndarray]]:
        ids = list(dict.fromkeys(chunk.ids for text in texts for chunk in text))
        found: dict[Ids, dict[str, np.ndarray]] = {}
        for first in range(0, len(ids), batch):
            group = ids[first : first + batch]
            made = self._made(engine, (*group, *[group[-1]] * (batch - len(group))))
            found |= {each: {name: value[row] for name, value in made.items()} for row, each in enumerate(group)}
        return [_joined([(chunk, found[chunk.ids]) for chunk in text]) for text in texts]

    def _made(self, engine: Engine, ids: tuple[Ids, ...]) -> dict[str, np.ndarray]:
        found = self._kept.pop((id(engine), ids), None)
        if found is None:
            found = engine({"input_ids": np.array(ids, np.int32)})
        # Kept for the next batches, but not without bound: those used last are the ones that come again.
        self._kept[id(engine), ids] = found
        while len(self._kept) > KEPT_READINGS:
            self._kept.pop(next(iter(self._kept)))
        return found

    def forget(self) -> None:
        """Drops what was encoded so far."""
        self._kept.clear()


def _joined(chunks: list[tuple[Chunk, dict[str, np.ndarray]]]) -> dict[str, np.ndarray]:
    first = chunks[0][1]
    return {
        name: np.concatenate([chunk.weigh(made[name]) for chunk, made in chunks]) if value.ndim == 2 else value
        for name, value in first.items()
    }


@dataclass(frozen=True)
class InitialImage:
    """The picture that images start from: `pixels` (1, 3, H, W) in [-1, 1], the engine that encodes it, and the `mask`
    (1, 1, H, W) of what is painted anew, 1 there and else 0; None where all is."""

    pixels: np.ndarray
    encoder: Engine
    mask: np.ndarray | None = None

    @classmethod
    def of(cls, pixels: np.ndarray, mask: np.ndarray | None, encoder: Engine) -> "InitialImage":
        """Of pixels (H, W, 3) and a mask (H, W), both uint8."""
        image = pixels.transpose(2, 0, 1)[None].astype(np.float32) / 255 * 2 - 1
        return cls(image, encoder, None if mask is None else is_marked(mask[None, None]).astype(np.float32))

    def latents(self, streams: list[NoiseStream], masked: bool = False) -> np.ndarray:
        """A sample of the picture's latents for each image, drawn from its stream: (B, C, h, w); `masked`, of what the
        mask leaves of it, with grey for the rest. Nothing is drawn where the encoder has no deviation."""
        made = self.encoder({"images": self.pixels * (self.mask < 0.5) if masked else self.pixels})
        mean = made["mean"]
        if "deviation" not in made:
            return mean.repeat(len(streams), axis=0)
        return mean + made["deviation"] * initial_latents(streams, mean.shape[1:])


def is_marked(mask: np.ndarray) -> np.ndarray:
    """Where a mask's uint8 mean that the picture is painted anew, as in diffusers."""
    return mask >= 128


class Begun(NamedTuple):
    """What the denoiser of a batch is given, and how its samples begin: with noise (B, C, h, w), the latents of a
    picture, and the mask (B, 1, h, w) of what is not kept of it, if any."""

    conditions: dict[str, np.ndarray]
    noise: np.ndarray
    image: np.ndarray | None
    mask: np.ndarray | None


@dataclass(frozen=True)
class DeferredRefiner:
    """A refiner that is loaded once the first model is done and gone, so that memory holds one of them at a time.

    `calls` are the network calls that a batch takes of it.
    """

    calls: int
    load: Callable[[], "Pipeline"]


@dataclass
class Pipeline:
    """Loaded engines and a compiled schedule for batches of one size.

    `latent_shape` is (C, h, w), of one image. `guidance_scale` is None where the denoiser's engine has no guidance.
    `reading` is how prompts are read, and `chunks` how many of a prompt the denoiser's engine takes; `zero_negative`
    makes the negative prompt's embeddings zeros. `added` are conditions beside the text, () or (N,) each, the same for
    every image; `added_negative` what guidance leads away from in their place; `common` those of `contract.COMMON`.
    `scales_by_call` (calls, K) are those of ControlNets, where they change from call to call otherwise than by the
    timestep. A denoiser that `inpaints` is given the mask of the picture that images start from; with others, the table
    blends it in. `start` is the picture to start from, if any. `rows` name text encoders and denoiser in the timing
    table. `vae` is None where a `refiner` goes on from this model's latents. One that comes as a `DeferredRefiner`
    takes this model's place: a single batch can be made.
    """

    encoders: tuple[TextEncoder, ...]
    denoiser: Engine
    vae: Engine | None
    table: Table
    latent_shape: tuple[int, int, int]
    guidance_scale: float | None
    reading: Reading = field(default_factory=Reading)
    chunks: int = 1
    zero_negative: bool = False
    added: dict[str, np.ndarray] = field(default_factory=dict)
    added_negative: dict[str, np.ndarray] = field(default_factory=dict)
    common: dict[str, np.ndarray] = field(default_factory=dict)
    scales_by_call: np.ndarray | None = None
    inpaints: bool = False
    start: InitialImage | None = None
    rows: tuple[str, str] = ("CLIP", "UNet")
    refiner: "Pipeline | DeferredRefiner | None" = None

    @property
    def calls(self) -> int:
        """Network calls that a batch takes."""
        return len(self.table) + (self.refiner.calls if self.refiner else 0)

    def run(self, batch: Batch, clock: StageClock, on_call: Callable[[], None] = lambda: None) -> np.ndarray:
        """Makes the pictures of one batch: (B, H, W, 3) float32 in [0, 1]. `on_call` is called after each step."""
        return self._run(batch, [NoiseStream(seed) for seed in batch.seeds], None, clock, on_call)

    def run_overlapped(self, batches: Sequence[Batch], clocks: Sequence[StageClock]) -> Iterator[np.ndarray]:
        """Makes the pictures of batch after batch, as `run` does each, while the text of the next is encoded and the
        latents of the one before are decoded. Stages take longer by their clocks than they do alone.

        With a refiner nothing overlaps: its denoiser would wait for the first one's.
        """
        if self.refiner:
            for batch, clock in zip(batches, clocks, strict=True):
                yield self.run(batch, clock)
            return
        started = [0.0] * len(batches)

        def begin(turn: int) -> tuple[list[NoiseStream], Begun]:
            started[turn] = time.perf_counter()
            streams = [NoiseStream(seed) for seed in batches[turn].seeds]
            return streams, self.begin(batches[turn], streams, None, clocks[turn])

        def finish(turn: int, latents: np.ndarray) -> np.ndarray:
            pictures = self._decode(latents, clocks[turn])
            clocks[turn].pipeline += 1000 * (time.perf_counter() - started[turn])
            return pictures

        with ThreadPoolExecutor(1) as before, ThreadPoolExecutor(1) as after:
            beginning = before.submit(begin, 0) if batches else None
            finishing = None
            for turn in range(len(batches)):
                streams, begun = beginning.result()
                if turn + 1 < len(batches):
                    beginning = before.submit(begin, turn + 1)
                latents = self._denoised(streams, begun, clocks[turn])
                made, finishing = finishing, after.submit(finish, turn, latents)
                if made:
                    yield made.result()
            if finishing:
                yield finishing.result()

    def _run(
        self,
        batch: Batch,
        streams: list[NoiseStream],
        image: np.ndarray | None,
        clock: StageClock,
        on_call: Callable[[], None],
    ) -> np.ndarray:
        """`image`: latents to start from, (B, C, h, w), where another model has made them."""
        began = time.perf_counter()
        begun = self.begin(batch, streams, image, clock)
        latents = self._denoised(streams, begun, clock, on_call)
        if self.refiner:
            clock.pipeline += 1000 * (time.perf_counter() - began)
            clock.refiner = StageClock()
            # The streams go on, as generators do that are handed to one diffusers pipeline after the other.
            return self._second_model()._run(batch, streams, latents, clock.refiner, on_call)
        pictures = self._decode(latents, clock)
        clock.pipeline += 1000 * (time.perf_counter() - began)
        return pictures

    def _second_model(self) -> "Pipeline":
        """The refiner. One that comes later is loaded now, when nothing of this model is left."""
        if isinstance(self.refiner, DeferredRefiner):
            self.encoders, self.start = (), None
            del self.denoiser
            self.refiner = self.refiner.load()
        return self.refiner

    def begin(self, batch: Batch, streams: list[NoiseStream], image: np.ndarray | None, clock: StageClock) -> Begun:
        """What is drawn is, of each image's stream, the picture's latents, the initial noise, and the latents of what
        the mask leaves of the picture: in diffusers' order, though not all of them may be used."""
        readers = {id(engine): engine for each in self.encoders for engine in (each.engine, each.negative)}
        with clock.time(self.rows[0], *readers.values()):
            conditions = self.condition(batch.prompts)
        mask = None if self.start is None else self.start.mask
        # With an inpainting model, what begins as noise alone is not made of the picture.
        if self.start and not (self.inpaints and not self.table.image_scale):
            with clock.time("VAE-Enc", self.start.encoder):
                image = self.start.latents(streams)
        noise = initial_latents(streams, self.latent_shape)
        if mask is None:
            return Begun(conditions, noise, image, None)
        with clock.time("VAE-Enc", self.start.encoder):
            masked = self.start.latents(streams, masked=True)
        factor = mask.shape[2] // self.latent_shape[1]
        mask = mask[:, :, ::factor, ::factor].repeat(len(streams), axis=0)
        if self.inpaints:
            return Begun(conditions | {MASK: mask, MASKED: masked}, noise, image, None)
        return Begun(conditions, noise, image, mask)

    def _denoised(
        self,
        streams: list[NoiseStream],
        begun: Begun,
        clock: StageClock,
        on_call: Callable[[], None] = lambda: None,
    ) -> np.ndarray:
        clock.denoiser = self.rows[1]
        with clock.time(clock.denoiser, self.denoiser):
            for step in self.denoise(streams, begun):
                latents = step
                clock.unet_calls += 1
                on_call()
        return latents

    def _decode(self, latents: np.ndarray, clock: StageClock) -> np.ndarray:
        with clock.time("VAE-Dec", self.vae):
            return self.decode(latents)

    def forget(self) -> None:
        """Drops the prompts encoded so far, so that the next run is timed with all of its work."""
        for encoder in self.encoders:
            encoder.forget()
        self.denoiser.forget()
        if isinstance(self.refiner, Pipeline):
            self.refiner.forget()

    def condition(self, prompts: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Prompts, one an image -> all that the denoiser is given beside latents and timestep, by its names."""
        images = len(prompts)
        guided = self.guidance_scale is not None
        *texts, away = self._encoded(prompts, guided and not self.zero_negative)
        text = {name: np.stack([each[name] for each in texts]) for name in texts[0]}
        conditions = _for_each(images, self.common) | text | _for_each(images, self.added)
        if not guided:
            return conditions
        away = _for_each(images, away | self.added | self.added_negative)
        return (
            conditions
            | {NEGATIVE + name: value for name, value in away.items()}
            | {GUIDANCE_SCALE.name: np.full(images, self.guidance_scale, np.float32)}
        )

    def _encoded(self, prompts: tuple[str, ...], away: bool) -> list[dict[str, np.ndarray]]:
        """Prompts, one an image -> all that the text encoders make of each, as long as the denoiser takes it; and, if
        it is wanted, of what guidance leads `away` from: else zeros."""
        tokenizers = [encoder.tokenizer for encoder in self.encoders]
        read = {prompt: self.reading.prompt(tokenizers, prompt) for prompt in dict.fromkeys(prompts)}
        texts = [read[prompt] for prompt in prompts] + ([self.reading.away(tokenizers)] if away else [])
        made: list[dict[str, np.ndarray]] = [{} for _ in texts]
        for place, encoder in enumerate(self.encoders):
            own = [text[place] for text in texts]
            ends = len(prompts)
            for each, text, embedded in zip(made, own, encoder(own[:ends], *own[ends:]), strict=True):
                times = self.chunks // len(text)
                each |= {
                    name: np.tile(value, (times, 1)) if value.ndim == 2 else value for name, value in embedded.items()
                }
        return made if away else [*made, {name: np.zeros_like(value) for name, value in made[0].items()}]

    def denoise(self, streams: list[NoiseStream], begun: Begun) -> Iterator[np.ndarray | None]:
        """Yields the latents (B, C, h, w) after every network call.

        An image's stream goes on with whatever its scheduler draws, in diffusers' order. Where the latents stay on a
        device, None stands for all but the last; where a picture is blended into them, or `scales_by_call` are given,
        they do not.
        """
        trajectory = Trajectory(self.table, begun.noise, begun.image, begun.mask)
        if isinstance(self.denoiser, Denoiser) and begun.mask is None and self.scales_by_call is None:
            noises = [initial_latents(streams, self.latent_shape) for drawn in self.table.noise_drawn if drawn]
            yield from self.denoiser.denoise(self.table, trajectory.sample, noises, begun.conditions)
            return
        for call, timestep in enumerate(self.table.timesteps):
            changing = {
                "latents": trajectory.network_input(call),
                "timestep": np.full(len(streams), timestep, np.float32),
            }
            if self.scales_by_call is not None:
                changing[CONTROL_SCALES] = np.tile(self.scales_by_call[call], (len(streams), 1))
            output = self.denoiser(begun.conditions | changing)["output"]
            noise = initial_latents(streams, self.latent_shape) if self.table.noise_drawn[call] else None
            trajectory.advance(call, output, noise)
            yield trajectory.sample

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents (B, C, h, w) -> pictures (B, H, W, 3) float32 in [0, 1]; NaN stays NaN."""
        assert self.vae is not None, "a model with a refiner hands over latents"
        images = self.vae({"latents": latents})["images"]
        return np.clip(images / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)


def _for_each(images: int, conditions: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.repeat(value[None], images, axis=0) for name, value in conditions.items()}
