"""What sweeps and comparisons found, for a spreadsheet, for a README, for a terminal, and as charts."""

import csv
import importlib.util
import io
import re
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from darkroom.bench.per_device import per_device
from darkroom.bench.results import FORMAT, JSON_NAMES, PIPELINE, Row, read
from darkroom.bench.sections import Entry, Section, sections
from darkroom.bench.words import less, number, size, times
from darkroom.errors import Failed, InvalidRequest
from darkroom.files import write_whole

WIDTH = 80
COLUMNS = {"": 26, " ": 12, "images/s": 8, "speed-up": 8, "ms (p90)": 14, "memory": 7}
"""The terminal's table: what is above each column, and its characters; with a blank between them, `WIDTH`."""


def report(files: list[Path], folder: Path, baseline: str | None, max_latency: float | None) -> list[Path]:
    """Writes results.csv, results.md and the charts into `folder`, and returns their paths.

    `baseline` is a contender or a part of its name; `max_latency` is in milliseconds, for `best_under`. Raises
    `InvalidRequest` for files that cannot be read, a contender that is not there and a package that is missing, and
    `Failed` for a folder that cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidRequest("The charts of a report need the package matplotlib: pip install matplotlib")
    from darkroom.bench.charts import write_charts

    rows = read(files)
    parts = sections(rows, baseline)
    best = [] if max_latency is None else best_lines(rows, max_latency)
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


def best_under(rows: list[Row], max_latency_ms: float) -> dict[str, Row | None]:
    """For each version the cell with the most images a second of those whose Pipeline has its p90 within the bound.

    None where there is no such cell. Raises `InvalidRequest` for a bound that nothing can be within.
    """
    if not max_latency_ms > 0:
        raise InvalidRequest(f"--max-latency must be above 0 ms, not {max_latency_ms:g}.")
    best: dict[str, Row | None] = {}
    for row in rows:
        known = best.setdefault(row.settings.version, None)
        within = row.error is None and row.pipeline.p90 <= max_latency_ms
        if within and (known is None or row.images_per_second > known.images_per_second):
            best[row.settings.version] = row
    return best


def best_lines(rows: list[Row], max_latency_ms: float) -> list[str]:
    """`best_under` in a sentence for each version."""
    best = best_under(rows, max_latency_ms)
    lines = []
    for part in sections(rows):
        bound = f"a p90 within {max_latency_ms:g} ms"
        if row := best[part.version]:
            found = next(entry for entry in part.entries if entry.row is row)
            lines.append(
                f"{part.version}: most images with {bound}: {_called(found)}, "
                f"{number(row.images_per_second)} images/s (p90 {number(row.pipeline.p90)} ms)."
            )
        elif part.entries:
            nearest = min(part.entries, key=lambda entry: entry.row.pipeline.p90)
            lines.append(
                f"{part.version}: no cell has {bound}; the nearest is {_called(nearest)} "
                f"with {number(nearest.row.pipeline.p90)} ms."
            )
        else:
            lines.append(f"{part.version}: no cell has {bound}, for none was measured.")
    return lines


def comma_separated(parts: list[Section]) -> str:
    """CSV: one line a cell with every setting and every number, so that any of them can be measured again."""
    records = []
    for part in parts:
        for entry in (*part.entries, *part.failed):
            standing = {
                "name": entry.name,
                "group": entry.group.label,
                "baseline": part.baseline,
                "speedup": entry.speedup,
                "host_bytes_saved": entry.saved,
                "host_share_saved": entry.saved_share,
            }
            records.append({"format": FORMAT, **_flat(entry.row), **standing})
    # Cells have different stages and packages, and what belongs together stands together.
    known = dict.fromkeys(name for record in records for name in record)
    order = ["format", *(field.name for field in fields(Row))]
    columns = [name for field in order for name in known if name == field or name.startswith(f"{field}_")]
    columns += [name for name in known if name not in columns]
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


def _flat(row: Row) -> dict[str, Any]:
    """The members of a line under one name each: `settings_async`, `machine_packages_torch`, `stages_UNet_median`."""
    flat: dict[str, Any] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for member, within in value.items():
                add(f"{name}_{JSON_NAMES.get(member, member)}", within)
        elif value is not None or name not in ("cold_start", "beside"):  # which have members, where they are there
            flat[name] = str(value).lower() if isinstance(value, bool) else value

    for name, value in asdict(row).items():
        if name == "machine":
            value["packages"] = dict(value["packages"])
        add(name, value.isoformat() if name == "finished" else value)
    return flat


def markdown(parts: list[Section], charts: dict[str, list[str]], best: list[str]) -> str:
    """A page with a table for each version; `charts` are the files to show with each, beside the page."""
    blocks = ["# Results", *best]
    for part in parts:
        blocks += [f"## {_plain(part.version)}", _plain(_heading(part))]
        if part.entries:
            blocks.append(_table([_cells(entry, part) for entry in part.entries]))
        if devices := per_device(part):
            blocks += ["By device:", _table(devices)]
        if part.failed:
            blocks.append("\n".join(["Failed:", "", *(f"- {_plain(line)}" for line in _failures(part))]))
        blocks += [f"![{name.removesuffix('.png')}]({name})" for name in charts.get(part.version, ())]
    return "\n\n".join(blocks) + "\n"


def _table(rows: list[dict[str, str]]) -> str:
    """The columns for which there is anything to say."""
    columns = [
        name for name in dict.fromkeys(name for row in rows for name in row) if any(row.get(name) for row in rows)
    ]
    lines = [columns, ["---" if name in ("contender", "group") else "---:" for name in columns]]
    lines += [[_plain(row.get(name, "")) for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(entry: Entry, part: Section) -> dict[str, str]:
    row, pipeline = entry.row, entry.row.pipeline
    stages = {name: "" for name in part.stages}
    for name, sample in row.stages.items():
        if name != PIPELINE:
            calls = f" ({row.unet_calls} calls)" if name == "UNet" and row.unet_calls else ""
            stages[name] = number(sample.median) + calls
    saved = "" if entry.saved_share is None or entry.name == part.baseline else f" ({less(entry.saved_share)})"
    return {
        "contender": entry.name,
        "group": entry.group.label,
        "images/s (speed-up)": number(row.images_per_second) + _in_brackets(entry.speedup, times),
        "Pipeline, ms (p90, spread)": (
            f"{number(pipeline.median)} ({number(pipeline.p90)}, {number(pipeline.spread)})"
        ),
        **{f"{name}, ms": text for name, text in stages.items()},
        "cold start, s": _maybe(row.cold_start and row.cold_start.median, number),
        "load, s": _maybe(row.load_seconds, number),
        "build, s": _maybe(row.build_seconds, number),
        "compile, s": _maybe(row.compile_seconds, number),
        "first call, ms": _maybe(row.first_run_ms, number),
        "host memory": _maybe(row.peak_host_bytes, size) + saved,
        "device memory": _maybe(row.peak_device_bytes, size),
        "engines": _maybe(row.engine_bytes, size),
        "PSNR, dB": _maybe(row.psnr, number),
        "images per unit of money": _maybe(row.images_per_unit, number),
    }


def text(rows: list[Row], baseline: str | None) -> str:
    """Tables with bars for a terminal of 80 columns; a bar is relative to the fastest of its group."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    file = io.StringIO()
    console = Console(file=file, width=WIDTH, color_system=None, highlight=False, markup=False, emoji=False)
    for part in sections(rows, baseline):
        console.print(Text(part.version))
        console.print(Text(_heading(part)))
        for index, group in enumerate(part.groups):
            alike = [entry for entry in part.entries if entry.group == group]
            fastest = max(entry.row.images_per_second for entry in alike)
            table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=index == 0)
            for name, width in COLUMNS.items():
                table.add_column(name, width=width, justify="left" if not name.strip() else "right", overflow="fold")
            for entry in alike:
                pipeline = entry.row.pipeline
                table.add_row(
                    Text(entry.name),
                    _bar(entry.row.images_per_second / fastest, COLUMNS[" "]),
                    number(entry.row.images_per_second),
                    _maybe(entry.speedup, times),
                    f"{number(pipeline.median)} ({number(pipeline.p90)})",
                    _maybe(entry.row.peak_host_bytes, size),
                )
            if group.label:
                console.print()
                console.print(Text(group.label))
            console.print(table)
        if devices := per_device(part):
            console.print()
            console.print(_by_device(devices))
        for line in _failures(part):
            console.print(Text(f"failed: {line}"))
        console.print()
    return "\n".join(line.rstrip() for line in file.getvalue().rstrip().split("\n"))


def _by_device(rows: list[dict[str, str]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in ("contender", "group") else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[name]) for name in columns))
    return table


def _bar(share: float, width: int) -> str:
    """A bar of at least half a character; of plain ones where the terminal has no others."""
    whole, half = "█", "▌"
    try:
        (whole + half).encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        whole, half = "#", ""
    halves = max(1, round(2 * share * width))
    return whole * (halves // 2) + half * (halves % 2)


def _heading(part: Section) -> str:
    """What holds for all cells of a section: the machine, the days, the work, the baseline."""
    baseline = f"baseline: {part.baseline}" if part.baseline else "no cell of the baseline"
    return "; ".join(filter(None, [part.machine, part.dates, part.shared.label, baseline])) + "."


def _failures(part: Section) -> list[str]:
    return [f"{_called(entry)}: {entry.row.error}" for entry in part.failed]


def _called(entry: Entry) -> str:
    return entry.name + _in_brackets(entry.group.label or None, str)


def _maybe(value: Any, form: Any) -> str:
    return "" if value is None else form(value)


def _in_brackets(value: Any, form: Any) -> str:
    return "" if value is None else f" ({form(value)})"


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
