"""Values as tables and charts say them."""

import re
import textwrap
from typing import Any

PROMPT_CHARACTERS = 40

NOISE = re.compile(
    r"\((?:R|TM|[0-9a-f]{8})\)|\b\d+-Core\b|\b(?:Processor|CPU)\b|@.*$|\b(?:with|w/) .*$|^\d+(?:st|nd|rd|th) Gen\b",
    re.IGNORECASE,
)
"""What processors' names say and nobody calls them; eight digits are Darkroom's hash of the instruction sets."""

INSTRUCTION_SETS = re.compile(r" \([0-9a-f]{8}\)$")


def processor_name(name: str) -> str:
    """`AMD EPYC 9B14` for `AMD EPYC 9B14 96-Core Processor (0123abcd)`."""
    return " ".join(NOISE.sub(" ", name).split()).strip(" ,") or name


def words(field: str, value: Any) -> str:
    """A value as it is said in a label: `batch 4`, `20 steps`, `DDIM`, `no CUDA graph`."""
    match field, value:
        case "batch_size", _:
            return f"batch {value}"
        case "denoising_steps", _:
            return counted(value, "step")
        case "size", (height, width):
            return f"{width}×{height}"
        case "scheduler", _:
            return value or "the model's scheduler"
        case "guidance_scale", _:
            return "the model's guidance" if value is None else f"guidance {value:g}"
        case "streams", _:
            return counted(value, "stream")
        case "devices", _:
            return counted(value, "device")
        case "threads", _:
            return "all threads" if value is None else counted(value, "thread")
        case "use_cuda_graph", _:
            return "CUDA graph" if value else "no CUDA graph"
        case "asynchronous", _:
            return "async" if value else "not async"
        case "prompt", str():
            return f'"{textwrap.shorten(value, PROMPT_CHARACTERS, placeholder="...")}"'
        case "processor", _:
            # Two of one name may differ in their instruction sets.
            return processor_name(value) + "".join(INSTRUCTION_SETS.findall(value))
        case "cores", int():
            return counted(value, "core")
        case "gpu", _:
            return value or "no GPU"
        case (("precision" | "build" | "engine" | "system"), str()):
            return value
        case "memory_bytes", int():
            return f"{value:,} bytes of memory"
        case _:
            return f"{field.replace('_', ' ')} {'unknown' if value is None else value}"


def counted(count: int, noun: str) -> str:
    """`1 step`, `20 steps`."""
    return f"{count} {noun}{'s' * (count != 1)}"


def number(value: float) -> str:
    """Three digits of a measurement, more where there are more before the point: `0.812`, `2.10`, `48.5`, `1190`."""
    decimals = next((digits for digits, bound in ((0, 99.95), (1, 9.995), (2, 0.9995)) if abs(value) >= bound), 3)
    return f"{value:.{decimals}f}"


def size(count: float) -> str:
    """Bytes as `412 MB` or `1.24 GB`, in powers of ten."""
    for unit, amount in (("GB", 1e9), ("MB", 1e6)):
        if count >= 0.9995 * amount:
            return f"{number(count / amount)} {unit}"
    return f"{count / 1e3:.0f} kB"


def times(ratio: float) -> str:
    """A speed-up: `2.5x`; with one digit more where it is a loss, `0.93x`."""
    return f"{ratio:.1f}x" if ratio >= 0.995 else f"{ratio:.2f}x"


def less(share: float) -> str:
    """A share saved: `63% less`, `12% more`, or `as much`."""
    percent = round(100 * share)
    return f"{abs(percent)}% {'less' if percent > 0 else 'more'}" if percent else "as much"
