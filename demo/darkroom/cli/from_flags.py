"""Flags -> the model and the request."""

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from darkroom.checkpoint.catalog import Script, Version, find_version
from darkroom.checkpoint.folder import Checkpoint
from darkroom.checkpoint.hub import REPOSITORY, repository_of
from darkroom.checkpoint.other_vae import check_vae
from darkroom.cli.flags import given, refuse_without
from darkroom.engines import RUNTIMES
from darkroom.engines.runtime import Runtime
from darkroom.errors import InvalidRequest
from darkroom.families import find_family
from darkroom.flags import FLAGS, OF_REQUEST, RECIPE, SYNTAXES, option
from darkroom.request import (
    DEFAULTS,
    ControlChoice,
    EmbeddingChoice,
    LoraChoice,
    MaskChoice,
    Request,
    draw_seed,
    pixels_digest,
)
from darkroom.text.drawing import Drawing

WORKED_OUT = ("model", "engine", "input_image", "image_strength", "refiner", "refiner_strength", "vae")
"""Fields of a request that are not a flag's value as it is."""

PROVISIONAL_SIZE = 512
Value = TypeVar("Value")


def recipe_of(flags: argparse.Namespace, script: Script) -> dict[str, Any] | None:
    """The recipe in the picture that --recipe names, or None without that flag."""
    if flags.recipe is None:
        return None
    from darkroom.pipeline.pictures import read_recipe

    if flags.prompt:
        raise InvalidRequest("a prompt cannot be given beside --recipe, which holds its own.")
    for flag in FLAGS:
        if RECIPE in flag.use and given(flags, flag.name):
            shown = f"--build-{flags.build}" if flag.switches else option(flag.name)
            raise InvalidRequest(f"{shown} cannot be given beside --recipe, which fixes it.")
    recipe = read_recipe(Path(flags.recipe))
    maker = recipe.get("script", script.program)
    if maker != script.program:
        raise InvalidRequest(f"--recipe {flags.recipe} was made by {maker}: replay it with that script.")
    Request.from_json(recipe["request"])
    return recipe


def refuse_flags_for_prompts(flags: argparse.Namespace) -> None:
    """Raises `InvalidRequest` for flags about the workers of a prompt file, where there is none."""
    refuse_without(flags, "prompts")
    dividing = [name for name, listed in RUNTIMES.items() if "devices" in listed.options]
    if flags.devices is not None and flags.recipe is None and engine_of(flags) not in dividing:
        raise InvalidRequest(f"--devices has no effect without --prompts or --engine {' or '.join(dividing)}.")


def refuse_flags_beside_prompts(flags: argparse.Namespace, beside: str = "--prompts") -> None:
    """Raises `InvalidRequest` for flags that have no effect, or another one, in a run of a whole file."""
    if flags.prompt:
        raise InvalidRequest("a prompt cannot be given beside --prompts, which names a file of them.")
    for flag in FLAGS:
        if flag.beside_prompts and given(flags, flag.name):
            raise InvalidRequest(f"{option(flag.name)} cannot be given beside {beside}: {flag.beside_prompts}.")


def version_of(flags: argparse.Namespace, recipe: dict[str, Any] | None, script: Script) -> Version:
    """The model that is meant: by folder, hub repository, version name, or a recipe's record of one of these.

    Without a recipe, its defaults are those of `--lcm-lora`, where that is passed.
    """
    version = _named(flags, recipe, script)
    return _with_few_steps(version, flags, script) if script.few_steps and recipe is None else version


def _named(flags: argparse.Namespace, recipe: dict[str, Any] | None, script: Script) -> Version:
    if flags.model is not None and flags.version is not None:
        raise InvalidRequest("--model and --version cannot be given together: each names the model.")
    if flags.config is not None and not os.path.isfile(flags.model or ""):
        raise InvalidRequest("--config describes a single-file model: it has no effect without one as --model.")
    if flags.model is not None:
        return unnamed(flags.model, script.unnamed)
    if recipe is not None:
        name = recipe["request"].get("model")
        if not name:
            raise InvalidRequest(f"--recipe {flags.recipe} was made with a model folder; name it with --model.")
        if name not in script.versions and not REPOSITORY.fullmatch(name):
            raise InvalidRequest(f"--recipe {flags.recipe} was made with {name}, which {script.program} does not run.")
        return script.versions.get(name) or replace(script.unnamed, name=name, source=name)
    named = flags.version
    if named is None:
        # Nothing embedded goes with the real refiner.
        if script.refiner and flags.enable_refiner and flags.refiner_model is None:
            named = script.real
        elif script.controlling and given(flags, "controlnet_type"):
            named = script.real
        elif getattr(flags, "lcm_lora", None):
            named = script.of_many_steps
        else:
            named = next(iter(script.versions))
    return find_version(named, script.versions)


