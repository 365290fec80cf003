"""Charts of a section: what is faster, where the time goes, what it takes in memory. PNG files, by matplotlib."""

import io
import math
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from darkroom.bench.drawing import (
    BASELINE,
    COLOURS,
    FAINT,
    NARROWEST,
    STYLE,
    Bar,
    Cluster,
    Look,
    clustered_bars,
    fill,
    headed_figure,
    ink_on,
    listed_figure,
    looks_of,
    places,
)
from darkroom.bench.results import PIPELINE
from darkroom.bench.sections import Entry, Group, Section
from darkroom.bench.words import less, number, size, times
from darkroom.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STAGE_COLOURS = {"CLIP": "#56B4E9", "VAE-Enc": "#CC79A7", "UNet": "#0072B2", "VAE-Dec": "#E69F00"}
REST, REST_COLOUR = "rest", "#c8c8c8"
"""What no stage accounts for."""

STATIC = "static-batch"
SHOWN_SHARE = 0.05
"""Smaller shares have no room for their number."""


def write_charts(part: Section, folder: Path, stem: str) -> list[Path]:
    """Writes those charts that there is data for, as `stem`-speed.png and so on. Returns their paths.

    Raises `OSError` where they cannot be written.
    """
    import matplotlib

    paths = []
    with matplotlib.rc_context(STYLE):
        for name, draw in CHARTS.items():
            if figure := draw(part):
                file = io.BytesIO()
                figure.savefig(file, format="png")
                paths.append(write_whole(folder / f"{stem}-{name}.png", file.getvalue()))
    return paths


def speed(part: Section) -> "Figure | None":
    """Images a second of every contender in every group, with the speed-up over the baseline above the bars."""
    clusters = []
    for group in part.groups:
        bars = [
            Bar(entry.name, entry.row.images_per_second, "" if entry.speedup is None else times(entry.speedup))
            for entry in part.entries
            if entry.group == group
        ]
        clusters.append(Cluster(group.label, group.without("batch_size"), tuple(bars)))
    if not clusters:
        return None
    over = f", and speed-up over {part.baseline}" if part.baseline else ""
    return clustered_bars(part, f"Images per second{over}", "images/s", clusters, looks_of(part))


def stages(part: Section) -> "Figure | None":
    """The share of each stage in the time of a batch, and of what no stage accounts for."""
    if not part.entries:
        return None
    spare = iter(colour for colour in COLOURS if colour not in STAGE_COLOURS.values())
    colours = {name: STAGE_COLOURS.get(name) or next(spare, BASELINE) for name in part.stages} | {REST: REST_COLOUR}
    looks = {name: Look(colour) for name, colour in colours.items()}
    figure, (axis,) = listed_figure(part, "Where the time of a batch goes", looks, 1)
    for y, entry in places(part, axis):
        medians = {name: sample.median for name, sample in entry.row.stages.items() if name != PIPELINE}
        # The medians of stages need not add up to the median of the whole.
        whole = max(entry.row.pipeline.median, sum(medians.values()))
        medians[REST] = whole - sum(medians.values())
        left = 0.0
        for name, colour in colours.items():
            percent = 100 * medians.get(name, 0.0) / whole
            axis.barh(y, percent, left=left, height=0.72, color=colour, edgecolor="white", linewidth=0.6)
            if percent >= 100 * SHOWN_SHARE:
                style = {"ha": "center", "va": "center", "size": 8, "color": ink_on(colour)}
                axis.text(left + percent / 2, y, f"{percent:.0f}%", **style).set_in_layout(False)
            left += percent
        axis.text(101, y, f"{number(entry.row.pipeline.median)} ms", va="center", size=8, color=FAINT)
    axis.set_xlim(0, 100)
    axis.set_xlabel("% of the time of a batch; at the right its median")
    return figure


def memory(part: Section) -> "Figure | None":
    """Peak memory of the host, and of the device where any was measured."""
    peaks = {
        "host": {entry: entry.row.peak_host_bytes for entry in part.entries},
        "device": {entry: entry.row.peak_device_bytes for entry in part.entries},
    }
    peaks = {where: counts for where, counts in peaks.items() if any(counts.values())}
    if not peaks:
        return None
    looks = looks_of(part)
    figure, axes = listed_figure(part, "Peak memory", {}, len(peaks))
    for (where, counts), axis in zip(peaks.items(), axes, strict=True):
        most = max(count for count in counts.values() if count)
        unit, amount = ("GB", 1e9) if most >= 1e9 else ("MB", 1e6)
        for y, entry in places(part, axis):
            if (count := counts[entry]) is None:
                continue
            axis.barh(y, count / amount, height=0.72, **fill(looks[entry.name]))
            compared = where == "host" and entry.saved_share is not None and entry.name != part.baseline
            label = f"{size(count)}, {less(entry.saved_share)}" if compared else size(count)
            style = {"textcoords": "offset points", "va": "center", "size": 8}
            axis.annotate(label, (count / amount, y), (4, 0), **style).set_in_layout(False)
        # Room for what is written behind the longest bar.
        axis.set_xlim(0, most / amount * (1.25 if len(peaks) == 1 else 1.4))
        axis.set_xlabel(f"peak memory of the {where}, {unit}")
    return figure


