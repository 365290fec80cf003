"""Lines of results: a JSON object for each measured cell, appended as it is known, and read back."""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from darkroom.errors import Failed, InvalidRequest

FORMAT = 1
"""What `format` in a line must be: the meaning of a name never changes without it."""

PIPELINE = "Pipeline"
"""The stage that is all of them: from the prompt to the pictures."""

SAMPLE = ("median", "p90", "least", "most", "count")
"""What a measured thing holds, in the unit of the member that holds it."""

DEFAULTS = {"engine": None, "precision": None, "build": None, "scheduler": None, "guidance_scale": None, "streams": 1}
DEFAULTS |= {"threads": None, "use_cuda_graph": False, "async": False, "devices": 1, "prompt": None, "seed": None}
DEFAULTS |= {"weights": None, "cold_starts": None}
"""Settings that a line may leave out."""


class Damaged(Exception):
    """What is wrong with a line, in half a sentence."""


@dataclass(frozen=True, eq=False)
class Row:
    """One cell, as its line has it: a contender, the settings it ran with, and what was measured, or its `error`.

    Of its members, which are None where they are not there, `stages` are in milliseconds a batch; `cold_start`,
    from the start of a process to its first PNG, `build_seconds`, of which `compile_seconds` are the compiler's,
    and `load_seconds` are in seconds; `psnr` is in dB against the reference's pictures; `images_per_unit` is for
    each unit of the money that `price_per_hour` is in; `computed` is what became of the precision `auto`; `beside`
    is what another contender did in the same turns, where memory had no room for all at a time.
    """

    line: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.line.get(name)

    @property
    def settings(self) -> dict[str, Any]:
        return self.line["settings"]

    @property
    def machine(self) -> dict[str, Any]:
        return self.line["machine"]

    @property
    def pipeline(self) -> dict[str, float]:
        """Milliseconds of a whole batch. Only for a cell without an error."""
        return self.line["stages"][PIPELINE]

    @property
    def key(self) -> str:
        """What makes two lines the same cell: how often it was started cold does not."""
        return identity(self.line | {"settings": self.settings | {"cold_starts": None}})

    @property
    def beside_key(self) -> str:
        """The `key` of the cell that is `beside` this one."""
        settings = DEFAULTS | self.line["beside"]["settings"]
        return Row(self.line["beside"] | {"machine": self.machine, "settings": settings}).key


def identity(line: dict[str, Any]) -> str:
    """What a line was measured with: contender, settings and machine."""
    return json.dumps([line.get(name) for name in ("contender", "settings", "machine")], sort_keys=True)


def row_of(line: Any) -> Row:
    """One line of a results file, as JSON gives it. Raises `Damaged` for one that a report would stumble over."""
    if not isinstance(line, dict):
        raise Damaged("it is not an object")
    if line.get("format") != FORMAT:
        raise Damaged(f"its format is {line.get('format')!r}, and this Darkroom reads {FORMAT}")
    for name in ("settings", "machine"):
        if not isinstance(line.get(name), dict):
            raise Damaged(f"{name} is not an object")
    line = line | {"settings": DEFAULTS | line["settings"], "stages": line.get("stages") or {}}
    for name, kind, holder in (
        *(("contender", str, line), ("version", str, line["settings"]), ("processor", str, line["machine"])),
        *((name, int, line["settings"]) for name in ("batch_size", "denoising_steps", "height", "width")),
    ):
        if type(holder.get(name)) is not kind:
            raise Damaged(f"{name} is {holder.get(name)!r}")
    try:
        datetime.fromisoformat(line["finished"])
    except (KeyError, TypeError, ValueError):
        raise Damaged(f"finished is no ISO 8601 time: {line.get('finished')!r}") from None
    samples = line["stages"] | ({"cold_start": line["cold_start"]} if line.get("cold_start") else {})
    for name, sample in samples.items():
        if not isinstance(sample, dict) or not all(_is_number(sample.get(member)) for member in SAMPLE):
            raise Damaged(f"{name} has not all of {', '.join(SAMPLE)}, or they are no numbers")
    if line.get("error") is None:
        if not _is_number(rate := line.get("images_per_second")) or rate <= 0:
            raise Damaged(f"images_per_second is {rate!r} where there is no error")
        if PIPELINE not in samples:
            raise Damaged(f"stages have no {PIPELINE} where there is no error")
    return Row(line)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def read(files: Iterable[Path]) -> list[Row]:
    """The cells in these files, in the order in which they first appear; of lines for the same cell the last counts,
    with the cold starts of the one before where it has none.

    Raises `InvalidRequest` for a file that cannot be read, holds no whole line, or is damaged before its end.
    """
    rows: dict[str, Row] = {}
    for file in files:
        found = list(_rows(file))
        if not found:
            raise InvalidRequest(f"{file} holds no results. Give a file that `benchmark.py run` wrote.")
        for row in found:
            before = rows.get(row.key)
            if before and before["cold_start"] and row["error"] is None and not row["cold_start"]:
                row = Row(row.line | {"settings": before.settings, "cold_start": before["cold_start"]})
            rows[row.key] = row
    return list(rows.values())


def _rows(file: Path) -> Iterator[Row]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror or error}.") from None
    # Nothing but a line feed ends a line: prompts may hold the other characters that Python would split at.
    *whole, last = content.split(b"\n")
    for number, text in enumerate([*whole, last], start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text.decode("utf-8"))
        except ValueError:
            if number > len(whole):
                return  # A sweep that was killed while it wrote: a line that is whole ends with a line feed.
            raise InvalidRequest(f"{file}, line {number} is damaged: it is not JSON. Remove the line.") from None
        try:
            yield row_of(line)
        except Damaged as error:
            raise InvalidRequest(f"{file}, line {number} is damaged: {error}. Remove the line.") from None


def last_lines(file: Path) -> dict[str, dict[str, Any]]:
    """The last line of every cell by its `identity`; what cannot be read is the report's to complain of."""
    found = {}
    with contextlib.suppress(FileNotFoundError):
        for text in file.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError):
                if isinstance(line := json.loads(text), dict):
                    found[identity(line)] = line
    return found


def check_writable(file: Path) -> None:
    """Raises `InvalidRequest` for a file that lines could not be appended to. Leaves nothing there."""
    try:
        if file.exists():
            file.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=next(parent for parent in file.absolute().parents if parent.exists())).close()
    except OSError as error:
        raise InvalidRequest(f"--output {file} cannot be written ({error.strerror or error}); name another.") from None


def append(file: Path, line: dict[str, Any]) -> None:
    """Adds a whole line; what a killed sweep left of one goes. Raises `Failed` when the file cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as out:
            content = file.read_bytes()
            end = content.rfind(b"\n") + 1
            if _is_whole(content[end:]):  # an editor may have taken its line feed
                out.write(b"\n")
            else:
                out.truncate(end)
            out.write(json.dumps(line).encode() + b"\n")
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        raise Failed(f"{file} cannot be written: {error.strerror or error}.") from None


def _is_whole(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def priced(line: dict[str, Any], price: float | None) -> dict[str, Any]:
    """The line, on a machine that costs so much an hour."""
    rate = line.get("images_per_second") if line.get("error") is None else None
    return line | {
        "price_per_hour": price,
        "images_per_unit": round(rate * 3600 / price, 2) if rate and price else None,
    }