def _with_few_steps(version: Version, flags: argparse.Namespace, script: Script) -> Version:
    """The version's defaults as `--lcm-lora` changes them. Refuses a model that this script would run badly."""
    if getattr(flags, "lcm_lora", None):
        if version.few_steps and version.name in script.versions:
            raise InvalidRequest(f"--lcm-lora has no effect with {version.name}, which needs few steps as it is.")
        return replace(version, steps=script.unnamed.steps, guidance_scale=0.0, scheduler="LCM")
    if not version.few_steps:
        raise InvalidRequest(
            f"--version {version.name} needs many steps: make it one of few with --lcm-lora, or use another script."
        )
    return version


def refiner_of(flags: argparse.Namespace, recipe: dict[str, Any] | None, script: Script) -> Version | None:
    """The second model that is meant, or None without one. Refuses flags about a refiner that is not enabled."""
    if script.refiner is None:
        return None
    asked = bool(flags.enable_refiner) if recipe is None else recipe["request"].get("refiner") is not None
    if not asked:
        refuse_without(flags, "enable_refiner")
        return None
    named = flags.refiner_model or (recipe["request"]["refiner"] if recipe else script.refiner.name)
    if named == script.refiner.name:
        return script.refiner
    if not named:
        raise InvalidRequest(f"--recipe {flags.recipe} was made with a refiner's folder; name it with --refiner-model.")
    return unnamed(named, script.refiner)


def vae_of(flags: argparse.Namespace, recipe: dict[str, Any] | None) -> str | None:
    """Another VAE than the model's own, by folder or hub repository; None without one."""
    named = flags.vae
    if named is None and recipe and (named := recipe["request"].get("vae")) == "":
        raise InvalidRequest(f"--recipe {flags.recipe} was made with a VAE's folder; name it with --vae.")
    if named is not None and repository_of(named) is None:
        check_vae(Path(named))
    return named


def unnamed(source: str, defaults: Version) -> Version:
    """A model by its folder, which has no name, or by its hub repository."""
    repository = repository_of(source)
    return replace(defaults, name=repository or "", source=source, size=0, embedded=repository is None)


def starts_from_image(flags: argparse.Namespace, recipe: dict[str, Any] | None, script: Script) -> bool:
    """Whether there is a picture to start from; some scripts do without. Refuses flags about one that is not there."""
    if script.from_image or not script.may_start:
        return script.from_image
    if not given(flags, "input_image"):
        refuse_without(flags, "input_image")
    return given(flags, "input_image") or (recipe is not None and recipe["request"].get("input_image") is not None)


@dataclass(frozen=True)
class Start:
    """What a run starts from: pixels (H, W, 3) uint8, and where they are painted anew (H, W) uint8, from black for
    never to white, with what that came of; None for all of them."""

    pixels: np.ndarray
    mask: np.ndarray | None = None
    choice: MaskChoice | None = None


def start_of(flags: argparse.Namespace, recipe: dict[str, Any] | None, script: Script) -> Start:
    """What to start from, of the requested size or else the file's own, resized to fit.

    Beside a recipe, it must be what that was made from.
    """
    from darkroom.pipeline.pictures import read_pixels

    if flags.input_image is None:
        raise InvalidRequest("--input-image is needed: the picture to start from.")
    path, request = Path(flags.input_image), recipe["request"] if recipe else None
    choice = _mask_choice(flags, request) if script.inpaints else None
    left, top, right, bottom = choice.outpaint if choice else (0, 0, 0, 0)
    height, width = (request or vars(flags))["height"], (request or vars(flags))["width"]
    sizes = _less(height, top + bottom, "height"), _less(width, left + right, "width")
    pixels = read_pixels(path, *sizes, find_family(script.families[0]).multiple)
    added = ((top, bottom), (left, right))
    start = Start(np.pad(pixels, (*added, (0, 0)), mode="edge"))
    if request and request.get("input_image") != pixels_digest(start.pixels):
        raise InvalidRequest(f"--input-image {flags.input_image} is not the picture that {flags.recipe} was made from.")
    if choice is None:
        return start
    mask = _mask(flags, *pixels.shape[:2], added, choice.blur)
    found = replace(choice, sha256=pixels_digest(mask))
    if request and found != choice:
        raise InvalidRequest(f"--mask-image: this is not the mask that {flags.recipe} was made with.")
    return replace(start, mask=mask, choice=found)


def _mask_choice(flags: argparse.Namespace, request: dict[str, Any] | None) -> MaskChoice:
    if request is not None:
        choice = Request.from_json(request).mask
        if choice is None:
            raise InvalidRequest(f"--recipe {flags.recipe} was made without a mask.")
        return choice
    return MaskChoice("", _or(flags.mask_blur, 0.0), tuple(flags.outpaint or (0, 0, 0, 0)), not flags.no_keep)


def _less(size: int | None, added: int, name: str) -> int | None:
    """What of a height or width is the picture's own, where so much of it is added."""
    if size is not None and added >= size:
        raise InvalidRequest(f"--{name} {size} leaves nothing of the picture beside the {added} pixels of --outpaint.")
    return None if size is None else size - added


