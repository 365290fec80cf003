"""Darkroom as a contender: `python -m darkroom.bench.worker CELL PLACE`, both in JSON; see `contender`."""

import time

STARTED = time.perf_counter()

import json  # noqa: E402  the clock runs from here, as a user's does
import os  # noqa: E402
import sys  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402

from darkroom.bench.cell import Cell, Place  # noqa: E402
from darkroom.bench.machine import usable_cores  # noqa: E402
from darkroom.checkpoint.folder import open_checkpoint  # noqa: E402
from darkroom.engines import find_runtime  # noqa: E402
from darkroom.engines.runtime import ON_NVIDIA  # noqa: E402
from darkroom.errors import DarkroomError  # noqa: E402
from darkroom.pipeline.pipeline import Pipeline  # noqa: E402
from darkroom.pipeline.timing import StageClock  # noqa: E402
from darkroom.prepare import Preparer  # noqa: E402
from darkroom.processes.child import peak_memory  # noqa: E402
from darkroom.request import Batch  # noqa: E402
from darkroom.store.store import Store  # noqa: E402

NEIGHBOURS = 4
"""Batches that an asynchronous run makes, so that they have neighbours."""


def preparer_of(cell: Cell, place: Place, **shown: Any) -> Preparer:
    """What compiles a cell's model; `shown` is what shows the progress."""
    graphs, engines = (Store(folder) for folder in place.folders())
    checkpoint = open_checkpoint(Path(cell.folder), engines.fingerprints)
    runtime = find_runtime(cell.engine, cell.options)
    threads = cell.threads
    if cell.streams > 1 and threads is None and runtime.threaded:
        threads = max(1, (usable_cores() or 1) // cell.streams)  # else each takes all, and they get in each other's way
    return Preparer(
        checkpoint,
        runtime,
        graphs,
        engines,
        name=cell.version,
        threads=threads,
        batches=cell.batches,
        pixels=cell.pixels,
        **shown,
    )


class Worker:
    """Loaded pipelines, one for each stream."""

    def __init__(self, cell: Cell, place: Place) -> None:
        preparer, request = preparer_of(cell, place), cell.request()
        compiled = preparer.compile(request)
        self.pipelines = [preparer.load(compiled, request).pipeline for _ in range(cell.streams)]
        self.cell = cell
        (self.batch,) = request.batches()

    def run(self) -> dict[str, Any]:
        if self.cell.asynchronous:
            return self._overlapped()
        if self.cell.streams == 1:
            return _answer(self._make(self.pipelines[0], self.batch)[1])
        start = time.perf_counter()
        with ThreadPoolExecutor(self.cell.streams) as pool:
            clocks = [clock for _, clock in pool.map(lambda each: self._make(each, self.batch), self.pipelines)]
        return {"streams": [_answer(clock) for clock in clocks], "wall": 1000 * (time.perf_counter() - start)}

    def save(self, folder: Path) -> dict[str, Any]:
        from PIL import Image

        from darkroom.pipeline.pictures import to_bytes

        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for image, picture in enumerate(self._make(self.pipelines[0], self.batch)[0]):
            paths.append(folder / f"image-{image}.png")
            Image.fromarray(to_bytes(picture, f"image {image + 1}")).save(paths[-1])
        return {"saved": [str(path) for path in paths]}

    def _make(self, pipeline: Pipeline, batch: Batch) -> tuple[np.ndarray, StageClock]:
        clock = StageClock()
        pipeline.forget()
        return pipeline.run(batch, clock), clock

    def _overlapped(self) -> dict[str, Any]:
        """Some batches of other prompts and seeds, whose stages overlap: nobody's text is known from another's."""
        count = len(self.batch.seeds)
        batches = [
            replace(
                self.batch,
                prompts=tuple(f"{prompt} {turn}" for prompt in self.batch.prompts),
                seeds=tuple(seed + turn * count for seed in self.batch.seeds),
            )
            for turn in range(NEIGHBOURS)
        ]
        start = time.perf_counter()
        clocks = [StageClock() for _ in batches]
        self.pipelines[0].forget()
        for _ in self.pipelines[0].run_overlapped(batches, clocks):
            pass
        return {"streams": [_answer(clock) for clock in clocks], "wall": 1000 * (time.perf_counter() - start)}


def _answer(clock: StageClock) -> dict[str, Any]:
    return {"stages": clock.milliseconds | {"Pipeline": clock.end_to_end}, "unet_calls": clock.unet_calls}


def main() -> int:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    cell, place = Cell.from_json(json.loads(sys.argv[1])), Place(**json.loads(sys.argv[2]))
    try:
        worker = Worker(cell, place)
        say({"loaded": time.perf_counter() - STARTED})
        for line in sys.stdin:
            match line.split(maxsplit=1):
                case ["run"]:
                    say(worker.run())
                case ["save", folder]:
                    say(worker.save(Path(folder.strip())))
                case _:
                    break
    except DarkroomError as error:
        say({"error": str(error)})
        return error.exit_code
    say({"peak_bytes": peak_memory(), "peak_device_bytes": device_memory(cell)})
    return 0


def device_memory(cell: Cell) -> int | None:
    """Bytes of the GPU's memory: with torch the most that this process took; with others those taken at the end, by
    whomever. None without CUDA."""
    if cell.engine == "tensorrt" or cell.options.provider in ON_NVIDIA:
        from darkroom.engines.cuda import memory_taken

        return memory_taken()
    torch = sys.modules.get("torch")
    return torch.cuda.max_memory_allocated() if torch and torch.cuda.is_available() else None


if __name__ == "__main__":
    sys.exit(main())
