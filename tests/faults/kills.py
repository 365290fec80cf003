"""A run is ended without warning while it unpacks, exports, builds, loads, denoises or writes: the same command then
makes what an undisturbed one makes, and nothing else is left. Ctrl-C and SIGTERM end it at once, in one line.

Each run is a copy of this process, which has imported what takes seconds to import and has computed nothing; its heavy
work runs in it, not in children of its own, whose end with their parent tests/processes shows.
"""

import functools
import importlib
import json
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darkroom.cli.start import STOPPED, Startup
from tests.faults.scene import Scene, forked, picture_of
from tests.support import Ended, Studio


@dataclass(frozen=True)
class Phase:
    """Part of a run: the function that does it, the run, and what is taken away so that it has to be done."""

    function: str
    run: str
    without: tuple[str, ...] = ()


UNBUILT = ("engines/unet-*-b1-*-openvino-*",)
PHASES = {
    "unpacking": Phase("darkroom.cli.opening.unpacked", "file", ("onnx/model-*",)),
    "export": Phase("darkroom.networks.graph.export_stage", "openvino", (*UNBUILT, "onnx/unet-*")),
    "build": Phase("darkroom.prepare.build_engine", "openvino", UNBUILT),
    "loading": Phase("darkroom.prepare.Preparer.load", "openvino"),
    "denoising": Phase("darkroom.pipeline.pipeline.Pipeline.run", "openvino"),
    "writing a PNG": Phase("darkroom.pipeline.pictures.save", "openvino"),
    "writing the journal": Phase("darkroom.prompts.journal.Journal.__init__", "prompts", ("output/prompts/*.png",)),
    "adding to the journal": Phase("darkroom.prompts.journal.Journal.add", "prompts", ("output/prompts/*.png",)),
}
HEAVY = ("diffusers.loaders.peft", "diffusers.loaders.single_file", "darkroom.networks.graph", "darkroom.networks.unet")
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM)


def run(scene: Scene, work: Path, count: int, seed: int = 0, phases: tuple[str, ...] = tuple(PHASES)) -> Counter[str]:
    """So many signals that hit a run, three in five of them SIGKILL. Returns what was hit how often."""
    load_heavy() if "export" in phases else importlib.import_module("openvino")
    chance, hit, slowest = random.Random(seed), Counter[str](), 0.0
    seconds = {name: _undisturbed(scene, work, PHASES[name]) for name in phases}
    number = 0
    while sum(hit.values()) < count:
        name, how = phases[number % len(phases)], SIGNALS[number // len(phases) % len(SIGNALS)]
        number += 1
        studio, told = prepared(scene, work, PHASES[name]), work / "told"
        moment = chance.uniform(1e-4, seconds[name])
        began = work / "began"
        began.unlink(missing_ok=True)
        code = forked(functools.partial(_ended, scene, studio, PHASES[name], how, moment, began), told)
        said = told.read_text()
        try:
            if code == 0:  # it was faster
                scene.check(studio)
                continue
            _check_end(how, code, said)
            if how is not signal.SIGKILL:
                slowest = max(slowest, time.time() - float(began.read_text()) - moment)
            assert forked(lambda: scene.run(studio, PHASES[name].run), told) == 0, told.read_text()  # noqa: B023
            scene.check(studio)
        except BaseException as error:
            error.add_note(f"{how.name} {moment:.4f} s into {name} (number {number} of seed {seed})\n{said}")
            raise
        hit[f"{how.name} while {name}"] += 1
    print(f"From SIGINT or SIGTERM to the end: {slowest:.2f} s at most.")
    return hit


def _check_end(how: signal.Signals, code: int, said: str) -> None:
    if how is signal.SIGKILL:
        assert code == -signal.SIGALRM, said
    else:
        expected, words = STOPPED[how]
        assert code == expected and said.splitlines()[-1].endswith(words) and "Traceback" not in said


def load_heavy() -> None:
    """What copies of this process need not import again."""
    for name in ("openvino", *HEAVY):
        importlib.import_module(name)


def prepared(scene: Scene, work: Path, phase: Phase) -> Studio:
    """A studio in which the run has to go through the phase."""
    studio = scene.copy(work / "killed")
    for pattern in phase.without:
        for path in studio.root.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not phase.without:
        picture_of(studio, phase.run).unlink()
    return studio


def _undisturbed(scene: Scene, work: Path, phase: Phase) -> float:
    """Seconds that the phase takes, the first time that a run comes to it."""
    studio, took = prepared(scene, work, phase), work / "took"
    took.unlink(missing_ok=True)

    def around(call: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        try:
            return call()
        finally:
            if not took.exists():
                took.write_text(json.dumps(time.perf_counter() - began))

    told = work / "told"
    assert forked(lambda: wrapped(scene, studio, phase, around), told) == 0, told.read_text()
    return float(json.loads(took.read_text()))


def _ended(scene: Scene, studio: Studio, phase: Phase, how: signal.Signals, moment: float, began: Path) -> Ended:
    """The run, which gets the signal so many seconds after it has come to the phase. The alarm in SIGKILL's place is
    the system's own, and no more heard than that."""
    with Startup():
        pass  # as scripts begin
    if how is not signal.SIGKILL:
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(how))

    def around(call: Callable[[], Any]) -> Any:
        if not began.exists():
            began.write_text(str(time.time()))
            signal.setitimer(signal.ITIMER_REAL, moment)
        return call()

    return wrapped(scene, studio, phase, around)


def wrapped(scene: Scene, studio: Studio, phase: Phase, around: Callable[[Callable[[], Any]], Any]) -> Ended:
    """The run, in which `around` gets each call of the phase's function."""
    place, _, name = phase.function.rpartition(".")
    try:
        owner: Any = importlib.import_module(place)
    except ModuleNotFoundError:
        module, _, kind = place.rpartition(".")
        owner = getattr(importlib.import_module(module), kind)
    function = getattr(owner, name)

    @functools.wraps(function)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        return around(lambda: function(*arguments, **named))

    setattr(owner, name, wrapped)  # for good: this process is a copy
    return scene.run(studio, phase.run, shelf=False)
