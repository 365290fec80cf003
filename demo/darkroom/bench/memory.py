"""How much memory is left, on the host and on the GPU: contenders that wait for their turn hold theirs."""

from pathlib import Path

from darkroom.bench.machine import nvidia

SAVED_ROOM = 0.15
"""The share of the memory that is left free."""


class Room:
    """Made before anybody is loaded: what is taken by then is others'."""

    def __init__(self) -> None:
        self._before = [free for _, free in _places()]

    def for_another(self, running: int) -> bool:
        """Whether memory is left for one more like those that are running. True where the system does not say."""
        places = zip(_places(), self._before, strict=False)
        return all(free - (before - free) / running > SAVED_ROOM * total for (total, free), before in places)


def _places() -> list[tuple[int, int]]:
    """All there is and what is free: of the host in kilobytes, and of the GPU in megabytes."""
    device = nvidia("memory.total", "memory.free")
    return [place for place in (_host(), device and (int(device[0]), int(device[1]))) if place]


def _host() -> tuple[int, int] | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kilobytes = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
    return kilobytes["MemTotal"], kilobytes["MemAvailable"]
