"""Who is measured on a GPU: diffusers' own pipeline, eager and compiled, and Darkroom, on networks with random weights.

Each makes its networks anew on the device, with the same weights, and gives them back when it is done.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import numpy as np
import torch

from darkroom.bench.architectures import ARCHITECTURES, random_network, write_model
from darkroom.checkpoint.folder import Checkpoint, open_checkpoint
from darkroom.contract import Job, Profile
from darkroom.engines import find_runtime
from darkroom.engines.runtime import Options
from darkroom.networks.load import DTYPES, silence, wrapped
from darkroom.noise import NoiseStream, initial_latents
from darkroom.pipeline.assembly import assemble, text_encoders
from darkroom.pipeline.pictures import to_bytes
from darkroom.pipeline.timing import StageClock
from darkroom.request import Request
from darkroom.schedule.compile import compile_schedule
from darkroom.store.fingerprints import Fingerprints
from darkroom.text.clip import ClipTokenizer

PROMPT = "a photograph of a red apple on a wooden table, morning light"
SEED = 7


@dataclass(frozen=True)
class Work:
    """A model by the name of its architecture, and what is done with it; `size` in pixels."""

    model: str
    size: int
    guidance_scale: float
    precision: str
    device: str

    def request(self, batch: int, steps: int) -> Request:
        return Request(
            model=self.model,
            prompts=(PROMPT,),
            negative_prompt=None,
            batch_size=batch,
            batch_count=1,
            height=self.size,
            width=self.size,
            denoising_steps=steps,
            guidance_scale=self.guidance_scale,
            clip_skip=0,
            scheduler=None,
            seed=SEED,
            engine="torch-compile",
            precision=self.precision,
            build="static-batch",
            onnx_opset=17,
        )


@dataclass(frozen=True)
class Model:
    """What is known of a work's model beside its weights. `folder` gets its configurations."""

    work: Work
    folder: Path
    checkpoint: Checkpoint = field(init=False)

    def __post_init__(self) -> None:
        silence()
        write_model(self.work.model, self.folder, [])
        fingerprints = Fingerprints(self.folder / "fingerprints.json")
        object.__setattr__(self, "checkpoint", open_checkpoint(self.folder, fingerprints))

    def network(self, part: str) -> Any:
        return random_network(self.work.model, part, self.work.device, DTYPES[self.work.precision])

    @property
    def parts(self) -> list[str]:
        return [*self.checkpoint.texts, "unet", "vae"]


class Contender(Protocol):
    """Makes a batch: the milliseconds of its stages and of the whole, and its pictures (B, H, W, 3) uint8."""

    label: str
    options: dict[str, Any]

    def run(self, batch: int, steps: int) -> tuple[StageClock, np.ndarray]: ...


