"""What the charts have in common: colours, headings, legends, and bars in panels where they can be told apart."""

import math
import textwrap
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from darkroom.bench.sections import Entry, Group, Section
from darkroom.bench.words import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS_PER_INCH = 144
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.dpi": DOTS_PER_INCH,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.color": "#e4e4e4",
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "savefig.dpi": DOTS_PER_INCH,
    # Labels may hold dollar signs, which stand for themselves.
    "text.parse_math": False,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}

FAINT = "#444444"
BASELINE = "#5a5a5a"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#CC79A7", "#F0E442")
"""Okabe and Ito's palette (https://jfly.uni-koeln.de/color/), which colour-blind people can tell apart. When all are
used they come again with hatches."""

HATCHES = ("", "///", "...", "xxx", "---")
MARKERS = "osD^vPX*"

BAR, EDGES, PANEL, ROW = 0.48, 1.1, 3.3, 0.27
"""Inches: the width for a vertical bar, the width for the edges of its panel, the height of the panel, and the height
for a horizontal bar."""

NARROWEST, WIDEST = 8.0, 16.5
"""Inches between which the width of a figure is, unless one group alone has more bars."""

SAME_SCALE = 8.0
"""How many times slower a group may be than another in its panel; beyond that its bars are stubs."""


@dataclass(frozen=True)
class Look:
    """How something is drawn in every chart of its section."""

    colour: str
    hatch: str = ""
    marker: str = "o"


@dataclass(frozen=True)
class Bar:
    """One of a cluster: its value is written above it, and `text` above that."""

    series: str
    value: float
    text: str


@dataclass(frozen=True)
class Cluster:
    """Bars that stand together over one label. Clusters of one `kind` share panels."""

    label: str
    kind: Group
    bars: tuple[Bar, ...]

    @property
    def most(self) -> float:
        return max(bar.value for bar in self.bars)

    @property
    def slots(self) -> int:
        """Its bars and the gap before the next, all of one width."""
        return len(self.bars) + 1


def looks_of(part: Section) -> dict[str, Look]:
    """The look of every contender: grey for the baseline, colours in the order of the lines for the others."""
    looks = {}
    others = [name for name in part.names if name != part.baseline]
    for index, name in enumerate(part.names):
        marker = MARKERS[index % len(MARKERS)]
        if name == part.baseline:
            looks[name] = Look(BASELINE, marker=marker)
        else:
            again, place = divmod(others.index(name), len(COLOURS))
            looks[name] = Look(COLOURS[place], HATCHES[again % len(HATCHES)], marker)
    return looks


def fill(look: Look) -> dict[str, Any]:
    """What matplotlib calls it."""
    return {"facecolor": look.colour, "hatch": look.hatch, "edgecolor": "white", "linewidth": 0.0}


