"""Fetches model folders from the Hugging Face hub."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING

from darkroom.checkpoint.folder import LARGE, weight_files
from darkroom.checkpoint.lora import DEFAULT_NAME
from darkroom.checkpoint.other_vae import STEM
from darkroom.errors import DarkroomError, Failed, InvalidRequest, near_on_disk
from darkroom.families import every_family, family_of
from darkroom.files import read_json
from darkroom.text.tokenizer import tokenizer_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi

WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
NETWORK_FILES = ["config.json", f"{STEM}.safetensors"]
LORA_FILES = ["*.safetensors"]
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")

SECONDS_TO_CONNECT = "5"


def fetch(
    repository: str, token: str | None, folder: Path | None, weights: bool = True, may_be_path: bool = True
) -> Path:
    """The folder of a hub repository's model: what is on disk already, or else downloaded; without `weights`, only its
    configurations and tokenizers. `may_be_path` is false for a name that no user typed.

    Downloads go to the hub's own cache, or into `folder` when one is given. `token` is for gated models, and is
    handed to the hub alone. Raises `Failed` in one line when the model cannot be fetched.
    """
    if found := on_disk(repository, folder, weights):
        return found
    import huggingface_hub

    target = _target(repository, folder)
    instead = "a folder that holds the model with --model" if weights else "a folder that is like it with --config"
    with _explained(repository, instead, may_be_path):
        api = huggingface_hub.HfApi(token=token)
        _reachable(api.endpoint)
        patterns = _wanted(repository, api, weights)
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns, token=token, **target))


def to_fetch(
    repository: str, token: str | None, folder: Path | None, patterns: list[str] | None = None
) -> dict[str, int]:
    """The files of a model, or those of the patterns, that are still to be downloaded, and their bytes, from the hub's
    metadata. Raises as `fetch` does."""
    _settings()
    import huggingface_hub

    target = _target(repository, folder)
    with _explained(repository, "a folder that holds the model with --model"):
        api = huggingface_hub.HfApi(token=token)
        _reachable(api.endpoint)
        patterns = patterns or _wanted(repository, api, weights=True)
        files = huggingface_hub.snapshot_download(
            repository, allow_patterns=patterns, token=token, dry_run=True, **target
        )
    return {file.filename: file.file_size or 0 for file in files if file.will_download}


def is_offline() -> bool:
    """Whether the hub is not to be asked: HF_HUB_OFFLINE and its relatives."""
    _settings()
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return HF_HUB_OFFLINE


def _wanted(repository: str, api: "HfApi", weights: bool) -> list[str]:
    """The patterns of the files that a model needs."""
    wanted = _stems() if weights else []
    patterns = _patterns(wanted)
    files = api.list_repo_files(repository)
    for stem in wanted:
        plain, halved = f"{stem}.safetensors", f"{stem}.fp16.safetensors"
        if {plain, halved} <= set(files) and api.get_paths_info(repository, plain)[0].size > 4 * LARGE:
            # Kept in float16 whatever it comes in (`Checkpoint.is_large`): half of the plain file is for nothing.
            patterns = [*(pattern for pattern in patterns if pattern != plain), halved]
        elif {f"{plain}.index.json", f"{plain}.index.fp16.json"} <= set(files):  # in parts, so it is as large
            patterns += [f"{stem}*fp16*.safetensors", f"{plain}.index.fp16.json"]
        elif plain not in files:
            patterns += [halved, f"{stem}*.safetensors", f"{stem}.safetensors.index*.json"]
    return patterns


def on_disk(repository: str, folder: Path | None, weights: bool = True) -> Path | None:
    """The folder of a model that was fetched before, whole, from where `fetch` puts it; None without one."""
    _settings()
    import huggingface_hub

    if folder:
        found = _target(repository, folder)["local_dir"]
        return found if _whole(found, weights) else None
    patterns = _patterns(_stems() if weights else [])
    try:
        cached = Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns, local_files_only=True))
    except Exception:  # whatever the reason, it is not there
        return None
    return cached if _whole(cached, weights) else None


def _target(repository: str, folder: Path | None) -> dict[str, Path]:
    return {"local_dir": folder / repository.replace("/", "--")} if folder else {}


def _stems() -> list[str]:
    """How the weight files of networks begin, of every family."""
    stems = [f"{name}/{part.stem}" for family in every_family() for name, part in family.parts.items()]
    return list(dict.fromkeys(stems))


def _patterns(wanted: list[str]) -> list[str]:
    parts = {name: part for family in every_family() for name, part in family.parts.items()}
    tokenizers = [f"{part.tokenizer}/*" for part in parts.values() if part.tokenizer]
    configs = [f"{name}/config.json" for name in parts]
    weights = [f"{stem}.safetensors" for stem in wanted]
    return ["model_index.json", "scheduler/*.json", *tokenizers, *configs, *weights]


def fetch_lora(repository: str, token: str | None, folder: Path | None) -> Path:
    """The LoRA file of a hub repository, found on disk or downloaded as `fetch` does with models."""
    _settings()
    import huggingface_hub

    target = _target(repository, folder)
    with _explained(repository, "a folder that has it with --framework-model-dir, or the file with --lora-path"):
        found = target.get("local_dir")
        if not folder:
            with contextlib.suppress(huggingface_hub.errors.LocalEntryNotFoundError):
                found = Path(huggingface_hub.snapshot_download(repository, local_files_only=True))
        if found and (name := _lora_among([path.name for path in found.glob("*.safetensors")])):
            return found / name
        api = huggingface_hub.HfApi(token=token)
        _reachable(api.endpoint)
        files = [name for name in api.list_repo_files(repository) if name.endswith(".safetensors")]
        if not (name := _lora_among(files)):
            raise InvalidRequest(
                f"{repository} holds {len(files)} safetensors files: fetch the one that is meant, and name it."
            )
        return Path(huggingface_hub.hf_hub_download(repository, name, token=token, **target))


def fetch_network(repository: str, token: str | None, folder: Path | None, flag: str) -> Path:
    """The folder of a repository that holds one network of diffusers alone, as `flag` names it; found on disk or
    downloaded as `fetch` does with models."""
    _settings()
    import huggingface_hub

    files = NETWORK_FILES
    target = _target(repository, folder)
    with _explained(repository, f"a folder that holds it with {flag}"):
        found = target.get("local_dir")
        if not folder:
            with contextlib.suppress(huggingface_hub.errors.LocalEntryNotFoundError):
                found = Path(huggingface_hub.snapshot_download(repository, allow_patterns=files, local_files_only=True))
        if found and all((found / name).is_file() for name in files):
            return found
        _reachable(huggingface_hub.HfApi(token=token).endpoint)
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=files, token=token, **target))


def _lora_among(names: list[str]) -> str | None:
    """Which of a repository's safetensors files is its LoRA: the one of the usual name, or the only one."""
    return DEFAULT_NAME if DEFAULT_NAME in names else names[0] if len(names) == 1 else None


