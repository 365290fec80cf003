"""Many compiled schedules in one file: for a server, which must make any step count and cannot compile."""

import json
from dataclasses import fields
from pathlib import Path

import numpy as np

from darkroom.errors import InvalidRequest
from darkroom.schedule.table import Table

TABLES, REFUSED = "tables.npz", "refused.json"


class Bundle:
    """The tables in a folder that `save` filled, by scheduler (a name of `--scheduler`, or None for the model's own)
    and steps. A table is read when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._refused: dict[str, str] = json.loads((folder / REFUSED).read_text(encoding="utf-8"))
        self._file = np.load(folder / TABLES, allow_pickle=False)
        self._read: dict[str, Table] = {}

    def table(self, scheduler: str | None, steps: int) -> Table:
        """Raises `InvalidRequest` for a schedule that cannot be made, or is not here."""
        name = schedule_name(scheduler, steps)
        if name in self._refused:
            raise InvalidRequest(self._refused[name])
        if name not in self._read:
            try:
                values = {field.name: self._file[f"{name}/{field.name}"] for field in fields(Table)}
            except KeyError:
                what = f"{steps} steps of {scheduler or 'the scheduler'}"
                raise InvalidRequest(f"{what} cannot be made here: that schedule was not compiled.") from None
            scales = {each: float(values[each]) for each in ("initial_scale", "image_scale")}
            self._read[name] = Table(**values | scales)
        return self._read[name]


def save(folder: Path, tables: dict[tuple[str | None, int], Table | str]) -> None:
    """Writes tables, and in a text's place why there is none, by scheduler and steps."""
    arrays, refused = {}, {}
    for (scheduler, steps), table in tables.items():
        name = schedule_name(scheduler, steps)
        if isinstance(table, str):
            refused[name] = table
        else:
            arrays |= {f"{name}/{field.name}": getattr(table, field.name) for field in fields(Table)}
    with (folder / TABLES).open("wb") as file:
        np.savez_compressed(file, **arrays)
    (folder / REFUSED).write_text(json.dumps(refused, indent=1), encoding="utf-8")


def schedule_name(scheduler: str | None, steps: int) -> str:
    """What a table is called in a bundle."""
    return f"{scheduler or 'own'}/{steps}"
