#!/usr/bin/env python3
"""Everything that takes an NVIDIA GPU, in under nine minutes and without a network: tests, parity, and the table.

tools/gpu_check.sh [--wheels] [--dry-run] [--output DIR] [--parts NAME ...] [--seconds N] [--mode MODE]

Parts run one after the other, each in processes of its own and within its own time; one that fails or runs out of time
ends alone. Results are kept as they come, in DIR/results.jsonl, which `demo/benchmark.py report` reads; what this
machine has in there, with the same versions, is not measured again, so a second run, which also finds what the first
compiled, goes on where that ended.

Exit codes: 0, or 1 where a part failed or one that --parts asks for could not run, or 2 where none can run here.
"""

import argparse
import configparser
import ctypes
import importlib.util
import json
import os
import re
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
    "cuda-python": "TensorRT, ONNX Runtime on the GPU, and the GPU's name in results",
    "onnx": "all engines but torch's and jax",
    "onnxruntime-gpu": "the same; in place of onnxruntime, which must not be beside it",
    "onnx-graphsurgeon": "TensorRT, and ONNX Runtime on the GPU",
    "polygraphy": "TensorRT",
    "tensorrt": "TensorRT",
    "tensorrt-rtx": "TensorRT-RTX",
    "jax-cuda13-plugin": "jax",
    "torchax": "jax",
    "flatbuffers": "jax",
    "openvino": "openvino",
}
FOR_CUDA = {
    "onnxruntime-gpu": ("onnxruntime", "onnxruntime-gpu[cuda,cudnn]"),
    "jax-cuda13-plugin": ("jax", "jax[cuda13]"),
}
"""What is asked for in the version of what: for CUDA 13, as torch on the package index is. Libraries of CUDA 12 are
installed into the same folders."""

INDEX = "https://pypi.nvidia.com"
"""Where TensorRT's libraries are."""

LIBRARY, TENSORRT_10 = "libnvinfer.so.10", "tensorrt-cu13-libs>=10.13,<11"
"""What ONNX Runtime's TensorRT provider links to, and what has it: TensorRT 11, of the same name, does not."""

GRAPHS = ("onnx", "onnxruntime or onnxruntime-gpu")
TENSORRT = (*GRAPHS, "onnx-graphsurgeon", "polygraphy", "cuda-python")
PROVIDERS = ("onnx", "onnx-graphsurgeon", "cuda-python", "onnxruntime-gpu")
"""What they need: engines that run graphs, TensorRT, and ONNX Runtime's providers on a GPU."""

PARITY = (
    ("torch", (), 40),
    ("onnxruntime-cuda", PROVIDERS, 60),
    ("tensorrt", (*TENSORRT, "tensorrt or tensorrt-cu13 or tensorrt-cu12"), 90),
    ("torch-compile", (), 90),
    ("jax", ("jax-cuda13-plugin or jax-cuda12-plugin", "torchax", "flatbuffers"), 90),
    ("onnxruntime-tensorrt", (*PROVIDERS, LIBRARY), 90),
    ("tensorrt-rtx", (*TENSORRT, "tensorrt-rtx"), 60),
    ("torch-quantized", ("torchao",), 60),
    ("onnxruntime", GRAPHS, 40),
    ("openvino", (*GRAPHS, "openvino"), 40),
)
"""The parts of `gpu_parity`, the most important first: name, what they need, most seconds."""

FIRST = 3
"""So many of these come before the table; and so many parts of that, before the rest of these."""

SLOW = 400
"""Seconds for the parity of an engine on a CPU that is busy."""

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

FEW_STEPS = tuple((batch, steps) for batch in (1, 4, 8) for steps in (4, 1))
MANY_STEPS = tuple((batch, steps) for batch in (1, 4, 8) for steps in (20, 30))
"""What models are seldom asked for, and the table holds for completeness."""

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
    ("sdxl-few-steps", XL, FEW_STEPS, ALL, 200),
    ("sd-1.5-few-steps", SD, FEW_STEPS, ALL, 160),
    ("sdxl-turbo-many-steps", XL_TURBO, MANY_STEPS, ALL, 240),
    ("sd-turbo-many-steps", SD_TURBO, MANY_STEPS, ALL, 200),
)
"""The parts of the table, the most important first: name, model, cells (batch, steps), contenders, most seconds."""

TABLE_NEEDS = {"sdxl-quantized": ("torchao",)}
"""What they need beside torch."""

TINY = (("tiny-trace", ("tiny", 64, 7.5), ((1, 4), (2, 2)), ("eager", "ours-eager"), 400),)


@dataclass(frozen=True)
class Job:
    """A part by its name: the most seconds that it gets, those without which it is not begun, and its command.

    `needs` are packages, or libraries that the loader finds; " or " stands between those of which one will do.
    """

    name: str
    seconds: float
    least: float
    command: tuple[str, ...]
    what: str
    needs: tuple[str, ...] = ()

    def lacks(self) -> str | None:
        """What keeps it from running on this machine; None where nothing does."""
        missing = [need for need in self.needs if not any(map(is_here, need.split(" or ")))]
        return f"not here: {', '.join(missing)} (see --wheels)" if missing else None


def is_here(name: str) -> bool:
    """Whether a package is installed, or a library can be loaded."""
    try:
        ctypes.CDLL(name) if ".so" in name else version(name)
    except (OSError, PackageNotFoundError):
        return False
    return True


