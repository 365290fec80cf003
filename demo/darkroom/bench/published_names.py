"""A model folder whose text encoders' weights have the names that published models have.

transformers 5 dropped the prefix `text_model.` when it saves, and reads both forms. Its older versions, which peers
ask for, read the published form alone: from the other they make a text encoder with random weights, and go on.
"""

import os
import shutil
from pathlib import Path

PREFIX = "text_model."
OUTSIDE = "text_projection."
"""What published text encoders have beside it."""


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
    from safetensors.torch import load_file, save_file

    weights = load_file(path)
    if any(name.startswith(PREFIX) for name in weights):
        return
    named = {name if name.startswith(OUTSIDE) else PREFIX + name: weight for name, weight in weights.items()}
    new = path.with_suffix(".renamed")
    save_file(named, new, {"format": "pt"})
    new.replace(path)
