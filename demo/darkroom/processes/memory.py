"""How much memory a process took, and how much it can have."""

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
LIMITS = ("memory.max", "memory.limit_in_bytes")
"""The files that say what a group of processes may hold: of cgroups v2 and v1, in bytes, or the word max."""


def peak_memory() -> int:
    """Bytes that this process held at most. 0 where the system does not say."""
    with suppress(OSError, StopIteration):  # Linux: what getrusage says of a child begins with what its parent held
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else 1024 * kilobytes


def machine_memory() -> int | None:
    """Bytes of memory that this process can have: the machine's, or what a cgroup limits it to. None where the system
    does not say."""
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None
    return min([machine, *_limits(CGROUPS, Path("/proc/self/cgroup"))])


def _limits(root: Path, membership: Path) -> Iterator[int]:
    """The limits of the groups that this process is in, and of all around them, as far as they can be seen here."""
    with suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            top = root / controllers
            for place in (top / group.lstrip("/"), *(top / group.lstrip("/")).parents):
                for name in LIMITS:
                    with suppress(OSError, ValueError):  # none there, or no limit
                        yield int((place / name).read_text())
                if place == root:
                    break
