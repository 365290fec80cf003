"""Made-up lines of results, with round numbers."""

import json
from pathlib import Path
from typing import Any

MACHINE = {
    "processor": "AMD EPYC 9B14 96-Core Processor (0123abcd)",
    "cores": 2,
    "memory_bytes": 8_000_000_000,
    "system": "Linux",
    "gpu": None,
    "python": "3.11.2",
    "packages": {"openvino": "2026.4.1", "torch": "2.13.0"},
}


def sample(median: float, p90: float | None = None) -> dict[str, float]:
    """Five measurements around a median: 1 below it and 3 above at the most."""
    return {
        "median": median,
        "p90": median + 2 if p90 is None else p90,
        "least": median - 1,
        "most": median + 3,
        "count": 5,
    }


def line(contender: str, milliseconds: float, **changes: Any) -> dict[str, Any]:
    """One cell whose batch takes so long, of which the UNet takes half; settings among the changes are set."""
    engine, _, precision = contender.partition(" ")
    settings = {
        "version": "emoji",
        "engine": engine,
        "precision": precision or None,
        "build": "static-batch",
        "batch_size": 1,
        "denoising_steps": 20,
        "height": 128,
        "width": 128,
        "scheduler": None,
        "guidance_scale": 4.0,
        "streams": 1,
        "threads": None,
        "use_cuda_graph": False,
        "async": False,
        "warmup_runs": 1,
        "repeat": 5,
        "prompt": "a red apple",
        "seed": 0,
        "devices": 1,
        "cold_starts": 5,
    }
    settings |= {name: changes.pop(name) for name in list(changes) if name in settings}
    stages = {"CLIP": sample(milliseconds / 10), "UNet": sample(milliseconds / 2), "VAE-Dec": sample(milliseconds / 5)}
    return {
        "format": 1,
        "contender": contender,
        "settings": settings,
        "machine": MACHINE,
        "finished": "2026-11-21T17:00:00+00:00",
        "stages": stages | {"Pipeline": sample(milliseconds)},
        "unet_calls": settings["denoising_steps"],
        "images_per_second": 1000 * settings["batch_size"] / milliseconds,
        "cold_start": sample(4.0),
        "build_seconds": 12.5,
        "load_seconds": 0.5,
        "peak_host_bytes": 400_000_000,
        "peak_device_bytes": None,
        "engine_bytes": 92_000_000,
        "psnr": None,
        "price_per_hour": None,
        "images_per_unit": None,
        "error": None,
    } | changes


def failed(contender: str, error: str, **changes: Any) -> dict[str, Any]:
    """A cell that ended with an error, and so measured nothing."""
    measured = ("unet_calls", "images_per_second", "cold_start", "build_seconds", "load_seconds", "peak_host_bytes")
    nothing = {name: None for name in (*measured, "engine_bytes")}
    return line(contender, 1.0, **changes) | nothing | {"stages": {}, "error": error}


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(f"{json.dumps(each)}\n" for each in lines), encoding="utf-8")
    return path
