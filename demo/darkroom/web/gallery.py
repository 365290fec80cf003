"""The pictures that are kept: listed newest first, shown, and deleted. They are PNG files with their recipes."""

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from darkroom.errors import DarkroomError
from darkroom.pipeline.pictures import read_recipe
from darkroom.web.api import Refused, in_thread, models_of

MOST = 60
"""Pictures of one answer."""


async def listed(request: HttpRequest) -> Response:
    """The newest pictures: file, recipe and time of each. `before` is the time of the last that is known."""
    before = request.query_params.get("before")
    try:
        before = float("inf") if before is None else float(before)
    except ValueError:
        raise Refused(400, f"before must be a time, not {before!r}.", "before", "invalid_value") from None
    return JSONResponse({"pictures": await in_thread(_newest, _folder(request), before)})


async def shown(request: HttpRequest) -> Response:
    """A picture's file."""
    return FileResponse(_path(request), media_type="image/png", headers={"Cache-Control": "no-cache"})


async def deleted(request: HttpRequest) -> Response:
    """Deletes a picture of ours."""
    path = _path(request)
    await in_thread(os.unlink, path)
    return JSONResponse({"deleted": path.name})


def _folder(request: HttpRequest) -> Path:
    return models_of(request).named(None).folder


def _path(request: HttpRequest) -> Path:
    """The file of a picture that carries a recipe. Raises `Refused` for anything else."""
    name = request.path_params["name"]
    path = _folder(request) / name
    if Path(name).name != name or name.startswith(".") or path.is_symlink() or _recipe(path) is None:
        raise Refused(404, f"there is no picture {name!r} here.", "name", "no_such_picture")
    return path


def _newest(folder: Path, before: float) -> list[dict[str, Any]]:
    with os.scandir(folder) as entries:
        files = [(entry.stat().st_mtime, entry.path) for entry in entries if _is_picture(entry)]
    found = []
    for time, path in sorted(files, reverse=True):
        if time < before and (recipe := _recipe(Path(path))) is not None:
            found.append({"file": os.path.basename(path), "time": time, "recipe": recipe})
        if len(found) == MOST:
            break
    return found


def _is_picture(entry: os.DirEntry) -> bool:
    return entry.name.endswith(".png") and not entry.name.startswith(".") and entry.is_file(follow_symlinks=False)


def _recipe(path: Path) -> dict[str, Any] | None:
    try:
        return _read(path, path.stat().st_mtime_ns)
    except OSError:
        return None


@lru_cache(10_000)
def _read(path: Path, changed: int) -> dict[str, Any] | None:
    """The recipe of a picture that was last `changed` then; None for a file without one."""
    try:
        return read_recipe(path)
    except DarkroomError:
        return None


ROUTES = [
    Route("/pictures", listed),
    Route("/pictures/{name}", shown, methods=["GET"]),
    Route("/pictures/{name}", deleted, methods=["DELETE"]),
]
