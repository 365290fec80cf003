#!/usr/bin/env python3
"""Everything that takes an NVIDIA GPU, in under nine minutes and without a network: tests, parity, and the table.

tools/gpu_check.sh [--wheels] [--dry-run] [--output DIR] [--parts NAME ...] [--seconds N] [--mode MODE]

Parts run one after the other, each in processes of its own and within its own time; one that fails or runs out of time
ends alone. Results are kept as they come, in DIR/results.jsonl, which `demo/benchmark.py report` reads; what is in
there is not measured again, so a second run, which also finds what the first compiled, goes on where that ended.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

SECONDS = 525.0
"""For all parts: nine minutes, less what starting and ending takes."""

NEEDED = (
    "torch",
    "diffusers",
    "transformers",
    "safetensors",
    "numpy",
    "tokenizers",
    "pillow",
    "rich",
    "huggingface_hub",
    "filelock",
    "pytest",
    "matplotlib",
)
EXTRA = {
    "torchao": "--quantization",
    "cuda-python": "the GPU's name in results, and TensorRT",
    "onnxruntime": "its parity",
    "onnx": "its parity, and TensorRT's",
    "openvino": "its parity",
}
TORCHAO = "torchao==0.18.0"
"""What is in no list of requirements: the release that was tried with the torch that is."""

PARITY, SLOW = 100, 400
"""Seconds for the parity of all engines; and for one on a CPU that is busy."""

LEAST = 45.0
"""Seconds without which a part of the table is not begun: imports and networks alone take half of them."""

MODES = ("default", "reduce-overhead", "max-autotune")


ALL = ("eager", "ours", "compiled")
XL, XL_TURBO, SD, SD_TURBO = (
    ("xl-1.0", 1024, 5.0),
    ("sdxl-turbo", 512, 0.0),
    ("sd-1.5", 512, 7.5),
    ("sd-turbo", 512, 0.0),
)
"""Models, with pixels along each side and guidance."""

TABLE = (
    ("sdxl", XL, ((1, 30), (1, 20)), ALL, 230),
    ("sdxl-turbo", XL_TURBO, ((1, 4), (1, 1)), ALL, 170),
    ("sdxl-throughput", XL, ((8, 20),), ALL, 170),
    ("sd-1.5", SD, ((1, 30), (1, 20), (1, 4), (1, 1)), ALL, 120),
    ("sd-turbo", SD_TURBO, ((1, 4), (1, 1)), ALL, 110),
    ("sdxl-trace", XL, ((1, 30), (1, 4), (1, 1)), ("eager", "ours", "ours-eager"), 120),
    ("sdxl-quantized", XL, ((1, 30),), ("eager", "ours-int8", "ours-fp8"), 180),
    ("sdxl-batches", XL, ((4, 20), (4, 30), (8, 30)), ALL, 240),
    ("sdxl-turbo-batches", XL_TURBO, ((4, 4), (4, 1), (8, 4), (8, 1)), ALL, 200),
    ("sd-1.5-batches", SD, ((4, 20), (4, 30), (8, 20), (8, 30)), ALL, 240),
    ("sd-turbo-batches", SD_TURBO, ((4, 4), (4, 1), (8, 4), (8, 1)), ALL, 160),
)
"""The parts of the table, the most important first: name, model, cells (batch, steps), contenders, most seconds."""

TINY = (("tiny-trace", ("tiny", 64, 7.5), ((1, 4), (2, 2)), ("eager", "ours-eager"), 400),)


@dataclass(frozen=True)
class Job:
    """A part by its name: the most seconds that it gets, those without which it is not begun, and its command."""

    name: str
    seconds: float
    least: float
    command: tuple[str, ...]
    what: str


def jobs(output: Path, mode: str, tiny: bool) -> list[Job]:
    """The parts in their order: what everything else rests on, then the most important cells first."""
    python, here = sys.executable, ROOT / "benchmarks"
    tests = (
        python,
        "-m",
        "pytest",
        "-q",
        "-o",
        "addopts=--import-mode=importlib",
        "-m",
        "gpu",
        str(ROOT / "tests/gpu"),
    )
    parity = (python, str(here / "gpu_parity.py"), str(output / "parity"))
    table = [_cells(output, mode, *asked) for asked in (TINY if tiny else TABLE)]
    if tiny:
        return [Job("parity", SLOW, 1, (*parity, str(SLOW), "torch"), "torch against diffusers in float32"), *table]
    return [
        Job("tests", 75, 20, tests, "the tests marked gpu"),
        Job("parity", PARITY, 20, (*parity, str(PARITY)), "every engine against diffusers in float32"),
        *table,
    ]


def _cells(
    output: Path,
    mode: str,
    name: str,
    of: tuple[str, int, float],
    cells: tuple[tuple[int, int], ...],
    contenders: tuple[str, ...],
    seconds: float,
) -> Job:
    """A part of the table: see `gpu_cells.Part`, which the command names. Those called so write a trace."""
    model, size, guidance = of
    device, precision = ("cpu", "fp32") if model == "tiny" else ("cuda", "bf16")
    work = {"model": model, "size": size, "guidance_scale": guidance, "precision": precision, "device": device}
    trace = str(output / f"{name}.json") if name.endswith("-trace") else None
    part = {"work": work, "cells": cells, "contenders": contenders, "results": str(output / "results.jsonl")}
    command = (sys.executable, str(ROOT / "benchmarks/gpu_cells.py"), json.dumps(part | {"mode": mode, "trace": trace}))
    steps = ", ".join(f"{batch} x {steps}" for batch, steps in cells)
    told = f"{model}, {size} pixels, {precision}; {', '.join(contenders)}; batch x steps: {steps}"
    return Job(name, seconds, LEAST, command, told)


def run(job: Job, seconds: float, log: Path, environment: dict[str, str]) -> str | None:
    """Runs a part. Returns why it failed, or None; what it says goes through, what libraries complain of into `log`."""
    with log.open("wb") as complaints:
        process = subprocess.Popen(job.command, cwd=ROOT, env=environment, stderr=complaints, start_new_session=True)
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"stopped: it took more than {seconds:.0f} s"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # and the compiler's own workers
            except ProcessLookupError:
                pass
            process.wait()
    if code == 0:
        return None
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] or [""]
    return f"failed with exit code {code}: {last[0][:160]} ({log})"


def check(output: Path, parts: list[Job], seconds: float) -> list[str]:
    """Runs the parts that fit into the time. Returns what went wrong."""
    began, wrong = time.perf_counter(), []
    output.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(output / "inductor"))
    for job in parts:
        left = seconds - (time.perf_counter() - began)
        if left < job.least:
            print(
                f"== {job.name}: skipped, {max(left, 0):.0f} s are left and it takes {job.least:.0f} or more",
                flush=True,
            )
            continue
        print(f"== {job.name}: {job.what}", flush=True)
        start = time.perf_counter()
        reason = run(job, min(job.seconds, left), output / f"{job.name}.log", environment)
        print(f"== {job.name}: {time.perf_counter() - start:.0f} s{f', {reason}' if reason else ''}", flush=True)
        if reason:
            wrong.append(f"{job.name} {reason}")
    return wrong


def say_wheels() -> None:
    """What to bring to a machine without a network, and what this one has of it."""
    pins = {}
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        pin = line.split("#")[0].split(";")[0].strip()
        pins[pin.split("==")[0].split("[")[0].lower()] = pin
    pins["torchao"] = TORCHAO
    print("Bring, for this Python and the GPU's machine (torch: a build with CUDA):")
    for name in (*NEEDED, *EXTRA):
        try:
            here = f"{version(name)} is here"
        except PackageNotFoundError:
            here = "not here"
        use = f"  for {EXTRA[name]}" if name in EXTRA else ""
        print(f"  {pins.get(name, name):<28}{here}{use}")
    asked = " ".join(f'"{pins.get(name, name)}"' for name in (*NEEDED, *EXTRA))
    print(f"With what they need in turn:\n  python -m pip download -d wheels {asked}")
    print("There:\n  python -m pip install --no-index --find-links wheels -e . " + asked)


def ready(tiny: bool) -> str | None:
    """What keeps this machine from running the check."""
    missing = [name for name in NEEDED if importlib.util.find_spec({"pillow": "PIL"}.get(name, name)) is None]
    if missing:
        return f"{', '.join(missing)} cannot be imported here: see --wheels."
    import torch

    if not tiny and not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} finds no CUDA device here: see --wheels, --dry-run, or try it out with --tiny."
        )
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wheels", action="store_true", help="say which packages to bring, and stop")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    parser.add_argument("--tiny", action="store_true", help="try the command out: a tiny model on the CPU")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "gpu-check", help="default: output/gpu-check")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="these alone, by the names that --dry-run says")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all parts; default {SECONDS:.0f}")
    parser.add_argument(
        "--mode", choices=MODES, default="reduce-overhead", help="torch.compile's, of all; default: this"
    )
    flags = parser.parse_args(arguments)
    parts = jobs(flags.output.absolute(), flags.mode, flags.tiny)
    if unknown := set(flags.parts or ()) - {job.name for job in parts}:
        parser.error(f"no part is called {', '.join(sorted(unknown))}: {', '.join(job.name for job in parts)}")
    parts = [job for job in parts if not flags.parts or job.name in flags.parts]
    if importlib.util.find_spec("torchao") is None:
        parts = [job for job in parts if not job.name.endswith("-quantized")]  # an extra: see --wheels
    if flags.wheels:
        say_wheels()
        return 0
    if flags.dry_run:
        for job in parts:
            print(f"{job.name}: up to {job.seconds:.0f} s; {job.what}")
        print(f"In this order, until {flags.seconds:.0f} s are over; results: {flags.output / 'results.jsonl'}")
        return 0
    if reason := ready(flags.tiny):
        print(f"gpu_check.sh: {reason}", file=sys.stderr)
        return 2
    wrong = check(flags.output.absolute(), parts, flags.seconds)
    from benchmarks.gpu_targets import say_targets

    say_targets(flags.output / "results.jsonl")
    for each in wrong:
        print(f"WRONG: {each}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
