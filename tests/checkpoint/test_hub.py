"""Fetching models from the hub: what is asked for, with a stand-in for the hub, which cannot be reached here."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from darkroom.checkpoint import hub
from darkroom.errors import DarkroomError, Failed, InvalidRequest

GIGA = 10**9
UNET = "unet/diffusion_pytorch_model"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Fetches a repository of these files and sizes; returns the patterns of what was downloaded."""
    import huggingface_hub

    def fetch(**sizes: int) -> list[str]:
        files = {f"{UNET}.{name.replace('_', '.')}": size for name, size in sizes.items()}
        downloads = []

        def download(repository: str, allow_patterns: list[str], local_files_only: bool = False, **_: Any) -> str:
            if local_files_only:
                raise FileNotFoundError("nothing is on disk")
            downloads.append(allow_patterns)
            return str(tmp_path)

        api = SimpleNamespace(
            endpoint="http://hub",
            list_repo_files=lambda repository: list(files),
            get_paths_info=lambda repository, path: [SimpleNamespace(size=files[path])],
        )
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: api)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        monkeypatch.setattr(hub, "_reachable", lambda endpoint: None)
        assert hub.fetch("owner/name", None, None) == tmp_path
        return [pattern for pattern in downloads[0] if pattern.startswith("unet/diffusion")]

    return fetch


@pytest.mark.parametrize("fetch", [hub.fetch, hub.fetch_lora, partial(hub.fetch_network, flag="--vae")])
def test_in_offline_mode_nothing_is_sent(fetch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(Failed, match=r"owner/name could not be fetched from the hub in offline mode"):
        fetch("owner/name", None, None)


def test_the_plain_file_is_taken_where_there_is_one(asked: Any) -> None:
    assert asked(safetensors=3 * GIGA, fp16_safetensors=GIGA) == [f"{UNET}.safetensors"]


def test_of_a_network_that_is_kept_halved_the_halved_file_is_taken(asked: Any) -> None:
    assert asked(safetensors=10 * GIGA, fp16_safetensors=5 * GIGA) == [f"{UNET}.fp16.safetensors"]
    assert asked(safetensors=10 * GIGA) == [f"{UNET}.safetensors"]


def test_of_a_network_in_parts_the_halved_ones_are_taken(asked: Any) -> None:
    from fnmatch import fnmatch

    patterns = asked(safetensors_index_json=1, safetensors_index_fp16_json=1)
    names = [f"{UNET}-00001-of-00002.safetensors", f"{UNET}.fp16-00001-of-00002.safetensors"]
    names += [f"{UNET}-00001-of-00002.fp16.safetensors", f"{UNET}.safetensors.index.fp16.json"]
    assert [any(fnmatch(name, pattern) for pattern in patterns) for name in names] == [False, True, True, True]


def test_without_the_plain_file_what_there_is_is_taken(asked: Any) -> None:
    assert f"{UNET}.fp16.safetensors" in asked(fp16_safetensors=GIGA)


@pytest.mark.parametrize(
    "source", ["./x", "../x", "/x", "~/x", "a/b/x", "a/b/", r"a\x", r".\x", "C:/x", "x", "a/x.ckpt"]
)
def test_what_can_only_be_a_path_is_no_repository(source: str) -> None:
    assert hub.repository_of(source) is None


@pytest.mark.parametrize(
    ("source", "raised", "said"),
    [
        ("models/emojy", InvalidRequest, "there is no folder models/emojy here. Did you mean 'models/emoji'? If"),
        ("models/unheard-of", InvalidRequest, "there is no folder models/unheard-of here. If a repository is meant"),
        ("model/emoji", Failed, "there is no folder model/emoji here. Did you mean 'models/emoji'? If"),
        ("stabilityai/sd-turbo", Failed, "stabilityai/sd-turbo could not be fetched"),
    ],
)
def test_what_may_be_a_mistyped_path_is_said_to_be_no_folder(
    source: str, raised: type[DarkroomError], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(endpoint: str) -> None:
        raise TimeoutError

    (tmp_path / "models" / "emoji").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_reachable", unreachable)
    with pytest.raises(raised) as error:
        hub.fetch(source, None, tmp_path / "downloads")
    assert str(error.value).startswith(said) and f"{source} could not be fetched from the hub" in str(error.value)
    assert type(error.value) is raised


def test_name_that_nobody_typed_is_no_mistyped_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(endpoint: str) -> None:
        raise TimeoutError

    (tmp_path / "stabilityai").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_reachable", unreachable)
    with pytest.raises(Failed) as error:
        hub.fetch("stabilityai/sd-turbo", None, tmp_path / "downloads", may_be_path=False)
    assert str(error.value).startswith("stabilityai/sd-turbo could not be fetched")
