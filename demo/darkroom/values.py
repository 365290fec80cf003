"""Dataclasses as JSON values, and back by what their fields are annotated with."""

from dataclasses import fields, is_dataclass
from functools import cache
from itertools import repeat
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

NONE = "any"
"""What stands for None where it is a name in a dictionary, beside whole numbers."""


def to_json(value: Any) -> Any:
    """Paths become texts, sets are sorted."""
    if is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {NONE if name is None else str(name): to_json(each) for name, each in value.items()}
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [to_json(each) for each in value]
    return value.as_posix() if isinstance(value, Path) else value


def from_json(kind: Any, value: Any) -> Any:
    """The inverse of `to_json`. Raises TypeError, KeyError, ValueError or AttributeError for other values."""
    if is_dataclass(kind):
        kinds = _hints(kind)
        return kind(**{name: from_json(kinds[name], each) for name, each in value.items()})
    outer, inner = get_origin(kind), get_args(kind)
    if outer in (Union, UnionType):
        return None if value is None else from_json(inner[0], value)
    if outer is dict:
        names = value if inner[0] is str else (None if name == NONE else int(name) for name in value)
        return {name: from_json(inner[1], each) for name, each in zip(names, value.values(), strict=True)}
    if outer in (tuple, frozenset):
        same = outer is frozenset or Ellipsis in inner
        return outer(from_json(*each) for each in zip(repeat(inner[0]) if same else inner, value, strict=not same))
    return Path(value) if kind is Path else value


_hints = cache(get_type_hints)
