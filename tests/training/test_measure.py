"""The measures give 100% on the right pictures and little on wrong ones."""

import numpy as np
import pytest

from training import artwork, measure
from training.colours import TABLE


@pytest.fixture(scope="module")
def gallery() -> np.ndarray:
    """Forty synthetic artworks: coloured boxes of various places and sizes, on blue. (40, 128, 128, 3) uint8."""
    rng = np.random.default_rng(3)
    rgba = np.zeros((40, 128, 128, 4), np.uint8)
    for picture in rgba:
        for _ in range(3):
            top, left, height, width = *rng.integers(10, 70, 2), *rng.integers(10, 48, 2)
            picture[top : top + height, left : left + width] = (*rng.integers(0, 256, 3), 255)
    return artwork.composite(rgba, np.repeat(TABLE[8][None], 40, 0))


def test_right_pictures_are_all_retrieved_even_when_noisy(gallery: np.ndarray) -> None:
    noisy = np.clip(gallery + np.random.default_rng(0).normal(0, 12, gallery.shape), 0, 255).astype(np.uint8)
    assert (measure.ranks(gallery, gallery, np.arange(40)) == 0).all()
    assert (measure.ranks(noisy, gallery, np.arange(40)) == 0).mean() > 0.9


def test_shuffled_pictures_are_not_retrieved(gallery: np.ndarray) -> None:
    ranks = measure.ranks(gallery, gallery, np.roll(np.arange(40), 7))
    assert (ranks == 0).sum() == 0
    assert (ranks < 5).mean() < 0.35


def test_background_is_right_only_for_the_colour_it_has(gallery: np.ndarray) -> None:
    assert measure.backgrounds_right(gallery, np.full(40, 8)).all()
    assert not measure.backgrounds_right(gallery, np.full(40, 3)).any()


def test_psnr_follows_its_formula() -> None:
    black = np.zeros((1, 8, 8, 3), np.uint8)
    assert measure.psnr(black, black + 255)[0] == pytest.approx(0)
    assert measure.psnr(black, black + 10)[0] == pytest.approx(20 * np.log10(25.5), abs=1e-3)


def test_composite_blends_by_alpha() -> None:
    rgba = np.zeros((1, 1, 3, 4), np.uint8)
    rgba[0, 0, :, :3], rgba[0, 0, :, 3] = 200, (0, 255, 51)
    row = artwork.composite(rgba, np.array([[100, 100, 100]], np.uint8))[0, 0, :, 0]
    assert row.tolist() == [100, 200, 120]


def test_gradient_ratio_is_below_one_where_detail_is_lost_and_above_for_ripples(gallery: np.ndarray) -> None:
    noisy = np.clip(gallery + np.random.default_rng(0).normal(0, 8, gallery.shape), 0, 255).astype(np.uint8)
    assert measure.gradient_ratio(gallery, gallery) == pytest.approx(1)
    assert measure.gradient_ratio(noisy, gallery) > 1.1
    assert measure.gradient_ratio(gallery, noisy) < 0.9
