"""One bit or more of one byte of an artefact changes: the next run makes the same pictures, and says what it found."""

import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np

from darkroom.prompts.journal import ROWS as JOURNAL
from darkroom.store.manifest import MANIFEST, read_manifest
from tests.faults.scene import ENGINES, Scene, picture_of
from tests.support import Studio, one_line, pixels


def run(scene: Scene, work: Path, count: int, seed: int = 0) -> Counter[str]:
    """Flips so many bytes, one after another. Returns what was hit how often."""
    chance, hit = random.Random(seed), Counter[str]()
    studio = scene.copy(work / "flips")
    for engine in (*ENGINES, "prompts"):  # what is known of files is of these, not of those they were copied from
        assert scene.run(studio, engine).code == 0
    kinds = sorted({kind for engine in ENGINES for kind in victims(studio, engine)})
    for number in range(count):
        kind = kinds[number % len(kinds)]
        engine = chance.choice([each for each in ENGINES if kind in victims(studio, each)])
        file = chance.choice(victims(studio, engine)[kind])
        where = flip(file, chance)
        try:
            if kind == "recipe":
                _replay(scene, studio, file)
            else:
                _run_again(scene, studio, kind, engine, file)
        except BaseException as error:
            error.add_note(f"flip {number} of seed {seed}: {kind}, {file}, {where}")
            raise
        hit[kind if kind != "engine" else f"engine of {engine}"] += 1
    return hit


def victims(studio: Studio, engine: str) -> dict[str, list[Path]]:
    """The files of every kind of artefact that the runs on an engine read."""
    found: dict[str, list[Path]] = {}
    for folder in (each for store in (studio.onnx, studio.engines) for each in sorted(store.iterdir())):
        if folder.name.startswith(".") or not folder.is_dir():
            continue
        key = read_manifest(folder)["key"]
        if key.get("runtime", engine) != engine:
            continue
        found.setdefault("manifest", []).append(folder / MANIFEST)
        for file in sorted(folder.rglob("*")):
            if file.is_file() and file.name != MANIFEST and not file.name.startswith("."):
                found.setdefault("external data" if file.suffix == ".data" else key["kind"], []).append(file)
    found["recipe"] = [picture_of(studio, engine)]
    found["journal"] = [studio.output / "prompts" / JOURNAL]
    found["picture of a row"] = sorted((studio.output / "prompts").glob("*.png"))
    return found


def flip(file: Path, chance: random.Random) -> str:
    content = bytearray(file.read_bytes())
    place, mask = chance.randrange(len(content)), chance.randrange(1, 256)
    content[place] ^= mask
    file.write_bytes(content)
    return f"byte {place} ^ {mask}"


def _run_again(scene: Scene, studio: Studio, kind: str, engine: str, file: Path) -> None:
    reader, damaged = _reader(file, engine), file.read_bytes()
    if reader == engine and file.is_relative_to(studio.onnx):  # which an engine that is there needs no more
        for folder in studio.engines.glob(f"[!.]*-b1-*{engine}*"):
            shutil.rmtree(folder)
    ended = scene.run(studio, reader)
    assert ended.code == 0 and "Traceback" not in ended.err, ended.err
    for aside in (path for store in (studio.onnx, studio.engines) for path in store.glob(".*.aside")):
        shutil.rmtree(aside)
    if kind == "picture of a row" and file.read_bytes() == damaged:
        # Whose it was can be read no more: it is kept, and the picture is beside it, under a longer name.
        (longer,) = file.parent.glob(f"{file.stem}?.png")
        longer.replace(file)
        assert scene.run(studio, "prompts").code == 0
    scene.check(studio)


def _reader(file: Path, engine: str) -> str:
    """The run that reads a file."""
    name = file.parent.name
    if name.startswith(("schedules-", "prompts")) or "-b2-" in name:
        return "prompts"
    return "file" if any(part.startswith(("model-", "tokenizer-model-model-")) for part in file.parts) else engine


def _replay(scene: Scene, studio: Studio, file: Path) -> None:
    """The picture is refused in a line, or made again as it was."""
    damaged = studio.root / file.name
    file.replace(damaged)
    ended = scene.here(studio, f"--recipe={damaged}", f"--model={studio.model}", *studio.folders())
    if ended.code == 0:
        made = pixels(file)
        np.testing.assert_array_equal(made, scene.pictures[file.name])
    else:
        assert ended.code == 2 and one_line(ended.err), ended
    damaged.unlink()
    shutil.copy(scene.finished.output / file.name, file)
    scene.check(studio)
