"""AUTOMATIC1111's web API (https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/API), which many tools speak.

A field that is left at that program's own default means nothing special; any other value that has no effect here is
refused by its name.
"""

import base64
import json
from dataclasses import replace
from typing import Any

from PIL import Image, ImageChops
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from darkroom.errors import InvalidRequest, check_known
from darkroom.request import MaskChoice, Request, pixels_digest
from darkroom.schedule import SCHEDULERS
from darkroom.serving.batching import Original
from darkroom.web.api import (
    BUSY_SECONDS,
    Refused,
    all_pictures,
    base64_of,
    image_file,
    in_thread,
    json_of,
    models_of,
    original_of,
    picture_of,
    waiting_for,
)
from darkroom.web.models import Job, Model, Picture

SAMPLERS = {
    "DDIM": "DDIM",
    "DDPM": "DDPM",
    "DEIS": "DEIS",
    "DPM++ 2M": "DPM++",
    "DPM++ 2M Karras": "DPM++Karras",
    "DPM++ 2M SDE": "DPM++2MSDE",
    "DPM++ SDE": "DPM++SDE",
    "DPM2": "KDPM2",
    "DPM2 a": "KDPM2A",
    "Euler": "Euler",
    "Euler a": "EulerA",
    "Heun": "Heun",
    "LCM": "LCM",
    "LMS": "LMSD",
    "PLMS": "PNDM",
    "TCD": "TCD",
    "UniPC": "UniPC",
}
"""The names of samplers there, and of `--scheduler`. Ours are taken, too."""

SAME = {"prompt": "prompt", "negative_prompt": "negative_prompt", "steps": "steps", "cfg_scale": "guidance_scale"}
SAME |= {"width": "width", "height": "height"}
"""The fields that mean what ours do."""

ABSENT = (None, False, "", 0, [], {}, -1)
"""What stands in a field of a feature that is not used."""

OWN = ("seed", "sampler_name", "sampler_index", "scheduler", "batch_size", "n_iter", "send_images", "save_images")
STARTING = ("init_images", "mask", "denoising_strength", "mask_blur", "inpainting_mask_invert")
"""The fields of img2img that act there alone."""

STRENGTH, MASK_BLUR = 0.75, 4
"""What is meant there where they are left out."""

HARMLESS = {
    "inpainting_fill": (1,),
    "mask_blur_x": (4,),
    "mask_blur_y": (4,),
    "inpaint_full_res_padding": (32,),
    "initial_noise_multiplier": (1, 1.0),
    "denoising_strength": (0.7, 0.75),
    "do_not_save_samples": (True,),
    "do_not_save_grid": (True,),
    "override_settings_restore_afterwards": (True,),
    "seed_resize_from_h": (0,),
    "seed_resize_from_w": (0,),
    "s_noise": (1, 1.0),
    "hr_scale": (2, 2.0),
    "hr_upscaler": ("Latent",),
    "refiner_switch_at": (0.8,),
}
"""Values beside those of ABSENT that clients send of features that they do not use."""


def error(refused: Refused) -> Response:
    """An error in the shape of that program."""
    said = {"error": refused.code or "error", "detail": refused.message, "body": "", "errors": refused.message}
    headers = {"Retry-After": str(BUSY_SECONDS)} if refused.status == 429 else None
    return JSONResponse(said, refused.status, headers)


async def txt2img(request: HttpRequest) -> Response:
    """Pictures from a prompt, as base64."""
    body = await json_of(request)
    served, requests = _asked(request, body)
    return await _answered(request, served, requests, body)


def _asked(request: HttpRequest, body: dict[str, Any]) -> tuple[Model, list[Request]]:
    served = _model(request, body.get("override_settings"))
    count = [body.get(name, 1) for name in ("batch_size", "n_iter")]
    if not all(isinstance(each, int) and each >= 1 for each in count):
        raise Refused(422, "batch_size and n_iter must be whole numbers from 1.", "batch_size")
    return served, served.service.requests(_fields(body), count[0] * count[1])


async def _answered(
    request: HttpRequest,
    served: Model,
    requests: list[Request],
    body: dict[str, Any],
    original: Original | None = None,
) -> Response:
    steps = max(each.denoising_steps for each in requests)
    job = served.submit(requests, previews=steps, original=original)
    async with waiting_for(request, job):
        pictures = await all_pictures(job)
    sent = body.get("send_images", True)
    images = [base64_of(data) for data in await in_thread(_files, pictures)] if sent else []
    return JSONResponse({"images": images, "parameters": body, "info": json.dumps(_info(pictures))})


async def img2img(request: HttpRequest) -> Response:
    """Pictures made of another: all of it, or what is white in the mask."""
    body = await json_of(request)
    own = {name: body.pop(name) for name in STARTING if name in body}
    served, requests = _asked(request, body)

    def begun() -> tuple[list[Request], Original]:
        pictures = own.get("init_images")
        if not isinstance(pictures, list) or len(pictures) != 1:
            raise Refused(422, "init_images must be a list of one picture, in base64.", "init_images")
        mask = own.get("mask") or None
        for name in ("denoising_strength", "mask_blur"):
            if not isinstance(own.get(name, 0), int | float) or isinstance(own.get(name), bool):
                raise Refused(422, f"{name} must be a number, not {own[name]!r}.", name)
        blur = float(own.get("mask_blur", MASK_BLUR)) if mask else 0.0
        marked = _picture(mask, "mask") if mask else None
        if marked is not None and own.get("inpainting_mask_invert"):
            marked = ImageChops.invert(marked.convert("L"))
        choice = MaskChoice("", blur)  # refused before it is done
        original = original_of(
            _picture(pictures[0], "init_images"), marked, blur, (requests[0].height, requests[0].width)
        )
        if original.mask is not None:
            choice = replace(choice, sha256=pixels_digest(original.mask))
        strength = float(own.get("denoising_strength", STRENGTH))
        return served.service.starting(requests, original, strength, choice if mask else None), original

    started, original = await in_thread(begun)
    return await _answered(request, served, started, body | own, original)


