"""Darkroom as a contender: `python -m darkroom.bench.worker CELL`, in JSON; see `contenders/protocol`."""

from darkroom.bench.contenders.protocol import PIPELINE, Clock, Make, serve  # isort: skip  the clock runs from here

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from darkroom.bench.cell import Cell
from darkroom.bench.machine import usable_cores
from darkroom.checkpoint.folder import open_checkpoint
from darkroom.engines import find_runtime
from darkroom.pipeline.assembly import assemble
from darkroom.pipeline.pictures import to_bytes
from darkroom.pipeline.pipeline import Pipeline
from darkroom.pipeline.timing import StageClock
from darkroom.prepare import TABLE_FILE, Preparer
from darkroom.request import Batch
from darkroom.schedule.table import Table
from darkroom.store.store import Store

NEIGHBOURS = 4
"""Batches that an asynchronous run makes, so that they have neighbours."""


def preparer_of(cell: Cell, **shown: Any) -> Preparer:
    """What compiles a cell's model; `shown` is what shows the progress."""
    graphs, engines = Store(Path(cell.onnx_dir)), Store(Path(cell.engine_dir))
    runtime = find_runtime(cell.engine, cell.options)
    threads = cell.threads
    if cell.streams > 1 and threads is None and runtime.threaded:
        threads = max(1, (usable_cores() or 1) // cell.streams)  # else each takes all, and they get in each other's way
    return Preparer(
        open_checkpoint(Path(cell.folder), engines.fingerprints),
        runtime,
        graphs,
        engines,
        name=cell.version,
        threads=threads,
        batches=cell.batches,
        pixels=cell.pixels,
        **shown,
    )


def load(cell: Cell) -> Make:
    """Pipelines, one for each stream. Those of runtimes that build nothing take other batch sizes and steps, too."""
    preparer = preparer_of(cell)
    compiled = preparer.compile(cell.request())
    loaded = [preparer.load(compiled).pipeline for _ in range(cell.streams)]
    pipelines = {cell: loaded}

    def pipelines_for(asked: Cell) -> list[Pipeline]:
        if asked not in pipelines:
            request = asked.request()
            table = Table.load(preparer.compile(request).table_folder / TABLE_FILE)
            pipelines[asked] = [
                assemble(preparer.traits, each.encoders, each.denoiser, each.vae, table, request) for each in loaded
            ]
        return pipelines[asked]

    def make(clock: Clock, asked: Cell) -> np.ndarray:
        first, *others = pipelines_for(asked)
        (batch,) = asked.request().batches()
        if asked.asynchronous:
            made, clocks = _overlapped(first, batch)
        else:
            with ThreadPoolExecutor(max(1, len(others))) as pool:
                beside = [pool.submit(_made, each, batch) for each in others]
                made, own = _made(first, batch)
                clocks = [own, *(each.result()[1] for each in beside)]
        clock.streams = [
            Clock(each.milliseconds | {PIPELINE: each.end_to_end}, {"UNet": each.unet_calls}) for each in clocks
        ]
        return np.stack([to_bytes(picture, f"image {image + 1}") for image, picture in enumerate(made)])

    return make


def _made(pipeline: Pipeline, batch: Batch) -> tuple[np.ndarray, StageClock]:
    clock = StageClock()
    pipeline.forget()
    return pipeline.run(batch, clock), clock


def _overlapped(pipeline: Pipeline, batch: Batch) -> tuple[np.ndarray, list[StageClock]]:
    """Some batches of other prompts and seeds, whose stages overlap: no text is known from another's."""
    batches = [
        replace(
            batch,
            prompts=tuple(f"{prompt} {turn}" if turn else prompt for prompt in batch.prompts),
            seeds=tuple(seed + turn * len(batch.seeds) for seed in batch.seeds),
        )
        for turn in range(NEIGHBOURS)
    ]
    clocks = [StageClock() for _ in batches]
    pipeline.forget()
    first, *_ = list(pipeline.run_overlapped(batches, clocks))
    return first, clocks


def device_memory() -> int | None:
    """Bytes of the GPU's memory that are taken, by whomever; None where no engine takes them from CUDA itself."""
    if "cuda.bindings.runtime" not in sys.modules:
        return None
    from darkroom.engines.cuda import memory_taken

    return memory_taken()


if __name__ == "__main__":
    serve(load, Cell.from_json, device_memory)
