"""A file of prompts: one a line, or a JSON object a line with other fields of it."""

import hashlib
import json
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from darkroom.errors import InvalidRequest, near_matches
from darkroom.flags import NUM_IMAGES, OF_ROW
from darkroom.request import Request
from darkroom.serving.service import asked_for, in_fields
from darkroom.text.drawing import Drawing

JSON_LINES = ".jsonl"
OTHERS = (".csv", ".tsv", ".json")
"""Files whose lines are no prompts."""

MOST_IMAGES = 10**7
"""Of one file: more are a slip of the keyboard, and years of work."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """What a line requests: `fields` are some of `flags.OF_ROW`, `first` counts the images before it."""

    line: int
    first: int
    images: int
    fields: dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """One image of a file: its `number` over all lines, from 1, and the line that requests it."""

    number: int
    line: int
    request: Request


class Prompts:
    """The rows of a file, which is read once and whole; they are parsed whenever they are gone through, not kept. Each
    image's prompt comes from `drawing`, if there is one.

    Raises `InvalidRequest`, with the file and line, for what is no prompt.
    """

    def __init__(self, path: Path, drawing: Drawing | None = None) -> None:
        self.path = path
        self.drawing = drawing
        if path.suffix.lower() in OTHERS:
            raise InvalidRequest(
                f"--prompts {path}: {path.suffix} files are not read; a prompt a line, or in a {JSON_LINES} file an "
                f"object with its fields a line."
            )
        content = read(path, "--prompts")
        self.digest = hashlib.sha256(content).hexdigest()
        self._lines = content.removeprefix(BYTE_ORDER_MARK).splitlines()
        self._firsts, self._places = array("Q"), array("Q")
        self.images = 0
        for row in self._rows():
            self._firsts.append(row.first)
            self._places.append(row.line)
            self.images = row.first + row.images
            if self.images > MOST_IMAGES:
                raise InvalidRequest(
                    f"{self.place(row.line)}: so far {self.images} images; {MOST_IMAGES} are the most."
                )
        if not self.images:
            raise InvalidRequest(f"--prompts {path} holds no prompt.")

    def place(self, line: int) -> str:
        """How people and editors call a line."""
        return f"{self.path}:{line}"

    def line_of(self, number: int) -> int:
        """The line that requests an image."""
        return self._places[bisect_right(self._firsts, number - 1) - 1]

    def rows(self, default: Request) -> Iterator[Asked]:
        """The first image of each row, or every one where each draws its own prompt; `default` is what rows leave
        unsaid, and image k of the file has its seed + k.

        Raises `InvalidRequest`, with the file and line, for what no picture could be made of.
        """
        for row, request in self._requests(default):
            for image in range(row.images if self.drawing else 1):
                yield self._image(row, request, image)

    def asked(self, default: Request) -> Iterator[Asked]:
        """Every image, in order: see `rows`."""
        for row, request in self._requests(default):
            for image in range(row.images):
                yield self._image(row, request, image)

    def _image(self, row: Row, request: Request, image: int) -> Asked:
        each = replace(request, seed=request.seed + image) if image else request
        try:
            each = self.drawing.drawn(each) if self.drawing else each
        except InvalidRequest as error:
            raise InvalidRequest(f"{self.place(row.line)}: {in_fields(str(error))}") from None
        return Asked(row.first + image + 1, row.line, each)

    def _requests(self, default: Request) -> Iterator[tuple[Row, Request]]:
        for row in self._rows():
            try:
                request = asked_for({"seed": default.seed + row.first} | row.fields, default)
                if row.images > 1:
                    asked_for(row.fields | {"seed": request.seed + row.images - 1}, default)
            except InvalidRequest as error:
                raise InvalidRequest(f"{self.place(row.line)}: {error}") from None
            yield row, request

    def _rows(self) -> Iterator[Row]:
        first = 0
        for number, fields in said_in(self.path, self._lines):
            images = fields.pop(NUM_IMAGES, 1)
            if wrong := OF_ROW[NUM_IMAGES].wrong(images):
                raise InvalidRequest(f"{self.place(number)}: {NUM_IMAGES} {wrong}")
            yield Row(number, first, images, fields)
            first += images


def read(path: Path, flag: str) -> bytes:
    """What is in a file of prompts. Raises `InvalidRequest` for one that cannot be read."""
    if path.suffix == ".json":
        raise InvalidRequest(f"{flag} {path}: JSON is read line by line, from a file that ends in {JSON_LINES}.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{flag} {path} cannot be read: {error.strerror}.") from None


def said_in(path: Path, lines: list[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines that are not empty, by their numbers, and the fields that each sets. Raises `InvalidRequest`, with the
    file and line, for what cannot be understood."""
    for number, line in enumerate(lines, start=1):
        try:
            if text := line.decode("utf-8").strip():
                yield number, _fields(text) if path.suffix == JSON_LINES else {"prompt": text}
        except UnicodeDecodeError:
            raise InvalidRequest(f"{path}:{number}: this line is not UTF-8 text.") from None
        except InvalidRequest as error:
            raise InvalidRequest(f"{path}:{number}: {error}") from None


def _fields(text: str) -> dict[str, Any]:
    """The fields of a line of JSON; one that is null is left out."""
    try:
        said = json.loads(text, object_pairs_hook=_once_each)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"this line is no JSON ({error}).") from None
    if isinstance(said, str):
        said = {"prompt": said}
    if not isinstance(said, dict):
        raise InvalidRequest('this line is no JSON object, as {"prompt": "a red apple", "steps": 4} is.')
    for name in said:
        if name not in OF_ROW:
            near = near_matches(name, list(OF_ROW))
            raise InvalidRequest(f"{name!r} is not a field.{near} Known: {', '.join(OF_ROW)}.")
    return {name: value for name, value in said.items() if value is not None}


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    said = dict(pairs)
    if len(said) < len(pairs):
        names = [name for name, _ in pairs]
        raise InvalidRequest(f"{max(names, key=names.count)!r} is set more than once.")
    return said
