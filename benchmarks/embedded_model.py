#!/usr/bin/env python3
"""Cold start and steady state of the embedded model, against diffusers, on this machine.

python benchmarks/embedded_model.py [--turns 7] [--output benchmarks/results/embedded_model.json]
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"
PROMPT = "a red apple, noto style, blue background"
SEED = 3
BATCHES = (1, 4)
COLD_STEPS = (1, 20)
STEADY_STEPS = 20
RUNS_A_TURN = 3

sys.path.insert(0, str(DEMO))

from darkroom.catalog import TXT2IMG  # noqa: E402
from darkroom.engines.cpu import processor  # noqa: E402

EMOJI = TXT2IMG.versions["emoji"]

DIFFUSERS_SCRIPT = f"""
import sys, torch
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained({EMOJI.source!r}, torch_dtype=torch.float32)
generator = torch.Generator("cpu").manual_seed({SEED})
picture = pipeline({PROMPT!r}, num_inference_steps=int(sys.argv[1]), guidance_scale={EMOJI.guidance_scale},
                   height={EMOJI.size}, width={EMOJI.size}, generator=generator).images[0]
picture.save(sys.argv[2])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=7, help="turns of each contender; the first is not counted")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "embedded_model.json")
    parser.add_argument("--worker", choices=("darkroom", "diffusers"), help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=1, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker:
        seconds = {"darkroom": _darkroom_seconds, "diffusers": _diffusers_seconds}[flags.worker](flags.batch)
        print(json.dumps(seconds))
        return
    if flags.turns < 6:
        parser.error("--turns must be 6 or more: medians are over at least five")
    results = {
        "machine": _machine(),
        "prompt": PROMPT,
        "seed": SEED,
        "turns": flags.turns - 1,
        "cold": {},
        "steady": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for steps in COLD_STEPS:
            results["cold"][steps] = _compare(
                f"cold start, {steps} steps (seconds)",
                flags.turns,
                {
                    name: lambda c=command: _process_seconds(c)
                    for name, command in _cold_commands(steps, folder).items()
                },
            )
    for batch in BATCHES:
        results["steady"][batch] = _compare(
            f"steady state, batch {batch}, {STEADY_STEPS} steps (seconds a batch)",
            flags.turns,
            {name: lambda n=name, b=batch: _worker(n, b) for name in ("darkroom", "diffusers")},
        )
        for name in ("darkroom", "diffusers"):
            rate = batch / results["steady"][batch][name]["median"]
            results["steady"][batch][name]["images_per_second"] = round(rate, 3)
            print(f"    {name}: {rate:.2f} images/s")
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    flags.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"every run is in {flags.output}")


def _compare(title: str, turns: int, contenders: dict) -> dict:
    """Lets the contenders take turns; medians without the first turn, and diffusers over Darkroom."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(turns):
        for name, run in contenders.items():
            seconds[name].append(round(run(), 4))
    result: dict = {name: {"median": median(runs[1:]), "runs": runs[1:]} for name, runs in seconds.items()}
    result["ratio"] = round(result["diffusers"]["median"] / result["darkroom"]["median"], 2)
    medians = ", ".join(f"{name} {result[name]['median']:.3f}" for name in contenders)
    print(f"{title}: {medians}; diffusers takes {result['ratio']:.2f} times as long", flush=True)
    return result


def _cold_commands(steps: int, folder: str) -> dict[str, list[str]]:
    darkroom = [
        sys.executable,
        str(DEMO / "demo_txt2img.py"),
        PROMPT,
        "--seed",
        str(SEED),
        "--denoising-steps",
        str(steps),
        "--output-dir",
        folder,
    ]
    return {
        "darkroom": darkroom,
        "diffusers": [sys.executable, "-c", DIFFUSERS_SCRIPT, str(steps), str(Path(folder) / "diffusers.png")],
    }


def _process_seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    return time.perf_counter() - start


def _worker(name: str, batch: int) -> float:
    command = [sys.executable, __file__, "--worker", name, "--batch", str(batch)]
    finished = subprocess.run(command, check=True, capture_output=True, text=True)
    return median(json.loads(finished.stdout.splitlines()[-1]))


def _darkroom_seconds(batch: int) -> list[float]:
    """Seconds of each run after one that warms up, prompts encoded anew each time."""
    from darkroom.checkpoint import open_checkpoint
    from darkroom.engines import find_runtime
    from darkroom.engines.store import Store
    from darkroom.prepare import Preparer
    from darkroom.request import Request
    from darkroom.timing import StageClock

    engines = Store(ROOT / "engines")
    runtime = find_runtime("auto")
    request = Request(
        model="emoji",
        prompts=(PROMPT,),
        negative_prompt="",
        batch_size=batch,
        batch_count=1,
        height=EMOJI.size,
        width=EMOJI.size,
        denoising_steps=STEADY_STEPS,
        guidance_scale=EMOJI.guidance_scale,
        clip_skip=0,
        scheduler=None,
        seed=SEED,
        engine=runtime.name,
        precision="fp32",
        build="static-batch",
        onnx_opset=17,
    )
    checkpoint = open_checkpoint(Path(EMOJI.source), engines.fingerprints)
    pipeline = Preparer(checkpoint, runtime, Store(ROOT / "onnx"), engines).prepare(request).pipeline
    (images,) = request.batches()

    def run() -> None:
        pipeline.forget()
        pipeline.run(images, StageClock())

    return _timed(run)


def _diffusers_seconds(batch: int) -> list[float]:
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(EMOJI.source, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def run() -> None:
        generators = [torch.Generator("cpu").manual_seed(SEED + image) for image in range(batch)]
        pipeline(
            [PROMPT] * batch,
            num_inference_steps=STEADY_STEPS,
            guidance_scale=EMOJI.guidance_scale,
            height=EMOJI.size,
            width=EMOJI.size,
            generator=generators,
            output_type="np",
        )

    return _timed(run)


def _timed(run) -> list[float]:
    run()
    seconds = []
    for _ in range(RUNS_A_TURN):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def _machine() -> dict[str, str]:
    packages = ("torch", "diffusers", "transformers", "openvino", "numpy", "tokenizers")
    return {
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


if __name__ == "__main__":
    main()
