"""A recoloured thing has the colour asked for; what has another hue, and light and shade, stay."""

import numpy as np
import pytest

from training import drawings


@pytest.fixture
def apple() -> np.ndarray:
    """A red disc with a darker half and a green leaf: (256, 256, 4) uint8."""
    rows, columns = np.mgrid[:256, :256]
    rgba = np.zeros((256, 256, 4), np.uint8)
    disc = (rows - 140) ** 2 + (columns - 128) ** 2 < 90**2
    rgba[disc] = (230, 40, 30, 255)
    rgba[disc & (columns > 160)] = (170, 25, 20, 255)
    rgba[20:50, 120:170] = (60, 150, 50, 255)
    return rgba


@pytest.mark.parametrize("colour", drawings.NAMES)
def test_every_colour_is_recognised_after_it_was_given(apple: np.ndarray, colour: str) -> None:
    made = drawings.recolour(apple, colour)
    assert drawings.main_colour(made[..., :3], made[..., 3] > 200) == colour
    assert drawings.takes(apple, colour)
    assert (made[..., 3] == apple[..., 3]).all()
    light, dark = (made[140, x, :3].astype(int).sum() for x in (100, 180))
    assert light > dark
    if colour != "green":
        assert np.abs(made[30, 140, :3].astype(int) - apple[30, 140, :3]).max() < 12  # the leaf


def test_grey_things_take_colours_and_striped_ones_are_told_apart() -> None:
    panda = np.full((256, 256, 4), (200, 200, 200, 255), np.uint8)
    assert all(drawings.takes(panda, colour) for colour in ("blue", "green", "white", "black"))
    zebra = panda.copy()
    zebra[np.arange(256) % 4 != 0] = (10, 10, 10, 255)
    assert not drawings.takes(zebra, "yellow")


def test_no_thing_has_no_colour() -> None:
    empty = np.zeros((8, 8, 3), np.uint8)
    assert drawings.main_colour(empty, np.zeros((8, 8), bool)) == "none"


def test_small_pictures_are_means(apple: np.ndarray) -> None:
    made = drawings.Drawings(apple[None], {("noto", "1f34e"): 0})
    assert made.small("noto", "1f34e", 4).shape == (64, 64, 4)
    assert made.has("noto", "1f34e") and not made.has("fluent", "1f34e")
