"""A model with another VAE than its own, such as the SDXL VAE whose weights were made to fit float16."""

import os
import shutil
from pathlib import Path
from typing import Any

from darkroom.checkpoint.folder import weight_files
from darkroom.errors import InvalidRequest
from darkroom.files import read_json
from darkroom.store.store import Key, Store

PART, STEM = "vae", "diffusion_pytorch_model"


def check_vae(folder: Path) -> Path:
    """The folder itself, or the VAE in a model's folder. Raises `InvalidRequest` for one that holds no VAE."""
    if not folder.is_dir():
        raise InvalidRequest(
            f"--vae {folder} is not there: it is the folder of a VAE, of a model, or a hub repository."
        )
    vae = folder / PART if (folder / PART / "config.json").is_file() else folder
    kind = str(read_json(vae / "config.json").get("_class_name"))
    if kind != "AutoencoderKL":
        raise InvalidRequest(f"--vae {folder} holds a {kind}, not an AutoencoderKL.")
    weight_files(vae, STEM)
    return vae


def with_vae(model: Path, vae: Path, store: Store) -> Path:
    """A folder of links to a model's files, with another VAE among them; made once and kept in `store`."""
    sources = {part.name: part for part in model.iterdir() if part.is_dir()} | {PART: vae}
    files = {"model_index.json": (model / "model_index.json").resolve()}
    for part, source in sorted(sources.items()):
        files |= {f"{part}/{path.name}": path.resolve() for path in sorted(source.iterdir()) if path.is_file()}
    # What the links lead to, and whether it is still the same.
    facts = {name: [str(path), path.stat().st_size, path.stat().st_mtime_ns] for name, path in files.items()}

    def build(folder: Path) -> dict[str, Any]:
        for name, path in files.items():
            _link(path, folder / name)
        return {}

    return store.make(Key(f"model-{model.name}-other-vae", {"kind": "model", "files": facts}), build)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    try:
        os.symlink(source, target)
    except OSError:  # Windows, without the right to make links
        shutil.copyfile(source, target)
