"""OpenAI's images API (https://platform.openai.com/docs/api-reference/images), streaming included.

What this project's requests have beside it goes by the names of prompt files: negative_prompt, steps, guidance_scale,
scheduler, seed, height and width. A field that would have no effect is refused by its name.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image, ImageChops
from starlette.datastructures import UploadFile
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from darkroom.checkpoint.catalog import IMG2IMG, INPAINT
from darkroom.errors import InvalidRequest
from darkroom.flags import pixel_size
from darkroom.request import MaskChoice, Request, pixels_digest
from darkroom.serving.batching import Original
from darkroom.serving.service import FIELDS
from darkroom.web.api import (
    BUSY_SECONDS,
    FORMATS,
    Refused,
    all_pictures,
    base64_of,
    image_file,
    in_thread,
    json_of,
    models_of,
    original_of,
    picture_file,
    picture_of,
    refusal_of,
    waiting_for,
)
from darkroom.web.models import Job, Model, Picture

KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
KINDS |= {413: "invalid_request_error", 415: "invalid_request_error", 429: "rate_limit_error"}
"""OpenAI's names for what a status means; all others are the server's fault."""

EXTENSIONS = tuple(name for name in FIELDS if name != "prompt")
ONE_WAY = {"background": ("auto", "opaque"), "moderation": ("auto", "low"), "quality": ("auto", "standard")}
"""Fields of OpenAI's that can be had in one way here, and what asks for that; other values are refused."""

IGNORED = ("user",)
"""Fields that say who asks, and change no picture."""

OWN = ("model", "prompt", "n", "size", "response_format", "output_format", "output_compression", "stream")
STRENGTH = "image_strength"
FORM_KINDS = {"n": int, "output_compression": int, "partial_images": int, "stream": bool, STRENGTH: float}
"""The fields of a form that are no text, beside those of FIELDS."""

KNOWN = (*OWN, "partial_images", *ONE_WAY, *IGNORED, *EXTENSIONS)


@dataclass(frozen=True)
class Asked:
    """What a client asks for beside the pictures themselves."""

    kind: str
    quality: int | None
    as_url: bool
    stream: bool
    previews: int


def error(refused: Refused) -> Response:
    """An error in OpenAI's shape."""
    said = {
        "message": refused.message,
        "type": KINDS.get(refused.status, "server_error"),
        "param": refused.param,
        "code": refused.code,
    }
    headers = {"Retry-After": str(BUSY_SECONDS)} if refused.status == 429 else None
    return JSONResponse({"error": said}, refused.status, headers)


async def models(request: HttpRequest) -> Response:
    """What is served, with the defaults of each model and what may be asked of it."""
    return JSONResponse({"object": "list", "data": [_described(model) for model in models_of(request).values()]})


async def model(request: HttpRequest) -> Response:
    """One of them."""
    return JSONResponse(_described(_model_named(request, request.path_params["name"])))


async def generations(request: HttpRequest) -> Response:
    """Pictures from a prompt: all at once, or events as they come up."""
    body = await json_of(request)
    served = _model_named(request, _of(body, "model", str))
    fields, images, asked = _read(body, served.plan.limits.images)
    wanted = served.service.requests(fields, images)
    if asked.stream:
        return await _streamed(request, served, wanted, asked)
    return await _answered(request, served, wanted, asked)


async def _answered(
    request: HttpRequest, served: Model, wanted: list[Request], asked: Asked, original: Original | None = None
) -> Response:
    """All pictures at once."""
    job = served.submit(wanted, original=original)
    async with waiting_for(request, job):
        pictures = await all_pictures(job)
    place = str(request.base_url)
    data = await asyncio.gather(*(in_thread(_datum, picture, asked, place) for picture in pictures))
    return JSONResponse({"created": int(time.time()), "data": data} | _facts(pictures[0].request, asked))


