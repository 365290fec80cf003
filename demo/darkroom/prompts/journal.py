"""What of a run is finished: a file that grows by a line of JSON with each picture, so that a stopped run can go on."""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from darkroom.errors import Failed
from darkroom.files import written
from darkroom.noise import SEED_LIMIT

ROWS = "rows.jsonl"


@dataclass(frozen=True)
class Record:
    """A finished picture. `image` counts over the whole run, from 1; `line` is its line in the file of prompts, `file`
    its name; `milliseconds` are what its stages took, None where that was never written down."""

    image: int
    line: int
    file: str
    prompt: str
    negative_prompt: str | None
    seed: int
    steps: int
    guidance_scale: float
    scheduler: str
    height: int
    width: int
    milliseconds: dict[str, float] | None = None
    prompt_2: str | None = None
    negative_prompt_2: str | None = None

    @property
    def own_milliseconds(self) -> float | None:
        """What it took, without the time that it waited for a slot."""
        times = self.milliseconds
        return times["Pipeline"] - times.get("Queue", 0.0) if times and "Pipeline" in times else None


class Past:
    """What an earlier run left: its head, {} for none, and its records by the names of their pictures.

    The half line that a killed run may end with is not among them.
    """

    def __init__(self, path: Path) -> None:
        self.head: dict[str, Any] = {}
        self._offsets: dict[str, int] = {}
        self._file: BinaryIO | None = None
        try:
            self._file = path.open("rb")
        except FileNotFoundError:
            return
        except OSError as error:
            raise Failed(f"{path} cannot be read: {error.strerror}.") from None
        self.head = _object(self._file.readline()) or {}
        while True:
            offset = self._file.tell()
            if not (line := self._file.readline()):
                break
            if record := _record(line):
                self._offsets[record.file] = offset

    @property
    def seed(self) -> int | None:
        """The seed of its first image, unless that was named by its row."""
        seed = self.head.get("seed")
        return seed if isinstance(seed, int) and 0 <= seed < SEED_LIMIT else None

    def record(self, file: str) -> Record | None:
        """What was written down of the picture of this name."""
        if self._file is None or file not in self._offsets:
            return None
        self._file.seek(self._offsets[file])
        return _record(self._file.readline())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class Journal:
    """The file of a run that goes on. It begins with the run's head and the `records` of what is there already, and
    takes the place of what an earlier run left when they are written. A record that was added is on the disk.
    """

    def __init__(self, path: Path, head: dict[str, Any], records: Iterable[Record]) -> None:
        self._path = path
        self._offsets: dict[int, int] = {}
        with written(path) as temporary, temporary.open("wb") as self._file:
            self._write(head)
            for record in records:
                self._offsets[record.image] = self._file.tell()
                self._write(asdict(record))
            self._sync()
        with self._writing():
            self._file = path.open("ab")
            self._reader = path.open("rb")

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what a full disk did not take it will not take now: it has been reported
            self._file.close()
        self._reader.close()

    def __len__(self) -> int:
        return len(self._offsets)

    def __contains__(self, image: int) -> bool:
        return image in self._offsets

    def __iter__(self) -> Iterator[Record]:
        """The records, in the order of the images."""
        return map(self.record, sorted(self._offsets))

    def record(self, image: int) -> Record:
        """What is written down of an image that is there."""
        self._reader.seek(self._offsets[image])
        return Record(**json.loads(self._reader.readline()))

    def add(self, record: Record) -> None:
        with self._writing():
            offset = self._file.tell()
            self._write(asdict(record))
            self._sync()
        self._offsets[record.image] = offset  # not before: a full disk may have taken half of it

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise Failed(f"{self._path} cannot be written: {error.strerror or error}.") from None


def _object(line: bytes) -> dict[str, Any] | None:
    """The object in a whole line."""
    with contextlib.suppress(ValueError, RecursionError):
        if line.endswith(b"\n") and isinstance(value := json.loads(line), dict):
            return value
    return None


def _record(line: bytes) -> Record | None:
    fields = _object(line)
    if fields is not None and isinstance(fields.get("file"), str) and _are_times(fields.get("milliseconds")):
        with contextlib.suppress(TypeError):  # another version's fields
            return Record(**fields)
    return None


def _are_times(value: Any) -> bool:
    """Whether this is what a record's milliseconds can be."""
    if not isinstance(value, dict):
        return value is None
    return all(type(each) in (int, float) and math.isfinite(each) for each in value.values())
