"""`python -m tests.faults NAME --count N`: the long forms, whose numbers stand in docs/faults.md."""

import argparse
import tempfile
import time
from importlib import import_module
from pathlib import Path

from tests.faults.scene import Scene

NAMES = ("flips", "kills", "full_disk", "fuzz")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Faults, caused on purpose.")
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--count", type=int, required=True, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="others; default 0")
    parser.add_argument("--scene", type=Path, help="a folder that keeps the model and its engines for the next time")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        scene = Scene.at(flags.scene or Path(folder) / "scene")
        began = time.monotonic()
        found = import_module(f"tests.faults.{flags.name}").run(scene, Path(folder), flags.count, flags.seed)
        print(f"{sum(found.values())} in {time.monotonic() - began:.0f} s:")
        for name, count in sorted(found.items()):
            print(f"  {count:5} {name}")
