"""A model folder whose text encoders' weights have the names that published models have.

transformers 5 dropped the prefix `text_model.` when it saves, and reads both forms. Its older versions, which peers
ask for, read the published form alone: from the other they make a text encoder with random weights, and go on.
"""

import json
import os
import shutil
from pathlib import Path

PREFIX = "text_model."
OUTSIDE = "text_projection."
"""What published text encoders have beside it."""

LENGTH = 8
"""Bytes of a safetensors file that say how long its header is; https://github.com/huggingface/safetensors#format"""


def copy_with_published_names(model: Path, copy: Path) -> Path:
    """Makes `copy`, whose files are the model's own (links, where the system allows) but for such text encoders."""
    shutil.copytree(model, copy, copy_function=_link)
    for path in copy.glob("text_encoder*/*.safetensors"):
        publish_names(path)
    return copy


def _link(source: str, target: str) -> None:
    try:
        os.link(Path(source).resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def publish_names(path: Path) -> None:
    """Gives the weights in a safetensors file their prefix. The file is replaced: it may be another's, too."""
    with path.open("rb") as old:
        header = json.loads(old.read(int.from_bytes(old.read(LENGTH), "little")))
        if any(name.startswith(PREFIX) for name in header):
            return
        named = {_published(name): value for name, value in header.items()}
        text = json.dumps(named, separators=(",", ":")).encode()
        text += b" " * (-len(text) % LENGTH)  # the format wants its tensors aligned
        new = path.with_suffix(".renamed")
        with new.open("wb") as file:
            file.write(len(text).to_bytes(LENGTH, "little") + text)
            shutil.copyfileobj(old, file)
    new.replace(path)


def _published(name: str) -> str:
    return name if name == "__metadata__" or name.startswith(OUTSIDE) else PREFIX + name