def _picture(text: Any, field: str) -> Image.Image:
    """A picture in base64, or in an address that holds it so."""
    if not isinstance(text, str):
        raise Refused(422, f"{field} must be a picture in base64.", field)
    try:
        data = base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
    except ValueError:
        raise Refused(422, f"{field} is not base64.", field) from None
    return picture_of(data, field)


async def progress(request: HttpRequest) -> Response:
    """How far all running jobs are together, and a preview of one of them."""
    jobs = _jobs(request)
    made, calls = (sum(each) for each in zip(*(job.progress for job in jobs), strict=True)) if jobs else (0, 0)
    shown = next((job.shown for job in jobs if job.shown is not None), None)
    image = None if shown is None else base64_of(await in_thread(image_file, shown, "png"))
    state = {"job_count": len(jobs), "job": "txt2img" if jobs else "", "sampling_step": made, "sampling_steps": calls}
    state |= {"skipped": False, "interrupted": False}
    share = made / calls if calls else 0.0
    return JSONResponse({"progress": share, "eta_relative": 0.0, "state": state, "current_image": image})


async def interrupt(request: HttpRequest) -> Response:
    """Gives up all running jobs."""
    for job in _jobs(request):
        job.give_up()
    return JSONResponse({})


async def sd_models(request: HttpRequest) -> Response:
    """What is served."""
    return JSONResponse(
        [
            {
                "title": model.name,
                "model_name": model.name,
                "hash": model.plan.revision[:10],
                "sha256": model.plan.revision,
                "filename": model.name,
                "config": None,
            }
            for model in models_of(request).values()
        ]
    )


async def samplers(request: HttpRequest) -> Response:
    """The names that sampler_name takes."""
    return JSONResponse([{"name": name, "aliases": [ours], "options": {}} for name, ours in SAMPLERS.items()])


async def options(request: HttpRequest) -> Response:
    """The model that requests go to which name none."""
    return JSONResponse({"sd_model_checkpoint": models_of(request).named(None).name})


def _jobs(request: HttpRequest) -> list[Job]:
    return [job for model in models_of(request).values() for job in list(model.jobs)]


def _model(request: HttpRequest, settings: Any) -> Model:
    settings = settings or {}
    if not isinstance(settings, dict):
        raise Refused(422, "override_settings must be a JSON object.", "override_settings")
    if strange := settings.keys() - {"sd_model_checkpoint"}:
        raise Refused(422, f"override_settings {min(strange)!r} is not supported.", "override_settings")
    try:
        return models_of(request).named(settings.get("sd_model_checkpoint"))
    except InvalidRequest as refused:
        raise Refused(404, str(refused), "sd_model_checkpoint") from None


def _fields(body: dict[str, Any]) -> dict[str, Any]:
    """The fields of our requests."""
    for name, value in body.items():
        if name in SAME or name in OWN or name == "override_settings":
            continue
        if not any(type(value) is type(each) and value == each for each in (*ABSENT, *HARMLESS.get(name, ()))):
            raise Refused(422, f"{name} {value!r} is not supported.", name)
    fields = {ours: body[theirs] for theirs, ours in SAME.items() if body.get(theirs) is not None}
    if not fields.get("negative_prompt") or fields.get("guidance_scale", 7) <= 1:
        fields.pop("negative_prompt", None)  # such clients always send one
    if (seed := body.get("seed", -1)) not in (None, -1):
        fields["seed"] = seed
    sampler = body.get("sampler_name") or body.get("sampler_index")
    if sampler:
        if not isinstance(sampler, str):
            raise Refused(422, f"sampler_name must be a text, not {sampler!r}.", "sampler_name")
        name = SAMPLERS.get(sampler, sampler)
        if str(body.get("scheduler") or "").lower() == "karras" and f"{name}Karras" in SCHEDULERS:
            name = f"{name}Karras"
        elif (body.get("scheduler") or "Automatic").lower() not in ("automatic", "normal"):
            raise Refused(422, f"scheduler {body['scheduler']!r} is not supported with {sampler}.", "scheduler")
        check_known("sampler_name", name, SCHEDULERS)
        fields["scheduler"] = name
    return fields


def _files(pictures: list[Picture]) -> list[bytes]:
    return [picture.path.read_bytes() for picture in pictures]


def _info(pictures: list[Picture]) -> dict[str, Any]:
    """What that program says of its pictures."""
    first = pictures[0].request
    return {
        "prompt": first.prompts[0],
        "all_prompts": [picture.request.prompts[0] for picture in pictures],
        "negative_prompt": first.negative_prompt or "",
        "seed": first.seed,
        "all_seeds": [picture.request.seed for picture in pictures],
        "width": first.width,
        "height": first.height,
        "sampler_name": first.scheduler or pictures[0].recipe["scheduler"],
        "cfg_scale": first.guidance_scale,
        "steps": first.denoising_steps,
        "sd_model_hash": pictures[0].recipe["revision"][:10],
        "batch_size": len(pictures),
    }


ROUTES = [
    Route("/sdapi/v1/txt2img", txt2img, methods=["POST"]),
    Route("/sdapi/v1/img2img", img2img, methods=["POST"]),
    Route("/sdapi/v1/progress", progress),
    Route("/sdapi/v1/interrupt", interrupt, methods=["POST"]),
    Route("/sdapi/v1/sd-models", sd_models),
    Route("/sdapi/v1/samplers", samplers),
    Route("/sdapi/v1/options", options),
]
