"""PNG files that carry their own recipe."""

import contextlib
import io
import json
import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from darkroom.contract import precisions_by_stage
from darkroom.errors import Failed, InvalidRequest, gist
from darkroom.files import written
from darkroom.flags import PIXEL_MULTIPLE
from darkroom.request import DENOISED_BY
from darkroom.store.fingerprints import hash_json

Image.preinit()  # the formats of which one is PNG; or else the first picture that is saved waits for them

RECIPE_CHUNK = "darkroom"
GALLERY_CHUNK = "parameters"
"""The text chunk, and its form, that gallery tools and web interfaces read settings from."""

# What Pillow warns of and logs (many pixels, odd EXIF, too many samples) helps nobody: what cannot be read is refused.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises for a file that is not a whole picture."""

JPEG_QUALITY = 92
NAME_CHARACTERS = 10
HASH_DIGITS, ALL_DIGITS = 4, 64
GAPS = 3
"""Names that are free, after which a longer one is not looked for: a file that had one may have been removed since."""

PER_IMAGE = ("image", "seed", "slot", DENOISED_BY)
"""What in a recipe differs between the pictures of one run, and so stays out of the hash in their names."""


def to_bytes(picture: np.ndarray, what: str) -> np.ndarray:
    """(H, W, 3) float32 in [0, 1] -> uint8. Raises `Failed` for a picture that is not one."""
    if not np.isfinite(picture).all():
        raise Failed(f"{what} holds values that are not numbers: it was not kept. Try --precision fp32.")
    pixels = (picture * 255).round().astype(np.uint8)
    if (pixels == pixels[:1, :1]).all():
        raise Failed(f"{what} is one constant colour: it was not kept. Try --precision fp32, or other settings.")
    return pixels


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Peak signal-to-noise ratio of 8-bit pictures of one shape, in dB; `inf` for the same. Raises `ValueError`."""
    if first.shape != second.shape:
        raise ValueError(f"the pictures are not of one size: {first.shape} and {second.shape}")
    error = float(np.mean((first.astype(np.float64) - second) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def read_pixels(path: Path, height: int | None, width: int | None, multiple: int = PIXEL_MULTIPLE) -> np.ndarray:
    """A picture as (H, W, 3) uint8, resized as diffusers does; without a size its own, down to multiples of `multiple`.

    As diffusers does, it is turned as its EXIF says, and loses its transparency: what shows is the colour beneath.
    """
    image = Image.fromarray(read_picture(path))
    for name, asked in (("height", height), ("width", width)):
        if asked is not None and (asked < multiple or asked % multiple):
            raise InvalidRequest(f"--{name} must be a multiple of {multiple}, not {asked}.")
    fitting = (own // multiple * multiple for own in image.size)
    size = tuple(asked or own for asked, own in zip((width, height), fitting, strict=True))
    if not all(size):
        raise InvalidRequest(f"{path} at {size[0]}x{size[1]} pixels is too small to start from.")
    return np.array(image if size == image.size else image.resize(size, Image.Resampling.LANCZOS))


def read_picture(path: Path) -> np.ndarray:
    """A picture of its own size, (H, W, 3) uint8, turned as its EXIF says and without its transparency."""
    try:
        with Image.open(path) as file:
            return np.array(_of_8_bits(upright(file)).convert("RGB"))
    except UNREADABLE as error:
        raise InvalidRequest(f"{path} cannot be read as a picture: {_why(error)}.") from None


def resized(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 at another size, as diffusers resizes."""
    if picture.shape[:2] == (height, width):
        return picture
    return np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))


def read_mask(path: Path, height: int, width: int) -> np.ndarray:
    """What is light in a picture: (H, W) uint8, resized as diffusers does; its transparency counts for nothing."""
    try:
        with Image.open(path) as file:
            grey = _of_8_bits(upright(file)).convert("L")
    except UNREADABLE as error:
        raise InvalidRequest(f"{path} cannot be read as a picture: {_why(error)}.") from None
    return np.array(grey.resize((width, height), Image.Resampling.LANCZOS))


