"""What the faces of the studio share: refusals with a status, waiting for pictures, and files of them."""

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from PIL import Image
from starlette.requests import Request as HttpRequest

from darkroom.errors import DarkroomError, InvalidRequest
from darkroom.pipeline.pictures import UNREADABLE, blurred, resized, upright
from darkroom.serving.batching import Busy, Late, Original, Unwanted
from darkroom.web.models import Job, Models, Picture

LARGEST_PICTURE = 4096**2
"""Pixels of a picture that a client sends."""

FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
"""What pictures can be sent as, and Pillow's names for it."""

QUALITY = 92
"""Of JPEG and WebP, where none is requested."""

BUSY_SECONDS = 1
"""After how long who was turned away may try again."""


class Refused(Exception):
    """A request that is answered with an error: its HTTP status, the field that is wrong, and a name for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def refusal_of(error: BaseException) -> Refused:
    """Any error as it is answered; what users cannot have caused keeps its words to itself."""
    match error:
        case Refused():
            return error
        case Busy():
            return Refused(429, str(error), code="queue_full")
        case Late() | Unwanted():
            return Refused(503, str(error), code="not_finished")
        case InvalidRequest():
            field = str(error).split(" ", 1)[0].strip("'\":")
            return Refused(400, str(error), field if field.isidentifier() else None, "invalid_value")
        case DarkroomError():
            return Refused(500, str(error), code="failed")
    return Refused(500, f"{type(error).__name__}: {error}", code="failed")


async def json_of(request: HttpRequest) -> dict[str, Any]:
    """The body of a request. Raises `Refused` for one that is not a JSON object.

    It has to be declared as JSON, too: so no page of another site can send one without its browser asking first.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "the body must be JSON, with Content-Type: application/json.", code="unsupported_type")
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {error}.", code="invalid_json") from None
    if not isinstance(body, dict):
        raise Refused(400, "the body must be a JSON object.", code="invalid_json")
    return body


def picture_of(data: bytes, field: str) -> Image.Image:
    """A picture that a client sent, turned as its EXIF says. Raises `Refused` for anything else; what would fill memory
    is not unpacked."""
    try:
        image = Image.open(io.BytesIO(data), formats=list(FORMATS.values()))
        if image.width * image.height > LARGEST_PICTURE:
            raise Refused(413, f"{field} has {image.width}x{image.height} pixels: too many.", field, "too_large")
        return upright(image)
    except (*UNREADABLE, EOFError) as error:
        words = " ".join(str(error).split())
        raise Refused(
            400, f"{field} is no PNG, JPEG or WebP that can be read: {words}.", field, "invalid_image"
        ) from None


def original_of(image: Image.Image, mask: Image.Image | None, blur: float, size: tuple[int, int]) -> Original:
    """What is started from, at this height and width. The mask is light where it is painted anew."""
    height, width = size
    pixels = resized(np.array(image.convert("RGB")), height, width)
    if mask is None:
        return Original(pixels)
    grey = mask.convert("L").resize((width, height), Image.Resampling.LANCZOS)
    return Original(pixels, blurred(np.array(grey), blur))


def models_of(request: HttpRequest) -> Models:
    return request.app.state.models


def picture_file(picture: Picture, kind: str, quality: int | None) -> bytes:
    """The whole file of a picture: PNG as it was kept, with its recipe."""
    return picture.path.read_bytes() if kind == "png" else image_file(Image.fromarray(picture.pixels), kind, quality)


def image_file(image: Image.Image, kind: str, quality: int | None = None) -> bytes:
    """A whole file of an image, of a kind among FORMATS."""
    file = io.BytesIO()
    more = {"compress_level": 1} if kind == "png" else {"quality": QUALITY if quality is None else quality}
    image.save(file, FORMATS[kind], **more)
    return file.getvalue()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


async def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns that reads files or compresses pictures."""
    return await asyncio.get_running_loop().run_in_executor(None, function, *arguments)


@asynccontextmanager
async def waiting_for(request: HttpRequest, job: Job) -> AsyncIterator[None]:
    """While a client waits for a job: it is given up when the connection is closed, or the block ends early."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.give_up()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        job.give_up()


async def all_pictures(job: Job) -> list[Picture]:
    """All pictures of a job, in order; the first error where there is one."""
    waiting: list[Awaitable[Picture]] = [asyncio.wrap_future(picture) for picture in job.pictures]
    return list(await asyncio.gather(*waiting))