def ink_on(colour: str) -> str:
    """Black or white, whichever is read better on a colour: by its relative luminance, as WCAG 2 defines it."""
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
    luminance = sum(weight * each for weight, each in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "black" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "white"


def headed_figure(
    part: Section, title: str, width: float, height: float, looks: dict[str, Look], lines: bool = False
) -> "Figure":
    """A figure with room for panels of this `width` and `height` in inches, below a heading and a legend.

    The heading says what is shown, and of which model on which machine and when. The legend, of `lines` or of areas,
    has everything in `looks`.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    # No letter of these sizes is wider on average than these inches.
    large = textwrap.wrap(title, int(width / 0.13))
    small = [f"{part.version} on {part.machine}, {part.dates}", part.shared.label]
    small = [line for text in small for line in textwrap.wrap(text, int(width / 0.085))]
    columns = max(1, int((width - 0.3) / (0.75 + 0.085 * max((len(name) for name in looks), default=1))))
    columns = min(columns, max(1, len(looks)))
    top = 0.25 + 0.25 * len(large) + 0.19 * len(small) + 0.23 * math.ceil(len(looks) / columns)
    tall = height + top
    figure = Figure(figsize=(width, tall), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(rect=(0, 0, 1, height / tall), h_pad=0.08, w_pad=0.1, hspace=0.04)
    down = 0.15
    for line in large:
        figure.text(0.15 / width, 1 - down / tall, line, va="top", size=13, weight="bold")
        down += 0.25
    for line in small:
        figure.text(0.15 / width, 1 - down / tall, line, va="top", color=FAINT)
        down += 0.19
    if looks:
        handles: list[Any] = [
            Line2D([], [], color=look.colour, marker=look.marker, linewidth=1.8, label=name)
            if lines
            else Patch(label=name, **fill(look))
            for name, look in looks.items()
        ]
        # A legend fills column by column; people read row by row.
        handles = [handle for column in range(columns) for handle in handles[column::columns]]
        legend = figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(0.05 / width, 1 - down / tall),
            ncols=columns,
            columnspacing=1.4,
            handlelength=1.6,
        )
        legend.set_in_layout(False)
    return figure


def clustered_bars(part: Section, title: str, unit: str, clusters: list[Cluster], looks: dict[str, Look]) -> "Figure":
    """Clusters of vertical bars, in as many panels as are needed to tell them apart."""
    panels = _panels(clusters)
    slots = max(sum(cluster.slots for cluster in panel) for panel in panels)
    width = max(NARROWEST, EDGES + BAR * slots)
    inches = (width - EDGES) / slots
    figure = headed_figure(part, title, width, PANEL * len(panels), looks)
    for index, panel in enumerate(panels):
        axis = figure.add_subplot(len(panels), 1, index + 1)
        start, ticks = 0.0, []
        for cluster in panel:
            for place, bar in enumerate(cluster.bars):
                x = start + place + 0.5
                axis.bar(x, bar.value, width=0.86, **fill(looks[bar.series]))
                _above(axis, x, bar.value, 2, number(bar.value), size=8, color=FAINT)
                _above(axis, x, bar.value, 12, bar.text, size=10, weight="bold")
            room = max(8, int(inches * (len(cluster.bars) + 0.6) / 0.075))
            label = "\n".join(textwrap.fill(line, room) for line in cluster.label.split("\n"))
            ticks.append((start + len(cluster.bars) / 2, label))
            start += cluster.slots
        axis.set_xticks([x for x, _ in ticks], [label for _, label in ticks])
        axis.tick_params(axis="x", length=0)
        axis.grid(visible=False, axis="x")
        axis.set_xlim(-0.5, slots - 0.5)
        axis.set_ylim(0, 1.2 * max(cluster.most for cluster in panel))
        axis.set_ylabel(unit)
    return figure


def _above(axis: "Axes", x: float, y: float, points: float, text: str, **style: Any) -> None:
    """Writes `text` so many points above (x, y), where the limits of the axis have left room for it."""
    if text:
        style |= {"textcoords": "offset points", "ha": "center", "va": "bottom"}
        axis.annotate(text, (x, y), (0, points), **style).set_in_layout(False)


def _panels(clusters: list[Cluster]) -> list[list[Cluster]]:
    """Clusters in their order, a new panel for those that are of another kind, of another scale, or too many."""
    kinds = Counter(cluster.kind for cluster in clusters)
    apart = max(kinds.values()) > 1
    panels = []
    for _, alike in groupby(clusters, key=lambda cluster: cluster.kind if apart else None):
        runs: list[list[Cluster]] = []
        for cluster in alike:
            rates = [cluster.most, *(each.most for each in runs[-1])] if runs else []
            if rates and max(rates) <= SAME_SCALE * min(rates):
                runs[-1].append(cluster)
            else:
                runs.append([cluster])
        for run in runs:
            fitting = max(1, int((WIDEST - EDGES) / BAR / max(cluster.slots for cluster in run)))
            count = math.ceil(len(run) / math.ceil(len(run) / fitting))
            panels += [run[start : start + count] for start in range(0, len(run), count)]
    return panels


def listed_figure(part: Section, title: str, looks: dict[str, Look], across: int) -> tuple["Figure", list["Axes"]]:
    """A figure for horizontal bars, one for each cell, in panels beside each other that share their labels."""
    count = len(part.entries) + sum(bool(group.label) for group in part.groups)
    figure = headed_figure(part, title, 9.0 if across == 1 else 12.0, 0.75 + ROW * (count + 1), looks)
    axes = [figure.add_subplot(1, across, index + 1) for index in range(across)]
    for axis in axes[1:]:
        axis.tick_params(axis="y", labelleft=False)
    return figure, axes


def places(part: Section, axis: "Axes") -> list[tuple[int, Entry]]:
    """Where the bar of each cell goes, from the top, with its name beside it and the label of its group above."""
    found, y = [], 0
    for group in part.groups:
        if group.label:
            axis.text(0.0, y, f" {group.label}", va="center", weight="bold").set_in_layout(False)
            y += 1
        for entry in part.entries:
            if entry.group == group:
                found.append((y, entry))
                y += 1
    axis.set_yticks([place for place, _ in found], [entry.name for _, entry in found])
    axis.tick_params(axis="y", length=0)
    axis.grid(visible=False, axis="y")
    axis.set_ylim(y - 0.4, -0.6)
    return found
