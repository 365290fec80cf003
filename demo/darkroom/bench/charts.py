"""Charts of a section: what is faster, where the time goes, what it takes in memory. PNG files, by matplotlib."""

import io
import math
import textwrap
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darkroom.bench.results import PIPELINE
from darkroom.bench.sections import Entry, Group, Section, less, number, size, times
from darkroom.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "font.size": 9,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "savefig.dpi": 144,
    # Labels may hold dollar signs, which stand for themselves.
    "text.parse_math": False,
}

BASELINE, FAINT = "#5a5a5a", "#444444"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#CC79A7", "#F0E442")
"""Okabe and Ito's palette (https://jfly.uni-koeln.de/color/), which colour-blind people can tell apart."""

MARKERS = "osD^vPX*"
STAGE_COLOURS = {"CLIP": "#56B4E9", "VAE-Enc": "#CC79A7", "UNet": "#0072B2", "VAE-Dec": "#E69F00"}
DARK = (COLOURS[0], BASELINE)
"""What is written on in white."""

REST, REST_COLOUR = "rest", "#c8c8c8"
"""What no stage accounts for."""

SHOWN_SHARE = 5
"""Smaller percentages have no room for their number."""

ROW, PANEL = 0.27, 3.4
"""Inches: the height of a horizontal bar, and of a panel with lines."""


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
    """Images a second of every cell, with its speed-up over the baseline."""
    over = f", and speed-up over {part.baseline}" if part.baseline else ""
    colours, bars = _colours(part), {}
    for entry in part.entries:
        rate = entry.row["images_per_second"]
        said = number(rate) if entry.speedup is None else f"{number(rate)}, {times(entry.speedup)}"
        bars[entry] = [(rate, colours[entry.name])], said
    return _bars(part, f"Images per second{over}", {"images/s": bars})


def memory(part: Section) -> "Figure | None":
    """Peak memory of the host, and of the device where any was measured."""
    colours = _colours(part)
    panels: Panels = {}
    for where in ("host", "device"):
        for entry in part.entries:
            if count := entry.row[f"peak_{where}_bytes"]:
                compared = where == "host" and entry.saved_share is not None and entry.name != part.baseline
                said = f"{size(count)}, {less(entry.saved_share)}" if compared else size(count)
                bars = panels.setdefault(f"peak memory of the {where}, MB", {})
                bars[entry] = [(count / 1e6, colours[entry.name])], said
    return _bars(part, "Peak memory", panels)


def stages(part: Section) -> "Figure | None":
    """The share of each stage in the time of a batch, and of what no stage accounts for."""
    spare = cycle(colour for colour in COLOURS if colour not in STAGE_COLOURS.values())
    colours = {name: STAGE_COLOURS.get(name) or next(spare) for name in part.stages} | {REST: REST_COLOUR}
    bars = {}
    for entry in part.entries:
        medians = {name: sample["median"] for name, sample in entry.row["stages"].items() if name != PIPELINE}
        # The medians of stages need not add up to the median of the whole.
        whole = max(entry.row.pipeline["median"], sum(medians.values()))
        medians[REST] = whole - sum(medians.values())
        shares = [(100 * medians.get(name, 0.0) / whole, colour) for name, colour in colours.items()]
        bars[entry] = shares, f"{number(entry.row.pipeline['median'])} ms"
    label = "% of the time of a batch; at the right its median"
    return _bars(part, "Where the time of a batch goes", {label: bars}, colours)


