#!/usr/bin/env python3
"""Where the time of a stage goes, and the least it could take on this machine.

python benchmarks/floor.py [--model FOLDER] [--size 128] [--batch-size 1 4] [--stages unet vae]

The floor of a stage is its floating-point operations over the rate at which this machine multiplies large float32
matrices. Operations are counted by torch while its module runs; those of the text's keys and values are left out of
the UNet's, because the engine computes them once a picture, and of an upsampler's convolution only the 4/9 are counted
that the engine computes. The profile is OpenVINO's own: the share of a call that each kind of operation takes.
"""

import argparse
import itertools
import json
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "demo"))

from darkroom.checkpoint.folder import open_checkpoint  # noqa: E402
from darkroom.engines import find_runtime  # noqa: E402
from darkroom.engines.openvino.devices import CPU  # noqa: E402
from darkroom.engines.openvino.runtime import BEFOREHAND, BLOB  # noqa: E402
from darkroom.networks.load import example_inputs, load_module  # noqa: E402
from darkroom.prepare import Preparer  # noqa: E402
from darkroom.request import Request  # noqa: E402
from darkroom.store.store import Store  # noqa: E402

EMOJI = ROOT / "demo" / "darkroom" / "models" / "emoji"
MATRICES = (1024, 2048, 4096)
ONCE_A_PICTURE = ("attn2.to_k", "attn2.to_v")
UPSAMPLER = re.compile(r"upsamplers\.\d+\.conv$")
NEEDED = Fraction(4, 9)
"""Of an upsampler's convolution: see `darkroom.engines.openvino.upsampling`."""
GIGA = 1e9


HEADER = """\
| stage | batch | GFLOP a call | floor | OpenVINO | of the peak | torch, channels last | torch / floor | profile |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |"""


def times(repeat: int, work: Callable[..., Any], *arguments: Any) -> list[float]:
    """Milliseconds of each call after two that are not counted."""
    work(*arguments), work(*arguments)
    found = []
    for _ in range(repeat):
        start = time.perf_counter()
        work(*arguments)
        found.append(1000 * (time.perf_counter() - start))
    return found


def peak(repeat: int) -> float:
    """Operations a second of the fastest product of two float32 matrices, the median of its calls."""
    rates = []
    for size in MATRICES:
        pair = torch.randn(size, size), torch.randn(size, size)
        for calls in (times(repeat, torch.mm, *pair), times(repeat, np.matmul, *(each.numpy() for each in pair))):
            rates.append(2000 * size**3 / statistics.median(calls))
    return max(rates)


def operations(module: torch.nn.Module, inputs: list[torch.Tensor]) -> int:
    """What the module's convolutions and matrix products take, as far as the engine computes them at every call."""
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(*inputs)
    total = Fraction(counter.get_total_flops())
    for name, counts in counter.get_flop_counts().items():
        if name.endswith(ONCE_A_PICTURE):  # a module's operations stand under its own name alone once
            total -= sum(counts.values())
        elif UPSAMPLER.search(name):
            total -= (1 - NEEDED) * sum(counts.values())
    return round(total)


def profile(folder: Path, inputs: dict[str, np.ndarray], repeat: int) -> dict[str, float]:
    """The share of a call that each kind of operation takes, the largest first."""
    core = openvino.Core()
    settings = {"PERF_COUNT": True, "INFERENCE_PRECISION_HINT": "f32"}

    def load(name: str) -> openvino.InferRequest:
        blob = openvino.Tensor(np.fromfile(folder / name, np.uint8))
        return core.import_model(blob, CPU, settings).create_infer_request()

    def taken(request: openvino.InferRequest, values: dict[str, Any]) -> dict[str, Any]:
        names = {name for port in request.model_inputs for name in port.get_names()}
        return {name: value for name, value in values.items() if name in names}

    if (folder / BEFOREHAND).exists():
        beforehand = load(BEFOREHAND)
        kept = beforehand.infer(taken(beforehand, inputs))
        inputs = inputs | {port.get_any_name(): value for port, value in kept.items()}
    request = load(BLOB)
    spent: Counter[str] = Counter()
    for _ in range(repeat):
        request.infer(taken(request, inputs))
        for node in request.profiling_info:
            spent[node.node_type] += node.real_time.total_seconds()
    total = spent.total()
    return {kind: seconds / total for kind, seconds in spent.most_common() if seconds}


def measure(preparer: Preparer, name: str, size: int, batch: int, repeat: int) -> dict[str, Any]:
    """One stage at one batch size: exported, built and called, beside torch's module. Calls are in milliseconds, the
    least of them `operations` over the fastest product."""
    request = Request(model=preparer.name, prompts=("an apple",), batch_size=batch, height=size, width=size,
                      denoising_steps=1, guidance_scale=7.5, engine="openvino")  # fmt: skip
    compiled = preparer.compile(request, {name})
    job, source = compiled.jobs[name], compiled.sources[name]
    tensors = example_inputs(job.stage, job.profile.sizes(), 7)
    inputs = {key: value.numpy() for key, value in tensors.items()}
    calls = times(repeat, preparer.runtime.load(job, source, None), inputs)
    shares = profile(source, inputs, 5)
    module = load_module(job.stage, preparer.checkpoint.folder).to(memory_format=torch.channels_last)
    found = {"stage": name, "batch_size": batch, "operations": operations(module, list(tensors.values()))}
    with torch.inference_mode():
        theirs = times(repeat, module, *tensors.values())
    return found | {"calls": calls, "torch_calls": theirs, "profile": shares}


def line(found: dict[str, Any], peak: float) -> str:
    """A row of the report; `peak` in operations a second."""
    ours, theirs = statistics.median(found["calls"]), statistics.median(found["torch_calls"])
    least = 1000 * found["operations"] / peak
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in list(found["profile"].items())[:5])
    return (
        f"| {found['stage']} | {found['batch_size']} | {found['operations'] / GIGA:.2f} | {least:.1f} ms "
        f"| {ours:.1f} ms | {least / ours:.0%} | {theirs:.1f} ms | {theirs / least:.1f} | {shares} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=EMOJI, help="a folder in the diffusers layout")
    parser.add_argument("--size", type=int, default=128, help="height and width in pixels")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--stages", nargs="+", default=["unet", "vae"])
    parser.add_argument("--repeat", type=int, default=15, help="calls that are counted, at least five")
    parser.add_argument("--output", type=Path, help="also write the results here, as JSON")
    flags = parser.parse_args()
    highest = peak(max(5, flags.repeat))
    print(f"{torch.get_num_threads()} threads, {highest / GIGA:.0f} GFLOP/s\n\n{HEADER}", flush=True)
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        graphs, engines = Store(Path(temporary, "onnx")), Store(Path(temporary, "engines"))
        checkpoint = open_checkpoint(flags.model, engines.fingerprints)
        preparer = Preparer(checkpoint, find_runtime("openvino"), graphs, engines)
        for name, batch in itertools.product(flags.stages, flags.batch_size):
            found.append(measure(preparer, name, flags.size, batch, max(5, flags.repeat)))
            print(line(found[-1], highest), flush=True)
    if flags.output:
        lines = {"peak": highest, "floors": found}
        flags.output.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
