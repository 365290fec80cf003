"""The short forms of what `python -m tests.faults` does at length; those that fork, and so need a process that has
computed nothing, are long alone."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import flips
from tests.faults.scene import Scene
from tests.support import ROOT

KINDS = 11


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    scene = Scene(tmp_path_factory.mktemp("faults") / "scene")
    scene.make()
    return scene


@pytest.mark.parametrize("count", [KINDS, pytest.param(1000, marks=pytest.mark.slow)], ids=["short", "long"])
def test_a_flipped_byte_is_noticed_and_changes_no_picture(count: int, scene: Scene, tmp_path: Path) -> None:
    assert len(flips.run(scene, tmp_path, count)) >= KINDS


@pytest.mark.parametrize("count", [24, pytest.param(5000, marks=pytest.mark.slow)], ids=["short", "long"])
def test_whatever_is_asked_ends_in_its_pictures_or_in_a_line(count: int, scene: Scene, tmp_path: Path) -> None:
    from tests.faults import fuzz  # not above: the others need no hypothesis

    hit = fuzz.run(scene, tmp_path, count)
    assert sum(hit.values()) >= count // 2  # of small spaces there may be fewer
    assert any(name.endswith("code 0") for name in hit) and any(name.endswith("code 2") for name in hit)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and mounts")
@pytest.mark.parametrize("name", ["kills", "full_disk"])
def test_a_run_that_ends_anywhere_goes_on(name: str, scene: Scene) -> None:
    command = [sys.executable, "-m", "tests.faults", name, "--count=200", f"--scene={scene.root}"]
    subprocess.run(command, cwd=ROOT, check=True)
