"""build_engines.py: what it builds, what it lists, and what it refuses."""

import contextlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from darkroom.checkpoint.folder import open_checkpoint
from darkroom.cli.artefacts import Runtimes, readable_size, rows_of
from darkroom.cli.doctor import findings
from darkroom.cli.prebuild import run
from darkroom.engines import RUNTIMES, Listed
from darkroom.engines.cuda import missing, runtime_api
from darkroom.store.archive import pack
from darkroom.store.fingerprints import hash_json
from darkroom.store.manifest import MANIFEST, read_manifest, write_manifest
from darkroom.store.store import Key, Store
from tests.support import (
    ROOT,
    Ended,
    Studio,
    assert_refused,
    changed_copy,
    children_inline,
    flags,
    listing,
    one_line,
    until,
)

PROMPT = "red apple"


def prebuild(studio: Studio, command: str, *arguments: str, **values: Any) -> Ended:
    """Runs build_engines.py in this process."""
    out, err = io.StringIO(), io.StringIO()
    folders = flags(onnx_dir=studio.onnx, engine_dir=studio.engines)
    with children_inline(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([command, *arguments, *flags(**values), *folders])
    return Ended(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def stock(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """All that ONNX Runtime needs of the tiny model. To be copied only."""
    studio = Studio(tmp_path_factory.mktemp("stock"), tiny_model)
    assert prebuild(studio, "build", model=tiny_model, engine="onnxruntime").code == 0
    return studio


@pytest.fixture
def stocked(stock: Studio, empty_studio: Studio) -> Studio:
    """Folders of this test's own in which all of that is built, and known to be whole."""
    for there, here in ((stock.onnx, empty_studio.onnx), (stock.engines, empty_studio.engines)):
        store = Store(shutil.copytree(there, here))
        assert [store.damage(folder) for folder in store.folders()].count(None) >= 4
        store.fingerprints.remember()
    return empty_studio


def rows(ended: Ended) -> list[dict[str, Any]]:
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


def scale_weights(part: Path) -> None:
    """Makes other weights of those in a part of a model."""
    from safetensors.numpy import load_file, save_file

    (file,) = part.glob("*.safetensors")
    save_file({name: value * value.dtype.type(1.25) for name, value in load_file(file).items()}, file)


def of_another(folder: Path, store: Store, made: dict[str, Any] | None = None, **facts: Any) -> Path:
    """A copy of an artefact, whole, that was made under another key."""
    manifest = read_manifest(folder)
    key = Key(manifest["label"], manifest["key"] | facts)
    copy = shutil.copytree(folder, store.root / key.folder_name)
    (copy / MANIFEST).unlink()
    write_manifest(copy, key.label, key.facts, manifest["made"] | (made or {}), store.fingerprints)
    return copy


def test_what_was_built_is_all_that_a_run_needs(empty_studio: Studio) -> None:
    made = rows(prebuild(empty_studio, "build", "--json", model=empty_studio.model, engine="openvino"))
    for kind in ("engine", "graph"):
        names = {row["name"].split("-")[0] for row in made if row["kind"] == kind}
        assert names == {"clip", "unet", "vae", "vae_encoder"}
    assert all(row["made"] and row["unusable"] is None and row["bytes"] > 0 for row in made)
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 2**26 for row in made)
    drawn = empty_studio.draw(PROMPT, engine="openvino")
    assert "build_engine" not in drawn.children and "export_stage" not in drawn.children


def test_a_second_time_nothing_is_built(empty_studio: Studio) -> None:
    arguments = ("--json", f"--model={empty_studio.model}", "--engine=onnxruntime", "--batch-size", "1", "2")
    first = rows(prebuild(empty_studio, "build", *arguments))
    before = listing(empty_studio.engines, empty_studio.onnx)
    again = rows(prebuild(empty_studio, "build", *arguments))
    assert listing(empty_studio.engines, empty_studio.onnx) == before
    assert not any(row["made"] for row in again)
    engines = [row["folder"] for row in first if row["kind"] == "engine"]
    assert [row["folder"] for row in again] == engines
    assert sum("b2-64x64" in row["name"] for row in again) == 2


def test_several_engines_and_precisions_in_one_call(empty_studio: Studio) -> None:
    pytest.importorskip("tensorrt_rtx")
    ended = prebuild(
        empty_studio,
        "build",
        "--engine",
        "openvino",
        "tensorrt",
        "--verbose",
        model=empty_studio.model,
        precision="fp32",
    )
    assert ended.code == 0, "engines for another machine are a success here"
    assert "unet-" in ended.out and "openvino" in ended.out and "tensorrt_rtx" in ended.out
    listed = rows(prebuild(empty_studio, "list", "--json"))
    (unet,) = (row for row in listed if "unet" in row["name"] and "tensorrt" in row["name"])
    assert unet["layers"] > 50 and unet["device"] == "8.0 and later"
    assert unet["tensors"]["engine.plan"]["latents"]["most"] == [1, 4, 8, 8]
    shown = prebuild(empty_studio, "list", "--verbose")
    assert "input guidance_scale: FLOAT [1]" in shown.out
    assert f"4 cannot be used here: {missing(runtime_api())}." in shown.out


def test_an_engine_of_another_version_or_machine_is_listed_as_such(studio: Studio) -> None:
    digest = studio.draw(PROMPT, engine="openvino").result["artefacts"]["unet"]
    (built,) = (folder for folder in Store(studio.engines).folders() if digest.startswith(folder.name.split("-")[-1]))
    for field, value, said in (
        ("version", "1.0", "built with 1.0"),
        ("device", "CPU: Z80", "built for CPU: Z80"),
        ("revision", 0, "built by another version of Darkroom"),
    ):
        foreign = of_another(built, Store(studio.engines), **{field: value})
        row = next(row for row in rows(prebuild(studio, "list", "--json")) if row["folder"] == str(foreign))
        assert row["unusable"].startswith(said)
        shutil.rmtree(foreign)


def test_an_empty_store_is_said_to_be_empty(empty_studio: Studio) -> None:
    assert prebuild(empty_studio, "list").out == "nothing is there yet.\n"
    assert rows(prebuild(empty_studio, "list", "--json")) == []
    assert not empty_studio.engines.exists()


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["build", "--version", "emojy"], "'emoji'"),
        (["build", "--engine", "torch"], "--engine torch builds nothing"),
        (["build", "--engine", "opnvino"], "'openvino'"),
        (["build", "--precision", "fp12"], "fp12"),
        (["build", "--batch-size", "0"], "--batch-size"),
        (["build", "--engine", "openvino", "--ws"], "--ws"),
        (["build", "--engine", "openvino", "--dynamic-batches", "1", "2", "3"], "--dynamic-batches"),
        (["build", "--height", "100"], "--height"),
        (["build", "--height", "0"], "--height"),
        (["build", "--batch-size", "2", "--build-dynamic-batch"], "--batch-size has no effect"),
        (["build", "--width", "128", "--build-dynamic-shape"], "--width has no effect"),
        (["build", "--presicion", "fp16"], "'--precision'"),
        (["build", "--engine", "openvino", "--optimization-level", "0"], "--optimization-level"),
        (["build", "--size", "64", "--height", "64"], "--size"),
        (["build", "--size", "64xx"], "--size"),
        (["build", "--size", "64x65"], "--width"),
        (["build", "--size", "64", "--build-dynamic-shape"], "--size has no effect"),
        (["build", "--scheduler", "Eular"], "'Euler'"),
        (["build", "--denoising-steps", "0"], "--denoising-steps"),
        (["build", "--dry-run", "--onnx-export-only"], "--onnx-export-only"),
        (["list", "nothing-like-it"], "'nothing-like-it' fits no artefact"),
        (["verify", "nothing-like-it"], "'nothing-like-it' fits no artefact"),
        (["clean"], "--unusable"),
        (["clean", "--yes"], "--unusable"),
        (["clean", "--unused", "-1"], "--unused"),
        (["clean", "--keep-under", "nan"], "--keep-under"),
        (["export", "/nowhere/at/all.tar"], "/nowhere/at/all.tar"),
        (["export", "all.tar"], "nothing to export"),
        (["import", "/nowhere/at/all.tar"], "/nowhere/at/all.tar"),
        (["import", "/etc/hostname"], "/etc/hostname"),
        (["build", "--model", "/nowhere/model"], "/nowhere/model"),
        (["bild"], "bild"),
        ([], "COMMAND"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_refused(empty_studio: Studio, arguments: list[str], said: str) -> None:
    out, err = io.StringIO(), io.StringIO()
    folders = flags(onnx_dir=empty_studio.onnx, engine_dir=empty_studio.engines) if len(arguments) else []
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([*arguments, *folders])
    assert code == 2 and one_line(err.getvalue()) and said in err.getvalue() and not out.getvalue()
    assert not empty_studio.engines.exists()


class TestBuild:
    def test_a_dry_run_tells_what_a_real_one_makes(self, empty_studio: Studio) -> None:
        asked = dict(model=empty_studio.model, engine="openvino", json=True)
        planned = rows(prebuild(empty_studio, "build", "--dry-run", **asked))
        assert not empty_studio.engines.exists() and not empty_studio.onnx.exists()
        assert not any(row["folder"] for row in planned)
        made = rows(prebuild(empty_studio, "build", **asked))
        read_off = {row["what"] for row in planned if row["what"].startswith(("schedule-", "tokenizer-"))}
        assert len(read_off) == 2
        assert {row["what"] for row in planned} - read_off == {row["name"] for row in made}
        again = rows(prebuild(empty_studio, "build", "--dry-run", **asked))
        assert all(row["folder"] for row in again)

    def test_graphs_alone(self, empty_studio: Studio) -> None:
        made = rows(prebuild(empty_studio, "build", "--onnx-export-only", "--json", model=empty_studio.model))
        assert {row["kind"] for row in made} == {"graph"} and len(made) == 4
        assert not empty_studio.engines.exists()

    def test_several_sizes_batches_kinds_and_schedules(self, empty_studio: Studio) -> None:
        lists = ("--size", "64", "128x64", "--build-static-batch", "--build-dynamic-shape", "--batch-size", "1", "2")
        lists += ("--scheduler", "Euler", "DDIM", "--denoising-steps", "2", "3")
        made = rows(prebuild(empty_studio, "build", *lists, "--json", model=empty_studio.model, engine="onnxruntime"))
        unets = {row["name"] for row in made if row["kind"] == "engine" and row["name"].startswith("unet-")}
        sizes = {name.removesuffix("-onnxruntime-fp32").split("-b")[1] for name in unets}
        assert sizes == {"1-64x64", "2-64x64", "1-128x64", "2-128x64", "any-anyxany"}
        names = {row["name"] for row in rows(prebuild(empty_studio, "list", "--json")) if row["kind"] == "schedule"}
        kinds = ("EulerDiscreteScheduler", "DDIMScheduler")
        assert names == {f"schedule-{kind}-{steps}" for kind in kinds for steps in (2, 3)}


class TestUpkeep:
    def test_verify_runs_every_engine_against_torch(self, stocked: Studio) -> None:
        verdicts = rows(prebuild(stocked, "verify", "--json"))
        errors = [verdict["error_against_torch"] for verdict in verdicts if "onnxruntime" in verdict["name"]]
        assert len(errors) == 4 and all(0 <= error < 1e-4 for error in errors)
        assert all(verdict["good"] for verdict in verdicts)

    def test_verify_finds_an_engine_of_other_weights(self, stocked: Studio, tmp_path: Path) -> None:
        """One whose bytes are right, under the key of what it is not."""
        other = changed_copy(stocked.model, tmp_path / "other", lambda folder: scale_weights(folder / "vae"))
        store = Store(stocked.engines)
        vae = next(store.root.glob("vae-*"))
        weights = open_checkpoint(other, store.fingerprints).digests["vae"]
        copy = of_another(vae, store, {"model_folder": str(other)}, weights={"vae": weights})
        ended = prebuild(stocked, "verify", "--json", copy.name)
        (verdict,) = json.loads(ended.out)
        assert ended.code == 1 and one_line(ended.err)
        assert not verdict["good"] and verdict["error_against_torch"] > 0.01
        advised = f"clean --all {copy.name} --yes"
        assert advised in ended.err and "damaged" not in ended.err
        assert prebuild(stocked, *advised.split()).code == 0 and not copy.exists()

    def test_verify_names_a_flipped_byte_that_kept_its_times(self, empty_studio: Studio) -> None:
        prebuild(empty_studio, "build", model=empty_studio.model, engine="onnxruntime")
        store = Store(empty_studio.engines)
        unet = next(empty_studio.engines.glob("unet-*onnxruntime*"))
        file = unet / "engine.onnx.data"
        content = bytearray(file.read_bytes())
        content[1000] ^= 1
        file.write_bytes(content)
        # As if a disk had lost it: what is remembered is of the file as it is now.
        memory = empty_studio.engines / ".fingerprints.json"
        known = json.loads(memory.read_text())
        stat = file.stat()
        known[str(file)][:4] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        memory.write_text(json.dumps(known))
        assert Store(empty_studio.engines).damage(unet) is None, "else this tests nothing"
        ended = prebuild(empty_studio, "verify", "--hashes-only", "--json")
        bad = [verdict for verdict in json.loads(ended.out) if not verdict["good"]]
        assert ended.code == 1 and [each["found"] for each in bad] == ["damaged: engine.onnx.data has changed"]
        assert "clean --unusable" in ended.err and "clean --all" not in ended.err
        assert store.damage(unet, anew=True) == "engine.onnx.data has changed"

    def test_verify_passes_when_what_was_damaged_has_been_made_again(self, empty_studio: Studio) -> None:
        asked = {"model": empty_studio.model, "engine": "onnxruntime"}
        prebuild(empty_studio, "build", **asked)
        next(empty_studio.engines.glob("unet-*")).joinpath("manifest.json").write_text("{}")
        assert prebuild(empty_studio, "verify", "--hashes-only").code == 1
        prebuild(empty_studio, "build", **asked)
        ended = prebuild(empty_studio, "verify", "--hashes-only")
        assert ended.code == 0 and "1 of them were set aside as damaged: `clean --unusable --yes`" in ended.out
        assert prebuild(empty_studio, "clean", "--unusable", "--yes").code == 0
        assert "set aside" not in prebuild(empty_studio, "verify", "--hashes-only").out

    def test_verify_says_where_there_is_nothing_to_compare_with(self, empty_studio: Studio, tmp_path: Path) -> None:
        model = shutil.copytree(empty_studio.model, tmp_path / "gone")
        prebuild(empty_studio, "build", model=model, engine="onnxruntime")
        shutil.rmtree(model)
        verdicts = rows(prebuild(empty_studio, "verify", "--json", "*onnxruntime*"))
        assert all(verdict["good"] and "nothing to compare with" in verdict["found"] for verdict in verdicts)

    def test_clean_shows_first_and_deletes_with_yes(self, stocked: Studio) -> None:
        before = listing(stocked.engines, stocked.onnx)
        shown = rows(prebuild(stocked, "clean", "--all", "--json"))
        assert listing(stocked.engines, stocked.onnx) == before
        assert len(shown) == 10 and all(row["why"] for row in shown)
        ended = prebuild(stocked, "clean", "--all", "--yes", "unet")
        assert ended.code == 0
        left = rows(prebuild(stocked, "list", "--json"))
        assert len(left) == 8 and not any("unet" in row["name"] for row in left)
        assert ended.out.endswith(f" freed, {readable_size(sum(row['bytes'] for row in left))} left.\n")

    def test_clean_takes_what_is_damaged_or_for_others(self, stocked: Studio) -> None:
        store = Store(stocked.engines)
        foreign = of_another(next(store.root.glob("vae-*")), store, device="CPU: Z80")
        damaged = next(store.root.glob("clip-*"))
        (damaged / MANIFEST).write_text("{}")
        doomed = rows(prebuild(stocked, "clean", "--unusable", "--yes", "--json"))
        assert {row["folder"] for row in doomed} == {str(foreign), str(damaged)}
        assert not foreign.exists() and not damaged.exists() and len(store.folders()) == 5

    def test_clean_by_age_and_use(self, stocked: Studio) -> None:
        assert rows(prebuild(stocked, "clean", "--older-than", "1", "--unused", "1", "--json")) == []
        assert len(rows(prebuild(stocked, "clean", "--older-than", "0", "--json"))) == 10
        total = sum(row["bytes"] for row in rows(prebuild(stocked, "list", "--json")))
        doomed = rows(prebuild(stocked, "clean", "--keep-under", str(total / 2e9), "--json"))
        freed = sum(row["bytes"] for row in doomed)
        assert freed >= total / 2 > freed - doomed[-1]["bytes"] or len(doomed) < 10


COMPILED = {"kind": "compiled", "runtime": "torch-compile", "version": "1", "device": "CPU"}
ENGINE = COMPILED | {"kind": "engine", "precision": "fp32"}


class TestCarry:
    def test_what_was_exported_serves_elsewhere(self, empty_studio: Studio, tmp_path: Path) -> None:
        first = empty_studio.draw(PROMPT, engine="onnxruntime")
        archive = tmp_path / "engines.tar"
        assert prebuild(empty_studio, "export", str(archive)).code == 0
        other = Studio(tmp_path / "other", empty_studio.model)
        other.root.mkdir()
        added = rows(prebuild(other, "import", str(archive), "--json"))
        assert {row["kind"] for row in added} == {"engine", "graph", "schedule", "tokenizer"}
        drawn = other.draw(PROMPT, engine="onnxruntime")
        assert drawn.children == [] and (drawn.pictures[0] == first.pictures[0]).all()
        before = listing(other.engines, other.onnx)
        assert rows(prebuild(other, "import", str(archive), "--json")) == []
        assert listing(other.engines, other.onnx) == before

    def test_a_damaged_archive_adds_nothing_damaged(self, stocked: Studio, tmp_path: Path) -> None:
        archive = tmp_path / "engines.tar"
        prebuild(stocked, "export", str(archive), "clip")
        whole = archive.read_bytes()
        weights = next(stocked.engines.glob("clip-*/engine.onnx.data")).read_bytes()
        place = whole.index(weights) + 100
        other = Studio(tmp_path, stocked.model)
        damages = {"flipped": whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :], "cut": whole[:place]}
        with tarfile.open(archive) as tar:
            *_, last = tar.getmembers()
        damages |= {"cut at a file's end": whole[: last.offset], "cut in a header": whole[: last.offset + 100]}
        damages["of a bad header"] = whole[: last.offset] + b"\1" + whole[last.offset + 1 :]
        for name, content in damages.items():
            archive.write_bytes(content)
            ended = prebuild(other, "import", str(archive))
            assert ended.code in (1, 2) and one_line(ended.err), name
            assert Store(other.engines).folders() == [], name

    @pytest.mark.parametrize(
        "name",
        [
            "../outside/x/y",
            "/engines/x/y",
            "engines/../../x",
            "other/x/y",
            "engines/.hidden/y",
            "engines/x",
            "engines/x/c:y",
        ],
    )
    def test_names_that_lead_elsewhere_are_refused(self, name: str, empty_studio: Studio, tmp_path: Path) -> None:
        archive = tmp_path / "bad.tar"
        with tarfile.open(archive, "w") as tar:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
        ended = prebuild(empty_studio, "import", str(archive))
        assert_refused(ended)
        assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["bad.tar"]

    def test_links_are_refused(self, empty_studio: Studio, tmp_path: Path) -> None:
        archive = tmp_path / "bad.tar"
        link = tarfile.TarInfo("engines/x/manifest.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        with tarfile.open(archive, "w") as tar:
            tar.addfile(link)
        ended = prebuild(empty_studio, "import", str(archive))
        assert_refused(ended)

    @pytest.mark.parametrize("key", [COMPILED, ENGINE | {"runtime": "jax"}])
    def test_what_runs_as_code_is_taken_from_who_is_trusted_alone(
        self, key: dict[str, str], empty_studio: Studio, tmp_path: Path
    ) -> None:
        archive, other = archive_of(tmp_path, key), Studio(tmp_path, empty_studio.model)
        ended = prebuild(other, "import", str(archive))
        assert_refused(ended, "--trust")
        assert not other.engines.exists()
        assert prebuild(other, "import", str(archive), "--trust").code == 0
        assert len(Store(other.engines).folders()) == 1

    def test_code_among_what_is_none_keeps_all_of_it_out(self, empty_studio: Studio, tmp_path: Path) -> None:
        archive = archive_of(tmp_path, {"kind": "schedule"}, COMPILED)
        other = Studio(tmp_path, empty_studio.model)
        assert_refused(prebuild(other, "import", str(archive)), "--trust")
        assert not other.engines.exists()

    def test_a_kind_that_nobody_knows_is_refused(self, empty_studio: Studio, tmp_path: Path) -> None:
        archive, other = archive_of(tmp_path, {"kind": "plugin"}), Studio(tmp_path, empty_studio.model)
        assert_refused(prebuild(other, "import", str(archive), "--trust"), "no kind of artefact")

    @pytest.mark.parametrize("name", ["more.so", ".hidden", ".hidden/code.py"])
    def test_files_that_no_manifest_names_are_refused(self, name: str, empty_studio: Studio, tmp_path: Path) -> None:
        def add(folder: Path) -> None:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("import os")

        archive, other = archive_of(tmp_path, {"kind": "schedule"}, change=add), Studio(tmp_path, empty_studio.model)
        assert_refused(prebuild(other, "import", str(archive)), name, "nothing was added")
        assert not other.engines.exists()

    def test_a_file_of_more_bytes_than_its_manifest_says_is_refused(self, empty_studio: Studio, tmp_path: Path) -> None:
        def grow(folder: Path) -> None:
            (folder / "data").write_bytes(b"0" * 1000)

        archive, other = archive_of(tmp_path, {"kind": "schedule"}, change=grow), Studio(tmp_path, empty_studio.model)
        assert_refused(prebuild(other, "import", str(archive)), "says 4 bytes", "1000")
        assert not other.engines.exists()

    def test_a_sparse_file_is_refused(self, empty_studio: Studio, tmp_path: Path) -> None:
        """A few bytes of an archive can stand for terabytes."""
        archive, other = archive_of(tmp_path, {"kind": "schedule"}), Studio(tmp_path, empty_studio.model)
        with tarfile.open(archive) as tar:
            members = [(member, tar.extractfile(member).read()) for member in tar.getmembers()]
        with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
            for member, content in members:
                if member.name.endswith("/data"):
                    member.pax_headers = {"GNU.sparse.size": str(2**50), "GNU.sparse.map": f"0,{len(content)}"}
                tar.addfile(member, io.BytesIO(content))
        assert_refused(prebuild(other, "import", str(archive)), "nothing was added")
        assert not other.engines.exists()

    def test_what_the_disk_has_no_room_for_is_not_begun(
        self, empty_studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        archive, other = archive_of(tmp_path, {"kind": "schedule"}), Studio(tmp_path, empty_studio.model)
        monkeypatch.setattr("darkroom.store.archive.shutil.disk_usage", lambda _: SimpleNamespace(free=3))
        ended = prebuild(other, "import", str(archive))
        assert ended.code == 1 and one_line(ended.err) and "3 are free" in ended.err
        assert not other.engines.exists()


def archive_of(root: Path, *keys: dict[str, str], change: Callable[[Path], None] = lambda folder: None) -> Path:
    """An archive of made-up artefacts with these keys, a file of four bytes in each, `change`d when they were made."""
    made = Store(root / "made")
    folders = {}
    for key in keys:
        folder = made.make(Key("made up", key), lambda folder: {"at": (folder / "data").write_bytes(b"data")})
        change(folder)
        folders[f"engines/{folder.name}"] = folder
    pack(root / "made.tar", folders, lambda: None)
    return root / "made.tar"


class TestStrangeStores:
    def test_one_folder_by_two_names_is_one_store(self, stocked: Studio) -> None:
        link = stocked.root / "link"
        link.symlink_to(stocked.engines)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert run(["list", "--json", f"--onnx-dir={stocked.engines}", f"--engine-dir={link}"]) == 0
        assert len(json.loads(out.getvalue())) == 6
        with contextlib.redirect_stdout(out):
            assert run(["clean", "--all", "--yes", f"--onnx-dir={stocked.engines}", f"--engine-dir={link}"]) == 0
        assert Store(stocked.engines).folders() == []

    def test_a_file_is_no_store(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            assert run(["list", f"--engine-dir={tmp_path / 'file'}"]) == 2
        assert one_line(err.getvalue()) and "not a folder" in err.getvalue()

    def test_names_are_shown_as_they_are(self, empty_studio: Studio, tmp_path: Path) -> None:
        model = shutil.copytree(empty_studio.model, tmp_path / "my[red]model :smile: [-x]")
        prebuild(empty_studio, "build", model=model, engine="onnxruntime")
        assert "clip-my[red]model :smile: [-x]-fp32" in prebuild(empty_studio, "list").out

    @pytest.mark.parametrize(
        "change",
        [
            {"key": {"kind": "engine"}},
            {"made": {"seconds": "long"}},
            {"files": {"a": 5}},
            {"files": {"a": {"size": "1", "sha256": ""}}},
            {"label": "z [/x] y"},
            {"made": {"engines": {"a": {"tensors": 3}}}},
        ],
        ids=str,
    )
    def test_no_manifest_makes_a_traceback(self, change: dict[str, Any], empty_studio: Studio) -> None:
        store = Store(empty_studio.engines)
        manifest = {"label": "z", "key": {"kind": "graph"}, "files": {}, "made": {}} | change
        folder = store.root / Key(manifest["label"], manifest["key"]).folder_name
        folder.mkdir(parents=True)
        text = json.dumps(manifest | {"sha256": hash_json(manifest)}, indent=1)
        (folder / MANIFEST).write_text(text)
        assert prebuild(empty_studio, "list").code == 0
        assert prebuild(empty_studio, "clean", "--all", "--yes").code == 0
        assert store.folders() == []

    def test_damaged_ones_go_first_and_are_not_exported_in_silence(self, stocked: Studio, tmp_path: Path) -> None:
        damaged = next(stocked.engines.glob("clip-*"))
        (damaged / MANIFEST).write_text("{}")
        ended = prebuild(stocked, "export", str(tmp_path / "x.tar"))
        assert ended.code == 0 and damaged.name in ended.err
        rows_there = rows(prebuild(stocked, "list", "--json"))
        under = (sum(row["bytes"] for row in rows_there) - 1) / 1e9
        doomed = rows(prebuild(stocked, "clean", "--keep-under", repr(under), "--json"))
        assert [row["folder"] for row in doomed] == [str(damaged)]

    def test_what_another_process_removes_meanwhile_is_passed_over(
        self, empty_studio: Studio, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prebuild(empty_studio, "build", model=empty_studio.model, engine="openvino")
        there = Store.folders
        monkeypatch.setattr(Store, "folders", lambda store: [store.root / "gone-0123456789ab", *there(store)])
        listed = rows(prebuild(empty_studio, "list", "--json"))
        assert listed and all(row["kind"] != "damaged" for row in listed)
        monkeypatch.setattr("darkroom.cli.maintenance.rows_of", lambda *_: prebuilt)
        prebuilt = rows_of([Store(empty_studio.engines)], Runtimes())
        Store(empty_studio.engines).remove(Path(prebuilt[0].folder))
        assert prebuild(empty_studio, "clean", "--all", "--yes").code == 0
        assert there(Store(empty_studio.engines)) == []

    def test_clean_sweeps_what_a_killed_build_left(self, empty_studio: Studio) -> None:
        left = empty_studio.engines / ".unet-x.0123abcd.tmp"
        left.mkdir(parents=True)
        assert prebuild(empty_studio, "clean", "--all", "--yes").code == 0
        assert not left.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere children outlive their parents")
def test_a_build_killed_at_any_moment_leaves_nothing_in_the_way(empty_studio: Studio) -> None:
    """The real one: the process that exports and builds dies with the one that asked, and what it left is swept."""
    asked = ("build", "--batch-size", "1", "2", *flags(model=empty_studio.model, engine="onnxruntime"))
    folders = flags(onnx_dir=empty_studio.onnx, engine_dir=empty_studio.engines)
    command = [sys.executable, ROOT / "demo" / "build_engines.py", *asked, *folders]

    def left(ending: str) -> list[Path]:
        return [*empty_studio.onnx.glob(f".*{ending}"), *empty_studio.engines.glob(f".*{ending}")]

    pick = random.Random(2)
    children: set[Child] = set()
    earlier: set[Path] = set()
    for _ in range(3):
        earlier.update(left(".tmp"))
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            until(lambda: process.poll() is not None or (set(left(".tmp")) - earlier and children_of(process.pid)))
            time.sleep(pick.uniform(0, 0.5))
            children |= children_of(process.pid)
            process.kill()
    assert children
    until(lambda: not any(map(still_runs, children)))
    assert prebuild(empty_studio, *asked).code == 0
    assert all(verdict["good"] for verdict in rows(prebuild(empty_studio, "verify", "--json")))
    assert not left(".tmp") and not left(".aside")


Child = tuple[int, int, str]
"""Its parent's id, its own, and when it began: another process may have the same id later."""


def seen(process: int) -> Child | None:
    """None for one that has ended."""
    try:
        state, parent, *more = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else (int(parent), process, more[17])


def still_runs(child: Child) -> bool:
    now = seen(child[1])
    return now is not None and now[2] == child[2]


def children_of(process: int) -> set[Child]:
    every = (seen(int(each.name)) for each in Path("/proc").glob("[0-9]*"))
    return {each for each in every if each is not None and each[0] == process}


def test_doctor_says_of_every_engine_whether_and_why_not() -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert run(["doctor", "--json"]) == 0
    told = json.loads(out.getvalue())
    assert [each["engine"] for each in told["engines"]] == list(RUNTIMES)
    for each in told["engines"]:
        assert each["usable"] == (each["why_not"] is None) == (each["command"] is None)
    assert sum(each["chosen"] for each in told["engines"]) == 1
    assert told["machine"]["cores"] >= 1


def test_doctor_names_the_command_for_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setitem(RUNTIMES, "onnxruntime", Listed("onnxruntime", ("no_such_package",), "pip install it"))
    found = {each.engine: each for each in findings()}
    assert found["onnxruntime"].command == "pip install it" and not found["onnxruntime"].usable
    assert found["torch-compile"].command == "apt-get install g++" and found["torch"].usable


def test_doctor_says_where_drivers_are() -> None:
    found = {each.engine: each for each in findings()}
    assert found["tensorrt"].why_not == "there is no NVIDIA driver on this machine"
    assert "https://www.nvidia.com/drivers; python demo/build_engines.py build" in found["tensorrt"].command
    (npu,) = (place for place in found["openvino"].places if place.name == "NPU")
    assert npu.why_not and npu.command == "https://github.com/intel/linux-npu-driver/releases"


def test_a_reader_that_has_had_enough_is_no_error(studio: Studio) -> None:
    studio.draw(PROMPT, engine="openvino")
    command = [sys.executable, str(ROOT / "demo" / "build_engines.py"), "list", f"--engine-dir={studio.engines}"]
    nobody_reads, pipe = os.pipe()
    os.close(nobody_reads)
    child = subprocess.Popen(command, stdout=pipe, stderr=subprocess.PIPE, env=studio.environment())
    os.close(pipe)
    assert child.stderr.read() == b"" and child.wait() == 1
