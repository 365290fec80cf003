"""What a run needs beside its request: folders, threads, the hub's token."""

import argparse
import contextlib
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from darkroom.errors import AskedWrongly, Failed

PACKAGE = Path(__file__).resolve().parent.parent


def home() -> Path:
    """The root of the checkout this code runs from, or the current folder when it is installed elsewhere."""
    root = PACKAGE.parent.parent
    return root if (root / "setup.cfg").is_file() and (root / "demo").is_dir() else Path.cwd()


@dataclass(frozen=True)
class Settings:
    onnx_dir: Path
    engine_dir: Path
    output_dir: Path
    framework_model_dir: Path | None
    hf_token: str | None = field(repr=False)
    threads: int | None
    num_warmup_runs: int
    onnx_refiner_dir: Path
    engine_refiner_dir: Path

    @classmethod
    def from_flags(cls, flags: argparse.Namespace) -> "Settings":
        """Raises `AskedWrongly` for values that cannot be meant and for an output folder that cannot be written."""
        if flags.threads is not None and flags.threads < 1:
            raise AskedWrongly(f"--threads must be 1 or more, not {flags.threads}.")
        if flags.num_warmup_runs < 0:
            raise AskedWrongly(f"--num-warmup-runs must be 0 or more, not {flags.num_warmup_runs}.")
        return cls(
            onnx_dir=_folder(flags.onnx_dir, "onnx"),
            engine_dir=_folder(flags.engine_dir, "engines"),
            output_dir=_writable(_folder(flags.output_dir, "output")),
            framework_model_dir=Path(flags.framework_model_dir) if flags.framework_model_dir else None,
            hf_token=flags.hf_token or os.environ.get("HF_TOKEN") or None,
            threads=flags.threads,
            num_warmup_runs=flags.num_warmup_runs,
            onnx_refiner_dir=_folder(getattr(flags, "onnx_refiner_dir", None) or flags.onnx_dir, "onnx"),
            engine_refiner_dir=_folder(getattr(flags, "engine_refiner_dir", None) or flags.engine_dir, "engines"),
        )


def make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failed(f"{folder} cannot be made: {error.strerror}.") from None
    return folder


def _folder(asked: str | None, name: str) -> Path:
    return Path(asked) if asked else home() / name


def _writable(folder: Path) -> Path:
    """Checks that pictures can be written to `folder`, without leaving anything there."""
    standing = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.exists(place))
    if not os.path.isdir(standing):
        raise AskedWrongly(f"--output-dir {folder}: {standing} is not a folder.")
    try:
        if standing != folder.absolute():
            with contextlib.suppress(FileNotFoundError):
                os.stat(folder)  # a name too long, or in a folder that may not be entered
        tempfile.TemporaryFile(dir=standing).close()
    except OSError as error:
        raise AskedWrongly(f"--output-dir {folder} cannot be written ({error.strerror}); name another.") from None
    return folder
