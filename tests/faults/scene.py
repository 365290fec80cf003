"""A scene for faults: a tiny model, all that its runs take, made once, and what they make when nothing goes wrong.

`Scene.at(folder)` finds it where an earlier run set it.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from unittest import mock

import numpy as np

from darkroom.pipeline.pictures import read_recipe
from tests.support import Ended, Studio, flags, on_shelf, pixels, write_tiny_model

ENGINES = ("openvino", "onnxruntime")
PROMPT = "a red apple"
ROWS = [{"prompt": PROMPT}, {"prompt": "the blue cat", "steps": 3}, {"prompt": "a green dog", "scheduler": "EulerA"}]
CHILDREN = ("serving.planning", "checkpoint.single_file", "checkpoint.other_vae")
"""Where `children_inline` leaves children be."""


@dataclass(frozen=True)
class Scene:
    """`finished` holds the stores and pictures of undisturbed runs; nothing ever changes it."""

    root: Path

    @property
    def finished(self) -> Studio:
        return Studio(self.root / "finished", self.root / "model")

    @property
    def shelf(self) -> Path:
        return self.root / "shelf"

    @classmethod
    def at(cls, root: Path) -> "Scene":
        """The scene in this folder; what is not there yet is made by another process: one that forks must not have
        computed anything."""
        scene = cls(root.resolve())
        if not (root / "set").exists():
            subprocess.run([sys.executable, "-m", "tests.faults.scene", str(scene.root)], check=True)
        return scene

    def make(self) -> None:
        """Writes the model, as a folder and as a file, and makes every run once."""
        from diffusers import StableDiffusionPipeline

        from tests.checkpoint.original_layout import write

        shutil.rmtree(self.root, ignore_errors=True)
        for folder in (self.finished.root, self.shelf):
            folder.mkdir(parents=True)
        model = write_tiny_model(self.root / "model")
        write(StableDiffusionPipeline.from_pretrained(model), self.root / "model.safetensors")
        for name in self.runs(self.finished):
            assert self.run(self.finished, name).code == 0, name
        (self.root / "set").touch()

    def runs(self, studio: Studio) -> dict[str, list[str]]:
        """The command lines, by names, in these folders."""
        prompts = self.root / "prompts.jsonl"
        prompts.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        asked = {"seed": 5, "denoising_steps": 2, "precision": "fp32"}
        own = flags(model=self.root / "model", **asked)
        made = {engine: [PROMPT, *own, f"--engine={engine}", *studio.folders()] for engine in ENGINES}
        file = flags(model=self.root / "model.safetensors", config=self.root / "model", **asked)
        made["file"] = [PROMPT, *file, "--engine=openvino", *studio.folders()]
        made["prompts"] = [f"--prompts={prompts}", *own, "--engine=openvino", "--batch-size=2", *studio.folders()]
        return made

    def run(self, studio: Studio, name: str, shelf: bool = True) -> Ended:
        """One of them, in this process; what it builds comes from the `shelf`, or is built anew."""
        return self.here(studio, *self.runs(studio)[name], shelf=shelf)

    def here(self, studio: Studio, *arguments: str, shelf: bool = True) -> Ended:
        with on_shelf(self.shelf if shelf else None), all_inline():
            return studio.here(*arguments)

    def copy(self, folder: Path) -> Studio:
        """A studio where all runs have been, to be disturbed."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.finished.root, folder)
        return Studio(folder, self.finished.model)

    @cached_property
    def pictures(self) -> dict[str, np.ndarray]:
        return pictures(self.finished)

    @cached_property
    def names(self) -> set[str]:
        return names(self.finished)

    def check(self, studio: Studio) -> None:
        """All pictures are those of undisturbed runs, and nothing else is there."""
        there = names(studio)
        assert there == self.names, f"more: {sorted(there - self.names)}, less: {sorted(self.names - there)}"
        made = pictures(studio)
        for name, expected in self.pictures.items():
            np.testing.assert_array_equal(made[name], expected, err_msg=name)


def names(studio: Studio) -> set[str]:
    """All that is in its folders, without what was set aside, which its user is told of, and the marks that are left of
    locks."""
    paths = [path.relative_to(studio.root) for path in studio.root.rglob("*")]
    return {str(path) for path in paths if not any(part.endswith((".aside", ".lock")) for part in path.parts)}


def pictures(studio: Studio) -> dict[str, np.ndarray]:
    """Those in its output folder, by their names there."""
    return {str(path.relative_to(studio.output)): pixels(path) for path in studio.output.rglob("*.png")}


def picture_of(studio: Studio, engine: str) -> Path:
    """The picture that the run on this engine made."""
    alone = studio.output.glob("*.png")
    return next(path for path in alone if read_recipe(path)["request"]["engine"] == engine)


@contextlib.contextmanager
def all_inline() -> Iterator[None]:
    def call(function: Callable, *arguments: object, verbose: bool = False) -> object:
        return function(*arguments)

    with contextlib.ExitStack() as patched:
        for place in CHILDREN:
            patched.enter_context(mock.patch(f"darkroom.{place}.run_in_child", call))
        yield


def forked(work: Callable[[], Ended], told: Path) -> int:
    """Does the work in a copy of this process, which writes what is printed to `told`. Returns the exit code, or the
    number of the signal that ended it, negative."""
    child = os.fork()
    if child == 0:
        code = 70
        with told.open("w") as file:
            try:
                ended = work()
                file.write(ended.err)
                code = ended.code
            except BaseException:
                traceback.print_exc(file=file)
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    Scene(Path(sys.argv[1])).make()