async def edits(request: HttpRequest) -> Response:
    """A picture made of another: all of it, or what is transparent of the mask. Sent as a form, as OpenAI's clients
    do."""
    async with request.form(max_files=2, max_fields=100) as form:
        files = {name: await value.read() for name, value in form.multi_items() if isinstance(value, UploadFile)}
        if len(files) < sum(isinstance(value, UploadFile) for _, value in form.multi_items()):
            raise Refused(400, "image takes one picture.", "image", "not_supported")
        body = {name: _typed(name, value) for name, value in form.multi_items() if isinstance(value, str)}
    files = {name.removesuffix("[]"): data for name, data in files.items()}
    for name in files:
        if name not in ("image", "mask"):
            raise Refused(400, f"{name!r} is not a file of this API: image, and mask.", name, "unknown_field")
    if "image" not in files:
        raise Refused(400, "image is missing: the picture to start from.", "image", "missing_field")
    strength = body.pop(STRENGTH, None)
    served = _model_named(request, _of(body, "model", str))
    fields, images, asked = _read(body, served.plan.limits.images)
    wanted = served.service.requests(fields, images)

    def begun() -> tuple[list[Request], Original]:
        mask = None
        if "mask" in files:
            clear = picture_of(files["mask"], "mask")
            if not clear.has_transparency_data:
                raise Refused(400, "mask has no transparency, which says what to paint.", "mask", "invalid_image")
            mask = ImageChops.invert(clear.convert("RGBA").getchannel("A"))
        size = (wanted[0].height, wanted[0].width)
        original = original_of(picture_of(files["image"], "image"), mask, 0.0, size)
        choice = None if original.mask is None else MaskChoice(pixels_digest(original.mask))
        far = (INPAINT if choice else IMG2IMG).strength if strength is None else strength
        return served.service.starting(wanted, original, far, choice), original

    requests, original = await in_thread(begun)
    if asked.stream:
        return await _streamed(request, served, requests, asked, original, "image_edit")
    return await _answered(request, served, requests, asked, original)


def _typed(name: str, text: str) -> Any:
    """A field of a form as JSON would have it."""
    kind = FIELDS[name].kind if name in FIELDS else FORM_KINDS.get(name, str)
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return kind(text)
    except ValueError:
        raise Refused(400, f"{name} must be a number, not {text!r}.", name, "invalid_type") from None


def _model_named(request: HttpRequest, name: str | None) -> Model:
    try:
        return models_of(request).named(name)
    except InvalidRequest as refused:
        raise Refused(404, str(refused), "model", "model_not_found") from None


def _described(model: Model) -> dict[str, Any]:
    plan = model.plan
    request = plan.request
    sizes = [lane.size for lane in plan.lanes if lane.size]
    return {
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": "darkroom",
        "revision": plan.revision,
        "defaults": {
            "height": request.height,
            "width": request.width,
            "steps": request.denoising_steps,
            "guidance_scale": request.guidance_scale,
            "scheduler": request.scheduler or plan.scheduler.removesuffix("Scheduler"),
        },
        "sizes": [list(size) for size in dict.fromkeys(sizes)],
        "guided": any(lane.guided for lane in plan.lanes),
        "schedulers": sorted({name.split("/")[0].split("-")[0] for name in plan.schedule_keys} - {"own"}),
        "limits": {"steps": plan.limits.steps, "images": plan.limits.images, "pixels": plan.limits.pixels},
    }


def _of(body: dict[str, Any], name: str, kind: type, least: int | None = None, most: int | None = None) -> Any:
    """A field of this kind, None where it is left out. Raises `Refused` for anything else."""
    value = body.get(name)
    if value is None:
        return None
    words = {str: "a text", int: "a whole number", bool: "true or false"}[kind]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise Refused(400, f"{name} must be {words}, not {value!r}.", name, "invalid_type")
    if (least is not None and value < least) or (most is not None and value > most):
        raise Refused(400, f"{name} must be from {least} to {most}, not {value}.", name, "invalid_value")
    return value


def _read(body: dict[str, Any], most: int) -> tuple[dict[str, Any], int, Asked]:
    """The fields of our requests, the number of images, and the rest of what is asked for."""
    for name in body:
        if name not in KNOWN:
            raise Refused(
                400, f"{name!r} is not a field of this API. Known: {', '.join(KNOWN)}.", name, "unknown_field"
            )
    for name, ways in ONE_WAY.items():
        if body.get(name) not in (None, *ways):
            raise Refused(400, f"{name} {body[name]!r} is not supported: {' or '.join(ways)}.", name, "not_supported")
    if not body.get("prompt"):
        raise Refused(400, "prompt is missing: say what the picture should show.", "prompt", "missing_field")
    fields = {name: body.get(name) for name in ("prompt", *EXTENSIONS)}
    fields |= _size(body)
    kind = _choice(body, "output_format", tuple(FORMATS)) or "png"
    quality = _of(body, "output_compression", int, 0, 100)
    if quality is not None and kind == "png":
        raise Refused(400, "output_compression has no effect with png.", "output_compression", "not_supported")
    as_url = _choice(body, "response_format", ("b64_json", "url")) == "url"
    stream = bool(_of(body, "stream", bool))
    previews = _of(body, "partial_images", int, 0, 1000)
    if previews and not stream:
        raise Refused(400, "partial_images has no effect without stream.", "partial_images", "not_supported")
    if as_url and stream:
        raise Refused(400, "response_format url has no effect with stream.", "response_format", "not_supported")
    if as_url and kind != "png":
        raise Refused(400, f"response_format url leads to a PNG, not to {kind}.", "response_format", "not_supported")
    images = _of(body, "n", int, 1, most)
    return fields, 1 if images is None else images, Asked(kind, quality, as_url, stream, previews or 0)


