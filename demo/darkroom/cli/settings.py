"""What a run needs beside its request: folders, threads, the hub's token."""

import argparse
import contextlib
import os
import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path

from darkroom.cli.console import Console
from darkroom.cli.flags import refuse_without, refuse_wrong
from darkroom.engines.runtime import Options
from darkroom.errors import Failed, InvalidRequest
from darkroom.files import sweep
from darkroom.flags import option
from darkroom.prepare import BATCHES
from darkroom.store.store import Store

PACKAGE = Path(__file__).resolve().parent.parent


def home() -> Path:
    """The root of the checkout this code runs from, or the current folder when it is installed elsewhere."""
    root = PACKAGE.parent.parent
    return root if (root / "setup.cfg").is_file() and (root / "demo").is_dir() else Path.cwd()


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Where models and what is made of them are kept, and what opens the hub."""

    onnx_dir: Path
    engine_dir: Path
    framework_model_dir: Path | None
    hf_token: str | None = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Settings(Folders):
    output_dir: Path
    threads: int | None
    num_warmup_runs: int
    onnx_refiner_dir: Path
    engine_refiner_dir: Path
    dynamic_batches: tuple[int, int, int]
    dynamic_sizes: tuple[int, int, int] | None
    options: Options

    @classmethod
    def from_flags(cls, flags: argparse.Namespace) -> "Settings":
        """Raises `InvalidRequest` for values that cannot be meant and for an output folder that cannot be written."""
        refuse_wrong(flags, "threads", "num_warmup_runs")
        return cls(
            **vars(artefact_folders(flags)),
            output_dir=output_folder(flags.output_dir),
            threads=flags.threads,
            num_warmup_runs=flags.num_warmup_runs or 0,
            onnx_refiner_dir=_folder(getattr(flags, "onnx_refiner_dir", None) or flags.onnx_dir, "onnx"),
            engine_refiner_dir=_folder(getattr(flags, "engine_refiner_dir", None) or flags.engine_dir, "engines"),
            dynamic_batches=bounds_of(flags, "dynamic_batches") or BATCHES,
            dynamic_sizes=bounds_of(flags, "dynamic_sizes"),
            options=options_of(flags),
        )


def artefact_folders(flags: argparse.Namespace) -> Folders:
    """The folders that flags name, or the ones at the root of the checkout."""
    models = getattr(flags, "framework_model_dir", None)
    return Folders(
        onnx_dir=_folder(getattr(flags, "onnx_dir", None), "onnx"),
        engine_dir=_folder(flags.engine_dir, "engines"),
        framework_model_dir=Path(models) if models else None,
        hf_token=getattr(flags, "hf_token", None) or os.environ.get("HF_TOKEN") or None,
    )


def stores_of(folders: Folders, console: Console) -> tuple[Store, Store]:
    """Those of graphs and of engines; what they report is a warning."""
    return Store(folders.onnx_dir, console.warn), Store(folders.engine_dir, console.warn)


def options_of(flags: argparse.Namespace) -> Options:
    """The options that some engines alone take."""
    if not getattr(flags, "ws", None):
        refuse_without(flags, "ws")
    refuse_wrong(flags, "t5_ws_percentage", "transformer_ws_percentage")
    asked = {field.name: getattr(flags, field.name) for field in fields(Options) if hasattr(flags, field.name)}
    if getattr(flags, "prompts", None) is not None:
        asked["devices"] = None  # there, they are workers
    elif devices := asked.get("devices"):
        if len(devices) > 1:
            raise InvalidRequest(
                f"--devices {' '.join(devices)}: several are for --prompts, else it is a number or all."
            )
        asked["devices"] = devices[0]
    if capabilities := asked.get("compute_capability"):
        asked["compute_capability"] = tuple(sorted(set(capabilities), key=lambda each: (len(each), each)))
    if provider := asked.get("provider"):  # CUDA and CUDAExecutionProvider are one
        asked["provider"] = provider.lower().removesuffix("executionprovider")
    if device := asked.get("device"):
        asked["device"] = device.upper()
    return Options(**asked)


def bounds_of(flags: argparse.Namespace, name: str) -> tuple[int, int, int] | None:
    """The three sizes of a flag, in order; None where it was not passed."""
    if getattr(flags, name) is None:
        return None
    least, best, most = getattr(flags, name)
    if not 1 <= least <= best <= most:
        raise InvalidRequest(
            f"{option(name)} are the least, the best and the most, in this order, not {least} {best} {most}."
        )
    return least, best, most


def make_folder(folder: Path) -> Path:
    """A folder that files are written to, without what killed runs left of theirs. Raises `Failed`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
    except OSError as error:
        raise Failed(f"{folder} cannot be made: {error.strerror}.") from None
    return folder


def _folder(asked: str | None, name: str) -> Path:
    return Path(asked) if asked else home() / name


def output_folder(asked: str | None) -> Path:
    """Where pictures go. Raises `InvalidRequest` where they could not be written; leaves nothing there."""
    folder = _folder(asked, "output")
    standing = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
    if not os.path.isdir(standing):
        raise InvalidRequest(f"--output-dir {folder}: {standing} is not a folder.")
    try:
        if standing != folder.absolute():
            with contextlib.suppress(FileNotFoundError):
                os.stat(folder)  # a name too long, or in a folder that may not be entered
        tempfile.TemporaryFile(dir=standing).close()
    except OSError as error:
        raise InvalidRequest(f"--output-dir {folder} cannot be written ({error.strerror}); name another.") from None
    return folder
