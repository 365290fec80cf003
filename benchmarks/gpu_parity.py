"""Pictures of the embedded model by one engine, against diffusers in float32 on the CPU.

python benchmarks/gpu_parity.py FOLDER SECONDS PART says one line for each way in which that engine is tried, and ends
with 1 if any is not alike, or none ran. What cannot be had here, or has no time, is skipped by its name.
"""

import os
import sys
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

import numpy as np  # noqa: E402

from darkroom.checkpoint.catalog import EMBEDDED  # noqa: E402
from darkroom.checkpoint.folder import open_checkpoint  # noqa: E402
from darkroom.engines import find_runtime  # noqa: E402
from darkroom.engines.runtime import NOTHING_ASKED, Options, Runtime  # noqa: E402
from darkroom.errors import Failed, InvalidRequest  # noqa: E402
from darkroom.pipeline.pictures import psnr, to_bytes  # noqa: E402
from darkroom.pipeline.timing import StageClock  # noqa: E402
from darkroom.prepare import Preparer  # noqa: E402
from darkroom.request import Request  # noqa: E402
from darkroom.store.fingerprints import hash_json  # noqa: E402
from darkroom.store.store import Store  # noqa: E402

ALIKE = {"fp32": 45.0, "fp16": 30.0, "bf16": 20.0}
"""Least PSNR in dB; what is quantized may differ as bf16 does."""

PROMPT, SEED, STEPS, GUIDANCE, SIZE, IMAGES = "a red apple, noto style, blue background", 5, 4, 4.0, 128, 2

os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)  # how the store keeps what is compiled belongs to what is tried

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
        values = vars(self.options)
        asked = (name.replace("_", "-") if values[name] is True else str(values[name]) for name in self.options.asked())
        return " ".join([self.engine, self.precision, *asked])


GRAPHS = Options(use_cuda_graph=True)
CUDA, ITS_TENSORRT = (Options(use_cuda_graph=True, provider=provider) for provider in ("cuda", "tensorrt"))
TENSORRT = Way("tensorrt", "fp32", GRAPHS), Way("tensorrt", "fp16", GRAPHS)
RTX = "tensorrt-rtx"

PARTS = {
    "torch": (Way("torch", "fp32"), Way("torch", "fp32", GRAPHS), Way("torch", "bf16"), Way("torch", "fp16")),
    "torch-quantized": tuple(Way("torch", "bf16", Options(quantization=kind)) for kind in ("int8", "fp8")),
    "torch-compile": (Way("torch-compile", "fp32", GRAPHS), Way("torch-compile", "bf16", GRAPHS)),
    "onnxruntime-cuda": (
        Way("onnxruntime", "fp32", Options(provider="cuda")),
        Way("onnxruntime", "fp32", CUDA),
        Way("onnxruntime", "fp16", CUDA),
    ),
    "onnxruntime-tensorrt": (Way("onnxruntime", "fp32", ITS_TENSORRT), Way("onnxruntime", "fp16", ITS_TENSORRT)),
    "tensorrt": TENSORRT,
    RTX: TENSORRT,
    "jax": (Way("jax", "fp32"), Way("jax", "bf16")),
    "onnxruntime": (Way("onnxruntime", "fp32"),),
    "openvino": (Way("openvino", "fp32"),),
}
"""What is tried on a GPU; elsewhere, each engine once."""

ON_CPU = ("onnxruntime", "openvino")
"""The parts that compute there on any machine."""


def ways(part: str) -> list[Way]:
    """What is tried here."""
    import torch

    if torch.cuda.is_available():
        return list(PARTS[part])
    plain = (replace(way, precision="fp32", options=replace(way.options, use_cuda_graph=False)) for way in PARTS[part])
    return list(dict.fromkeys(plain))


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


