"""Files: JSON objects that are read, and contents that are written whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

from darkroom.errors import InvalidRequest


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


def write_whole(path: Path, content: bytes) -> Path:
    """Writes under another name, then gives the file its own. Returns the path; raises `OSError`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