def _mask(
    flags: argparse.Namespace, height: int, width: int, added: tuple[tuple[int, int], ...], blur: float
) -> np.ndarray:
    """What of a picture of this size, with what is added around it, is painted anew."""
    from darkroom.pipeline.pictures import blurred, read_mask, read_transparency

    if flags.mask_image is not None:
        mask = read_mask(Path(flags.mask_image), height, width)
    else:
        mask = read_transparency(Path(flags.input_image), height, width)
        if mask is None:
            if not any(map(any, added)):
                raise InvalidRequest(
                    "--mask-image is needed, white where the picture is to be painted anew: nothing of --input-image "
                    "is transparent."
                )
            mask = np.zeros((height, width), np.uint8)
    return blurred(np.pad(mask, added, constant_values=255), blur)


def request_of(
    flags: argparse.Namespace,
    version: Version,
    start: Start | None,
    refiner: Version | None,
    checkpoint: Checkpoint | None,
    engine: str,
    loras: tuple[LoraChoice, ...] = (),
    strength: float | None = None,
    controls: tuple[ControlChoice, ...] = (),
    embeddings: tuple[EmbeddingChoice, ...] = (),
) -> Request:
    """The request that the flags make, with the version's defaults for what they leave out; `strength` is the script's.

    Without a checkpoint, sizes and seed are stand-ins: good for finding out what is wrong before a model is
    fetched.
    """
    guidance_scale = _or(flags.guidance_scale, version.guidance_scale)
    for name in ("negative_prompt", "negative_prompt_2"):
        if getattr(flags, name) and guidance_scale <= 1:
            raise InvalidRequest(
                f"{option(name)} acts through guidance, which --guidance-scale {guidance_scale} turns off: "
                f"use one above 1, or leave the negative prompt out."
            )
    if start is not None:
        height, width = start.pixels.shape[:2]
    elif version.size or checkpoint is None:
        height = width = version.size or PROVISIONAL_SIZE
    else:
        height, width = checkpoint.default_sizes
    drawing = Drawing.asked(flags.prompt_syntax or SYNTAXES[0], flags.wildcards)
    request = make_request(
        vars(flags),
        version,
        (height, width),
        prompts=tuple(flags.prompt),
        seed=flags.seed if flags.seed is not None else draw_seed() if checkpoint else 0,
        engine=engine,
        input_image=None if start is None else pixels_digest(start.pixels),
        image_strength=None if start is None else _or(flags.image_strength, strength),
        mask=None if start is None else start.choice,
        controls=controls,
        refiner=None if refiner is None else refiner.name,
        refiner_strength=None if refiner is None else _or(flags.image_strength, DEFAULTS["refiner_strength"]),
        loras=loras,
        embeddings=embeddings,
        vae=None if flags.vae is None else repository_of(flags.vae) or "",
    )
    return drawing.drawn(request) if drawing else request


def make_request(values: Mapping[str, Any], version: Version, size: tuple[int, int], **fields: Any) -> Request:
    """The request of `values`, by the names of flags. What is None there is the version's, or the flag's own default.

    `size` is the height and width in pixels where none is passed; `fields` of the request go before all of these.
    """
    of_version = {
        "model": version.name or None,
        "prompts": ("a picture",),
        "height": size[0],
        "width": size[1],
        "denoising_steps": version.steps,
        "guidance_scale": version.guidance_scale,
        "scheduler": version.scheduler,
    }
    flags = ((name, flag) for name, flag in OF_REQUEST.items() if name not in WORKED_OUT)
    passed = {name: value for name, flag in flags if (value := values.get(flag.name)) is not None}
    return Request(**of_version | passed | fields)


def engine_of(flags: argparse.Namespace) -> str:
    """The engine that is meant, by its name or by how PyTorch is to run."""
    if flags.torch_inference is None:
        return _or(flags.engine, "auto")
    implied = "torch" if flags.torch_inference == "eager" else "torch-compile"
    if flags.engine not in (None, implied):
        raise InvalidRequest(
            f"--torch-inference {flags.torch_inference} is --engine {implied}, not --engine {flags.engine}: "
            f"leave one of them out."
        )
    return implied


def refuse_build_flags(flags: argparse.Namespace, runtime: Runtime) -> None:
    """Raises `InvalidRequest` for flags about building, on an engine that builds nothing, or not from ONNX graphs."""
    about: dict[str, Any] = {} if runtime.compiles else {f"--build-{flags.build}": flags.build}
    for flag, value in (about if runtime.from_graph else about | {"--onnx-opset": flags.onnx_opset}).items():
        if value is not None:
            how = "is built from the model as it is" if runtime.compiles else "runs the model as it is"
            raise InvalidRequest(f"{flag} has no effect with --engine {runtime.name}, which {how}.")


def _or(value: Value | None, default: Value) -> Value:
    """The value, also when it is 0 or empty, unless nothing was given."""
    return default if value is None else value
