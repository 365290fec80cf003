"""Files: JSON objects that are read, and contents that are written whole or not at all."""

import contextlib
import json
import os
import threading
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
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise Failed(f"{path} cannot be written: {error.strerror or error}.") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes | memoryview) -> Path:
    """Writes a file whole or not at all. Returns the path; raises as `written` does."""
    with written(path) as temporary:
        temporary.write_bytes(content)
    return path
