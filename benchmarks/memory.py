#!/usr/bin/env python3
"""What the stages of a model take at most: measured, as JSON lines, beside what `--dry-run` forecasts.

python benchmarks/memory.py emoji sd-1.5 --engine openvino --size 512 --batch-size 1 --stages unet vae

A model is an embedded one, a folder, or a published architecture, which gets random weights. Export and build are
measured in the processes that do them, as every manifest records; a run, in one that loads the engine and calls it.
"""

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "demo"))

from darkroom.bench.architectures import ARCHITECTURES, write_model  # noqa: E402
from darkroom.checkpoint.catalog import EMBEDDED  # noqa: E402
from darkroom.checkpoint.folder import open_checkpoint  # noqa: E402
from darkroom.contract import Job  # noqa: E402
from darkroom.engines import find_runtime  # noqa: E402
from darkroom.engines.runtime import Options  # noqa: E402
from darkroom.prepare import Preparer  # noqa: E402
from darkroom.processes.child import run_in_child  # noqa: E402
from darkroom.processes.memory import peak_memory  # noqa: E402
from darkroom.request import Request  # noqa: E402
from darkroom.store.manifest import MANIFEST  # noqa: E402
from darkroom.store.store import Store  # noqa: E402


def called(engine: str, job: Job, source: Path) -> int:
    """The peak of a process that loads an engine and calls it twice."""
    import numpy as np

    sizes, random = job.profile.sizes(), np.random.default_rng(0)
    inputs = {}
    for tensor in job.stage.inputs:
        shape = [sizes.get(size, size) for size in tensor.shape]
        if tensor.dtype == "int32":
            inputs[tensor.name] = random.integers(0, min(tensor.count or 256, 256), shape, np.int32)
        else:
            inputs[tensor.name] = random.standard_normal(shape, np.float32)
    network = find_runtime(engine, Options()).load(job, source, None)
    for _ in range(2):
        network(inputs)
    return peak_memory()


def measured(folder: Path, engine: str, request: Request, stages: list[str], stores: Path) -> list[dict]:
    """A line for each stage's export, build and run: what it took at most, and what it left on disk."""
    graphs, engines = Store(stores / "onnx"), Store(stores / "engines")
    preparer = Preparer(open_checkpoint(folder, engines.fingerprints), find_runtime(engine, Options()), graphs, engines)
    wanted = preparer.stages_for(request, from_image=True)
    lines = []
    for stage in sorted(wanted & set(stages) if stages else wanted):
        planned = preparer.plan(request, {stage})
        compiled = preparer.compile(request, {stage})
        missing = [each for each in planned if each.folder is None and each.place is not None]
        for each, made in zip(missing, preparer.made, strict=True):
            peak = json.loads((made / MANIFEST).read_text())["made"]["peak_bytes"]
            disk = sum(file.stat().st_size for file in made.iterdir())
            work = "build" if made.parent == engines.root else "export"
            lines.append({"stage": stage, "work": work, "peak": peak, "forecast": each.make})
            lines[-1] |= {"disk": disk, "disk_forecast": each.disk}
        preparer.made.clear()
        peak = run_in_child(called, engine, compiled.jobs[stage], compiled.sources[stage])
        lines.append({"stage": stage, "work": "run", "peak": peak, "forecast": planned[-1].run})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--engine", nargs="+", default=["openvino"])
    parser.add_argument("--precision", nargs="+", default=["fp32"])
    parser.add_argument("--size", type=int, nargs="+", default=[0], help="pixels; default: the model's own")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1])
    parser.add_argument("--stages", nargs="+", default=[])
    parser.add_argument(
        "--networks", nargs="+", help="those of a published architecture that get weights; default: all"
    )
    flags = parser.parse_args()
    for model in flags.models:
        with tempfile.TemporaryDirectory() as place:
            folder = EMBEDDED / model
            if model in ARCHITECTURES:
                folder = run_in_child(write_model, model, Path(place, model), flags.networks)
            own = open_checkpoint(folder, Store(Path(place, "engines")).fingerprints).default_size
            for engine, precision, size, batch in itertools.product(
                flags.engine, flags.precision, flags.size, flags.batch_size
            ):
                settings = {"model": model, "engine": engine, "precision": precision}
                settings |= {"size": size or own, "batch_size": batch}
                request = Request(
                    model=model,
                    prompts=("an apple",),
                    height=size or own,
                    width=size or own,
                    denoising_steps=2,
                    guidance_scale=7.5,
                    engine=engine,
                    precision=precision,
                    batch_size=batch,
                )
                for line in measured(folder, engine, request, flags.stages, Path(place)):
                    print(json.dumps(settings | line), flush=True)


if __name__ == "__main__":
    main()
