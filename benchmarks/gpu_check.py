#!/usr/bin/env python3
"""Everything that takes an NVIDIA GPU, in under nine minutes and without a network: tests, parity, and the table.

tools/gpu_check.sh [--wheels] [--dry-run] [--tiny] [--output DIR] [--parts NAME ...] [--seconds N] [--mode MODE]

Each part runs in processes of its own and within its own time, ends alone where it fails or runs out of time, and has a
line of verdict: PASS, FAIL or SKIP, and why. Tests and parity (`parity.py`) run side by side, for they measure no time;
then the parts of the table, one after the other. Those are comparisons of `demo/benchmark.py`, whose results are kept
as they come in DIR/results.jsonl, which its `report` reads; what this machine has in there, with the same versions, is
not measured again, so a second run, which also finds what the first compiled, goes on where that ended.

Exit codes: 0, or 1 where a part failed or one that --parts asks for could not run, or 2 where none can run here.
"""

import argparse
import configparser
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from darkroom.bench.machine import nvidia  # noqa: E402

SECONDS = 525.0
"""For all parts: nine minutes, less what starting and ending takes."""

NEEDED = (
    "torch diffusers transformers safetensors numpy tokenizers pillow rich huggingface_hub filelock pytest matplotlib"
)
EXTRA = "torchao cuda-python onnx onnxruntime-gpu onnx-graphsurgeon polygraphy tensorrt tensorrt-rtx jax-cuda13-plugin"
EXTRA += " torchax flatbuffers openvino"
"""What all parts need, and what some do. onnxruntime must not be beside onnxruntime-gpu."""

FOR_CUDA = {
    "onnxruntime-gpu": ("onnxruntime", "onnxruntime-gpu[cuda,cudnn]"),
    "jax-cuda13-plugin": ("jax", "jax[cuda13]"),
}
"""What is asked for in the version of what: for CUDA 13, as torch on the package index is. Libraries of CUDA 12 are
installed into the same folders."""

LIBRARY, TENSORRT_10 = "libnvinfer.so.10", "tensorrt-cu13-libs>=10.13,<11"
"""What ONNX Runtime's TensorRT provider links to, and what has it: TensorRT 11, of the same name, does not."""

GRAPHS = ("onnx", "onnxruntime or onnxruntime-gpu")
TENSORRT = (*GRAPHS, "onnx-graphsurgeon", "polygraphy", "cuda-python")
PROVIDERS = ("onnx", "onnx-graphsurgeon", "cuda-python", "onnxruntime-gpu")
"""What they need: engines that run graphs, TensorRT, and ONNX Runtime's providers on a GPU."""

RTX, NOT_FOR_RTX = "tensorrt-rtx", ("8.0", "9.0")
"""A part, and the compute capabilities of data centres' GPUs, which that library says it is not for."""

GRAPH = "--use-cuda-graph"
TENSORRT_WAYS = f"tensorrt --precision fp32 fp16 {GRAPH}"
PARITY = {
    "torch": (40, (), f"torch --precision fp32; torch --precision fp32 bf16 fp16 {GRAPH}"),
    "onnxruntime-cuda": (
        60,
        PROVIDERS,
        f"onnxruntime --precision fp32 --provider cuda; onnxruntime --precision fp32 fp16 --provider cuda {GRAPH}",
    ),
    "tensorrt": (90, (*TENSORRT, "tensorrt or tensorrt-cu13 or tensorrt-cu12"), TENSORRT_WAYS),
    "torch-compile": (90, (), f"torch-compile --precision fp32 bf16 {GRAPH}"),
    "jax": (90, ("jax-cuda13-plugin or jax-cuda12-plugin", "torchax", "flatbuffers"), "jax --precision fp32 bf16"),
    "onnxruntime-tensorrt": (
        90,
        (*PROVIDERS, LIBRARY),
        f"onnxruntime --precision fp32 fp16 --provider tensorrt {GRAPH}",
    ),
    RTX: (60, (*TENSORRT, RTX), TENSORRT_WAYS),
    "torch-quantized": (
        60,
        ("torchao",),
        "torch --precision bf16 --quantization int8; torch --precision bf16 --quantization fp8",
    ),
    "onnxruntime": (40, GRAPHS, "onnxruntime --precision fp32"),
    "openvino": (40, (*GRAPHS, "openvino"), "openvino --precision fp32"),
}
"""Engines that are held against diffusers in float32, the most important first: most seconds, what they need, and each
way in which they are tried."""

