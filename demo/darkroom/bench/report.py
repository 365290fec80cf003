"""What was measured, for a spreadsheet, for a README, for a terminal, and as charts: the same columns in each."""

import csv
import importlib.util
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from darkroom.bench.results import Row, read
from darkroom.bench.sections import Entry, Section, less, number, sections, size, times
from darkroom.contract import AUTO
from darkroom.errors import Failed, InvalidRequest
from darkroom.files import write_whole

TERMINAL = {"": 26, " ": 12, "images/s": 8, "speed-up": 8, "ms (p90)": 14, "memory": 7}
"""What stands above the columns in a terminal, a contender's name and a bar first, and the characters of each."""

Columns = dict[str, Callable[[Entry], str]]
"""What stands above each column, and what it says of a cell; nothing is said where nothing is known."""

WORDS = ("contender", "group")
"""Columns that stand at the left."""


def report(files: list[Path], folder: Path, baseline: str | None, max_latency: float | None) -> list[Path]:
    """Writes results.csv, results.md and the charts into `folder`, and returns their paths.

    `baseline` is a contender or a part of its name; `max_latency` is in milliseconds, for `best_under`. Raises
    `InvalidRequest` for files that cannot be read, a contender that is not there and a package that is missing, and
    `Failed` for a folder that cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidRequest("The charts of a report need the package matplotlib: pip install matplotlib")
    from darkroom.bench.charts import write_charts

    parts = sections(read(files), baseline)
    best = [] if max_latency is None else best_under(parts, max_latency)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        charts = {
            part.version: write_charts(part, folder, stem) for part, stem in zip(parts, _stems(parts), strict=True)
        }
        page = markdown(parts, {version: [path.name for path in paths] for version, paths in charts.items()}, best)
        tables = [
            write_whole(folder / "results.csv", comma_separated(parts).encode()),
            write_whole(folder / "results.md", page.encode()),
        ]
    except OSError as error:
        raise Failed(f"The report could not be written to {folder}: {error.strerror or error}.") from None
    return tables + [path for paths in charts.values() for path in paths]


def best_under(parts: list[Section], bound: float) -> list[str]:
    """For each version, in a sentence, the cell with the most images a second whose Pipeline has its p90 within the
    bound in milliseconds. Raises `InvalidRequest` for a bound that nothing can be within."""
    if not bound > 0:
        raise InvalidRequest(f"--max-latency must be above 0 ms, not {bound:g}.")
    lines = []
    for part in parts:
        within = [entry for entry in part.entries if entry.row.pipeline["p90"] <= bound]
        if within:
            best = max(within, key=lambda entry: entry.row["images_per_second"])
            found = f"most images with a p90 within {bound:g} ms: {best.called}, "
            found += f"{number(best.row['images_per_second'])} images/s (p90 {number(best.row.pipeline['p90'])} ms)."
        elif part.entries:
            nearest = min(part.entries, key=lambda entry: entry.row.pipeline["p90"])
            found = f"no cell has a p90 within {bound:g} ms; the nearest is {nearest.called} "
            found += f"with {number(nearest.row.pipeline['p90'])} ms."
        else:
            found = f"no cell has a p90 within {bound:g} ms, for none was measured."
        lines.append(f"{part.version}: {found}")
    return lines


def columns_of(part: Section) -> Columns:
    """Everything that is said of a measured cell."""

    def member(name: str, form: Callable[[Any], str]) -> Callable[[Entry], str]:
        return lambda entry: _maybe(entry.row[name], form)

    def stage(name: str) -> Callable[[Entry], str]:
        def said(entry: Entry) -> str:
            calls = entry.row["unet_calls"] if name == "UNet" else None
            return _maybe(entry.row["stages"].get(name), _median) + (f" ({calls} calls)" if calls else "")

        return said

    def memory(entry: Entry) -> str:
        compared = entry.saved_share is not None and entry.name != part.baseline
        return member("peak_host_bytes", size)(entry) + (f" ({less(entry.saved_share)})" if compared else "")

    def pipeline(entry: Entry) -> str:
        found = entry.row.pipeline
        return f"{number(found['median'])} ({number(found['p90'])}, {number(found['most'] - found['least'])})"

    return {
        "contender": lambda entry: entry.name,
        "group": lambda entry: entry.group.label,
        "computed in": lambda entry: _maybe(entry.row["computed"] if entry.row["precision"] == AUTO else None, str),
        "images/s (speed-up)": lambda entry: (
            number(entry.row["images_per_second"]) + _maybe(entry.speedup, lambda ratio: f" ({times(ratio)})")
        ),
        "Pipeline, ms (p90, spread)": pipeline,
        **{f"{name}, ms": stage(name) for name in part.stages},
        "cold start, s": member("cold_start", _median),
        "load, s": member("load_seconds", number),
        "build, s": member("build_seconds", number),
        "compile, s": member("compile_seconds", number),
        "first call, ms": member("first_run_ms", number),
        "host memory": memory,
        "device memory": member("peak_device_bytes", size),
        "engines": member("engine_bytes", size),
        "PSNR, dB": member("psnr", number),
        "images per unit of money": member("images_per_unit", number),
    }


BY_DEVICE: Columns = {
    "contender": lambda entry: entry.name,
    "group": lambda entry: entry.group.label,
    "devices": lambda entry: str(entry.row.settings["devices"]),
    "batch per device": lambda entry: f"{entry.row.settings['batch_size'] / entry.row.settings['devices']:g}",
    "latency, s": lambda entry: number(entry.row.pipeline["median"] / 1000),
    "images/s per device": lambda entry: number(entry.row["images_per_second"] / entry.row.settings["devices"]),
    "images per unit of money": lambda entry: _maybe(entry.row["images_per_unit"], number),
}
"""The columns in which accelerators are compared, those of the comparison of TPU v4 and v5e that was published with
Stable Diffusion XL in JAX."""


def _is_by_device(part: Section) -> bool:
    """Whether any cell was measured on several devices or at a price."""
    return any(entry.row.settings["devices"] > 1 or entry.row["price_per_hour"] for entry in part.entries)


def _filled(columns: Columns, entries: list[Entry]) -> tuple[list[str], list[list[str]]]:
    """The columns for which there is anything to say, and their cells by row."""
    said = {name: [column(entry) for entry in entries] for name, column in columns.items()}
    said = {name: cells for name, cells in said.items() if any(cells)}
    return list(said), [list(row) for row in zip(*said.values(), strict=True)]


def markdown(parts: list[Section], charts: dict[str, list[str]], best: list[str]) -> str:
    """A page with a table for each version; `charts` are the files to show with each, beside the page."""
    blocks = ["# Results", *best]
    for part in parts:
        blocks += [f"## {_plain(part.version)}", _plain(_heading(part))]
        if part.entries:
            blocks.append(_markdown_table(columns_of(part), part))
        if _is_by_device(part):
            blocks += ["By device:", _markdown_table(BY_DEVICE, part)]
        if part.failed:
            blocks.append("\n".join(["Failed:", "", *(f"- {_plain(line)}" for line in _failures(part))]))
        blocks += [f"![{name.removesuffix('.png')}]({name})" for name in charts.get(part.version, ())]
    return "\n\n".join(blocks) + "\n"


def _markdown_table(columns: Columns, part: Section) -> str:
    names, rows = _filled(columns, list(part.entries))
    lines = [names, ["---" if name in WORDS else "---:" for name in names]]
    lines += [[_plain(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def comma_separated(parts: list[Section]) -> str:
    """CSV: one line a cell with every setting and every number, so that any of them can be measured again."""
    records = []
    for part in parts:
        for entry in (*part.entries, *part.failed):
            standing = {"name": entry.name, "group": entry.group.label, "baseline": part.baseline}
            standing |= {"speedup": entry.speedup, "host_bytes_saved": entry.saved}
            records.append(_flat(entry.row.line) | standing | {"host_share_saved": entry.saved_share})
    # Cells have different stages and packages, and what belongs together stands together.
    members = dict.fromkeys(name.split("_")[0] for record in records for name in record)
    known = dict.fromkeys(name for record in records for name in record)
    file = io.StringIO(newline="")
    columns = sorted(known, key=lambda name: [*members].index(name.split("_")[0]))
    writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


def _flat(line: dict[str, Any], within: str = "") -> dict[str, Any]:
    """The members of a line under one name each: `settings_async`, `machine_packages_torch`, `stages_UNet_median`."""
    flat: dict[str, Any] = {}
    for name, value in line.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{within}{name}_")
        else:
            flat[within + name] = str(value).lower() if isinstance(value, bool) else value
    return flat


def text(rows: list[Row], baseline: str | None) -> str:
    """Tables with bars for a terminal of 80 columns; a bar is relative to the fastest of its group."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    file = io.StringIO()
    console = Console(file=file, width=80, color_system=None, highlight=False, markup=False, emoji=False)

    def show(columns: Columns, entries: list[Entry], widths: dict[str, int], headed: bool = True) -> None:
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=headed)
        names, cells = (list(columns), None) if widths else _filled(columns, entries)
        for name in names:
            left = name in WORDS or not name.strip()
            table.add_column(name, width=widths.get(name), justify="left" if left else "right", overflow="fold")
        for row in cells or [[column(entry) for column in columns.values()] for entry in entries]:
            table.add_row(*map(Text, row))
        console.print(table)

    for part in sections(rows, baseline):
        console.print(Text(part.version))
        console.print(Text(_heading(part)))
        for index, (group, entries) in enumerate(part.groups.items()):
            if group.label:
                console.print()
                console.print(Text(group.label))
            fastest = max(entry.row["images_per_second"] for entry in entries)
            show(_beside_a_bar(fastest), entries, TERMINAL, headed=index == 0)
        if _is_by_device(part):
            console.print()
            show(BY_DEVICE, list(part.entries), {})
        for line in _failures(part):
            console.print(Text(f"failed: {line}"))
        console.print()
    return "\n".join(line.rstrip() for line in file.getvalue().rstrip().split("\n"))


