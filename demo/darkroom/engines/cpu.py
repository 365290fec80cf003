"""What this machine's processor is called in the keys of engines built for it."""

import hashlib
import platform
from pathlib import Path


def processor() -> str:
    """The model name and a short hash of the instruction sets, which compiled kernels depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = facts.get("model name", platform.machine())
    flags = hashlib.sha256(facts.get("flags", facts.get("Features", "")).encode()).hexdigest()[:8]
    return f"{name} ({flags})"