def batches(part: Section) -> "Figure | None":
    """Images a second against the size of the batch, beside what they would be if they grew with it."""
    found: dict[Group, dict[str, list[tuple[int, float]]]] = {}
    for entry in part.entries:
        lines = found.setdefault(entry.group.without("batch_size"), {})
        lines.setdefault(entry.name, []).append((entry.row.settings.batch_size, entry.row.images_per_second))
    panels = {}
    for rest, lines in found.items():
        if longer := {name: sorted(line) for name, line in lines.items() if len(line) > 1}:
            panels[rest] = longer
    if not panels:
        return None
    looks = {name: look for name, look in looks_of(part).items() if any(name in lines for lines in panels.values())}
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    title = "Images per second by batch size; dashed: ideal scaling"
    figure = headed_figure(part, title, max(NARROWEST, 4.2 * across), 3.4 * down, looks, lines=True)
    for index, (rest, lines) in enumerate(panels.items()):
        axis = figure.add_subplot(down, across, index + 1)
        for name, line in lines.items():
            sizes, rates = zip(*line, strict=True)
            look = looks[name]
            ideal = [rates[0] * batch / sizes[0] for batch in sizes]
            axis.plot(sizes, ideal, "--", color=look.colour, alpha=0.4, linewidth=1, zorder=1)
            axis.plot(sizes, rates, color=look.colour, marker=look.marker, linewidth=1.8, markersize=6, zorder=2)
        _scale(axis, lines.values())
        axis.set_title(textwrap.fill(rest.label, 45))
        axis.set_xlabel("batch size, images")
        axis.set_ylabel("images/s")
    return figure


def _scale(axis: "Axes", lines: Iterable[list[tuple[int, float]]]) -> None:
    """Powers of two on both axes: what grows with the batch is then a straight line."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    points = [point for line in lines for point in line]
    sizes = sorted({batch for batch, _ in points})
    slowest, fastest = min(rate for _, rate in points), max(rate for _, rate in points)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(sizes, [str(batch) for batch in sizes])
    axis.set_xlim(sizes[0] / 1.15, sizes[-1] * 1.15)
    # Dashed lines may leave the picture: it is about the others.
    axis.set_ylim(slowest / 1.5, fastest * 2)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.5) if fastest < 4 * slowest else (1.0,)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def builds(part: Section) -> "Figure | None":
    """Engines that leave the batch or the size free beside static ones, with their speed over those above the bars."""
    clusters: list[Cluster] = []
    seen: dict[str, None] = {}
    for group in part.groups:
        alike: dict[tuple, dict[str, Entry]] = {}
        for entry in part.entries:
            if entry.group == group and entry.row.settings.build:
                alike.setdefault(_but_for_its_build(entry), {})[entry.row.settings.build] = entry
        for (label, *_), by_build in alike.items():
            if STATIC not in by_build or len(by_build) == 1:
                continue
            base = by_build[STATIC].row.images_per_second
            rates = {build: by_build[build].row.images_per_second for build in sorted(by_build, key=_static_first)}
            bars = tuple(Bar(build, rate, f"{rate / base:.2f}x") for build, rate in rates.items())
            name = "\n".join(filter(None, [label, group.label]))
            clusters.append(Cluster(name, group.without("batch_size"), bars))
            seen |= dict.fromkeys(rates)
    if not clusters:
        return None
    looks = dict(zip(sorted(seen, key=_static_first), map(Look, (BASELINE, *COLOURS)), strict=False))
    return clustered_bars(part, "Images per second: dynamic engines beside static ones", "images/s", clusters, looks)


def _static_first(build: str) -> tuple[bool, str]:
    return build != STATIC, build


def _but_for_its_build(entry: Entry) -> tuple:
    """What a static and a dynamic contender have in common: the label without the words of the build, and the rest."""
    settings = entry.row.settings
    words = (settings.build, *settings.build.split("-"))
    label = " ".join(word for word in entry.row.contender.split() if word not in words)
    return label, settings.engine, settings.precision


CHARTS = {"speed": speed, "stages": stages, "memory": memory, "batches": batches, "builds": builds}
"""By what stands in the names of their files."""