def _choice(body: dict[str, Any], name: str, choices: tuple[str, ...]) -> str | None:
    value = body.get(name)
    if value is not None and value not in choices:
        raise Refused(400, f"{name} {value!r} is not supported: {' or '.join(choices)}.", name, "not_supported")
    return value


def _size(body: dict[str, Any]) -> dict[str, int]:
    """OpenAI writes WIDTHxHEIGHT."""
    size = _of(body, "size", str)
    if size in (None, "auto"):
        return {}
    if body.get("height") is not None or body.get("width") is not None:
        raise Refused(400, "size and height or width cannot be given together.", "size", "invalid_value")
    try:
        width, height = pixel_size(size)
    except ValueError:
        raise Refused(400, f"size {size!r} is not WIDTHxHEIGHT, as 512x768.", "size", "invalid_value") from None
    return {"height": height, "width": width}


def _facts(request: Any, asked: Asked) -> dict[str, Any]:
    return {
        "size": f"{request.width}x{request.height}",
        "quality": "standard",
        "background": "opaque",
        "output_format": asked.kind,
    }


def _datum(picture: Picture, asked: Asked, place: str) -> dict[str, Any]:
    """A picture of the answer; its seed, file and times beside what OpenAI has."""
    if asked.as_url:
        shown = {"url": f"{place}pictures/{picture.path.name}"}
    else:
        shown = {"b64_json": base64_of(picture_file(picture, asked.kind, asked.quality))}
    times = {name: round(value, 3) for name, value in picture.clock.milliseconds.items()}
    more = {"seed": picture.request.seed, "file": picture.path.name}
    return shown | more | {"milliseconds": times | {"Pipeline": round(picture.clock.pipeline, 3)}}


async def _streamed(
    request: HttpRequest,
    model: Model,
    wanted: list[Request],
    asked: Asked,
    original: Original | None = None,
    begins: str = "image_generation",
) -> Response:
    """Server-sent events: previews of each image, then the image. `image_index` says which of several it is."""
    events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def put(event: dict[str, Any]) -> None:
        loop.call_soon_threadsafe(events.put_nowait, event)

    def watch(image: int, shown: Image.Image, calls: int) -> None:
        data = base64_of(image_file(shown, asked.kind, asked.quality))
        index = counts[image]
        counts[image] += 1
        put(event("partial_image", image, b64_json=data, partial_image_index=index, steps_made=calls))

    def event(kind: str, image: int, **more: Any) -> dict[str, Any]:
        facts = {"type": f"{begins}.{kind}", "image_index": image, "created_at": int(time.time())}
        return facts | _facts(wanted[image], asked) | more

    def finished(image: int, picture: Any) -> None:
        try:
            put(event("completed", image, usage=None, **_datum(picture.result(), asked, "")))
        except BaseException as problem:
            refused = refusal_of(problem)
            put({"type": "error", "image_index": image} | json.loads(error(refused).body))

    counts = [0] * len(wanted)
    job = model.submit(wanted, asked.previews, watch, original)
    for image, picture in enumerate(job.pictures):
        picture.add_done_callback(partial(finished, image))
    return StreamingResponse(
        _events(job, events, len(wanted)), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
    )


async def _events(job: Job, events: asyncio.Queue, images: int) -> AsyncIterator[str]:
    """The stream's text, up to the last image. Who closes it early is waited for no more."""
    try:
        while images:
            event = await events.get()
            images -= event["type"] == "error" or event["type"].endswith(".completed")
            yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
    finally:
        job.give_up()


ROUTES = [
    Route("/v1/models", models),
    Route("/v1/models/{name:path}", model),
    Route("/v1/images/generations", generations, methods=["POST"]),
    Route("/v1/images/edits", edits, methods=["POST"]),
]
