"""The columns in which accelerators are compared: batch, latency and throughput of a device, and what a picture costs.

They are those of the comparison of TPU v4 and v5e that was published with Stable Diffusion XL in JAX.
"""

from darkroom.bench.sections import Section
from darkroom.bench.words import number

MILLISECONDS = 1000


def per_device(part: Section) -> list[dict[str, str]]:
    """A row for each cell, where any was measured on several devices or at a price; else none."""
    rows = [entry.row for entry in part.entries]
    if not any(row.settings.devices > 1 or row.price_per_hour for row in rows):
        return []
    return [
        {
            "contender": entry.name,
            "group": entry.group.label,
            "devices": str(entry.row.settings.devices),
            "batch per device": f"{entry.row.settings.batch_size / entry.row.settings.devices:g}",
            "latency, s": number(entry.row.pipeline.median / MILLISECONDS),
            "images/s per device": number(entry.row.images_per_second / entry.row.settings.devices),
            "images per unit of money": "" if entry.row.images_per_unit is None else number(entry.row.images_per_unit),
        }
        for entry in part.entries
    ]
