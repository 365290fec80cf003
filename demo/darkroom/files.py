"""Files: JSON objects that are read, and contents that are written whole or not at all."""

import contextlib
import json
import os
import re
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from darkroom.errors import Failed, InvalidRequest


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder. Raises `InvalidRequest` naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InvalidRequest(f"{path} is missing; a diffusers model folder needs it.") from None
    except RecursionError:
        raise InvalidRequest(f"{path} cannot be read: it is nested too deeply.") from None
    except (ValueError, OSError) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}.") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"{path} does not hold a JSON object.")
    return value


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` when the block ends well. Raises `Failed` for want of room or rights."""
    temporary = path.with_name(f".{path.name}.{_machine()}-{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise Failed(f"{path} cannot be written: {error.strerror or error}.") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Removes what processes that were killed on this machine left half-written in a folder, if anything."""
    if sys.platform == "win32":  # where asking whether a process is there ends it
        return
    mine = re.compile(rf"\..*\.{_machine()}-(\d+)-\d+\.tmp")
    for path in folder.glob(".*.tmp"):
        if (found := mine.fullmatch(path.name)) and not _runs(int(found[1])):
            with contextlib.suppress(OSError):
                path.unlink()


def _machine() -> str:
    """What tells this machine, or container, from others that write to the same folders."""
    name = os.uname().nodename if hasattr(os, "uname") else ""
    return f"{zlib.crc32(name.encode()):08x}"


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def write_whole(path: Path, content: bytes | memoryview) -> Path:
    """Writes a file whole or not at all. Returns the path; raises as `written` does."""
    with written(path) as temporary:
        temporary.write_bytes(content)
    return path
