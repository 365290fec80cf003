#!/usr/bin/env python3
"""Whether an engine draws what diffusers draws: its latents and its pictures, held against right and wrong ones.

python benchmarks/parity.py torch --precision fp32 bf16 --use-cuda-graph

A picture of few colours is like many others: one of another seed can be as close to it as one that was rounded to 8
bits. So the probe is one whose pictures vary, and an engine must come closer to diffusers in float32 than each of the
`CONTROLS`, which are wrong on purpose, by `MARGIN`. A line of verdict for each precision; exit code 1 where one fails.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import numpy as np
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from darkroom.checkpoint.catalog import EMBEDDED  # noqa: E402
from darkroom.checkpoint.folder import open_checkpoint  # noqa: E402
from darkroom.engines import find_runtime  # noqa: E402
from darkroom.engines.runtime import Options  # noqa: E402
from darkroom.errors import DarkroomError  # noqa: E402
from darkroom.files import written  # noqa: E402
from darkroom.noise import NoiseStream  # noqa: E402
from darkroom.pipeline.timing import StageClock  # noqa: E402
from darkroom.prepare import Preparer  # noqa: E402
from darkroom.request import Batch, Request  # noqa: E402
from darkroom.schedule import SCHEDULERS  # noqa: E402
from darkroom.store.store import Store  # noqa: E402

MARGIN = 6.0
"""Decibels by which an engine must be closer than the closest control: half of its distance."""

LEAST = {"fp32": 70.0, "fp16": 40.0, "bf16": 20.0}
"""Decibels of latents above their error, by precision, for what is not quantized. On a CPU torch reaches 116, 58, 33:
float32 that is silently rounded to TF32, which has as short a mantissa as float16, is found out."""

RUNS = 4
"""The last is looked at: captured graphs replay it, and the loop as a whole was captured before it."""


@dataclass(frozen=True)
class Probe:
    """What is drawn: an image a prompt, with seeds from `seed` up."""

    prompts: tuple[str, ...] = ("a cat", "a red fish")
    seed: int = 5
    scheduler: str = "EulerA"
    guidance_scale: float = 5.0
    denoising_steps: int = 8


PROBE = Probe()
CONTROLS = {
    "another seed": replace(PROBE, seed=1005),
    "no guidance": replace(PROBE, guidance_scale=1.0),
    "less guidance": replace(PROBE, guidance_scale=3.0),
    "another scheduler": replace(PROBE, scheduler="Euler"),
    "a step more": replace(PROBE, denoising_steps=9),
    "the prompts exchanged": replace(PROBE, prompts=PROBE.prompts[::-1]),
}


@dataclass(frozen=True)
class Drawn:
    """`latents` (B, C, h, w) and `pictures` (B, H, W, 3) in [0, 1]."""

    latents: np.ndarray
    pictures: np.ndarray

    def likeness(self, other: "Drawn") -> dict[str, list[float]]:
        """Of each image, in dB: this one's latents above the difference, and the PSNR of the pictures."""
        return {
            "latents": [
                _decibels(mine.var(), mine - its) for mine, its in zip(self.latents, other.latents, strict=True)
            ],
            "pictures": [_decibels(1.0, mine - its) for mine, its in zip(self.pictures, other.pictures, strict=True)],
        }


def _decibels(signal: float, error: np.ndarray) -> float:
    power = float(np.mean(error.astype(np.float64) ** 2))
    if not np.isfinite(power):
        return -np.inf
    return float(10 * np.log10(signal / power)) if power else np.inf


def verdict(expected: Drawn, controls: dict[str, Drawn], found: Drawn, least: float | None) -> tuple[bool, str]:
    """Whether what was `found` is good, and the numbers: its worst image against the best one of each control.

    `least` is what its latents must reach besides, in dB.
    """
    its = {what: min(each) for what, each in expected.likeness(found).items()}
    good, told = True, []
    for what, reached in its.items():
        nearest = {name: max(expected.likeness(wrong)[what]) for name, wrong in controls.items()}
        closest = max(nearest, key=nearest.__getitem__)
        needed = max(nearest[closest] + MARGIN, (least or -np.inf) if what == "latents" else -np.inf)
        good = good and reached >= needed
        told.append(f"{what} {reached:.1f} dB, {needed:.1f} needed ({closest} reaches {nearest[closest]:.1f})")
    return good, "; ".join(told)