def repository_of(source: str) -> str | None:
    """The hub repository that a model or LoRA is named by, or None for a file or folder."""
    is_path = os.path.exists(source) or source.lower().endswith(WEIGHT_SUFFIXES) or not REPOSITORY.fullmatch(source)
    return None if is_path else source


def _settings() -> None:
    """How the hub's client behaves; read when it is first imported."""
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", SECONDS_TO_CONNECT)
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", SECONDS_TO_CONNECT)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # a job's one line is Darkroom's own


@contextlib.contextmanager
def _explained(repository: str, instead: str, may_be_path: bool = True) -> Iterator[None]:
    """Raises what goes wrong with the hub in one line. `instead` says what can be passed to do without."""
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    # With a folder of the owner's name here, a path is meant.
    not_here = _not_here(repository) if may_be_path else ""
    try:
        yield
    except DarkroomError:
        raise
    except GatedRepoError:
        raise Failed(
            f"the hub gives {repository} only to people who accepted its terms: accept them on its page, then "
            f"pass --hf-token or set HF_TOKEN."
        ) from None
    except RepositoryNotFoundError:
        raise InvalidRequest(f"{not_here}the hub has no {repository}, or it is private and needs --hf-token.") from None
    except Exception as error:  # the hub's client raises errors of several libraries when it cannot connect
        kind = InvalidRequest if may_be_path and os.path.isdir(Path(repository).parent) else Failed
        why = f"({type(error).__name__}): connect to the network and run this again"
        if isinstance(error, OfflineModeIsEnabled):
            why = "in offline mode, which HF_HUB_OFFLINE turns on: unset that"
        raise kind(f"{not_here}{repository} could not be fetched from the hub {why}, or pass {instead}.") from None


def _not_here(repository: str) -> str:
    """How an error begins where a repository's name may be a mistyped path: with what is not there, and what is."""
    near = near_on_disk(Path(repository))
    if not near and not os.path.isdir(Path(repository).parent):
        return ""
    return f"there is no folder {repository} here.{near} If a repository is meant: "


def _whole(folder: Path, weights: bool) -> bool:
    """Whether all of a model is in `folder`: the hub's client renames each file when it is whole."""
    try:
        index = read_json(folder / "model_index.json")
        if (family := family_of(index)) is None:
            return False
        parts = family.parts_of(index)
        for name in parts:
            read_json(folder / name / "config.json")
        for tokenizer in family.tokenizers_of(index):
            tokenizer_files(folder / tokenizer)
        read_json(folder / "scheduler" / "scheduler_config.json")
        return not weights or all(weight_files(folder / name, part.stem) for name, part in parts.items())
    except DarkroomError:
        return False


def _reachable(endpoint: str) -> None:
    """Fails within seconds without a network or an answer, where the hub's client would try again and again; and at
    once, without a packet, in offline mode.

    A name may have many addresses, and be long in being resolved: all of that together takes no longer.
    """
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import OfflineModeIsEnabled

    if HF_HUB_OFFLINE:
        raise OfflineModeIsEnabled
    seconds = float(SECONDS_TO_CONNECT)
    ended: SimpleQueue[Exception | None] = SimpleQueue()

    def ask() -> None:
        try:
            urlopen(Request(endpoint, method="HEAD"), timeout=seconds).close()
        except HTTPError:
            ended.put(None)  # an answer all the same
        except Exception as error:
            ended.put(error)
        else:
            ended.put(None)

    Thread(target=ask, daemon=True).start()
    try:
        error = ended.get(timeout=seconds)
    except Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