def read_transparency(path: Path, height: int, width: int) -> np.ndarray | None:
    """What is transparent of a picture: (H, W) uint8, 255 where nothing shows; None where everything does."""
    with Image.open(path) as file:
        if not file.has_transparency_data:
            return None
        alpha = upright(file).convert("RGBA").getchannel("A")
    mask = 255 - np.array(alpha.resize((width, height), Image.Resampling.LANCZOS))
    return mask if mask.any() else None


def blurred(mask: np.ndarray, radius: float) -> np.ndarray:
    """A mask (H, W) uint8 with an edge that fades over `radius` pixels (a Gaussian's deviation)."""
    from PIL import ImageFilter

    return np.array(Image.fromarray(mask).filter(ImageFilter.GaussianBlur(radius))) if radius else mask


def with_the_rest(picture: np.ndarray, original: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture where the mask is 255, the original's bytes where it is 0, both (H, W, 3) uint8, and a mixture where
    it is between."""
    share = mask[..., None].astype(np.float32) / 255
    return (picture * share + original * (1 - share)).round().astype(np.uint8)


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says."""
    from PIL import ImageOps  # not above: those who make pictures wait for it, and have no use for it

    return ImageOps.exif_transpose(image)


def _why(error: Exception) -> str:
    """Half a sentence for what Pillow raises of a file."""
    if isinstance(error, UnidentifiedImageError):
        return "it has no format that is known here"
    if isinstance(error, Image.DecompressionBombError):
        return "it has too many pixels"
    return (isinstance(error, OSError) and error.strerror) or gist(error)


def _of_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits -> the same in 8, where Pillow would take all above 255 for white; other pictures as they are.

    Raises `ValueError` where white is unknown.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of any range; save it with 8 or 16 bits")
    if image.mode not in ("I", "I;16", "I;16B", "I;16L", "I;16N"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError(f"its pixels go from {values.min()} to {values.max()}; save it with 8 or 16 bits")
    return Image.fromarray((values / 257).round().astype(np.uint8))


def file_name(pipeline: str, recipe: dict[str, Any], digits: int = HASH_DIGITS) -> str:
    """`txt2img-fp32-a_red_appl-1-03fe.png`, or with bf16+fp32 where networks differ: what anyone types, made safe for
    every file system."""
    prompt = recipe["prompt"][:NAME_CHARACTERS].replace(" ", "_")
    safe = "".join(c if c.isalnum() or c in "-_.,+!'()" else "_" for c in prompt)
    same_for_the_run = {key: value for key, value in recipe.items() if key not in (*PER_IMAGE, "prompt")}
    hashed = hash_json(same_for_the_run)[:digits]
    asked = recipe["request"]["precision"]
    precisions = "+".join(sorted({*precisions_by_stage(asked).values()} or {asked}))
    return f"{pipeline}-{precisions}-{safe}-{recipe['image']}-{hashed}.png"


def names(folder: Path, pipeline: str, recipe: dict[str, Any]) -> Iterator[Path]:
    """The paths that a picture may have: the first that no other has."""
    return (folder / file_name(pipeline, recipe, digits) for digits in range(HASH_DIGITS, ALL_DIGITS + 1))


def find(folder: Path, pipeline: str, recipe: dict[str, Any]) -> Path | None:
    """The picture that `save` wrote for this recipe, if it is there and whole."""
    gaps = 0
    for path in names(folder, pipeline, recipe):
        if not path.exists():
            gaps += 1
            if gaps == GAPS:
                return None
        elif _carries(path, recipe):
            with contextlib.suppress(*UNREADABLE), Image.open(path) as image:
                image.verify()  # every byte is under a checksum
                return path
    return None


def save(pixels: np.ndarray, folder: Path, pipeline: str, recipe: dict[str, Any]) -> Path:
    """Writes a picture under the name its recipe gives it, and returns the path.

    A picture with the same recipe is replaced; where the name is taken by another, the name gets more digits.
    """
    path = next(path for path in names(folder, pipeline, recipe) if not path.exists() or _carries(path, recipe))
    with written(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=_text_chunks(recipe))
        with Image.open(temporary) as picture:
            picture.load()
            if picture.size != pixels.shape[1::-1]:
                raise Failed(f"{path} could not be written whole.")
    return path


def upscaled(pixels: np.ndarray, factor: float) -> np.ndarray:
    """(H, W, 3) uint8 -> the same `factor` times as large, by Lanczos resampling."""
    if factor == 1:
        return pixels
    height, width = (round(side * factor) for side in pixels.shape[:2])
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


def encoded(pixels: np.ndarray, kind: str, recipe: dict[str, Any] | None) -> bytes:
    """A whole file: "png", which carries the recipe if there is one, or "jpeg", whose comment is the prompt."""
    file = io.BytesIO()
    if kind == "png":
        Image.fromarray(pixels).save(file, format="PNG", pnginfo=recipe and _text_chunks(recipe))
    else:
        Image.fromarray(pixels).save(file, format="JPEG", quality=JPEG_QUALITY, comment=recipe["prompt"].encode())
    return file.getvalue()


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe that a picture carries; `InvalidRequest` when it is no PNG or carries none."""
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {}).get(RECIPE_CHUNK)
    except FileNotFoundError:
        raise InvalidRequest(f"--recipe {path}: there is no such file.") from None
    except UNREADABLE as error:
        raise InvalidRequest(f"--recipe {path} is not a PNG that can be read: {_why(error)}.") from None
    if text is None:
        raise InvalidRequest(f"--recipe {path}: this picture carries no Darkroom recipe.")
    try:
        recipe = json.loads(text)
    except RecursionError:
        raise InvalidRequest(f"--recipe {path}: its recipe cannot be read: it is nested too deeply.") from None
    except ValueError as error:
        raise InvalidRequest(f"--recipe {path}: its recipe cannot be read ({error}).") from None
    whole = isinstance(recipe, dict) and isinstance(recipe.get("request"), dict) and type(recipe.get("image")) is int
    if not whole:
        raise InvalidRequest(f"--recipe {path}: what it carries is no recipe of Darkroom's.")
    return recipe


def _carries(path: Path, recipe: dict[str, Any]) -> bool:
    """Whether a file says that it is the picture of this recipe, whichever engines made its steps."""
    found = _recipe_or_none(path)
    return isinstance(found, dict) and found | {DENOISED_BY: None} == recipe | {DENOISED_BY: None}


def _recipe_or_none(path: Path) -> dict[str, Any] | None:
    """What a file says that it is, whether it is whole or not."""
    with contextlib.suppress(KeyError, TypeError, RecursionError, *UNREADABLE), Image.open(path) as image:
        return json.loads(image.info[RECIPE_CHUNK])
    return None


def _text_chunks(recipe: dict[str, Any]) -> PngImagePlugin.PngInfo:
    request = recipe["request"]
    settings = {
        "Steps": request["denoising_steps"],
        "Sampler": request["scheduler"] or recipe["scheduler"],
        "Schedule type": request.get("sigmas"),
        "Shift": request.get("shift"),
        "CFG scale": request["guidance_scale"],
        "Seed": recipe["seed"],
        "Size": f"{request['width']}x{request['height']}",
        "Model hash": recipe["revision"][:10],
        "Model": request["model"] or "folder",
        "Clip skip": request["clip_skip"] + 1 if request["clip_skip"] else None,  # they count no skip as 1
        "Lora hashes": " ".join(lora["sha256"][:10] for lora in request["loras"]) or None,
        "TI hashes": ", ".join(f"{each['word']}: {each['sha256'][:10]}" for each in request.get("embeddings", ()))
        or None,
        "Upscale": request.get("upscale", 1) if request.get("upscale", 1) != 1 else None,
        "Denoising strength": request.get("image_strength"),
        "Mask blur": (request.get("mask") or {}).get("blur") or None,
        "Version": f"darkroom {recipe['darkroom']}",
    }
    lines = [recipe["prompt"]]
    if request["negative_prompt"]:
        lines.append(f"Negative prompt: {request['negative_prompt']}")
    lines.append(", ".join(f"{key}: {value}" for key, value in settings.items() if value is not None))
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt(GALLERY_CHUNK, "\n".join(lines))
    chunks.add_itxt(RECIPE_CHUNK, json.dumps(recipe, sort_keys=True))
    return chunks
