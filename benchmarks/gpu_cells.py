"""Measures one model on a GPU, in a process of its own: `python benchmarks/gpu_cells.py PART`, in JSON; see `Part`.

Every cell is written to the results file as it ends, and said in one line. A contender that fails ends alone; what
the file holds already is not measured again.
"""

import contextlib
import gc
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.gpu_contenders import PROMPT, SEED, Contender, Darkroom, Diffusers, Model, Work  # noqa: E402
from darkroom.bench.machine import machine  # noqa: E402
from darkroom.bench.sweep import Entrant, append, line_of, sample  # noqa: E402
from darkroom.engines.runtime import Options  # noqa: E402
from darkroom.pipeline.pictures import psnr  # noqa: E402
from darkroom.pipeline.timing import StageClock  # noqa: E402
from darkroom.processes.child import peak_memory  # noqa: E402

WARMUP = 3
"""Runs before the timed ones: the first compiles, the second is captured when it is done, the third is replayed."""

EAGER, COMPILED, OURS, OURS_EAGER = "eager", "compiled", "ours", "ours-eager"
"""Contenders; `ours-int8` and `ours-fp8` are quantized."""

KERNELS = 15
"""Rows of a trace's summary."""


@dataclass(frozen=True)
class Part:
    """What one process measures: `cells` are batches and steps, the most important first; `contenders` in their order,
    the reference of the pictures first. `mode` is torch.compile's; with a `trace` file, a run of ours is profiled."""

    work: Work
    cells: tuple[tuple[int, int], ...]
    contenders: tuple[str, ...]
    results: str
    mode: str
    repeat: int = 5
    trace: str | None = None

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    def pictures(self, batch: int, steps: int) -> Path:
        """Where the reference's pictures of a cell are: beside the results."""
        return Path(self.results).parent / f"{self.work.model}-{self.work.size}-b{batch}-s{steps}.npy"

    @classmethod
    def from_json(cls, text: str) -> "Part":
        fields = json.loads(text)
        fields |= {"work": Work(**fields["work"]), "cells": tuple(map(tuple, fields["cells"]))}
        return cls(**fields | {"contenders": tuple(fields["contenders"])})


def contender_of(name: str, model: Model, mode: str) -> Contender:
    """The contender of this name, its networks on the device."""
    if name in (EAGER, COMPILED):
        return Diffusers(model, mode if name == COMPILED else None)
    if name == OURS_EAGER:
        return Darkroom(model, "torch", Options())
    graphs = model.work.device != "cpu"
    quantization = name.removeprefix(OURS).removeprefix("-") or None
    options = Options(torch_inference=mode, use_cuda_graph=graphs, quantization=quantization)
    return Darkroom(model, "torch-compile", options)


def machine_with(device: str) -> dict[str, Any]:
    """What results on this device are measured on, with versions."""
    here = machine()
    if device != "cpu":
        here["gpu"] = here["gpu"] or torch.cuda.get_device_name(0)
    return here


def measure(part: Part) -> int:
    """Measures all that it can. Returns how many cells failed."""
    here, failed = machine_with(part.work.device), 0
    with tempfile.TemporaryDirectory() as folder:
        model = Model(part.work, Path(folder))
        for name in part.contenders:
            left = [cell for cell in part.cells if not _is_done(part, name, *cell, here)]
            if left or _lacks_trace(part, name):
                failed += _all_of(part, name, model, left, here)
            gc.collect()
            if part.work.device != "cpu":
                torch.cuda.empty_cache()
            torch._dynamo.reset()  # what was compiled holds on to the networks
    return failed


def _all_of(part: Part, name: str, model: Model, cells: list[tuple[int, int]], here: dict[str, Any]) -> int:
    """Measures one contender. Returns how many of its cells failed."""
    start = time.perf_counter()
    try:
        contender = contender_of(name, model, part.mode)
    except Exception as error:  # whatever keeps one contender away keeps it alone
        say(f"{part.work.model}, {name}: {reason_of(error)}")
        return len(cells)
    loaded = round(time.perf_counter() - start, 3)
    failed = 0
    for batch, steps in cells:
        found = _measured(part, name, contender, batch, steps)
        line = line_of(_entrant(part, name, contender, batch, steps), found, here, None) | {"load_seconds": loaded}
        append(Path(part.results), line)
        say(words_of(line))
        failed += line["error"] is not None
    if part.trace and name == _first_of_ours(part):
        failed += not _traced(contender, *min(part.cells, key=lambda cell: cell[0] * cell[1]), Path(part.trace))
    return failed


def _first_of_ours(part: Part) -> str | None:
    """The contender of which a run is profiled."""
    return next((name for name in part.contenders if name.startswith(OURS)), None)


