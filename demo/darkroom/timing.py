"""Stage clocks, and the table that people know."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

ROWS = ("CLIP", "VAE-Enc", "UNet", "VAE-Dec")


@dataclass
class StageClock:
    """Milliseconds that each stage of one batch took, and how often the UNet was called."""

    milliseconds: dict[str, float] = field(default_factory=dict)
    unet_calls: int = 0
    pipeline: float = 0.0

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Adds the time of the block to `stage`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.milliseconds[stage] = self.milliseconds.get(stage, 0.0) + 1000 * (time.perf_counter() - start)


def medians(clocks: list[StageClock]) -> dict[str, float]:
    """Median milliseconds of each stage over the batches, under the names of the table, and of the pipeline."""
    stages = {stage: median(clock.milliseconds[stage] for clock in clocks) for stage in _rows(clocks)}
    return stages | {"Pipeline": median(clock.pipeline for clock in clocks)}


def _rows(clocks: list[StageClock]) -> list[str]:
    """The stages that were timed, in their order."""
    return [stage for stage in ROWS if stage in clocks[0].milliseconds]


def throughput(clocks: list[StageClock], batch_size: int) -> float:
    """Images a second over all batches."""
    return 1000 * batch_size * len(clocks) / sum(clock.pipeline for clock in clocks)


def table(clocks: list[StageClock], batch_size: int) -> str:
    """The stage table; over several batches, medians."""
    values = medians(clocks)
    rule = f"|{'-' * 17}|{'-' * 14}|"
    lines = [rule, f"|{'Module':^17}|{'Latency':^14}|", rule]
    for stage in _rows(clocks):
        name = f"UNet x {clocks[0].unet_calls}" if stage == "UNet" else stage
        lines.append(f"|{name:^17}|{values[stage]:>10.2f} ms |")
    lines += [rule, f"|{'Pipeline':^17}|{values['Pipeline']:>10.2f} ms |", rule]
    return "\n".join([*lines, f"Throughput: {throughput(clocks, batch_size):.2f} image/s"])
