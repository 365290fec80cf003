"""Pictures of the embedded model by every engine that runs here, against diffusers in float32 on the CPU.

python benchmarks/gpu_parity.py FOLDER SECONDS [ENGINE ...] says one line for each, and ends with 1 if any is not alike.
What there is no time for is skipped by its name.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

import numpy as np  # noqa: E402

from darkroom.catalog import EMBEDDED  # noqa: E402
from darkroom.checkpoint import SD, open_checkpoint  # noqa: E402
from darkroom.cli.doctor import findings  # noqa: E402
from darkroom.engines import RUNTIMES, find_runtime  # noqa: E402
from darkroom.engines.runtime import NOTHING_ASKED, Options  # noqa: E402
from darkroom.engines.store import Store  # noqa: E402
from darkroom.pictures import psnr, to_bytes  # noqa: E402
from darkroom.prepare import Preparer  # noqa: E402
from darkroom.request import Request  # noqa: E402
from darkroom.timing import StageClock  # noqa: E402

ALIKE = {"fp32": 45.0, "fp16": 30.0, "bf16": 20.0}
"""Least PSNR in dB; what is quantized may differ as bf16 does."""

PROMPT, SEED, STEPS, GUIDANCE, SIZE, IMAGES = "a red apple, noto style, blue background", 5, 4, 4.0, 128, 2
ORDER = ("torch", "torch-compile", "onnxruntime", "openvino", "tensorrt")
"""What takes longer to build comes later."""

LATEST = 0.6
"""Of the time: what begins later would hardly end in it."""

RUNS = 4
"""Of each: the third and later ones are replays, where an engine captures CUDA graphs."""


@dataclass(frozen=True)
class Way:
    """An engine, and what is asked of it."""

    engine: str
    precision: str
    options: Options = NOTHING_ASKED

    def __str__(self) -> str:
        return " ".join([self.engine, self.precision, *(str(value) for value in vars(self.options).values() if value)])


def ways(engines: list[str]) -> list[Way]:
    """What is tried: on a GPU in several precisions, with CUDA graphs."""
    import torch

    from darkroom.engines.torch_tuning import QUANTIZATIONS

    if not torch.cuda.is_available():
        return [Way(engine, "fp32") for engine in engines]
    graphs = Options(use_cuda_graph=True)
    tried = {
        "torch": [Way("torch", "fp32"), Way("torch", "fp32", graphs), Way("torch", "bf16"), Way("torch", "fp16")]
        + [Way("torch", "bf16", Options(quantization=kind)) for kind in QUANTIZATIONS],
        "torch-compile": [
            Way("torch-compile", "fp32", graphs),
            Way("torch-compile", "bf16", graphs),
        ],
        "tensorrt": [Way("tensorrt", "fp32", graphs), Way("tensorrt", "fp16", graphs)],
    }
    return [way for engine in engines for way in tried.get(engine, [Way(engine, "fp32")])]


def request_for(way: Way) -> Request:
    return Request(
        model="emoji",
        prompts=(PROMPT,),
        negative_prompt=None,
        batch_size=IMAGES,
        batch_count=1,
        height=SIZE,
        width=SIZE,
        denoising_steps=STEPS,
        guidance_scale=GUIDANCE,
        clip_skip=0,
        scheduler=None,
        seed=SEED,
        engine=way.engine,
        precision=way.precision,
        build="static-batch",
        onnx_opset=17,
    )


def expected() -> np.ndarray:
    """The pictures by diffusers (B, H, W, 3) uint8: the reference shares nothing with the engines but the weights."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(EMBEDDED / "emoji", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(SEED + image) for image in range(IMAGES)]
    made = pipeline([PROMPT] * IMAGES, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators)
    return np.stack([np.array(image) for image in made.images])


def likeness(way: Way, folder: Path, reference: np.ndarray) -> float:
    """The least PSNR in dB of any image of any run."""
    graphs, engines = Store(folder / "onnx"), Store(folder / "engines")
    checkpoint = open_checkpoint(EMBEDDED / "emoji", engines.fingerprints, (SD,))
    request = request_for(way)
    preparer = Preparer(checkpoint, find_runtime(way.engine, way.options), graphs, engines, name="emoji")
    pipeline = preparer.prepare(request).pipeline
    (batch,) = request.batches()
    found = []
    for _ in range(RUNS):
        pipeline.forget()
        pictures = pipeline.run(batch, StageClock())
        found += [psnr(to_bytes(one, "a picture"), other) for one, other in zip(pictures, reference, strict=True)]
    return min(found)


def main() -> int:
    folder, seconds, *named = sys.argv[1:]
    began, reference, failed = time.perf_counter(), expected(), 0
    names = named or sorted(RUNTIMES, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    usable = {finding.engine: finding.usable for finding in findings()}
    for engine in (name for name in names if not usable[name]):
        print(f"{engine}: not here", flush=True)
    for way in ways([name for name in names if usable[name]]):
        start = time.perf_counter()
        if start - began > LATEST * float(seconds):
            print(f"{way}: skipped, {start - began:.0f} of {seconds} s are over", flush=True)
            continue
        try:
            found = likeness(way, Path(folder), reference)
            least = ALIKE["bf16" if way.options.quantization else way.precision]
            told, failed = f"{found:.1f} dB (at least {least:.0f})", failed + (found < least)
        except Exception as error:  # whatever keeps one engine away, the others are there
            told = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            failed += "--quantization" not in told  # torchao is extra, and says so
        print(f"{way}: {told}, {time.perf_counter() - start:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
