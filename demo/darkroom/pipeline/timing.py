"""Stage clocks, and the table that people know."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

ROWS = ("CLIP", "VAE-Enc", "UNet", "VAE-Dec")
QUEUE = "Queue"
"""What a served picture waited, which is no stage."""

RULE = f"|{'-' * 17}|{'-' * 14}|"


class Timed(Protocol):
    """What may know how long its last call took on its device; see `darkroom.engines.runtime.Engine`."""

    milliseconds: float | None


@dataclass
class StageClock:
    """Milliseconds that each stage of one batch took, and how often the denoiser, the stage of that row, was called.

    `refiner` is the clock of the second model, where there is one.
    """

    milliseconds: dict[str, float] = field(default_factory=dict)
    unet_calls: int = 0
    denoiser: str = "UNet"
    pipeline: float = 0.0
    refiner: "StageClock | None" = None

    @property
    def end_to_end(self) -> float:
        """Milliseconds of both models."""
        return self.pipeline + (self.refiner.pipeline if self.refiner else 0.0)

    @contextmanager
    def time(self, stage: str, *engines: Timed) -> Iterator[None]:
        """Adds the time of the block to `stage`: by the clocks of the engines' devices, where they have any."""
        start = time.perf_counter()
        for engine in engines:
            engine.milliseconds = None
        try:
            yield
        finally:
            known = [engine.milliseconds for engine in engines if engine.milliseconds is not None]
            took = sum(known) if known else 1000 * (time.perf_counter() - start)
            self.milliseconds[stage] = self.milliseconds.get(stage, 0.0) + took


def medians(clocks: list[StageClock]) -> dict[str, float]:
    """Median milliseconds of each stage over the batches, under the names of the table, and of the pipeline."""
    stages = {stage: median(clock.milliseconds[stage] for clock in clocks) for stage in _rows(clocks)}
    return stages | {"Pipeline": median(clock.pipeline for clock in clocks)}


def _rows(clocks: list[StageClock]) -> list[str]:
    """The stages that were timed, in their order."""
    return [stage for stage in clocks[0].milliseconds if stage != QUEUE]


def throughput(clocks: list[StageClock], batch_size: int) -> float:
    """Images a second over all batches."""
    return 1000 * batch_size * len(clocks) / sum(clock.end_to_end for clock in clocks)


def table(clocks: list[StageClock], batch_size: int) -> str:
    """The stage table; over several batches, medians. With a refiner a second one, and both together."""
    lines = _table(clocks)
    if refining := [clock.refiner for clock in clocks if clock.refiner]:
        together = median(clock.end_to_end for clock in clocks)
        lines += [*_table(refining), _row("e2e", together), RULE]
    return "\n".join([*lines, f"Throughput: {throughput(clocks, batch_size):.2f} image/s"])


def _table(clocks: list[StageClock]) -> list[str]:
    values = medians(clocks)
    lines = [RULE, f"|{'Module':^17}|{'Latency':^14}|", RULE]
    for stage in _rows(clocks):
        calls = f" x {clocks[0].unet_calls}" if stage == clocks[0].denoiser else ""
        lines.append(_row(stage + calls, values[stage]))
    return [*lines, RULE, _row("Pipeline", values["Pipeline"]), RULE]


def _row(name: str, milliseconds: float) -> str:
    return f"|{name:^17}|{milliseconds:>10.2f} ms |"
