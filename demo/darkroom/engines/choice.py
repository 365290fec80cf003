"""Which precision a stage is computed in where nobody says: the fastest that agrees with float32, measured.

What a processor or GPU claims to compute natively is not always faster: with AVX-512's bfloat16 and without AMX, some
networks are slower in it. So each is run in each, in turns, on the machine at hand, once its engines are built.
"""

import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from darkroom.contract import Job
from darkroom.engines import find_runtime
from darkroom.engines.parity import sizes_of
from darkroom.engines.runtime import Options
from darkroom.networks.examples import example_arrays
from darkroom.networks.graph import relative_error

BOUNDS = {"bf16": 5e-2, "fp16": 1e-2}
"""Largest difference from float32, relative to the largest value, that `auto` accepts of one call."""

GAIN = 1.1
"""How many times as fast as float32 it has to be: for less, its error is not worth having."""

TURNS, SECONDS = (3, 25), 2.0
"""Calls of each precision, least and most: no more are made once they took so long altogether."""


def choose(runtime: str, options: Options, job: Job, sources: dict[str, Path]) -> dict[str, Any]:
    """Runs in a child. `sources` are the engines of a stage by precision, the one that others are held against first.

    Returns which is `chosen` and `why`, in half a sentence, the median `milliseconds` of a call of each, and the
    `differences` from the first.
    """
    its = find_runtime(runtime, options)
    inputs = example_arrays(job.stage, sizes_of(job), seed=4)
    plain, *others = sources
    expected: dict[str, Any] = {}
    differences: dict[str, float] = {}
    times: dict[str, list[float]] = {precision: [] for precision in sources}
    # Of the largest networks there is room for one at a time.
    for together in [[each] for each in sources] if job.stage.half_weights else [list(sources)]:
        loaded = {each: its.load(replace(job, precision=each), sources[each], None) for each in together}
        for precision, engine in loaded.items():
            found = {name: value.copy() for name, value in engine(inputs).items()}
            if precision == plain:
                expected = found
            differences[precision] = relative_error((expected[name], value) for name, value in found.items())
        until = time.perf_counter() + SECONDS
        for turn in range(TURNS[1]):
            if turn >= TURNS[0] and time.perf_counter() > until:
                break
            for precision, engine in loaded.items():
                began = time.perf_counter()
                engine(inputs)
                times[precision].append(time.perf_counter() - began)
        del loaded, engine
    took = {precision: median(each) for precision, each in times.items()}
    agreeing = [each for each in others if differences[each] <= BOUNDS[each] and took[plain] >= GAIN * took[each]]
    chosen = min(agreeing, key=took.__getitem__, default=plain)
    told = [f"{each} {took[each] * 1e3:.1f} ms" for each in sources]
    told += [f"{each} differs by {differences[each]:.0e} (allowed: {BOUNDS[each]:.0e})" for each in others]
    return {
        "chosen": chosen,
        "why": ", ".join(told),
        "milliseconds": {precision: seconds * 1e3 for precision, seconds in took.items()},
        "differences": differences,
    }
