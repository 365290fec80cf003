"""A model repository is written over whatever stands there, and nothing half-made is left in it."""

from functools import partial
from pathlib import Path

import filelock
import pytest

from darkroom.errors import Failed
from darkroom.triton.config import CONFIG
from darkroom.triton.repository import VERSION, write_ensemble, write_text


def write(repository: Path) -> Path:
    write_ensemble(repository, "tiny", {"tiny_ensemble": "a text"})
    return repository / "tiny_ensemble"


@pytest.mark.parametrize("what", ["file", "link to a folder", "link to nothing", "folder"])
def test_whatever_stands_in_the_place_of_a_version_is_replaced_as_often_as_it_does(what: str, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder = write(tmp_path / "models")
    version = folder / VERSION
    for _ in range(3):
        (version / ".keep").unlink()
        version.rmdir()
        if what == "file":
            version.write_text("no version")
        elif what == "folder":
            version.mkdir()
        else:
            version.symlink_to(elsewhere if what == "link to a folder" else "nothing")
        assert write(tmp_path / "models") == folder
        assert not version.is_symlink() and [path.name for path in version.iterdir()] == [".keep"]
        assert {path.name for path in folder.iterdir()} == {VERSION, CONFIG, f".{VERSION}.lock"}
    assert elsewhere.is_dir(), "what a link leads to is somebody's"


def test_what_cannot_be_put_in_its_place_is_not_left_beside_it(tmp_path: Path) -> None:
    (tmp_path / CONFIG).mkdir()
    with pytest.raises(Failed, match="cannot be written: Is a directory"):
        write_text(tmp_path / CONFIG, "a text")
    assert [path.name for path in tmp_path.iterdir()] == [CONFIG]


def test_version_that_another_process_is_making_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = write(tmp_path / "models") / VERSION
    theirs = version.with_name(f".{VERSION}.4711.tmp")
    theirs.mkdir()
    waiting = partial(filelock.FileLock, timeout=0)
    with filelock.FileLock(version.with_name(f".{VERSION}.lock")), monkeypatch.context() as patched:
        patched.setattr(filelock, "FileLock", waiting)
        with pytest.raises(Failed, match="lock"):
            write(tmp_path / "models")
        assert theirs.is_dir(), "it is being filled"
    write(tmp_path / "models")
    assert not theirs.exists(), "nobody is filling it any more"
