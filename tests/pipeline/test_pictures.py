"""A picture is written whole, under the name of its request, with the recipe that remakes it."""

import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from darkroom.errors import Failed, InvalidRequest
from darkroom.pipeline.pictures import file_name, read_pixels, read_recipe, save, to_bytes
from tests.support import listing
from tests.test_request import request

ODD_PROMPTS = [
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    "...",
    "~/x",
    "a/b\\c",
    "C:\\x",
    "a\nb\r\tc",
    "a\x00b",
    "\x1b[31mred",
    "con",
    "😀😀😀",
    "-rf *",
    "$(touch x)`y`",
    "'\"",
    "%2e%2e%2f",
    "日本語のりんごの絵です",
    "\u202egnp.exe",
    " .hidden",
    "a" * 5000,
    "*?<>|:",
]


def recipe(**changes: Any) -> dict[str, Any]:
    asked = request(prompts=(changes.get("prompt", "a red apple"),)).as_json() | changes.pop("request", {})
    return {
        "darkroom": "0.1.0",
        "request": asked,
        "revision": "f" * 64,
        "scheduler": "PNDMScheduler",
        "artefacts": {"unet": "ab"},
        "runtime": "openvino 1",
        "image": 1,
        "seed": 0,
        "slot": 0,
        "prompt": "a red apple",
    } | changes


def noise(height: int = 16, width: int = 24) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_pixels_are_rounded_as_diffusers_rounds_them() -> None:
    picture = np.linspace(0, 1, 1024 * 3, dtype=np.float32).reshape(32, 32, 3)
    from diffusers.image_processor import VaeImageProcessor

    (expected,) = VaeImageProcessor.numpy_to_pil(picture[None])
    np.testing.assert_array_equal(to_bytes(picture, "image 1"), np.array(expected))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_picture_with_values_that_are_not_numbers_is_refused(bad: float) -> None:
    picture = np.random.default_rng(0).random((8, 8, 3), np.float32)
    picture[3, 4, 1] = bad
    with pytest.raises(Failed, match="image 7"):
        to_bytes(picture, "image 7")


@pytest.mark.parametrize("colour", [(0, 0, 0), (1, 1, 1), (0.2, 0.5, 0.7)])
def test_picture_of_one_colour_is_refused(colour: tuple[float, float, float]) -> None:
    with pytest.raises(Failed, match="image 7"):
        to_bytes(np.broadcast_to(np.array(colour, np.float32), (8, 8, 3)), "image 7")


def test_name_tells_pipeline_precision_prompt_and_number() -> None:
    assert re.fullmatch(r"txt2img-fp32-a_red_appl-1-[0-9a-f]{4}\.png", file_name("txt2img", recipe()))
    assert re.fullmatch(
        r"txt2img-bf16-a_red_appl-3-[0-9a-f]{4}\.png",
        file_name("txt2img", recipe(request={"precision": "bf16"}, image=3)),
    )


def test_same_request_gives_the_same_name() -> None:
    assert file_name("txt2img", recipe()) == file_name("txt2img", json.loads(json.dumps(recipe())))


@pytest.mark.parametrize(
    "changes", [{"guidance_scale": 7.4}, {"seed": 1}, {"scheduler": "DDIM"}, {"negative_prompt": "x"}]
)
def test_another_request_gives_another_name(changes: dict[str, Any]) -> None:
    assert file_name("txt2img", recipe(request=changes), 12) != file_name("txt2img", recipe(), 12)


def test_pictures_of_one_run_share_the_hash() -> None:
    names = [file_name("txt2img", recipe(image=1 + slot, slot=slot, seed=slot)) for slot in range(3)]
    assert len({name.rsplit("-", 1)[1] for name in names}) == 1
    assert len(set(names)) == 3


@pytest.mark.parametrize("prompt", ODD_PROMPTS, ids=range(len(ODD_PROMPTS)))
def test_no_prompt_escapes_the_folder(prompt: str, tmp_path: Path) -> None:
    folder = tmp_path / "output"
    folder.mkdir()
    path = save(noise(), folder, "txt2img", recipe(prompt=prompt))
    assert path.resolve().parent == folder.resolve()
    assert [str(tmp_path), str(folder), str(path)] == list(listing(tmp_path))
    assert path.name.isprintable()
    assert not re.search(r'[\\/:*?"<>|\s]', path.name)
    assert read_recipe(path)["prompt"] == prompt


