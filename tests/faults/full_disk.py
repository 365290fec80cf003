"""The disk is full at some moment of a run: that ends in one line, and with room the same command makes its pictures.

The studio lies on a file system in memory, most of whose room a file takes when the run comes to a phase. Mounting it
takes root, or a kernel that lets everybody be root of a namespace of their own: `unshare -rm python -m tests.faults`.
"""

import os
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.kills import PHASES, load_heavy, prepared, wrapped
from tests.faults.scene import Scene, forked, names, pictures
from tests.support import Ended

MEBIBYTES = 64


def run(scene: Scene, work: Path, count: int, seed: int = 0) -> Counter[str]:
    """So many runs. Returns how often the disk was full when, and how the run ended: 0 where there was room enough."""
    load_heavy()
    disk = work / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={MEBIBYTES}m", "tmpfs", str(disk)], check=True)
    try:
        return _run(scene, disk, work / "told", count, random.Random(seed))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _run(scene: Scene, disk: Path, told: Path, count: int, chance: random.Random) -> Counter[str]:
    hit = Counter[str]()
    for number in range(count):
        name = list(PHASES)[number % len(PHASES)]
        phase, filling = PHASES[name], disk / "filling"
        studio = prepared(scene, disk, phase)
        # Most often next to nothing; now and then as much as one of several files needs.
        left = chance.choice([0, 1, 3, 20, 200, 1000, chance.randrange(4000)]) * 1024

        def fill(call: Callable[[], Any]) -> Any:
            if not filling.exists():  # noqa: B023
                room = shutil.disk_usage(disk).free - left  # noqa: B023
                with filling.open("wb") as file:  # noqa: B023
                    os.posix_fallocate(file.fileno(), 0, max(room, 1))
            return call()

        def work() -> Ended:
            return wrapped(scene, studio, phase, fill)  # noqa: B023

        code = forked(work, told)
        said = told.read_text()
        filling.unlink(missing_ok=True)
        try:
            assert code in (0, 1) and "Traceback" not in said
            if code == 1:
                *_, last = said.splitlines()
                assert last.startswith("demo_txt2img.py: ") and ("space" in last or "cannot" in last), last
            half_made = {each for each in names(studio) - scene.names if each.endswith(".tmp")}
            assert half_made == set()
            for each, made in pictures(studio).items():
                assert (made == scene.pictures[each]).all(), each
            assert forked(lambda: scene.run(studio, phase.run), told) == 0, told.read_text()  # noqa: B023
            scene.check(studio)
        except BaseException as error:
            error.add_note(f"{left} bytes free at {name} (number {number})\n{said}")
            raise
        hit[f"{name}: exit code {code}"] += 1
    return hit
