"""A model repository: one folder a model, with its configuration, and all that a server needs in `1`.

Artefacts are hard links to those in the stores where that can be, so a repository takes little room of its own, and
stays whole when a store is cleaned.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from darkroom.errors import Failed
from darkroom.families import find_family
from darkroom.files import read_json, written
from darkroom.serving.service import PLAN, Plan, check_whole
from darkroom.store.store import Store
from darkroom.triton.config import AFTER, BEFORE, CONFIG

VERSION = "1"
MODEL_FILE = "model.py"
MODEL = """\
# What Triton's Python backend runs; the rest is in {module}.
from {module} import {name} as TritonPythonModel  # noqa: F401
"""


@dataclass(frozen=True)
class Contents:
    """What `1` of a model holds. `name` begins its folders' names; `graphs` are the folders of ONNX graphs, `model` is
    that of the model itself."""

    name: str
    plan: Plan
    max_batch_size: int
    graphs: tuple[Path, ...]
    model: Path
    copy: bool = False


def write_version(folder: Path, contents: Contents) -> Path:
    """Fills `folder`/1 anew: all is there before the old one goes. Raises `Failed` where it cannot be written."""
    name = re.sub(r"[^A-Za-z0-9.+-]+", "_", contents.name)
    with _replaced(folder / VERSION) as version:
        engines = version / f"{name}-engine-batch-size-{contents.max_batch_size}"
        graphs, model = version / f"{name}-onnx", version / f"{name}-pytorch_model"
        for target in (engines, graphs, model):
            target.mkdir()
        for source in contents.plan.folders():
            if source != contents.model:  # engines that run the model as it is are loaded from its own folder
                _place(source, engines / source.name, contents.copy)
        for source in contents.graphs:
            _place(source, graphs / source.name, contents.copy)
        index, family = read_json(contents.model / "model_index.json"), find_family(contents.plan.traits.family)
        for part in ("scheduler", *family.parts_of(index), *family.tokenizers_of(index)):
            if (contents.model / part).is_dir():
                _place(contents.model / part, model / part, contents.copy)
        _place(contents.model / "model_index.json", model / "model_index.json", contents.copy)

        def place(folder: Path) -> Path:
            if folder.is_relative_to(contents.model):
                return model / folder.relative_to(contents.model)
            return engines / folder.name

        plan = contents.plan.moved(place)
        (version / PLAN).write_text(json.dumps(plan.as_json(version), indent=1), encoding="utf-8")
        code = MODEL.format(module="darkroom.triton.model", name="TritonPythonModel")
        (version / MODEL_FILE).write_text(code, encoding="utf-8")
        check_whole(Plan.read(version / PLAN))
    return folder / VERSION


def write_ensemble(repository: Path, name: str, texts: dict[str, str]) -> None:
    """The models around a model, by their configurations: see `config.ensemble_texts`."""
    classes = {name + BEFORE: "Preprocess", name + AFTER: "Postprocess"}
    for model, text in texts.items():
        with _replaced(repository / model / VERSION) as version:
            if model in classes:
                code = MODEL.format(module="darkroom.triton.processing", name=classes[model])
                (version / MODEL_FILE).write_text(code, encoding="utf-8")
            else:
                (version / ".keep").touch()  # an ensemble has a version, and nothing in it
        write_text(repository / model / CONFIG, text)


def write_text(file: Path, text: str) -> None:
    """A file whole or not at all, and the folder that it is in."""
    with written(file) as temporary:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")


def tree(folder: Path, depth: int = 3) -> list[str]:
    """The lines of a folder as people draw them; files that many artefacts share are not opened up below `depth`."""
    lines = [f"{folder.name}/"]

    def walk(place: Path, indent: str, left: int) -> None:
        entries = sorted((each for each in place.iterdir() if each.name[0] != "."), key=lambda each: each.name)
        for index, entry in enumerate(entries):
            last = index == len(entries) - 1
            lines.append(f"{indent}{'└── ' if last else '├── '}{entry.name}{'/' if entry.is_dir() else ''}")
            if entry.is_dir() and left > 1:
                walk(entry, indent + ("    " if last else "│   "), left - 1)

    walk(folder, "", depth)
    return lines


@contextlib.contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of `folder` when the block ends well; another that makes one waits."""
    store = Store(folder.parent)
    with store.changing(folder.name), store.filled(folder) as temporary:
        yield temporary


def _place(source: Path, target: Path, copy: bool) -> None:
    """Links or copies a file, or a folder with all that is in it; marks of a store's own are left."""
    if source.is_dir():
        target.mkdir()
        for each in sorted(source.iterdir()):
            if not each.name.startswith("."):
                _place(each, target / each.name, copy)
        return
    if not copy:
        with contextlib.suppress(OSError):  # another file system, or one without links
            os.link(source.resolve(), target)
            return
    shutil.copy2(source, target)


def versions_in(repository: Path) -> list[str]:
    """The names of the models in a repository that can be loaded."""
    if not repository.is_dir():
        raise Failed(f"the model repository {repository} does not exist: build_triton_repository.py makes one.")
    return sorted(each.parent.name for each in repository.glob(f"*/{CONFIG}"))