class Diffusers:
    """diffusers' pipeline, eager, or compiled as documented: channels last, fused projections, whole graphs."""

    def __init__(self, model: Model, mode: str | None) -> None:
        import diffusers
        from transformers import CLIPTokenizer

        self.label = "diffusers, torch.compile" if mode else "diffusers eager"
        self.options = {"mode": mode} if mode else {}
        self._model = model
        self._scheduler = model.checkpoint.scheduler(None)
        tokenizers = {
            model.checkpoint.tokenizer(part).name: CLIPTokenizer.from_pretrained(model.checkpoint.tokenizer(part))
            for part in model.checkpoint.texts
        }
        xl = model.checkpoint.family.name == "sdxl"
        more: dict[str, Any] = (
            {"add_watermarker": False}
            if xl
            else {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        )
        kind = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
        self._pipeline = kind(
            **{part: model.network(part) for part in model.parts},
            **tokenizers,
            scheduler=getattr(diffusers, self._scheduler.class_name).from_config(self._scheduler.config),
            **more,
        )
        self._pipeline.set_progress_bar_config(disable=True)
        if mode:
            self._compile(mode)
        self._marks: list[tuple[str, Any, Any]] = []
        for part in (*model.checkpoint.texts, "unet"):
            owner = getattr(self._pipeline, part)
            owner.forward = self._timed(owner.forward, "UNet" if part == "unet" else "CLIP")
        self._pipeline.vae.decode = self._timed(self._pipeline.vae.decode, "VAE-Dec")

    def _compile(self, mode: str) -> None:
        pipeline = self._pipeline
        for network in (pipeline.unet, pipeline.vae):
            network.to(memory_format=torch.channels_last)
        pipeline.fuse_qkv_projections()
        pipeline.unet.forward = torch.compile(pipeline.unet.forward, mode=mode, fullgraph=True)
        pipeline.vae.decode = torch.compile(pipeline.vae.decode, mode=mode, fullgraph=True)

    def _timed(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            start = mark(self._model.work.device)
            made = function(*arguments, **named)
            self._marks.append((stage, start, mark(self._model.work.device)))
            return made

        return call

    def run(self, batch: int, steps: int) -> tuple[StageClock, np.ndarray]:
        work = self._model.work
        clock = StageClock()
        self._marks.clear()
        start = time.perf_counter()
        streams = [NoiseStream(SEED + image) for image in range(batch)]
        shape = (4, work.size // self._model.checkpoint.vae_factor, work.size // self._model.checkpoint.vae_factor)
        latents = torch.from_numpy(initial_latents(streams, shape)).to(work.device, DTYPES[work.precision])
        with torch.inference_mode(), drawing_from(streams):
            made = self._pipeline(
                PROMPT,
                num_images_per_prompt=batch,
                height=work.size,
                width=work.size,
                num_inference_steps=steps,
                guidance_scale=work.guidance_scale,
                latents=latents,
                output_type="np",
            ).images
        clock.pipeline = 1000 * (time.perf_counter() - start)
        for stage, began, ended in self._marks:
            clock.milliseconds[stage] = clock.milliseconds.get(stage, 0.0) + milliseconds(began, ended)
            clock.unet_calls += stage == "UNet"
        return clock, as_bytes(made)


class Darkroom:
    """Our own pipeline on a torch engine. `options` are those of the engine."""

    def __init__(self, model: Model, engine: str, options: Options) -> None:
        work = model.work
        self.label = f"Darkroom ({engine} {work.precision})"
        self.options = {"mode": options.torch_inference} if options.torch_inference else {}
        if options.quantization:
            self.label, self.options = f"{self.label}, {options.quantization}", {"quantization": options.quantization}
        self._model = model
        runtime = find_runtime(engine, options)
        self._traits = model.checkpoint.family.traits(model.checkpoint)
        guided = self._traits.guided(work.request(1, 1))
        contracts = model.checkpoint.family.stages(model.checkpoint, guided, 0)
        profile = Profile(1, work.size, work.size, model.checkpoint.vae_factor)
        self._engines = {
            name: runtime.engine(
                Job(stage, profile, work.precision), wrapped(stage, model.network(stage.networks[0].part))
            )
            for name, stage in contracts.items()
            if name != "vae_encoder"
        }
        self._tokenizers = [
            ClipTokenizer(model.checkpoint.tokenizer(part), text["max_position_embeddings"])
            for part, text in model.checkpoint.texts.items()
        ]
        self._tables: dict[int, Any] = {}

    def run(self, batch: int, steps: int) -> tuple[StageClock, np.ndarray]:
        request = self._model.work.request(batch, steps)
        if steps not in self._tables:
            self._tables[steps] = compile_schedule(self._model.checkpoint.scheduler(None), steps)
        engines = self._engines
        pipeline = assemble(
            self._traits,
            text_encoders(self._traits, self._tokenizers, engines),
            engines["unet"],
            engines["vae"],
            self._tables[steps],
            request,
        )
        clock = StageClock()
        (asked,) = request.batches()
        return clock, as_bytes(pipeline.run(asked, clock))


@contextmanager
def drawing_from(streams: list[NoiseStream]) -> Iterator[None]:
    """Lets diffusers' ancestral scheduler draw each image's noise from its stream, as Darkroom does."""
    from diffusers.schedulers import scheduling_euler_ancestral_discrete as module

    def draw(shape: tuple[int, ...], dtype: Any, device: Any, generator: Any = None) -> torch.Tensor:
        return torch.from_numpy(initial_latents(streams, tuple(shape[1:]))).to(device, dtype)

    with mock.patch.object(module, "randn_tensor", draw):
        yield


def as_bytes(pictures: np.ndarray) -> np.ndarray:
    """(B, H, W, 3) float in [0, 1] -> uint8. Raises `Failed` for pictures that are none."""
    return np.stack([to_bytes(picture, f"image {image + 1}") for image, picture in enumerate(pictures)])


def mark(device: str) -> Any:
    """A mark in the device's stream, or on the CPU the host's clock."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(start: Any, end: Any) -> float:
    """Between two marks that the device has passed."""
    return 1000 * (end - start) if isinstance(start, float) else start.elapsed_time(end)


def size_of(model: str) -> int:
    """The pixels that a model makes pictures of, along each side."""
    described = ARCHITECTURES[model]
    levels = len(described.get("vae", {}).get("block_out_channels", (0, 0, 0, 0)))
    return described["unet"]["sample_size"] * 2 ** (levels - 1)
