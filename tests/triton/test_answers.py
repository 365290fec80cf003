"""What is made of a server's answers: images or a reason why not, files, and percentiles."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from darkroom.cli.client import latency_of
from darkroom.triton.album import Album
from darkroom.triton.answers import Image, NoAnswer, read_images
from darkroom.triton.load import Tally
from darkroom.triton.prompts import Prompt

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)


def test_percentiles_lie_between_the_nearest_two_latencies() -> None:
    values = np.random.default_rng(1).exponential(100, 37).tolist()
    found = latency_of(Tally(latencies=dict(enumerate(values))))
    ordered = sorted(values)
    for share in (50, 95, 99):
        position = share / 100 * (len(ordered) - 1)
        below, part = int(position), position % 1
        assert found[f"p{share}"] == pytest.approx(ordered[below] * (1 - part) + ordered[below + 1] * part)
    assert found["mean"] == pytest.approx(sum(values) / 37)
    assert latency_of(Tally()) == {}


GOOD = {
    "generated_image": np.zeros((2, 8, 8, 3), np.uint8),
    "used_seed": np.array([[1], [2]], np.uint64),
    "recipe": np.array([[b"{}"], [b"{}"]], np.object_),
    "stage_times": np.array([[b'{"UNet": 1}'], [b"{}"]], np.object_),
}


@pytest.mark.parametrize(
    ("changed", "value", "said"),
    [
        ("generated_image", None, "without images"),
        ("generated_image", np.zeros((2, 8, 8, 3), np.float32), "float32"),
        ("generated_image", np.zeros((8, 8, 3), np.uint8), "(8, 8, 3)"),
        ("generated_image", np.zeros((3, 8, 8, 3), np.uint8), "3 images with 2"),
        ("used_seed", np.array([[1]], np.uint64), "1 of used_seed"),
        ("recipe", np.array([[b"{}"], [b"[]"]], np.object_), "recipe"),
        ("stage_times", np.array([[b"{}"], [b'{"UNet": "long"}']], np.object_), "no numbers"),
        ("stage_times", np.array([[1.5], [2.5]], np.float32), "float32 for stage_times"),
        ("recipe", np.array([[1], [2]], np.uint64), "uint64 for recipe"),
        ("used_seed", np.array([[b"one"], [b"two"]], np.object_), "object for used_seed"),
        ("used_seed", np.array([[np.nan], [1]], np.float32), "float32 for used_seed"),
    ],
)
def test_answer_that_does_not_fit_is_no_answer(changed: str, value: np.ndarray | None, said: str) -> None:
    assert [image.seed for image in read_images([Prompt({"prompt": "a"}), Prompt({"prompt": "b"})], GOOD)] == [1, 2]
    with pytest.raises(NoAnswer) as refused:
        read_images([Prompt({"prompt": "a"}), Prompt({"prompt": "b"})], GOOD | {changed: value})
    assert said in str(refused.value)


def test_file_that_is_no_file_is_no_answer() -> None:
    with pytest.raises(NoAnswer, match="float32 for encoded_image"):
        read_images([Prompt({"prompt": "a"})], {"encoded_image": np.zeros((1, 1), np.float32)})


def test_number_of_images_must_fit_that_of_prompts() -> None:
    with pytest.raises(NoAnswer, match="2 images for 3 prompts"):
        read_images([Prompt({"prompt": "a"})] * 3, GOOD)


def test_file_is_named_by_what_it_is(tmp_path: Path) -> None:
    album = Album(tmp_path, "model")
    file = io.BytesIO()
    Pillow.fromarray(PIXELS).save(file, format="JPEG")
    path = album.keep(Image("a", None, file.getvalue(), None, None, {}))
    assert path == tmp_path / "model-1.jpg"
    assert path.read_bytes() == file.getvalue()
    assert album.keep(Image("a", PIXELS, None, None, None, {})) == tmp_path / "model-2.png"
    with pytest.raises(NoAnswer, match="no PNG or JPEG"):
        album.keep(Image("a", None, b"GIF89a", None, None, {}))


def test_two_who_keep_at_once_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has looked which number is free before the other has taken it."""
    monkeypatch.setattr(Path, "exists", lambda self: False)
    one, other = Album(tmp_path, "model"), Album(tmp_path, "model")
    paths = [
        album.keep(Image("a", PIXELS // divisor, None, None, None, {})) for album, divisor in ((one, 1), (other, 2))
    ]
    assert [path.name for path in paths] == ["model-1.png", "model-2.png"]
    for path, divisor in zip(paths, (1, 2), strict=True):
        assert np.array_equal(np.array(Pillow.open(path)), PIXELS // divisor)


REQUEST = {"model": "toy", "precision": "fp32", "denoising_steps": 3, "scheduler": None, "guidance_scale": 7.5}
REQUEST |= {"width": 16, "height": 16, "clip_skip": 0, "loras": [], "negative_prompt": None}
RECIPE = {"prompt": "a", "image": 1, "seed": 1, "slot": 0, "scheduler": "toy", "revision": "0", "darkroom": "0"}


@pytest.mark.parametrize("request_", [{}, REQUEST | {"precision": "/../../../outside"}, REQUEST | {"loras": [1]}])
def test_recipe_of_a_server_decides_no_place(request_: dict[str, Any], tmp_path: Path) -> None:
    album = Album(tmp_path / "a" / "b", "model")
    (tmp_path / "a" / "b" / "model-").mkdir(parents=True)
    with pytest.raises(NoAnswer, match="recipe"):
        album.keep(Image("a", PIXELS, None, 1, RECIPE | {"request": request_}, {}))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    kept = album.keep(Image("a", PIXELS, None, 1, RECIPE | {"request": REQUEST}, {}))
    assert kept.parent == tmp_path / "a" / "b"
