"""JAX: a batch divided over devices, precisions, what is kept, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from darkroom.engines import find_runtime
from darkroom.engines.runtime import Denoiser, Options
from tests.support import Diffusers, Studio, one_line, psnr

jax = pytest.importorskip("jax")

PROMPT = "a red apple on the house"
DEVICES = 8
SAME_AS_DIFFUSERS, SAME_AS_ON_ONE_DEVICE = 45.0, 50.0
"""dB."""


@pytest.fixture(params=["sd", "xl"])
def both(request: pytest.FixtureRequest, studio: Studio, xl_studio: Studio) -> tuple[Studio, Diffusers]:
    """The script on the tiny model of each family, and diffusers on the same."""
    name, its = ("diffusers_tiny", studio) if request.param == "sd" else ("diffusers_tiny_xl", xl_studio)
    return its, request.getfixturevalue(name)


def test_pictures_of_many_devices_are_those_of_one(both: tuple[Studio, Diffusers]) -> None:
    studio, diffusers = both
    asked: dict[str, Any] = {"engine": "jax", "scheduler": "EulerA", "guidance_scale": 7.5}
    together = studio.draw(PROMPT, batch_size=DEVICES, devices="all", **asked)
    expected = diffusers.draw(*[PROMPT] * DEVICES, scheduler="EulerA")
    assert min(map(psnr, together.pictures, expected)) >= SAME_AS_DIFFUSERS
    for image in (0, DEVICES - 1):
        alone = studio.draw(PROMPT, **asked | {"seed": 5 + image}).pictures[0]
        assert psnr(together.pictures[image], alone) >= SAME_AS_ON_ONE_DEVICE
    (again,) = studio.draw(recipe=together.paths[2], output_dir=studio.root / "again", devices=DEVICES).pictures
    np.testing.assert_array_equal(again, together.pictures[2])
