"""The tables of benchmarks/RESULTS.md, made of the raw lines in benchmarks/results/.

`python -m tests.bench.results_page` writes them into the page; a test says that the page has what it writes.
"""

import json
import re
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from tests.support import ROOT

PAGE = ROOT / "benchmarks" / "RESULTS.md"
RAW = ROOT / "benchmarks" / "results"
MARK = re.compile(r"(<!-- (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Line = dict[str, Any]


class Column(NamedTuple):
    """What a column shows of the lines of one contender: the value, and how it is written. `best` of a column, min or
    max, is set in bold."""

    title: str
    value: Callable[[list[Line]], float | None]
    form: str = "{:.2f}"
    best: Callable[..., float] | None = max


def where(batch: int | None = None, steps: int | None = None, turns: int | None = None) -> Callable[[Line], bool]:
    wanted = {"batch_size": batch, "denoising_steps": steps, "repeat": turns}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    return lambda line: all(line["settings"][name] == value for name, value in wanted.items())


def last(pick: Callable[[Line], float | None], **which: int | None) -> Callable[[list[Line]], float | None]:
    """Of the last line of the runs that fit, if any has a value."""

    def value(lines: list[Line]) -> float | None:
        found = [pick(line) for line in lines if where(**which)(line) and pick(line) is not None]
        return found[-1] if found else None

    return value


def speed(title: str, **which: int | None) -> Column:
    return Column(title, last(lambda line: line["images_per_second"], **which))


def cold(title: str, **which: int | None) -> Column:
    return Column(title, last(lambda line: (line["cold_start"] or {}).get("median"), **which), "{:.2f} s", min)


def stage(title: str, name: str) -> Column:
    return Column(title, last(lambda line: line["stages"][name]["median"] / 1000), "{:.1f} s", min)


LOAD = Column("load", last(lambda line: line["load_seconds"]), "{:.1f} s", min)
MEMORY = Column("memory", last(lambda line: line["peak_host_bytes"] / 1e9, batch=1), "{:.2f} GB", min)


def least_psnr(lines: list[Line]) -> float | None:
    return min((line["psnr"] for line in lines if line.get("psnr")), default=None)


PSNR = Column("least PSNR", least_psnr, "{:.0f} dB", None)
FULL = (stage("UNet, 1 call", "UNet"), stage("VAE decoder", "VAE-Dec"), stage("prompt to picture", "Pipeline"), LOAD)

TABLES: dict[str, tuple[str, Callable[[Line], bool], tuple[Column, ...]]] = {
    "emoji": (
        "emoji.jsonl",
        lambda line: True,
        (
            cold("cold start, 4 steps", steps=4),
            speed("images/s, 20 steps, batch 1", batch=1, steps=20),
            speed("images/s, 20 steps, batch 4", batch=4, steps=20),
            MEMORY,
            PSNR,
        ),
    ),
    "compiled": (
        "emoji-compiled.jsonl",
        lambda line: True,
        (speed("images/s, batch 1", batch=1), speed("images/s, batch 4", batch=4), MEMORY, PSNR),
    ),
    "avx512": (
        "emoji-avx512.jsonl",
        where(turns=25),
        (speed("images/s, batch 1", batch=1), speed("images/s, batch 4", batch=4), PSNR),
    ),
    "sd-1-5": ("full-size-sd-1.5.jsonl", lambda line: True, (*FULL, MEMORY, PSNR)),
    "sd-1-5-avx512": ("full-size-sd-1.5-avx512.jsonl", lambda line: True, (*FULL, MEMORY, PSNR)),
}


def lines(name: str) -> list[Line]:
    return [json.loads(line) for line in (RAW / name).read_text(encoding="utf-8").splitlines()]


def table(name: str) -> str:
    file, keep, columns = TABLES[name]
    contenders: dict[str, list[Line]] = {}
    for line in lines(file):
        if keep(line) and line["error"] is None:
            contenders.setdefault(line["contender"], []).append(line)
    values = {who: [column.value(own) for column in columns] for who, own in contenders.items()}
    best = [
        column.best and column.best(row[place] for row in values.values() if row[place] is not None)
        for place, column in enumerate(columns)
    ]
    order = sorted(values, key=lambda who: -statistics.fmean(line["images_per_second"] for line in contenders[who]))
    made = ["| " + " | ".join(["", *(column.title for column in columns)]) + " |"]
    made.append("| --- |" + " ---: |" * len(columns))
    for who in order:
        cells = []
        for column, value, top in zip(columns, values[who], best, strict=True):
            text = "" if value is None or value == float("inf") else column.form.format(value)
            cells.append(f"**{text}**" if text and value == top else text)
        made.append("| " + " | ".join([who, *cells]) + " |")
    return "\n".join(made)


def with_tables(page: str) -> str:
    """The page with its tables as the raw lines have them."""
    return MARK.sub(lambda found: f"{found[1]}{table(found['name'])}\n{found[3]}", page)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
