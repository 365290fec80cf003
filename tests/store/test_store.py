"""What stands in the store under a key is whole, is for that key alone, and was made once."""

import contextlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import darkroom.store.fingerprints
import darkroom.store.store
from darkroom.errors import Failed
from darkroom.store.store import MANIFEST, USED, Key, Store, last_use
from tests.support import ROOT, SOON, listing, until

KEY = Key("unet-tiny-b1", {"kind": "network", "weights": "abc", "shapes": {"latents": [1, 4, 8, 8]}})
OTHER = Key(KEY.label, KEY.facts | {"weights": "abd"})


class Builder:
    """Writes two files; counts how often it was asked to."""

    def __init__(self, content: bytes = b"compiled" * 100) -> None:
        self.content = content
        self.calls = 0

    def __call__(self, folder: Path) -> dict:
        self.calls += 1
        (folder / "engine.bin").write_bytes(self.content)
        (folder / "engine.bin.data").write_bytes(self.content * 3)
        return {"error_against_torch": 1e-6}


def test_artefact_is_made_once_and_found_again(tmp_path: Path) -> None:
    build = Builder()
    made = Store(tmp_path / "engines").make(KEY, build)
    before = listing(made)
    assert Store(tmp_path / "engines").make(KEY, build) == made
    assert Store(tmp_path / "engines").find(KEY) == made
    assert build.calls == 1
    assert listing(made) == before


def test_nothing_is_found_and_nothing_made_by_looking(tmp_path: Path) -> None:
    assert Store(tmp_path / "engines").find(KEY) is None
    assert not (tmp_path / "engines").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": "abd"},
        {"shapes": {"latents": [2, 4, 8, 8]}},
        {"kind": "graph"},
        {"precision": "fp16"},
        {"weights": None},
    ],
)
def test_any_changed_fact_is_another_artefact(changes: dict, tmp_path: Path) -> None:
    store = Store(tmp_path)
    other = Key(KEY.label, KEY.facts | changes)
    assert other.digest != KEY.digest
    made = store.make(KEY, Builder())
    assert store.find(other) is None
    assert store.make(other, Builder(b"other")) != made


def test_order_of_facts_does_not_matter() -> None:
    assert Key("a", {"x": 1, "y": 2}).digest == Key("b", {"y": 2, "x": 1}).digest


def test_folder_name_is_safe_whatever_the_label_holds() -> None:
    name = Key("../../etc/passwd \n:*?", {}).folder_name
    assert "/" not in name
    assert name.isprintable()
    assert not name.startswith(".") or set(name) != {"."}


@pytest.mark.parametrize("name", ["engine.bin", "engine.bin.data", MANIFEST])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "emptied"])
def test_damaged_artefact_is_noticed_and_made_again(name: str, damage: str, tmp_path: Path) -> None:
    made = Store(tmp_path).make(KEY, Builder())
    file = made / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[:-5])
    elif damage == "emptied":
        file.write_bytes(b"")
    else:
        file.write_bytes(content[:40] + bytes([content[40] ^ 0xFF]) + content[41:])
    store, build = Store(tmp_path), Builder()
    assert store.find(KEY) is None
    assert store.make(KEY, build) == made
    assert build.calls == 1
    assert (made / "engine.bin").read_bytes() == build.content


def test_damage_is_noticed_by_a_run_that_remembers_the_hashes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = store.make(KEY, Builder())
    store.find(KEY)
    store.fingerprints.remember()
    (made / "engine.bin").write_bytes(b"COMPILED" * 100)
    assert Store(tmp_path).find(KEY) is None


def test_remembered_hashes_are_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    made = store.make(KEY, Builder())
    store.find(KEY)
    store.fingerprints.remember()

    def refuse(path: Path) -> str:
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr("darkroom.store.fingerprints.hash_file", refuse)
    assert Store(tmp_path).find(KEY) == made


def test_broken_memory_of_hashes_only_costs_time(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = store.make(KEY, Builder())
    for content in ("", "[1, 2", "[]", '{"x": 3}', json.dumps({str(made / "engine.bin"): [1]})):
        (tmp_path / ".fingerprints.json").write_text(content)
        assert Store(tmp_path).find(KEY) == made


def test_half_made_artefact_is_not_found(tmp_path: Path) -> None:
    temporary = tmp_path / f".{KEY.folder_name}.0123abcd.tmp"
    temporary.mkdir()
    (temporary / "engine.bin").write_bytes(b"half")
    (temporary / "left over").write_bytes(b"half")
    store = Store(tmp_path)
    assert store.find(KEY) is None
    made = store.make(KEY, Builder())
    assert sorted(path.name for path in made.iterdir()) == ["engine.bin", "engine.bin.data", MANIFEST]
    assert not temporary.exists()


def test_failed_build_leaves_no_artefact(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict:
        (folder / "engine.bin").write_bytes(b"half")
        raise Failed("no such operator")

    store = Store(tmp_path)
    with pytest.raises(Failed, match="no such operator"):
        store.make(KEY, fail)
    assert store.find(KEY) is None
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith("engine.bin")]


def test_store_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "engines").write_text("a file")
    with pytest.raises(Failed, match="engines"):
        Store(tmp_path / "engines").make(KEY, Builder())


