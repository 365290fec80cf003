"""Many compiled schedules in one file: for a server, which must make any step count and cannot compile."""

import json
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from darkroom.errors import InvalidRequest
from darkroom.schedule.table import Table

TABLES, REFUSED = "tables.npz", "refused.json"


class Schedule(NamedTuple):
    """The key of a table: a name of `--scheduler` or None for the model's own, the steps, and the picture's
    height and width where they depend on it."""

    scheduler: str | None
    steps: int
    size: tuple[int, int] | None = None

    @property
    def group(self) -> str:
        """What the tables of one scheduler have in common."""
        return (self.scheduler or "own") + (f"-{self.size[0]}x{self.size[1]}" if self.size else "")

    @property
    def name(self) -> str:
        """What its table is called in a bundle."""
        return f"{self.group}/{self.steps}"

    def among(self, names: Collection[str]) -> str:
        """Its name among these: for any size where there is none for this one alone."""
        return self.name if self.name in names else self._replace(size=None).name


class Bundle:
    """The tables in a folder that `save` filled. One is read when it is first used."""

    def __init__(self, folder: Path) -> None:
        self._refused: dict[str, str] = json.loads((folder / REFUSED).read_text(encoding="utf-8"))
        self._file = np.load(folder / TABLES, allow_pickle=False)
        self._names = {*self._refused, *(array.rpartition("/")[0] for array in self._file.files)}
        self._read: dict[str, Table] = {}

    def table(self, schedule: Schedule) -> Table:
        """Raises `InvalidRequest` for a schedule that cannot be made, or is not here."""
        name = schedule.among(self._names)
        if name in self._refused:
            raise InvalidRequest(self._refused[name])
        if name not in self._read:
            try:
                values = {field.name: self._file[f"{name}/{field.name}"] for field in fields(Table)}
            except KeyError:
                what = f"{schedule.steps} steps of {schedule.scheduler or 'the scheduler'}"
                raise InvalidRequest(f"{what} cannot be made here: that schedule was not compiled.") from None
            scales = {each: float(values[each]) for each in ("initial_scale", "image_scale")}
            self._read[name] = Table(**values | scales)
        return self._read[name]


def save(folder: Path, tables: dict[str, Table | str]) -> None:
    """Writes tables, and in a text's place why there is none, by the names of their schedules."""
    arrays, refused = {}, {}
    for name, table in tables.items():
        if isinstance(table, str):
            refused[name] = table
        else:
            arrays |= {f"{name}/{field.name}": getattr(table, field.name) for field in fields(Table)}
    with (folder / TABLES).open("wb") as file:
        np.savez_compressed(file, **arrays)
    (folder / REFUSED).write_text(json.dumps(refused, indent=1), encoding="utf-8")