SIDE_BY_SIDE = 4
"""Of the parts that measure no time, so many at once: compilers keep several cores busy each, and the GPU hardly."""

LEAST = 45.0
"""Seconds without which a part of the table is not begun: imports and networks alone take half of them."""

TABLE = {
    "sdxl": (230, "xl-1.0 --batch-size 1 --denoising-steps 30 20"),
    "sdxl-turbo": (170, "sdxl-turbo --batch-size 1 --denoising-steps 4 1"),
    "sdxl-throughput": (170, "xl-1.0 --batch-size 8 --denoising-steps 20"),
    "sd-1.5": (120, "sd-1.5 --batch-size 1 --denoising-steps 30 20 4 1"),
    "sd-turbo": (110, "sd-turbo --batch-size 1 --denoising-steps 4 1"),
    "sdxl-eager": (120, "xl-1.0 --batch-size 1 --denoising-steps 30 4 1 --engine torch"),
    "sdxl-int8": (120, "xl-1.0 --batch-size 1 --denoising-steps 30 --quantization int8"),
    "sdxl-fp8": (120, "xl-1.0 --batch-size 1 --denoising-steps 30 --quantization fp8"),
    "sdxl-batches": (240, "xl-1.0 --batch-size 4 8 --denoising-steps 20 30"),
    "sdxl-turbo-batches": (200, "sdxl-turbo --batch-size 4 8 --denoising-steps 4 1"),
    "sd-1.5-batches": (240, "sd-1.5 --batch-size 4 8 --denoising-steps 20 30"),
    "sd-turbo-batches": (160, "sd-turbo --batch-size 4 8 --denoising-steps 4 1"),
    "sdxl-few-steps": (200, "xl-1.0 --batch-size 1 4 8 --denoising-steps 4 1"),
    "sd-1.5-few-steps": (160, "sd-1.5 --batch-size 1 4 8 --denoising-steps 4 1"),
    "sdxl-turbo-many-steps": (240, "sdxl-turbo --batch-size 1 4 8 --denoising-steps 20 30"),
    "sd-turbo-many-steps": (200, "sd-turbo --batch-size 1 4 8 --denoising-steps 20 30"),
}
"""The parts of the table, the most important first: most seconds, and the model at full size with what is asked of it.
The last ones are seldom asked for; they are there for completeness."""


@dataclass(frozen=True)
class Job:
    """A part by its name: the most seconds that it gets, those without which it is not begun, and its commands.

    `needs` are packages, or libraries that the loader finds; " or " stands between those of which one will do. What is
    `timed` has the machine to itself.
    """

    name: str
    seconds: float
    least: float
    commands: tuple[tuple[str, ...], ...]
    what: str
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    timed: bool = False

    def lacks(self) -> str | None:
        """What keeps it from running on this machine; None where nothing does."""
        missing = [need for need in self.needs if not any(map(is_here, need.split(" or ")))]
        if missing:
            return f"not here: {', '.join(missing)} (see --wheels)"
        if self.name == f"parity-{RTX}" and (nvidia("compute_cap") or [""])[0] in NOT_FOR_RTX:
            return "TensorRT-RTX says that it is not for this GPU"
        return None


def is_here(name: str) -> bool:
    """Whether a package is installed, or a library can be loaded."""
    try:
        ctypes.CDLL(name) if ".so" in name else version(name)
    except (OSError, PackageNotFoundError):
        return False
    return True


def jobs(output: Path, mode: str, tiny: bool) -> list[Job]:
    """The parts in their order: what everything else rests on, then the table, its most important cells first."""
    if tiny:
        asked = "--full-size tiny --batch-size 1 2 --denoising-steps 4 2 --engine torch --peer diffusers --keep-loaded"
        table = Job("tiny", 400, 20, (_compared(output, asked),), asked, timed=True)
        return [_parity(output, "torch", 400, (), "torch --precision fp32"), table]
    tests = (sys.executable, *"-m pytest -q -o addopts=--import-mode=importlib -m gpu".split(), str(ROOT / "tests/gpu"))
    parity = [_parity(output, name, *asked) for name, asked in PARITY.items()]
    table = [_table(output, mode, name, *asked) for name, asked in TABLE.items()]
    return [Job("tests", 240, 20, (tests,), "the tests marked gpu"), *parity, *table]


