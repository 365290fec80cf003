"""What was aimed for on one H200, and what a results file says of it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from darkroom.bench.results import Machine, Row, read

OURS, COMPILED = "Darkroom (torch-compile", "diffusers, torch.compile"
FASTER, ALIKE = 1.25, 35.0
"""Times diffusers with torch.compile; and the least PSNR in dB against eager diffusers in the same precision."""


def say_targets(file: Path, machine: dict[str, Any]) -> None:
    """One line a target: what was found on this machine, with its versions, and whether that is enough."""
    here = Machine(**machine | {"packages": tuple(sorted(machine["packages"].items()))})
    found = read([file]) if file.exists() else []
    rows = [row for row in found if row.error is None and row.machine == here]
    ours = [row for row in rows if row.contender.startswith(OURS) and row.contender.endswith(")")]
    for name, found, enough in (
        ("SDXL 1024, 30 steps, batch 1, at most 1200 ms", *_latency(ours, "xl-1.0", 30, 1200)),
        ("SDXL 1024, 20 steps, at least 2.4 images/s", *_most(ours, "xl-1.0", 20, 2.4)),
        ("SDXL-Turbo 512, 4 steps, batch 1, at most 80 ms", *_latency(ours, "sdxl-turbo", 4, 80)),
        (f"at least {FASTER} times diffusers with torch.compile", *_ratio(ours, rows)),
        (f"pictures within {ALIKE:.0f} dB of eager diffusers", *_likeness(ours)),
    ):
        verdict = "not measured" if enough is None else f"{found}, {'reached' if enough else 'MISSED'}"
        print(f"target: {name}: {verdict}")


Verdict = tuple[str, bool | None]


def _latency(ours: list[Row], model: str, steps: int, most: float) -> Verdict:
    found = [row.pipeline.median for row in _of(ours, model, steps) if row.settings.batch_size == 1]
    return (f"{min(found):.1f} ms", min(found) <= most) if found else ("", None)


def _most(ours: list[Row], model: str, steps: int, least: float) -> Verdict:
    found = [row.images_per_second or 0.0 for row in _of(ours, model, steps)]
    return (f"{max(found):.2f} images/s", max(found) >= least) if found else ("", None)


def _ratio(ours: list[Row], rows: list[Row]) -> Verdict:
    """The least of all cells that both have."""
    theirs = {_cell(row): row for row in rows if row.contender == COMPILED}
    both = [(row, theirs[_cell(row)]) for row in ours if _cell(row) in theirs]
    found = [other.pipeline.median / row.pipeline.median for row, other in both]
    return (f"{min(found):.2f} to {max(found):.2f}", min(found) >= FASTER) if found else ("", None)


def _likeness(ours: list[Row]) -> Verdict:
    found = [row.psnr for row in ours if row.psnr is not None]
    return (f"{min(found):.1f} dB at the least", min(found) >= ALIKE) if found else ("", None)


def _of(rows: Iterable[Row], model: str, steps: int) -> list[Row]:
    return [row for row in rows if (row.settings.version, row.settings.denoising_steps) == (model, steps)]


def _cell(row: Row) -> tuple[str, int, int, int]:
    return row.settings.version, row.settings.batch_size, row.settings.denoising_steps, row.settings.height
