"""A model with another VAE than its own, such as the SDXL VAE whose weights were made to fit float16."""

import os
import shutil
from pathlib import Path
from typing import Any

from darkroom.checkpoint import NETWORKS, networks, read_json, weight_files
from darkroom.engines.store import Key, Store
from darkroom.errors import AskedWrongly

PART = "vae"


def check_vae(folder: Path) -> Path:
    """The folder itself, or the VAE in a model's folder. Raises `AskedWrongly` for one that holds no VAE."""
    if not folder.is_dir():
        raise AskedWrongly(f"--vae {folder} is not there: it is the folder of a VAE, of a model, or a hub repository.")
    vae = folder / PART if (folder / PART / "config.json").is_file() else folder
    kind = str(read_json(vae / "config.json").get("_class_name"))
    if kind != "AutoencoderKL":
        raise AskedWrongly(f"--vae {folder} holds a {kind}, not an AutoencoderKL.")
    weight_files(vae, NETWORKS[PART])
    return vae


def with_vae(model: Path, vae: Path, store: Store) -> Path:
    """A folder of links to a model's files, with another VAE among them; made once and kept in `store`."""
    index = read_json(model / "model_index.json")
    parts = [part for part in (*networks(index), "tokenizer", "tokenizer_2", "scheduler") if part != PART]
    facts = {"kind": "model", "model": str(model.resolve()), "vae": str(vae.resolve())}

    def build(folder: Path) -> dict[str, Any]:
        shutil.copyfile(model / "model_index.json", folder / "model_index.json")
        for part, source in [(part, model / part) for part in parts] + [(PART, vae)]:
            if source.is_dir():
                _link(source, folder / part)
        return {}

    return store.make(Key(f"model-{model.name}-other-vae", facts), build)


def _link(source: Path, target: Path) -> None:
    """Files, not folders, so that what is in the store is seen by whoever hashes it."""
    target.mkdir()
    for path in source.iterdir():
        if path.is_file():
            try:
                os.symlink(path.resolve(), target / path.name)
            except OSError:  # Windows, without the right to make links
                shutil.copyfile(path, target / path.name)
