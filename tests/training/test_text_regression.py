"""The text encoder's places start apart, and what it regresses is the mean of what a caption may mean."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from training import artwork, concepts  # noqa: E402
from training.colours import NAMES  # noqa: E402
from training.latents import Cache, Emphasis, contrast  # noqa: E402
from training.train_text import place_codes  # noqa: E402


def test_each_place_is_read_by_its_own_reader_alone() -> None:
    codes, readers = place_codes()
    torch.testing.assert_close(readers @ codes.T, torch.eye(64), rtol=0, atol=1e-5)
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(64))
    # Neighbours look more alike than places far apart.
    alike = codes @ codes.T
    assert alike[27, 28] > 0.5 > alike[27, 31] and alike[27, 35] > 0.5 > alike[27, 59]


def test_captions_come_with_their_picture_and_the_mean_of_what_they_may_mean() -> None:
    pictures = len(artwork.STYLES) * len(concepts.load())
    generator = torch.Generator().manual_seed(3)
    colours = torch.stack([torch.randperm(len(NAMES), generator=generator)[:3] for _ in range(pictures)])
    random = torch.randn(pictures, 3, 4, 16, 16, generator=generator).half()
    cache = Cache(random, colours, 1.0, torch.ones(colours.shape))
    texts, latents, means = cache.draw(400, generator)
    every = cache.latents.float()
    for text, one, mean in zip(texts, latents, means, strict=True):
        picture, which = (every == one).all(-1).all(-1).all(-1).nonzero()[0].tolist()
        if not text:
            torch.testing.assert_close(mean, every.mean((0, 1)))
        elif torch.equal(one, mean):
            assert NAMES[cache.colours[picture, which]] in text
        else:
            torch.testing.assert_close(mean, every[picture].mean(0))
            assert not text.endswith("background")
    assert 0.3 < sum(map(torch.equal, latents, means)) / 400 < 0.9


def test_favourites_are_drawn_as_often_as_asked() -> None:
    listed = concepts.load()
    pictures = len(artwork.STYLES) * len(listed)
    once = torch.zeros(pictures, 1, dtype=torch.int64)
    cache = Cache(torch.arange(pictures).reshape(pictures, 1, 1, 1, 1).float(), once, 1.0, torch.ones(once.shape))
    share = sum(each.favourite for each in listed) / len(listed)
    for favour in (1.0, 3.0):
        _, latents, _ = cache.draw(3000, torch.Generator().manual_seed(1), Emphasis(favour))
        drawn = sum(listed[int(each) % len(listed)].favourite for each in latents.flatten()) / 3000
        assert drawn == pytest.approx(favour * share / (favour * share + 1 - share), abs=0.03)


def test_what_is_learnt_anew_is_drawn_more_often_than_favourites() -> None:
    pictures = len(artwork.STYLES) * len(listed := concepts.load())
    once = torch.zeros(pictures, 1, dtype=torch.int64)
    cache = Cache(torch.arange(pictures).reshape(pictures, 1, 1, 1, 1).float(), once, 1.0, torch.ones(once.shape))
    emphasis = Emphasis(icons=("cat", "ant"), anew=50.0)
    _, latents, _ = cache.draw(3000, torch.Generator().manual_seed(1), emphasis)
    drawn = sum(listed[int(each) % len(listed)].icon in emphasis.icons for each in latents.flatten()) / 3000
    assert drawn == pytest.approx(100 / (100 + len(listed) - 2), abs=0.03)
    with pytest.raises(ValueError, match="no concept is drawn as katze"):
        Emphasis(icons=("cat", "katze"))


def test_what_hardly_shows_is_drawn_more_often_within_the_bound() -> None:
    pictures = len(artwork.STYLES) * len(concepts.load())
    colours = torch.arange(3).expand(pictures, 3)
    contrast = torch.tensor([0.4, 0.2, 0.01]).expand(pictures, 3)  # the median is 0.2: once, once, and at most 6 times
    cache = Cache(colours.reshape(pictures, 3, 1, 1, 1).float(), colours, 1.0, contrast)
    for faint, expected in ((1.0, [1 / 3] * 3), (6.0, [1 / 8, 1 / 8, 6 / 8])):
        _, latents, _ = cache.draw(3000, torch.Generator().manual_seed(1), Emphasis(faint=faint))
        shares = torch.bincount(latents.flatten().long(), minlength=3) / 3000
        torch.testing.assert_close(shares, torch.tensor(expected), rtol=0, atol=0.03)


def test_contrast_is_the_distance_from_the_background_where_something_is_drawn() -> None:
    rgba = np.zeros((2, 8, 8, 4), np.uint8)
    rgba[:, 2:4, 2:4] = (255, 0, 0, 255)
    behind = np.array([[255, 0, 0], [0, 0, 0]], np.uint8)
    np.testing.assert_allclose(contrast(rgba, behind), [0, np.sqrt(1 / 3)], atol=1e-6)
