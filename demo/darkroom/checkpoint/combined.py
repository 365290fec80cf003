"""A model with parts of others: another VAE than its own, or ControlNets."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from darkroom.files import read_json
from darkroom.store.store import Key, Store

INDEX = "model_index.json"


def combined(model: Path, parts: Mapping[str, Path], new: Mapping[str, list[str]], store: Store, label: str) -> Path:
    """A folder of links to a model's files, with those of `parts` among them, or in the place of its own; made once and
    kept in `store`. `new` is what the model's index says of those that it had not, as ["library", "Class"].
    """
    sources = {part.name: part for part in model.iterdir() if part.is_dir()} | parts
    files: dict[str, Path] = {} if new else {INDEX: (model / INDEX).resolve()}
    for part, source in sorted(sources.items()):
        files |= {f"{part}/{path.name}": path.resolve() for path in sorted(source.iterdir()) if path.is_file()}
    index = read_json(model / INDEX) | new
    # What the links lead to, and whether it is still the same.
    facts: dict[str, Any] = {
        name: [str(path), path.stat().st_size, path.stat().st_mtime_ns] for name, path in files.items()
    }

    def build(folder: Path) -> dict[str, Any]:
        for name, path in files.items():
            link(path, folder / name)
        if new:
            (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
        return {}

    more = {"index": index} if new else {}
    return store.make(Key(f"model-{model.name}-{label}", {"kind": "model", "files": facts} | more), build)


def link(source: Path, target: Path) -> None:
    """Makes `target` a link to a file, or a copy of it."""
    target.parent.mkdir(exist_ok=True)
    try:
        os.symlink(source, target)
    except OSError:  # Windows, without the right to make links
        shutil.copyfile(source, target)