def expected(folder: Path) -> np.ndarray:
    """The pictures by diffusers (B, H, W, 3) uint8: the reference shares nothing with the engines but the weights.

    It is kept in the folder for the parts that come after.
    """
    revision = open_checkpoint(EMBEDDED / "emoji", Store(folder / "engines").fingerprints).revision
    made_by = [version(package) for package in ("torch", "diffusers", "transformers")]
    asked = [PROMPT, SEED, STEPS, GUIDANCE, SIZE, IMAGES]
    file = folder / f"expected-{hash_json([revision, made_by, asked])[:16]}.npy"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"partial-{os.getpid()}.npy"
        np.save(partial, _by_diffusers())
        partial.replace(file)
    return np.load(file)


def _by_diffusers() -> np.ndarray:
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(EMBEDDED / "emoji", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(SEED + image) for image in range(IMAGES)]
    made = pipeline([PROMPT] * IMAGES, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators)
    return np.stack([np.array(image) for image in made.images])


def likeness(way: Way, runtime: Runtime, folder: Path, reference: np.ndarray) -> float:
    """The least PSNR in dB of any image of any run."""
    graphs, engines = Store(folder / "onnx"), Store(folder / "engines")
    checkpoint = open_checkpoint(EMBEDDED / "emoji", engines.fingerprints)
    request = request_for(way)
    pipeline = Preparer(checkpoint, runtime, graphs, engines, name="emoji").prepare(request).pipeline
    (batch,) = request.batches()
    found = []
    for _ in range(RUNS):
        pipeline.forget()
        pictures = pipeline.run(batch, StageClock())
        found += [psnr(to_bytes(one, "a picture"), other) for one, other in zip(pictures, reference, strict=True)]
    return min(found)


def check_place(part: str, device: str) -> None:
    """Raises `Failed` for what would compute on the CPU where torch finds a GPU."""
    import torch

    if torch.cuda.is_available() and part not in ON_CPU and device.startswith("CPU"):
        raise Failed("it finds no GPU, where torch finds one, and would be computed on the CPU")


def leave_out_tensorrt(folder: Path) -> None:
    """Lets TensorRT-RTX be found, here and in processes that build, where plain TensorRT is installed too."""
    first = folder / "without-tensorrt"
    first.mkdir(parents=True, exist_ok=True)
    (first / "tensorrt.py").write_text('raise ImportError("left out")\n', encoding="ascii")
    sys.path.insert(0, str(first))


def not_here(way: Way) -> str | None:
    """Why this machine cannot be asked for it; None where it can."""
    try:
        find_runtime(way.engine, way.options)
    except InvalidRequest as error:
        return str(error)
    except Exception:  # what is broken is not absent: trying it tells
        return None
    return None


def tried(way: Way, part: str, folder: Path) -> tuple[str, bool]:
    """What came of it, in half a line, and whether that is well."""
    try:
        runtime = find_runtime(way.engine, way.options)
        if way.engine == "tensorrt" and not runtime.unusable() and not runtime.is_meant_for_this_gpu():
            return f"skipped, {runtime.device()} is no GPU that TensorRT-RTX says it is for", True
        check_place(part, runtime.device())
        found = likeness(way, runtime, folder, expected(folder))
    except Exception as error:  # whatever keeps one way from working, others may
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", False
    least = ALIKE["bf16" if way.options.quantization else way.precision]
    return f"{found:.1f} dB (at least {least:.0f}), {runtime.device()}", found >= least


def main(folder: Path, seconds: float, part: str) -> int:
    began = time.perf_counter()
    wrong: list[str] = []
    skipped: list[str] = []
    if part == RTX:
        leave_out_tensorrt(folder)
    asked = ways(part)
    for way in asked:
        start = time.perf_counter()
        late = f"{start - began:.0f} of {seconds:.0f} s are over" if start - began > LATEST * seconds else None
        if reason := late or not_here(way):
            skipped.append(f"{way}: skipped, {reason}")
            print(skipped[-1], flush=True)
            continue
        told, well = tried(way, part, folder)
        wrong += [] if well else [f"{way}: {told}"]
        print(f"{way}: {told}, {time.perf_counter() - start:.0f} s", flush=True)
    if len(skipped) == len(asked):
        wrong = skipped
    if wrong:
        print("; ".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]))
