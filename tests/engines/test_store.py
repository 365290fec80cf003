"""What stands in the store under a key is whole, is for that key alone, and was made once."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from darkroom.engines.store import MANIFEST, Key, Store
from darkroom.errors import Failed
from tests.support import ROOT, listing

KEY = Key("unet-tiny-b1", {"kind": "engine", "weights": "abc", "shapes": {"latents": [1, 4, 8, 8]}})


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

    monkeypatch.setattr("darkroom.fingerprints.hash_file", refuse)
    assert Store(tmp_path).find(KEY) == made


def test_broken_memory_of_hashes_only_costs_time(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = store.make(KEY, Builder())
    for content in ("", "[1, 2", "[]", '{"x": 3}', json.dumps({str(made / "engine.bin"): [1]})):
        (tmp_path / ".fingerprints.json").write_text(content)
        assert Store(tmp_path).find(KEY) == made


def test_half_made_artefact_is_not_found(tmp_path: Path) -> None:
    temporary = tmp_path / f".{KEY.folder_name}.tmp"
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
        from darkroom.engines.store import Key, Store
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
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert len(list(tmp_path.glob("built-*"))) == 1
