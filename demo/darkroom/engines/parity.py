"""An engine held against what it was made of: loaded and run once, on inputs that keep to its contract.

When it is built, against the graph, which was held against torch when it was exported, run by another runtime; when it
is verified, against torch in float32.
"""

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from darkroom.contract import FREE, Job
from darkroom.engines.runtime import Options, Runtime
from darkroom.errors import Failed
from darkroom.networks.examples import example_arrays
from darkroom.networks.graph import by_onnxruntime, by_openvino, relative_error
from darkroom.values import from_json

TOLERANCES = {"fp32": 1e-3, "fp16": 3e-2, "bf16": 1e-1}
"""Largest difference from the reference that an engine may show, relative to the largest value."""


def held_against_graph(runtime: Runtime, job: Job, graph: Path, engine: Path) -> dict[str, float]:
    """Runs graph and engine once each. Returns the largest difference relative to the largest value, and the seconds
    that the comparison took. Raises `Failed` for more than the engine's precision allows.
    """
    began = time.perf_counter()
    stage, inputs = job.stage, example_arrays(job.stage, sizes_of(job), seed=3)
    # ONNX Runtime computes no bfloat16 graphs.
    own = runtime.name == "onnxruntime" or (runtime.typed and job.precision == "bf16")
    run = by_openvino if own or not find_spec("onnxruntime") else by_onnxruntime
    expected = run(graph, stage, inputs)
    found = runtime.load(job, engine, None)(inputs)
    error = relative_error((value, found[tensor.name]) for tensor, value in zip(stage.outputs, expected, strict=True))
    if not error <= TOLERANCES[job.precision]:
        raise Failed(
            f"the {stage.name} engine of {runtime.name} in {job.precision} differs from its graph by {error:.1e} "
            f"(allowed: {TOLERANCES[job.precision]:.0e}): it was not kept. Try --precision fp32, or another --engine."
        )
    return {"error_against_graph": error, "checked_in": time.perf_counter() - began}


def run_once(
    runtime: str, options: dict[str, Any], job: dict[str, Any], engine: Path, model: Path | None
) -> float | None:
    """Runs in a child. Largest difference from torch relative to the largest value, or infinity for a broken output.

    `options` and `job` are the engine's, as its manifest has them. None without a `model` to compare with; the outputs
    must be finite then, too.
    """
    import numpy as np

    from darkroom.engines import find_runtime
    from darkroom.networks.load import example_inputs, load_module, outputs_of

    its = from_json(Job, job)
    inputs = example_inputs(its.stage, sizes_of(its), seed=2)
    loaded = find_runtime(runtime, Options(**options)).load(its, engine, None)
    outputs = loaded({name: value.numpy() for name, value in inputs.items()})
    if not all(np.isfinite(output).all() for output in outputs.values()):
        return float("inf")
    if model is None:
        return None
    expected = outputs_of(load_module(its.stage, model), its.stage, inputs)
    return relative_error((value, outputs[name]) for name, value in expected.items())


def sizes_of(job: Job) -> dict[str, int]:
    """The sizes that an engine is for; what it leaves free is what it is best at."""
    profile = job.profile
    best = {"B": profile.batches[1], "H": profile.pixels[1], "W": profile.pixels[1]}
    best |= {latent: best[pixel] // profile.vae_factor for latent, pixel in (("h", "H"), ("w", "W"))}
    return {symbol: best[symbol] if size == FREE else size for symbol, size in profile.sizes().items()}
