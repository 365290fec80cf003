"""Darkroom from Python."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from darkroom import Darkroom
from darkroom.errors import InvalidRequest
from tests.support import Studio, children_inline, psnr


@pytest.fixture(scope="module")
def tiny(stores: Path, tiny_model: Path) -> Iterator[Darkroom]:
    with children_inline():
        made = Darkroom(str(tiny_model), engine="openvino", onnx_dir=stores / "onnx", engine_dir=stores / "engines")
    with made:
        yield made


def test_picture_is_the_scripts(tiny: Darkroom, studio: Studio) -> None:
    image = tiny("a red apple", seed=5, steps=3)
    assert psnr(np.array(image), studio.draw("a red apple").pictures[0]) >= 50
    assert image.info["darkroom"]["seed"] == 5


def test_several_images_have_seeds_that_count_up(tiny: Darkroom) -> None:
    images = tiny("a red apple", images=3, seed=5, steps=2)
    assert [image.info["darkroom"]["seed"] for image in images] == [5, 6, 7]


def test_stream_ends_with_the_picture(tiny: Darkroom) -> None:
    images = list(tiny.stream("a red apple", seed=5, steps=6))
    assert len(images) == 7  # PNDM makes a call more than steps
    assert (np.array(images[-1]) == np.array(tiny("a red apple", seed=5, steps=6))).all()
    assert all(image.size == (64, 64) for image in images)


def test_stream_that_is_left_frees_its_slot(tiny: Darkroom) -> None:
    stream = tiny.stream("a red apple", steps=50)
    next(stream)
    stream.close()
    assert tiny("a red apple", steps=1).size == (64, 64)


@pytest.mark.parametrize(
    ("fields", "said"), [({"steps": 51}, "steps"), ({"size": 3}, "size"), ({"scheduler": "Eular"}, "'Euler'")]
)
def test_what_cannot_be_made_is_an_exception_with_the_same_line(tiny: Darkroom, fields: dict, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        tiny("a red apple", **fields)


def test_unknown_model_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="nowhere/at/all"):
        Darkroom("nowhere/at/all")