def batches(part: Section) -> "Figure | None":
    """Images a second against the size of the batch, beside what they would be if they grew with it."""
    found: dict[Group, dict[str, list[tuple[int, float]]]] = {}
    for entry in part.entries:
        lines = found.setdefault(entry.group.without("batch_size"), {})
        lines.setdefault(entry.name, []).append((entry.row.settings["batch_size"], entry.row["images_per_second"]))
    panels = [
        (group, {name: sorted(line) for name, line in lines.items() if len(line) > 1}) for group, lines in found.items()
    ]
    panels = [(group, lines) for group, lines in panels if lines]
    if not panels:
        return None
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    title = "Images per second by batch size; dashed: ideal scaling"
    shown = dict.fromkeys(name for _, lines in panels for name in lines)
    colours = {name: colour for name, colour in _colours(part).items() if name in shown}
    figure = _headed(part, title, max(8.0, 4.2 * across), PANEL * down, colours)
    for index, (group, lines) in enumerate(panels):
        axis = figure.add_subplot(down, across, index + 1)
        for (name, line), marker in zip(lines.items(), cycle(MARKERS), strict=False):
            sizes, rates = zip(*line, strict=True)
            ideal = [rates[0] * batch / sizes[0] for batch in sizes]
            axis.plot(sizes, ideal, "--", color=colours[name], alpha=0.4, linewidth=1)
            axis.plot(sizes, rates, color=colours[name], marker=marker)
        every = sorted({batch for line in lines.values() for batch, _ in line})
        axis.set_xscale("log", base=2)
        axis.set_xticks(every, [str(batch) for batch in every])
        # Dashed lines may leave the picture: it is about the others.
        axis.set_ylim(0, 1.3 * max(rate for line in lines.values() for _, rate in line))
        axis.set_title(textwrap.fill(group.label, 45), size=10)
        axis.set_xlabel("batch size, images")
        axis.set_ylabel("images/s")
    return figure


CHARTS = {"speed": speed, "stages": stages, "memory": memory, "batches": batches}
"""By what stands in the names of their files."""


def _colours(part: Section) -> dict[str, str]:
    """The colour of every contender: grey for the baseline, the palette in their order for the others."""
    palette = cycle(COLOURS)
    return {name: BASELINE if name == part.baseline else next(palette) for name in part.names}


def _headed(part: Section, title: str, width: float, height: float, legend: dict[str, str]) -> "Figure":
    """A figure with room for panels of this size in inches, below a heading: what is shown, and of which model on
    which machine and when. The legend has a name for each colour."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    small = [f"{part.version} on {part.machine}, {part.dates}", part.shared.label]
    lines = [line for text in small for line in textwrap.wrap(text, int(width / 0.085))]
    figure = Figure(figsize=(width, height + 0.5 + 0.2 * len(lines) + 0.25 * math.ceil(len(legend) / 3)))
    figure.set_layout_engine("constrained")
    figure.suptitle("\n".join([*textwrap.wrap(title, int(width / 0.1)), *lines]), x=0.01, ha="left", size=10)
    if legend:
        handles: list[Any] = [Patch(label=name, color=colour) for name, colour in legend.items()]
        figure.legend(handles=handles, loc="outside lower left", ncols=3)
    return figure


Panels = dict[str, dict[Entry, tuple[list[tuple[float, str]], str]]]
"""What stands below each panel, and in it the bar of each cell: its parts with their colours, and what it says."""


def _bars(part: Section, title: str, panels: Panels, legend: dict[str, str] | None = None) -> "Figure | None":
    """Horizontal bars, one for each cell that has one, in panels beside each other. None without any. With a legend,
    what its colours stand for are percentages, which are written on them."""
    if not any(panels.values()):
        return None
    count = len(part.entries) + sum(bool(group.label) for group in part.groups)
    figure = _headed(part, title, 9.0 if len(panels) == 1 else 12.0, 0.75 + ROW * (count + 1), legend or {})
    for index, (label, bars) in enumerate(panels.items()):
        axis = figure.add_subplot(1, len(panels), index + 1)
        ticks, y = {}, 0
        for group, entries in part.groups.items():
            if group.label:
                axis.text(0.0, y, f" {group.label}", va="center", weight="bold")
                y += 1
            for entry in entries:
                segments, said = bars.get(entry, ([], ""))
                left = 0.0
                for value, colour in segments:
                    axis.barh(y, value, left=left, height=0.72, color=colour)
                    if legend and value >= SHOWN_SHARE:
                        ink = "white" if colour in DARK else "black"
                        axis.text(left + value / 2, y, f"{value:.0f}%", color=ink, ha="center", va="center", size=8)
                    left += value
                style = {"textcoords": "offset points", "va": "center", "size": 8, "color": FAINT}
                axis.annotate(said, (left, y), (4, 0), **style)
                ticks[y] = entry.name
                y += 1
        axis.set_yticks([*ticks], ticks.values() if index == 0 else [""] * len(ticks))
        axis.tick_params(axis="y", length=0)
        axis.grid(visible=False, axis="y")
        axis.set_ylim(y - 0.4, -0.6)
        axis.set_xlim(0, 1.3 * max(sum(value for value, _ in segments) for segments, _ in bars.values()))
        axis.set_xlabel(label)
    return figure