def test_picture_and_recipe_come_back_as_they_were(tmp_path: Path) -> None:
    written, own = noise(), recipe(prompt="größe 🍎", seed=2**64 - 1)
    path = save(written, tmp_path, "txt2img", own)
    with Image.open(path) as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.array(image), written)
    assert read_recipe(path) == own


def test_gallery_tools_find_the_settings_they_look_for(tmp_path: Path) -> None:
    own = recipe(request={"negative_prompt": "blurry", "scheduler": "EulerA", "height": 16, "width": 24}, seed=9)
    with Image.open(save(noise(), tmp_path, "txt2img", own)) as image:
        prompt, negative, settings = image.text["parameters"].split("\n")
    assert prompt == "a red apple"
    assert negative == "Negative prompt: blurry"
    pairs = dict(pair.split(": ", 1) for pair in settings.split(", "))
    assert pairs["Steps"] == "20"
    assert pairs["Sampler"] == "EulerA"
    assert pairs["CFG scale"] == "7.5"
    assert pairs["Seed"] == "9"
    assert pairs["Size"] == "24x16"


def test_same_picture_again_replaces_itself_with_the_same_bytes(tmp_path: Path) -> None:
    first = save(noise(), tmp_path, "txt2img", recipe())
    content = first.read_bytes()
    assert save(noise(), tmp_path, "txt2img", recipe()) == first
    assert first.read_bytes() == content
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "carried",
    ["{}", "[]", "null", "1", '{"request": {}, "image": true}', '{"request": "x", "image": 1}', "[" * 50_000, "{"],
)
def test_what_is_no_recipe_is_refused_in_words(carried: str, tmp_path: Path) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("darkroom", carried)
    Image.new("RGB", (8, 8)).save(path := tmp_path / "a.png", pnginfo=chunks)
    with pytest.raises(
        InvalidRequest, match=r"--recipe .*a\.png: (what it carries is no recipe|its recipe cannot be read)"
    ):
        read_recipe(path)


def test_name_taken_by_another_recipe_gets_more_digits(tmp_path: Path) -> None:
    own, other = recipe(), recipe(revision="0" * 64)
    taken = save(noise(), tmp_path, "txt2img", other).rename(tmp_path / file_name("txt2img", own))
    content = taken.read_bytes()
    path = save(noise(), tmp_path, "txt2img", own)
    assert path.name == file_name("txt2img", own, 5)
    assert taken.read_bytes() == content
    assert save(noise(), tmp_path, "txt2img", own) == path


def test_name_taken_by_something_else_is_left_alone(tmp_path: Path) -> None:
    taken = tmp_path / file_name("txt2img", recipe())
    taken.write_text("notes")
    assert save(noise(), tmp_path, "txt2img", recipe()) != taken
    assert taken.read_text() == "notes"


def test_folder_that_cannot_be_written_fails_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(Failed) as failure:
        save(noise(), tmp_path / "missing", "txt2img", recipe())
    assert "missing" in str(failure.value)
    assert "\n" not in str(failure.value)


def _jpeg(path: Path) -> None:
    Image.fromarray(noise()).save(path, format="JPEG")


def _png(path: Path) -> None:
    Image.fromarray(noise()).save(path, format="PNG")