def _beside_a_bar(fastest: float) -> Columns:
    return {
        "": lambda entry: entry.name,
        " ": lambda entry: _bar(entry.row["images_per_second"] / fastest),
        "images/s": lambda entry: number(entry.row["images_per_second"]),
        "speed-up": lambda entry: _maybe(entry.speedup, times),
        "ms (p90)": lambda entry: f"{number(entry.row.pipeline['median'])} ({number(entry.row.pipeline['p90'])})",
        "memory": lambda entry: _maybe(entry.row["peak_host_bytes"], size),
    }


def _bar(share: float) -> str:
    """A bar of at least half a character; of plain ones where the terminal has no others."""
    whole, half = "█", "▌"
    try:
        (whole + half).encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        whole, half = "#", ""
    halves = max(1, round(2 * share * TERMINAL[" "]))
    return whole * (halves // 2) + half * (halves % 2)


def _heading(part: Section) -> str:
    """What holds for all cells of a section: the machine, the days, the work, the baseline."""
    baseline = f"baseline: {part.baseline}" if part.baseline else "no cell of the baseline"
    return "; ".join(filter(None, [part.machine, part.dates, part.shared.label, baseline])) + "."


def _failures(part: Section) -> list[str]:
    return [f"{entry.called}: {entry.row['error']}" for entry in part.failed]


def _maybe(value: Any, form: Callable[[Any], str]) -> str:
    return "" if value is None else form(value)


def _median(sample: dict[str, float]) -> str:
    return number(sample["median"])


def _plain(content: str) -> str:
    """On one line, and nothing in it that Markdown would take for its own."""
    return re.sub(r"([\\|`*_<>\[\]#])", r"\\\1", " ".join(content.split()))


def _stems(parts: list[Section]) -> list[str]:
    """What the names of a version's charts begin with: safe for every file system, and different for each."""
    stems: list[str] = []
    for part in parts:
        stem = re.sub(r"[^\w.-]+", "_", part.version).strip("._") or "model"
        stems.append(stem if stem.lower() not in map(str.lower, stems) else f"{stem}-{len(stems) + 1}")
    return stems