def test_manifest_holds_the_whole_key(tmp_path: Path) -> None:
    made = Store(tmp_path).make(KEY, Builder())
    manifest = json.loads((made / MANIFEST).read_text())
    assert manifest["key"] == KEY.facts
    assert manifest["files"]["engine.bin"]["size"] == (made / "engine.bin").stat().st_size
    assert manifest["made"]["error_against_torch"] == 1e-6


def test_two_processes_make_an_artefact_once(tmp_path: Path) -> None:
    program = textwrap.dedent(
        f"""
        import os, sys, time
        from pathlib import Path
        sys.path.insert(0, {str(ROOT / "demo")!r})
        from darkroom.store.store import Key, Store
        root = Path(sys.argv[1])
        (root / f"ready-{{os.getpid()}}").touch()
        while len(list(root.glob("ready-*"))) < 2:
            time.sleep(0.01)
        def build(folder):
            (root / f"built-{{os.getpid()}}").touch()
            time.sleep(0.5)
            (folder / "engine.bin").write_bytes(b"whole")
            return {{}}
        folder = Store(root / "engines").make(Key("unet", {{"x": 1}}), build)
        assert (folder / "engine.bin").read_bytes() == b"whole"
        """
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    both = [subprocess.Popen(command, env=dict(os.environ), stderr=subprocess.PIPE) for _ in range(2)]
    assert [process.wait(timeout=SOON) for process in both] == [0, 0]
    assert len(list(tmp_path.glob("built-*"))) == 1


def test_a_store_that_is_removed_meanwhile_is_said_in_one_line(tmp_path: Path) -> None:
    def build(folder: Path) -> dict[str, object]:
        shutil.rmtree(tmp_path / "engines")
        raise RuntimeError("cannot open engine.bin")  # as libraries say it

    with pytest.raises(Failed, match="engines was removed while something was made in it"):
        Store(tmp_path / "engines").make(KEY, build)


class TestDamage:
    def test_any_flipped_byte_is_noticed(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        made = store.make(KEY, Builder(bytes(range(256))))
        store.fingerprints.remember()
        pick = random.Random(0)
        files = sorted(path for path in made.iterdir())
        for _ in range(300):
            file = pick.choice(files)
            whole = file.read_bytes()
            place, flip = pick.randrange(len(whole)), pick.randrange(1, 256)
            file.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
            assert store.find(KEY) is None, f"{file.name}, byte {place} ^ {flip}"
            file.write_bytes(whole)
            assert store.find(KEY) == made

    def test_that_keeps_size_and_modification_time_is_noticed(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        file = store.make(KEY, Builder()) / "engine.bin"
        store.fingerprints.remember()
        before = file.stat()
        file.write_bytes(b"COMPILED" * 100)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert Store(tmp_path).find(KEY) is None

    def test_is_told_in_one_line_and_kept_aside(self, tmp_path: Path) -> None:
        told: list[str] = []
        store = Store(tmp_path, told.append)
        made = store.make(KEY, Builder())
        (made / "engine.bin").write_bytes(b"half")
        store.make(KEY, Builder())
        (line,) = told
        assert "engine.bin has 4 bytes, not 800" in line and str(made) in line and "\n" not in line
        (aside,) = store.aside()
        assert (aside / "engine.bin").read_bytes() == b"half"
        assert store.folders() == [made]

    def test_a_file_that_is_none_of_its_own_is_damage(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        made = store.make(KEY, Builder())
        (made / "beforehand.blob").write_bytes(b"foreign")
        assert store.find(KEY) is None and store.damage(made) == "beforehand.blob is none of its files"

    def test_a_line_feed_that_becomes_another_is_damage(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        manifest = store.make(KEY, Builder()) / MANIFEST
        manifest.write_bytes(manifest.read_bytes().replace(b"\n", b"\r", 1))
        assert store.find(KEY) is None

    def test_a_foreign_artefact_is_not_used(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        other = store.make(Key(KEY.label, KEY.facts | {"weights": "other"}), Builder(b"other"))
        shutil.copytree(other, tmp_path / KEY.folder_name)
        assert store.find(KEY) is None
        assert "another artefact" in (store.damage(tmp_path / KEY.folder_name) or "")

    @pytest.mark.parametrize("content", ["", "{", "[]", "null", "3", '{"key": 3}', "[" * 100_000, "\ufffe"])
    def test_of_the_manifest_is_never_a_traceback(self, content: str, tmp_path: Path) -> None:
        store = Store(tmp_path)
        made = store.make(KEY, Builder())
        (made / MANIFEST).write_text(content)
        assert store.find(KEY) is None
        assert list(store.manifests()) == []
        assert store.make(KEY, Builder()) == made

    def test_of_what_is_remembered_of_an_artefact_is_not_its_own(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        made = store.make(KEY, Builder())
        store.find(KEY)
        store.fingerprints.remember()
        memory = tmp_path / ".fingerprints.json"
        known = json.loads(memory.read_text())
        memory.write_text(json.dumps({path: [*value[:-1], "0" * 64] for path, value in known.items()}))
        assert Store(tmp_path).find(KEY) == made


def stand_in_the_way(path: Path, what: str) -> None:
    """Puts what is no folder of an artefact under its name."""
    elsewhere = path.parent.parent / "elsewhere"
    if path.exists():
        shutil.rmtree(path)
    if what == "file":
        path.write_text("no artefact")
    elif what == "link to a folder":
        elsewhere.mkdir(exist_ok=True)
        path.symlink_to(elsewhere)
    elif what == "link to nothing":
        path.symlink_to(path.parent / "nothing")
    else:
        path.mkdir()


WAYS = ["file", "link to a folder", "link to nothing", "folder"]


@pytest.mark.parametrize("first", WAYS)
@pytest.mark.parametrize("then", WAYS)
def test_whatever_stands_under_a_key_is_set_aside_as_often_as_it_does(first: str, then: str, tmp_path: Path) -> None:
    told: list[str] = []
    store = Store(tmp_path / "engines", told.append)
    made = store.make(KEY, Builder())
    for what in (first, then):
        stand_in_the_way(made, what)
        assert store.make(KEY, Builder()) == made
        assert store.find(KEY) == made and (made / "engine.bin").is_file() and not made.is_symlink()
    assert len(told) == 2
    assert {path.name for path in store.root.iterdir() if path.suffix != ".lock"} == {
        KEY.folder_name,
        f".{KEY.folder_name}.aside",
    }


@pytest.mark.parametrize("what", WAYS)
@pytest.mark.parametrize("work", ["take", "renew", "put", "remove", "sweep"])
def test_what_is_no_folder_is_in_nobodys_way(what: str, work: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "engines")
    made = store.make(KEY, Builder())
    whole = shutil.copytree(made, tmp_path / "whole")
    for _ in range(2):
        stand_in_the_way(made, what)
        if work == "take":
            assert store.take(KEY) is None
        elif work == "renew":
            store.renew(KEY, lambda folder: None)
        elif work == "put":
            store.put(made, lambda folder: shutil.copytree(whole, folder, dirs_exist_ok=True))
        elif work == "remove":
            store.remove(made)
        else:
            made.rename(store.root / f".{KEY.folder_name}.01234567.tmp")
            store.sweep()
        assert (store.find(KEY) == made) is (work in ("renew", "put"))
        assert not list(store.root.glob(".*.tmp"))
    for aside in store.aside():
        store.remove(aside)
    assert store.aside() == []
    if what == "link to a folder":
        assert (tmp_path / "elsewhere").is_dir(), "what a link leads to is somebody's"


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {demo!r})
from darkroom.store.store import Key, Store
def build(folder):
    print("building", flush=True)
    for part in range(200):
        (folder / f"part-{{part}}").write_bytes(bytes([part]) * 20_000)
    return {{}}
store = Store(Path(sys.argv[1]))
while True:
    folder = store.make(Key("unet", {{"x": 1}}), build)
    store.remove(folder)
"""


def test_a_builder_killed_at_any_moment_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    root, key = tmp_path / "engines", Key("unet", {"x": 1})
    pick = random.Random(1)
    for _ in range(12):
        command = [sys.executable, "-c", KILLED.format(demo=str(ROOT / "demo")), str(root)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(pick.uniform(0, 0.15))
        process.kill()
        process.wait()
        process.stdout.close()
        store = Store(root)
        if folder := store.find(key):
            assert len(list(folder.glob("part-*"))) == 200
    store = Store(root)
    folder = store.make(key, Builder())
    assert store.find(key) == folder
    store.sweep()
    assert [path.name for path in root.iterdir() if path.name.endswith(".tmp")] == []
    assert store.folders() == [folder]


def interrupted_at(moment: int, work: Callable[[], object]) -> bool:
    """Does `work` with Ctrl-C at one of the steps that Python takes in the store's own code: whether it came so far."""
    own, left = (darkroom.store.store.__file__, darkroom.store.fingerprints.__file__), moment

    def trace(frame: types.FrameType, event: str, _: Any) -> Any:
        nonlocal left
        # Beside it what enters and leaves its blocks.
        asking = frame.f_back if frame.f_code.co_filename == contextlib.__file__ else frame
        if asking is None or asking.f_code.co_filename not in own:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize(
    "work",
    [
        lambda store: store.make(KEY, lambda folder: {}),
        lambda store: store.renew(OTHER, lambda folder: None),
        lambda store: store.scratch("own"),
        lambda store: store.fingerprints.remember(),
    ],
    ids=["make", "renew", "scratch", "remember"],
)
def test_ctrl_c_at_any_moment_leaves_nothing_half_made(
    work: Callable[[Store], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each moment has a store of its own; artefacts of no files are made in a millisecond."""
    ends: list[Callable[[], None]] = []
    monkeypatch.setattr("atexit.register", ends.append)
    monkeypatch.setattr("darkroom.store.fingerprints.TICK", 0)
    for moment in itertools.count():
        store = Store(tmp_path / str(moment))
        store.fingerprints.sha256(store.make(OTHER, lambda folder: {}) / MANIFEST)
        whole = not interrupted_at(moment, lambda store=store: work(store))
        while ends:  # as when the process ends
            ends.pop()()
        left = {path.name for path in store.root.iterdir() if path.suffix != ".lock"}
        assert left <= {KEY.folder_name, OTHER.folder_name, ".fingerprints.json"}, moment
        if whole:
            break
    assert moment > 30


def test_what_another_process_is_making_is_not_swept_away(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.changing("other"):
        (tmp_path / ".other.0123abcd.tmp").mkdir()
        Store(tmp_path).make(KEY, Builder())
        assert (tmp_path / ".other.0123abcd.tmp").exists()
    Store(tmp_path).sweep()
    assert not (tmp_path / ".other.0123abcd.tmp").exists()


def test_whoever_waits_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    first, second = Store(tmp_path), Store(tmp_path, told.append)

    def build(folder: Path) -> dict:
        waiting.start()
        until(lambda: bool(told))
        return Builder()(folder)

    found: list[Path] = []
    waiting = threading.Thread(target=lambda: found.append(second.make(KEY, Builder(b"never"))))
    made = first.make(KEY, build)
    waiting.join()
    assert found == [made] and (made / "engine.bin").read_bytes() == Builder().content
    assert told == [f"waiting for another process, which is making {KEY.folder_name}."]


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A file system of its own at `folder`; skips where none can be mounted."""
    folder.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(not shutil.which("mount"), reason="file systems cannot be mounted here")
class TestDisk:
    def test_that_is_full_is_named_and_nothing_is_left(self, tmp_path: Path) -> None:
        def fill(folder: Path) -> dict:
            (folder / "engine.bin").write_bytes(b"x" * 3_000_000)
            return {}

        with mounted(tmp_path / "disk", "size=1m"):
            with pytest.raises(Failed, match="No space left on device"):
                Store(tmp_path / "disk" / "engines").make(KEY, fill)
            assert [path for path in (tmp_path / "disk" / "engines").iterdir() if path.suffix != ".lock"] == []

    def test_that_is_full_is_named_whatever_a_library_says(self, tmp_path: Path) -> None:
        def fill(folder: Path) -> dict:
            raise RuntimeError("protobuf: could not serialize")

        with mounted(tmp_path / "disk", "size=1m"), pytest.raises(Failed, match="No space left on device"):
            Store(tmp_path / "disk" / "engines").make(KEY, fill)

    def test_that_is_read_only_serves_what_is_built(self, tmp_path: Path) -> None:
        root = tmp_path / "disk"
        with mounted(root, "size=1m"):
            made = Store(root).make(KEY, Builder())
            subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
            store = Store(root)
            assert store.find(KEY) == made
            store.note_use(made)
            store.sweep()
            store.fingerprints.remember()
            with pytest.raises(Failed, match="cannot be written"):
                store.make(Key("unet", {"x": 2}), Builder())

    def test_that_is_read_only_names_what_is_damaged_in_it(self, tmp_path: Path) -> None:
        root, told = tmp_path / "disk", []
        with mounted(root, "size=1m"):
            made = Store(root).make(KEY, Builder())
            (made / "engine.bin").write_bytes(b"other bytes")
            subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
            with pytest.raises(Failed, match="cannot be written"):
                Store(root, tell=told.append).make(KEY, Builder())
        assert told == [f"{made} is damaged (engine.bin has 11 bytes, not 800)."]


def test_use_is_noted_to_the_hour(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = store.make(KEY, Builder())
    assert last_use(made) == 0
    start = time.time()
    store.note_use(made)
    first = last_use(made)
    assert start - 1 <= first <= time.time() + 1, "but for the clock of files, which is less exact"
    before = listing(made)
    store.note_use(made)
    assert listing(made) == before
    os.utime(made / USED, (0, first - 7200))
    store.note_use(made)
    assert last_use(made) >= first
    assert store.find(KEY) == made, "a mark is no damage"
