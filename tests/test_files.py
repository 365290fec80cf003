"""Files are written whole, or not at all."""

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from darkroom.errors import Failed
from darkroom.files import sweep, write_whole, written


def test_two_threads_may_write_one_file(tmp_path: Path) -> None:
    with written(tmp_path / "a") as ours, ThreadPoolExecutor(1) as other:
        ours.write_text("ours")
        other.submit(write_whole, tmp_path / "a", b"theirs").result()
    assert (tmp_path / "a").read_text() == "ours"


def test_what_cannot_be_put_in_its_place_is_not_left_beside_it(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(Failed, match="file cannot be written"):
        write_whole(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_file_stays_as_it_was_until_another_is_whole(tmp_path: Path) -> None:
    file = write_whole(tmp_path / "file", b"old")
    with pytest.raises(KeyboardInterrupt), written(file) as temporary:
        temporary.write_bytes(b"half")
        assert file.read_bytes() == b"old"
        raise KeyboardInterrupt
    assert (file.read_bytes(), list(tmp_path.iterdir())) == (b"old", [file])
    assert write_whole(file, b"new").read_bytes() == b"new"


def test_folder_that_is_not_there_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(Failed, match="cannot be written: No such file or directory"):
        write_whole(tmp_path / "nowhere" / "file", b"")


@pytest.mark.skipif(sys.platform == "win32", reason="nothing is swept there")
def test_what_a_killed_process_left_is_swept_up_and_that_of_others_is_not(tmp_path: Path) -> None:
    kill = "written(Path('gone.png')).__enter__().touch(); os.kill(os.getpid(), signal.SIGKILL)"
    program = f"import os, signal; from pathlib import Path; from darkroom.files import written; {kill}"
    killed = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=False)
    (left,) = tmp_path.iterdir()
    elsewhere = left.with_name(left.name.replace(left.name.split(".")[-2].split("-")[0], "0123abcd"))
    elsewhere.touch()
    with written(tmp_path / "here.png") as temporary:
        temporary.touch()
        sweep(tmp_path)
        assert killed.returncode == -signal.SIGKILL and set(tmp_path.iterdir()) == {elsewhere, temporary}