def _png_with(path: Path, text: str) -> None:
    from PIL import PngImagePlugin

    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("darkroom", text)
    Image.fromarray(noise()).save(path, format="PNG", pnginfo=chunks)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: None,
        lambda path: path.mkdir(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n half"),
        lambda path: path.write_text("no picture"),
        _jpeg,
        _png,
        lambda path: _png_with(path, "not json"),
        lambda path: _png_with(path, "[]"),
        lambda path: _png_with(path, "{}"),
        lambda path: _png_with(path, '{"request": 3, "image": 1}'),
    ],
    ids=[
        "missing",
        "folder",
        "empty",
        "half",
        "text",
        "jpeg",
        "no recipe",
        "not json",
        "list",
        "no request",
        "no object",
    ],
)
def test_file_without_a_recipe_is_refused_by_name(write: Any, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    write(path)
    with pytest.raises(InvalidRequest) as refusal:
        read_recipe(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


GREY = np.random.default_rng(1).integers(0, 256, (16, 24), np.uint8)
WIDE = GREY.astype(np.uint16) * 257
"""The same, where white is 65535."""


def _pgm(path: Path) -> None:
    path.write_bytes(b"P5 24 16 65535\n" + WIDE.astype(">u2").tobytes())


@pytest.mark.parametrize(
    ("name", "mode", "write"),
    [
        ("a.png", "I;16", lambda path: Image.fromarray(WIDE).save(path)),
        ("a.tif", "I;16", lambda path: Image.fromarray(WIDE).save(path)),
        ("b.tif", "I;16B", lambda path: Image.frombytes("I;16B", (24, 16), WIDE.astype(">u2").tobytes()).save(path)),
        ("i.tif", "I", lambda path: Image.fromarray(WIDE.astype(np.int32)).save(path)),
        ("a.pgm", "I", _pgm),
    ],
)
def test_grey_of_16_bits_is_what_it_is_in_8(name: str, mode: str, write: Any, tmp_path: Path) -> None:
    write(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert image.mode == mode
    assert np.array_equal(read_pixels(tmp_path / name, None, None), np.stack([GREY] * 3, axis=-1))


def test_grey_of_16_bits_is_rounded(tmp_path: Path) -> None:
    values = np.random.default_rng(2).integers(0, 2**16, (16, 24), np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    expected = np.floor(values * (255 / 65535) + 0.5)
    assert np.array_equal(read_pixels(tmp_path / "a.png", None, None)[..., 0], expected)


@pytest.mark.parametrize("values", [WIDE / np.float32(65535), GREY.astype(np.int32) - 9, WIDE.astype(np.int32) * 2])
def test_picture_whose_white_nobody_can_tell_is_refused(values: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(InvalidRequest, match=r"a\.tif cannot be read as a picture: its pixels .* save it with 8 or 16"):
        read_pixels(tmp_path / "a.tif", None, None)


def _turned(path: Path, mode: str, **options: Any) -> None:
    """Noise with a noisy transparency, in a mode of Pillow's, with a right side that is the picture's top."""
    picture = Image.fromarray(noise())
    if mode in ("LA", "PA", "RGBA"):
        picture.putalpha(Image.fromarray(GREY))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.convert(mode).save(path, exif=exif, **options)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        *((f"{mode}.png", lambda path, mode=mode: _turned(path, mode)) for mode in ("1", "L", "LA", "RGB", "RGBA")),
        ("see-through P.png", lambda path: _turned(path, "P", transparency=3)),
        ("PA.tif", lambda path: _turned(path, "PA")),
        ("CMYK.jpg", lambda path: _turned(path, "CMYK")),
        ("RGB16.ppm", lambda path: path.write_bytes(b"P6 24 16 65535\n" + (noise().astype(">u2") * 257).tobytes())),
    ],
)
def test_pictures_of_other_kinds_are_read_as_diffusers_reads_them(name: str, write: Any, tmp_path: Path) -> None:
    from diffusers.utils import load_image

    write(tmp_path / name)
    assert np.array_equal(read_pixels(tmp_path / name, None, None), np.array(load_image(str(tmp_path / name))))


def test_grey_of_16_bits_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the picture is its right side
    Image.fromarray(WIDE).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_pixels(tmp_path / "a.png", None, None)[..., 0], np.rot90(GREY, -1))


def test_nothing_that_pillow_says_reaches_the_user(tmp_path: Path) -> None:
    """Neither warnings nor what it logs, nor its names for what is wrong."""
    picture = Image.new("RGB", (64, 64))
    picture.save(tmp_path / "exif.jpg", exif=b"Exif\0\0MM\0*" + struct.pack(">IHHHII", 8, 1, 0x0112, 2, 99999, 5))
    picture.convert("P").save(tmp_path / "palette.png", transparency=bytes(256))
    Image.new("1", (11000, 9000)).save(tmp_path / "large.png")
    Image.new("1", (20000, 10000)).save(tmp_path / "larger.png")
    (tmp_path / "text.png").write_text("a red apple")
    picture.save(tmp_path / "samples.tif")
    tags = bytearray((tmp_path / "samples.tif").read_bytes())
    at = tags.index(struct.pack("<HHI", 277, 3, 1)) + 8  # samples per pixel
    tags[at : at + 2] = struct.pack("<H", 2048)
    (tmp_path / "samples.tif").write_bytes(tags)
    program = """
import sys
from pathlib import Path
from darkroom.errors import InvalidRequest
from darkroom.pipeline.pictures import read_pixels
for path in sorted(Path().iterdir()):
    try:
        read_pixels(path, 64, 64)
    except InvalidRequest as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    refused = done.stdout.splitlines()
    assert "larger.png cannot be read as a picture: it has too many pixels." in refused
    assert "text.png cannot be read as a picture: it has no format that is known here." in refused
    assert [line.split()[0] for line in refused] == ["larger.png", "samples.tif", "text.png"]