def jobs(output: Path, mode: str, tiny: bool) -> list[Job]:
    """The parts in their order: what everything else rests on, then the most important cells first."""
    tests = (
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-o",
        "addopts=--import-mode=importlib",
        "-m",
        "gpu",
        str(ROOT / "tests/gpu"),
    )
    table = [_cells(output, mode, *asked) for asked in (TINY if tiny else TABLE)]
    if tiny:
        return [_parity(output, "torch", (), SLOW), *table]
    parity = [_parity(output, *asked) for asked in PARITY]
    first = Job("tests", 75, 20, tests, "the tests marked gpu")
    return [first, *parity[:FIRST], *table[:FIRST], *parity[FIRST:], *table[FIRST:]]


def _parity(output: Path, name: str, needs: tuple[str, ...], seconds: float) -> Job:
    """The parity of an engine: see `gpu_parity`."""
    command = (sys.executable, str(ROOT / "benchmarks/gpu_parity.py"), str(output / "parity"), str(seconds), name)
    return Job(f"parity-{name}", seconds, 20, command, "pictures against diffusers in float32", needs)


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
    return Job(name, seconds, LEAST, command, told, TABLE_NEEDS.get(name, ()))


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


def check(output: Path, parts: list[Job], seconds: float, by_name: bool = False) -> list[str]:
    """Runs the parts that can run here and fit into the time. Returns what went wrong.

    Parts that were asked for `by_name` go wrong where they cannot run, too.
    """
    began, wrong = time.perf_counter(), []
    output.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(output / "inductor"))
    for job in parts:
        left = seconds - (time.perf_counter() - began)
        late = f"{max(left, 0):.0f} s are left and it takes {job.least:.0f} or more" if left < job.least else None
        if reason := job.lacks() or late:
            print(f"== {job.name}: skipped, {reason}", flush=True)
            wrong += [f"{job.name} did not run: {reason}"] if by_name else []
            continue
        print(f"== {job.name}: {job.what}", flush=True)
        start = time.perf_counter()
        reason = run(job, min(job.seconds, left), output / f"{job.name}.log", environment)
        print(f"== {job.name}: {time.perf_counter() - start:.0f} s{f', {reason}' if reason else ''}", flush=True)
        if reason:
            wrong.append(f"{job.name} {reason}")
    return wrong


def requirements() -> dict[str, str]:
    """What to ask pip for, by the package's name: requirements.txt's version, else the range of setup.cfg's extras."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    lists = [*setup["options.extras_require"].values(), (ROOT / "requirements.txt").read_text(encoding="utf-8")]
    lines = (line.split("#")[0].split(";")[0].strip() for text in lists for line in text.splitlines())
    known = {re.split(r"[^\w.-]", line)[0].lower(): line for line in lines if line}
    builds = {name: known[plain].replace(plain, build, 1) for name, (plain, build) in FOR_CUDA.items()}
    return {name: (known | builds)[name] for name in (*NEEDED, *EXTRA)}


def say_wheels() -> None:
    """What to bring to a machine without a network, and what this one has of it."""
    asked = requirements()
    print("Bring, for this Python and the GPU's machine, whose driver knows CUDA 13 (torch: a build with CUDA):")
    for name, requirement in asked.items():
        here = f"{version(name)} is here" if is_here(name) else "not here"
        print(f"  {requirement:<38}{here}{f'  for {EXTRA[name]}' if name in EXTRA else ''}")
    here = "is here" if is_here(LIBRARY) else "not here"
    print(f"  {TENSORRT_10:<38}{LIBRARY} {here}  for ONNX Runtime's TensorRT provider, in a folder of its own")
    words = " ".join(f'"{requirement}"' for requirement in asked.values())
    wheel, install = "python -m pip wheel --extra-index-url " + INDEX, "python -m pip install --no-index"
    print(f"With what they need in turn:\n  {wheel} -w wheels {words}")
    print(f'  {wheel} -w wheels-10 --no-deps "{TENSORRT_10}"')
    print(f"There, without onnxruntime:\n  {install} --find-links wheels -e . {words}")
    print(f'  {install} --find-links wheels-10 --no-deps --target tensorrt-10 "{TENSORRT_10}"')
    print("  LD_LIBRARY_PATH=$PWD/tensorrt-10/tensorrt_libs tools/gpu_check.sh")


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
    if flags.wheels:
        say_wheels()
        return 0
    results = flags.output / "results.jsonl"
    if flags.dry_run:
        lacking = {job.name: job.lacks() for job in parts}
        for job in parts:
            reason = lacking[job.name]
            print(f"{job.name}: {f'skipped, {reason}' if reason else f'up to {job.seconds:.0f} s; {job.what}'}")
        print(f"In this order, until {flags.seconds:.0f} s are over; results: {results}")
        return 1 if flags.parts and any(lacking.values()) else 0
    if reason := ready(flags.tiny):
        print(f"gpu_check.sh: {reason}", file=sys.stderr)
        return 2
    wrong = check(flags.output.absolute(), parts, flags.seconds, by_name=bool(flags.parts))
    from benchmarks.gpu_cells import machine_with
    from benchmarks.gpu_targets import say_targets

    say_targets(results, machine_with("cpu" if flags.tiny else "cuda"))
    for each in wrong:
        print(f"WRONG: {each}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
