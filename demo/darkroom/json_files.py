"""JSON files of a model folder."""

import json
from pathlib import Path
from typing import Any

from darkroom.errors import AskedWrongly


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder. Raises `AskedWrongly` naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise AskedWrongly(f"{path} is missing; a diffusers model folder needs it.") from None
    except RecursionError:
        raise AskedWrongly(f"{path} cannot be read: it is nested too deeply.") from None
    except (ValueError, OSError) as error:
        raise AskedWrongly(f"{path} cannot be read: {error}.") from None
    if not isinstance(value, dict):
        raise AskedWrongly(f"{path} does not hold a JSON object.")
    return value