def _compared(output: Path, flags: str) -> tuple[str, ...]:
    """A comparison in this environment."""
    folders = "--output results.jsonl --peer-dir peers --onnx-dir onnx --engine-dir engines"
    named = [word if word.startswith("--") else str(output / word) for word in folders.split()]
    compare = (sys.executable, str(ROOT / "demo" / "benchmark.py"), "compare", "--peers-here", "--cold-starts", "0")
    return (*compare, *named, *flags.split())


def _parity(output: Path, name: str, seconds: float, needs: tuple[str, ...], ways: str) -> Job:
    """What an engine draws with the embedded model, in each of its ways."""
    parity = (sys.executable, str(ROOT / "benchmarks" / "parity.py"), "--output", str(output))
    commands = tuple((*parity, *way.split()) for way in ways.split("; "))
    environment = {"PYTHONPATH": str(output / "without-tensorrt")} if name == RTX else {}
    return Job(f"parity-{name}", seconds, 20, commands, f"against diffusers in float32: {ways}", needs, environment)


def _table(output: Path, mode: str, name: str, seconds: float, asked: str) -> Job:
    """A part of the table, all of it in bf16; eager and quantized engines are held against eager diffusers alone."""
    plain = not {"--engine", "--quantization"} & set(asked.split())
    if "--engine" not in asked:
        asked += f" --engine torch-compile --use-cuda-graph --torch-inference {mode}"
    asked += " --precision bf16 --peer diffusers-bf16" + " diffusers-compile-bf16" * plain
    command = _compared(output, f"--full-size {asked} --keep-loaded --num-warmup-runs 3")
    return Job(name, seconds, LEAST, (command,), asked, ("torchao",) if "--quantization" in asked else (), timed=True)


def run(job: Job, seconds: float, log: Path, environment: dict[str, str]) -> str | None:
    """Runs a part. Returns why it failed, or None; what it says goes through if it is `timed` and else beside `log`,
    what libraries complain of into `log`."""
    reasons, ends = [], time.perf_counter() + seconds
    for command in job.commands:
        with log.open("wb") as complaints, nullcontext() if job.timed else log.with_suffix(".txt").open("ab") as said:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=said, stderr=complaints, start_new_session=True
            )
            try:
                code = process.wait(timeout=max(0.0, ends - time.perf_counter()))
            except subprocess.TimeoutExpired:
                return f"stopped: it took more than {seconds:.0f} s"
            finally:
                try:
                    os.killpg(process.pid, signal.SIGKILL)  # and the compiler's own workers
                except ProcessLookupError:
                    pass
                process.wait()
        if code:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] or [""]
            reasons.append(f"failed with exit code {code}: {last[0][:160]} ({log})")
    return "; ".join(reasons) or None


def check(output: Path, parts: list[Job], seconds: float, by_name: bool = False) -> list[str]:
    """Runs the parts that can run here and fit into the time. Returns what went wrong.

    Parts that were asked for `by_name` go wrong where they cannot run, too.
    """
    began, verdicts = time.perf_counter(), {}
    without = output / "without-tensorrt"
    without.mkdir(parents=True, exist_ok=True)
    # Lets TensorRT-RTX be found where plain TensorRT is installed too.
    (without / "tensorrt.py").write_text('raise ImportError("left out")\n', encoding="ascii")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(output / "inductor"))
    environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take three quarters of the memory

    def verdict(job: Job) -> str:
        left = seconds - (time.perf_counter() - began)
        late = f"{max(left, 0):.0f} s are left and it takes {job.least:.0f} or more" if left < job.least else None
        if reason := job.lacks() or late:
            return f"SKIP {job.name}: {reason}"
        log = output / f"{job.name}.log"
        log.with_suffix(".txt").unlink(missing_ok=True)
        if job.timed:
            print(f"== {job.name}: {job.what}", flush=True)
        start = time.perf_counter()
        reason = run(job, min(job.seconds, left), log, environment | job.environment)
        return f"{'FAIL' if reason else 'PASS'} {job.name}: {reason or f'{time.perf_counter() - start:.0f} s'}"

    def tell(job: Job, told: str) -> None:
        said = output / f"{job.name}.txt"
        ran = not told.startswith("SKIP") and said.exists()
        verdicts[job.name] = told
        print(
            *(said.read_text(encoding="utf-8", errors="replace").splitlines() if ran else ()),
            told,
            sep="\n",
            flush=True,
        )

    untimed = [job for job in parts if not job.timed]
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        for job, told in zip(untimed, pool.map(verdict, untimed), strict=True):
            tell(job, told)
    for job in parts:
        if job.timed:
            tell(job, verdict(job))
    print("Verdicts:", *verdicts.values(), sep="\n", flush=True)
    bad = ("FAIL ", "SKIP ") if by_name else ("FAIL ",)
    return [told for told in verdicts.values() if told.startswith(bad)]