def by_diffusers(model: Path, probes: Iterable[Probe]) -> list[Drawn]:
    """What diffusers draws, in float32 on the CPU."""
    import diffusers
    import torch

    pipeline = diffusers.DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    own, vae = pipeline.scheduler.config, pipeline.vae
    made = []
    for probe in probes:
        name, overrides = SCHEDULERS[probe.scheduler]
        pipeline.scheduler = getattr(diffusers, name).from_config(own, **overrides)
        seeds = range(probe.seed, probe.seed + len(probe.prompts))
        latents = pipeline(
            list(probe.prompts),
            num_inference_steps=probe.denoising_steps,
            guidance_scale=probe.guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            output_type="latent",
        ).images
        with torch.no_grad():
            pictures = (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        made.append(Drawn(latents.numpy(), pictures.permute(0, 2, 3, 1).numpy()))
    return made


def references(model: Path, folder: Path) -> tuple[Drawn, dict[str, Drawn]]:
    """What is right, and what is wrong: drawn once, and kept in `folder`."""
    facts = [repr(PROBE), repr(CONTROLS), *map(version, ("torch", "diffusers", "transformers"))]
    facts += [sha256(path.read_bytes()).hexdigest() for path in sorted(model.rglob("*")) if path.is_file()]
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"references-{sha256(json.dumps(facts).encode()).hexdigest()[:16]}.npz"
    with FileLock(f"{kept}.lock"):  # of several that begin at once, one draws
        if not kept.exists():
            drawn = by_diffusers(model, (PROBE, *CONTROLS.values()))
            arrays = {f"{kind}{index}": value for index, each in enumerate(drawn) for kind, value in vars(each).items()}
            with written(kept) as path, path.open("wb") as file:
                np.savez(file, **arrays)
    with np.load(kept) as held:
        right, *wrong = [Drawn(held[f"latents{i}"], held[f"pictures{i}"]) for i in range(1 + len(CONTROLS))]
    return right, dict(zip(CONTROLS, wrong, strict=True))


def by_engine(model: Path, folder: Path, engine: str, precision: str, options: Options, size: int = 128) -> Drawn:
    """What an engine draws of the probe, in the last of its runs. `size` is the model's, in pixels."""
    graphs, engines = Store(folder / "onnx"), Store(folder / "engines")
    checkpoint = open_checkpoint(model, engines.fingerprints)
    preparer = Preparer(checkpoint, find_runtime(engine, options), graphs, engines, name=model.name)
    request = Request(
        model=model.name,
        prompts=PROBE.prompts,
        batch_size=len(PROBE.prompts),
        engine=engine,
        precision=precision,
        scheduler=PROBE.scheduler,
        guidance_scale=PROBE.guidance_scale,
        denoising_steps=PROBE.denoising_steps,
        seed=PROBE.seed,
        height=size,
        width=size,
    )
    pipeline = preparer.prepare(request).pipeline
    seeds = tuple(range(PROBE.seed, PROBE.seed + len(PROBE.prompts)))
    batch = Batch(0, PROBE.prompts, seeds)
    for _ in range(RUNS):
        pipeline.forget()
        streams = [NoiseStream(seed) for seed in batch.seeds]
        *_, latents = pipeline.denoise(streams, pipeline.begin(batch, streams, None, StageClock()))
        pictures = pipeline.decode(latents)
    return Drawn(latents, pictures)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="parity.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engine")
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=list(LEAST))
    parser.add_argument("--provider")
    parser.add_argument("--quantization")
    parser.add_argument("--use-cuda-graph", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "gpu-check", help="for what is compiled")
    return parser


def main(arguments: list[str] | None = None) -> int:
    flags = parser().parse_args(arguments)
    model = EMBEDDED / "emoji"
    right, wrong = references(model, flags.output)
    options = Options(use_cuda_graph=flags.use_cuda_graph, provider=flags.provider, quantization=flags.quantization)
    failed = False
    for precision in flags.precision:
        words = [flags.engine, flags.provider, precision, flags.quantization, "graph" if flags.use_cuda_graph else None]
        name = " ".join(word for word in words if word)
        try:
            found = by_engine(model, flags.output, flags.engine, precision, options)
            good, told = verdict(right, wrong, found, None if flags.quantization else LEAST[precision])
        except DarkroomError as error:
            good, told = False, str(error)
        print(f"{'PASS' if good else 'FAIL'} {name}: {told}", flush=True)
        failed = failed or not good
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
