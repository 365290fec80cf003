"""How much memory is left, on the host and on the GPU: contenders that wait for their turn hold theirs."""

import os
import shutil
import subprocess
from pathlib import Path

SAVED_ROOM = 0.15
"""The share of the memory that is left free."""

SECONDS_TO_ANSWER = 20


class Room:
    """Made before anybody is loaded: what is taken by then is others'."""

    def __init__(self) -> None:
        self._before = [free for _, free in _places()]

    def for_another(self, running: int) -> bool:
        """Whether memory is left for one more like those that are running. True where the system does not say."""
        places = zip(_places(), self._before, strict=False)
        return all(free - (before - free) / running > SAVED_ROOM * total for (total, free), before in places)


def _places() -> list[tuple[int, int]]:
    return [place for place in (_host(), _device()) if place is not None]


def _host() -> tuple[int, int] | None:
    """All there is and what is free, in kilobytes."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kilobytes = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
    return kilobytes["MemTotal"], kilobytes["MemAvailable"]


def _device() -> tuple[int, int] | None:
    """The same of the NVIDIA GPU that programs here take first, in megabytes. Asking CUDA itself would take some."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    query = [program, "-i", device, "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=SECONDS_TO_ANSWER)
        total, free = map(int, answer.stdout.split(","))
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return total, free