def requirements() -> dict[str, str]:
    """What to ask pip for, by the package's name: requirements.txt's version, else the range of setup.cfg's extras."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    lists = [*setup["options.extras_require"].values(), (ROOT / "requirements.txt").read_text(encoding="utf-8")]
    lines = (line.split("#")[0].split(";")[0].strip() for text in lists for line in text.splitlines())
    known = {re.split(r"[^\w.-]", line)[0].lower(): line for line in lines if line}
    builds = {name: known[plain].replace(plain, build, 1) for name, (plain, build) in FOR_CUDA.items()}
    return {name: (known | builds)[name] for name in f"{NEEDED} {EXTRA}".split()}


def say_wheels() -> None:
    """What to bring to a machine without a network, and what this one has of it."""
    asked = requirements()
    print("Bring, for this Python and the GPU's machine, whose driver knows CUDA 13 (torch: a build with CUDA):")
    for name, requirement in asked.items():
        here = f"{version(name)} is here" if is_here(name) else "not here"
        print(f"  {requirement:<38}{here}")
    here = "is here" if is_here(LIBRARY) else "not here"
    print(f"  {TENSORRT_10:<38}{LIBRARY} {here}  for ONNX Runtime's TensorRT provider, in a folder of its own")
    words = " ".join(f'"{requirement}"' for requirement in asked.values())
    wheel, install = "python -m pip wheel --extra-index-url https://pypi.nvidia.com", "python -m pip install --no-index"
    print(f"With what they need in turn:\n  {wheel} -w wheels {words}")
    print(f'  {wheel} -w wheels-10 --no-deps "{TENSORRT_10}"')
    print(f"There, without onnxruntime:\n  {install} --find-links wheels -e . {words}")
    print(f'  {install} --find-links wheels-10 --no-deps --target tensorrt-10 "{TENSORRT_10}"')
    print("  LD_LIBRARY_PATH=$PWD/tensorrt-10/tensorrt_libs tools/gpu_check.sh")


def ready(tiny: bool) -> str | None:
    """What keeps this machine from running the check."""
    if missing := [name for name in NEEDED.split() if not is_here(name)]:
        return f"{', '.join(missing)} cannot be imported here: see --wheels."
    import torch

    if not tiny and not torch.cuda.is_available():
        found = f"torch {torch.__version__} finds no CUDA device here"
        return f"{found}: see --wheels, --dry-run, or try it out with --tiny."
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wheels", action="store_true", help="say which packages to bring, and stop")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    parser.add_argument("--tiny", action="store_true", help="try the command out: a tiny model on the CPU")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "gpu-check", help="default: output/gpu-check")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="these alone, by the names that --dry-run says")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all parts; default {SECONDS:.0f}")
    modes = ("reduce-overhead", "default", "max-autotune")
    parser.add_argument("--mode", choices=modes, default=modes[0], help="torch.compile's, of all; default: the first")
    flags = parser.parse_args(arguments)
    parts = jobs(flags.output.absolute(), flags.mode, flags.tiny)
    if unknown := set(flags.parts or ()) - {job.name for job in parts}:
        parser.error(f"no part is called {', '.join(sorted(unknown))}: {', '.join(job.name for job in parts)}")
    parts = [job for job in parts if not flags.parts or job.name in flags.parts]
    if flags.wheels:
        say_wheels()
        return 0
    if flags.dry_run:
        lacking = {job.name: job.lacks() for job in parts}
        for job in parts:
            reason = lacking[job.name]
            print(f"{job.name}: {f'skipped, {reason}' if reason else f'up to {job.seconds:.0f} s; {job.what}'}")
        print(f"In this order, until {flags.seconds:.0f} s are over; results: {flags.output / 'results.jsonl'}")
        return 1 if flags.parts and any(lacking.values()) else 0
    if reason := ready(flags.tiny):
        print(f"gpu_check.sh: {reason}", file=sys.stderr)
        return 2
    wrong = check(flags.output.absolute(), parts, flags.seconds, by_name=bool(flags.parts))
    print(f"The table: demo/benchmark.py report {flags.output / 'results.jsonl'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