def _lacks_trace(part: Part, name: str) -> bool:
    """Whether a run of this contender is to be profiled, and none was."""
    return bool(part.trace) and name == _first_of_ours(part) and not Path(part.trace).with_suffix(".txt").exists()


def _is_done(part: Part, name: str, batch: int, steps: int, here: dict[str, Any]) -> bool:
    """Whether the results hold the cell, measured on this machine with these versions."""
    wanted = _settings(part, name, batch, steps)
    for line in _lines(Path(part.results)):
        same = line.get("measured_by") == [name, part.mode] and line["machine"] == here
        if same and line["settings"] | wanted == line["settings"] and line["error"] is None:
            return True
    return False


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of results, less the half of one that a part may have left when it was stopped."""
    for text in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError):
            yield json.loads(text)


def _measured(part: Part, name: str, contender: Contender, batch: int, steps: int) -> dict[str, Any]:
    """What a line of results says of a cell, or the `error` that it ended with."""
    on_gpu = part.work.device != "cpu"
    found: dict[str, Any] = {"measured_by": [name, part.mode]}
    kept = part.pictures(batch, steps)
    if name == part.contenders[0]:
        kept.unlink(missing_ok=True)  # they may be another machine's
    try:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        runs = [contender.run(batch, steps) for _ in range(WARMUP + part.repeat)]
        pictures = runs[-1][1]
        if name == part.contenders[0]:
            np.save(kept, pictures)
        elif kept.exists():
            found["psnr"] = round(min(map(psnr, pictures, np.load(kept))), 2)
    except Exception as error:
        return found | {"error": reason_of(error)}
    clocks: list[StageClock] = [clock for clock, _ in runs[WARMUP:]]
    stages = {stage: sample([clock.milliseconds[stage] for clock in clocks]) for stage in clocks[0].milliseconds}
    whole = sample([clock.pipeline for clock in clocks])
    return found | {
        "first_run_ms": round(runs[0][0].pipeline, 3),
        "stages": stages | {"Pipeline": whole},
        "unet_calls": clocks[0].unet_calls,
        "images_per_second": round(1000 * batch / whole["median"], 4),
        "peak_host_bytes": peak_memory(),
        "peak_device_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }


def _settings(part: Part, name: str, batch: int, steps: int) -> dict[str, Any]:
    """What is known of a cell before its contender is there."""
    work = part.work
    return {
        "version": work.model,
        "engine": None,
        "precision": work.precision,
        "build": None,
        "batch_size": batch,
        "denoising_steps": steps,
        "height": work.size,
        "width": work.size,
        "guidance_scale": work.guidance_scale,
        "warmup_runs": WARMUP,
        "repeat": part.repeat,
        "prompt": PROMPT,
        "seed": SEED,
        "use_cuda_graph": work.device != "cpu" and name.startswith(OURS) and name != OURS_EAGER,
    }


def _entrant(part: Part, name: str, contender: Contender, batch: int, steps: int) -> Entrant:
    options = json.dumps(contender.options, sort_keys=True) if contender.options else None
    settings = _settings(part, name, batch, steps) | {"options": options}
    return Entrant(contender.label, contender.label, settings, [], None, {})


def _traced(contender: Contender, batch: int, steps: int, file: Path) -> bool:
    """Writes a trace of one run, and a summary beside it, which is also said. Returns whether that went well."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    try:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        for _ in range(WARMUP):
            contender.run(batch, steps)
        with profile(activities=activities) as profiler:
            contender.run(batch, steps)
        order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        summary = profiler.key_averages().table(sort_by=order, row_limit=KERNELS, max_name_column_width=70)
        profiler.export_chrome_trace(str(file))
        file.with_suffix(".txt").write_text(summary, encoding="utf-8")
    except Exception as error:
        say(f"the trace: {reason_of(error)}")
        return False
    say(f"trace of {contender.label}, batch {batch}, {steps} steps: {file}\n{summary}")
    return True


def words_of(line: dict[str, Any]) -> str:
    """A cell in one line."""
    settings = line["settings"]
    what = f"{settings['version']} {settings['height']}, batch {settings['batch_size']}, "
    what += f"{settings['denoising_steps']} steps, {line['contender']}"
    if line["error"] is not None:
        return f"{what}: {line['error']}"
    told = f"{what}: {line['stages']['Pipeline']['median']:.1f} ms, {line['images_per_second']:.2f} images/s"
    if line.get("peak_device_bytes"):
        told += f", {line['peak_device_bytes'] / 1e9:.1f} GB"
    return told if line.get("psnr") is None else f"{told}, PSNR {line['psnr']:.1f} dB"


def reason_of(error: BaseException) -> str:
    """An error in one line."""
    words = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {words}".rstrip(": ")


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(1 if measure(Part.from_json(sys.argv[1])) else 0)
