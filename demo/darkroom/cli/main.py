"""The one main that every script calls."""

import argparse
import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from darkroom import __version__
from darkroom.checkpoint.catalog import Script
from darkroom.cli.console import Console
from darkroom.cli.controls import Controls, controls_of
from darkroom.cli.dry_run import first_of_all, show_plan
from darkroom.cli.exit import exit_code
from darkroom.cli.flags import given, parsed
from darkroom.cli.from_flags import (
    Start,
    engine_of,
    recipe_of,
    refiner_of,
    refuse_flags_for_prompts,
    request_of,
    start_of,
    starts_from_image,
    vae_of,
    version_of,
)
from darkroom.cli.inversions import check_embedding_flags, chosen, inversions_of
from darkroom.cli.loras import check_lora_flags, loras_of
from darkroom.cli.opening import models_of, precision_asked, refuse_inpainting, runtime_of, say_what_ships
from darkroom.cli.settings import Settings, make_folder
from darkroom.cli.start import EXIT
from darkroom.contract import AUTO, spelled
from darkroom.engines import find_runtime
from darkroom.errors import DarkroomError, Failed, InvalidRequest
from darkroom.families import find_family
from darkroom.pipeline.pipeline import Pipeline, is_marked
from darkroom.pipeline.timing import StageClock, medians, table, throughput
from darkroom.prepare import Preparer, check_precision
from darkroom.request import DENOISED_BY, OF_REFINER, Batch, Request, check_published_steps, check_steps_left
from darkroom.text.reading import cuts

LEAST_ADDRESSES = 10**9
"""Bytes of address space below which no engine can be loaded: some libraries end the process there and then."""


def run(script: Script, arguments: list[str] | None = None) -> int:
    """Runs a script of demo/. Returns the exit code: 0 done, 1 failed, 2 an invalid request."""
    return exit_code(script.program, lambda: _run(script, parsed(script, arguments)))


def _run(script: Script, flags: argparse.Namespace) -> None:
    _check_limit()
    console = Console(flags.verbose, flags.quiet, flags.json)
    if given(flags, "download_onnx_models"):
        console.warn("--download-onnx-models does nothing: graphs are exported from the model's own weights.")
    if getattr(flags, "grid", None) and flags.prompts is None and flags.recipe is None:
        from darkroom.cli.grid import make_grid

        make_grid(script, flags, console)
        return
    if getattr(flags, "prompts", None) is not None:
        from darkroom.cli.prompt_file import make_all  # not above: a run of its own kind, which others need nothing of

        make_all(script, flags, console)
        return
    refuse_flags_for_prompts(flags)
    recipe = recipe_of(flags, script)
    settings = Settings.from_flags(flags)
    version, second = version_of(flags, recipe, script), refiner_of(flags, recipe, script)
    vae = vae_of(flags, recipe)
    check_lora_flags(flags)
    check_embedding_flags(flags)
    start = start_of(flags, recipe, script) if starts_from_image(flags, recipe, script) else None
    if start and start.mask is not None and not is_marked(start.mask).any():
        console.warn("the mask is dark everywhere: nothing of the picture is painted anew.")
    controls = controls_of(flags, recipe, script, version)
    engine = engine_of(flags)
    if recipe is None:
        # What is wrong with the request is refused before a model is fetched for it.
        asked = request_of(
            flags, version, start, second, None, engine, strength=script.strength, controls=controls.choices
        )
        if asked.image_strength is not None and version.name in script.versions:  # none spreads its steps
            left = find_family(script.families[0]).steps_left(asked.denoising_steps, asked.image_strength)
            check_steps_left(asked.denoising_steps, asked.image_strength, left)
    runtime = runtime_of(flags, recipe, engine, settings, console)
    if recipe is None:
        flags.precision = precision_asked(flags, engine, runtime, console)
        check_precision(runtime, flags.precision or asked.precision)
        if version.name in script.versions and not version.embedded:
            check_published_steps(asked)
    if flags.dry_run:
        models_asked = [each.source for each in (version, second) if each and not each.embedded]
        if first := first_of_all(models_asked, settings, vae, flags.lora_path or (), controls.sources):
            show_plan(first, flags.json, console)
            return
    models = models_of(script, settings, runtime, vae, console, controls.sources)
    base = models.preparer(version, config=flags.config)
    of_refiner = replace(models, controlnets=())
    refiner = of_refiner.preparer(second, settings.onnx_refiner_dir, settings.engine_refiner_dir) if second else None
    if refiner is not None:
        _check_same_latents(base, refiner)
    refuse_inpainting(base, script)
    base.loras, choices = loras_of(flags, recipe, settings, base, console)
    for each in filter(None, (base, refiner)):
        each.inversions = inversions_of(flags, recipe, each, console)
    if recipe is None:
        own = (base.checkpoint, runtime.name, choices, script.strength, controls.choices, chosen(base.inversions))
        request = request_of(flags, version, start, second, *own)
    else:
        request = Request.from_json(recipe["request"])
        _check_weights(flags, recipe, base, refiner)
    if flags.dry_run:
        stages = base.stages_for(request, start is not None, decodes=refiner is None)
        planned = base.plan(request, stages) + (refiner.plan(request.refining()) if refiner else [])
        show_plan(planned, flags.json, console)
        return
    batches = range(request.batch_total)
    if recipe is not None:
        if not 1 <= recipe["image"] <= request.image_count:
            raise InvalidRequest(f"--recipe {flags.recipe} is for image {recipe['image']} of a run that had fewer.")
        number = (recipe["image"] - 1) // request.batch_size
        batches = range(number, number + 1)
    once = len(batches) == 1 and not settings.num_warmup_runs
    pipeline, made_with = _prepare(base, refiner, request, start, controls, once)
    EXIT.keep(pipeline, runtime)
    if recipe is None:
        say_what_ships(version, flags, script, console)
    facts = {"darkroom": __version__, "script": script.program, **made_with}
    _warn_of_cuts(pipeline, request, console)
    if recipe is not None:
        recorded, present = recipe.get("artefacts"), facts["artefacts"]
        if DENOISED_BY in recipe and isinstance(recorded, dict):  # by engines for other batches, of the same graph
            present = {name: key for name, key in present.items() if name in recorded}
        rest = any(recipe.get(key) != facts.get(key) for key in ("refiner_artefacts", "runtime"))
        if rest or recorded != present:
            console.warn(f"this picture was made by {recipe.get('runtime')} and other engines: pixels may differ.")
    elif flags.seed is None:
        console.say(f"seed: {request.seed}")
    first = request.batch(batches[0])
    _warm_up(pipeline, first, settings.num_warmup_runs, console)

    make_folder(settings.output_dir)
    clocks: list[StageClock] = []
    made: list[dict[str, Any]] = []
    pictures_of_first: np.ndarray | None = None
    try:
        with console.job("denoising", len(batches) * pipeline.calls) as advance:
            for batch in map(request.batch, batches):
                clocks.append(StageClock())
                pictures = pipeline.run(batch, clocks[-1], advance)
                pictures_of_first = pictures if pictures_of_first is None else pictures_of_first
                for picture in _keep(batch, pictures, start, facts, recipe, settings.output_dir, script.pipeline):
                    made.append(picture)
    except DarkroomError as error:
        if flags.json:
            console.result(json.dumps(facts | {"images": made, "error": str(error)}), failing=True)
        else:
            for picture in made:
                console.result(picture["path"], failing=True)
        raise
    console.say(table(clocks, request.batch_size))
    told = _timings(clocks, request.batch_size)
    if quantization := runtime.options.quantization:
        computed = Request.from_json(facts["request"])  # `auto` could choose another precision without it
        told["quantization_psnr"] = _loss(pictures_of_first, base, refiner, computed, start, controls, first, console)
        console.say(f"{quantization}: PSNR {told['quantization_psnr']:.1f} dB against the same pictures without it")
    if flags.json:
        console.result(json.dumps(facts | {"images": made} | told))
    else:
        for picture in made:
            console.result(picture["path"])


def _check_weights(flags: argparse.Namespace, recipe: dict[str, Any], base: Preparer, refiner: Preparer | None) -> None:
    """Raises `InvalidRequest` where a model is not the one that the recipe was made with."""
    for each, key, flag in ((base, "revision", "--model"), (refiner, "refiner_revision", "--refiner-model")):
        if each is not None and recipe.get(key) != each.checkpoint.revision:
            raise InvalidRequest(
                f"--recipe {flags.recipe} was made with other weights than those in {each.checkpoint.folder}; "
                f"name the folder or repository that has them with {flag}."
            )


def _check_same_latents(base: Preparer, refiner: Preparer) -> None:
    """Raises `InvalidRequest` where a refiner would read the latents of another VAE than its own."""
    if base.checkpoint.latent_space != refiner.checkpoint.latent_space:
        raise InvalidRequest(
            f"--enable-refiner: {refiner.name or refiner.checkpoint.folder} reads the latents of another VAE than "
            f"that of {base.name or base.checkpoint.folder}."
        )


def _prepare(
    base: Preparer, refiner: Preparer | None, request: Request, start: Start | None, controls: Controls, once: bool
) -> tuple[Pipeline, dict[str, Any]]:
    """The pipeline, with its refiner if there is one, and what a recipe records of both.

    Where it runs `once`, the refiner is loaded when the first model is gone.
    """
    if refiner is not None:
        refiner.check(request.refining())  # before anything is built for the first model
    compiled = base.compile(request, base.stages_for(request, start is not None, decodes=refiner is None))
    refining_compiled = refiner.compile(request.refining()) if refiner is not None else None
    # Pillow takes a step's time to import: that passes while the engines load.
    Thread(target=_import_pictures).start()
    pixels, mask = (start.pixels, start.mask) if start else (None, None)
    prepared = base.load(compiled, pixels, mask, controls.maps(request.height, request.width))
    if refining_compiled is not None and request.precision == AUTO:
        chosen = {name: job.precision for name, job in compiled.jobs.items()}
        chosen |= {OF_REFINER + name: job.precision for name, job in refining_compiled.jobs.items()}
        request = replace(request, precision=spelled(chosen))
    else:
        request = compiled.request
    facts = {
        "request": request.as_json(),
        "revision": base.checkpoint.revision,
        "scheduler": prepared.scheduler,
        "artefacts": prepared.artefacts,
        "runtime": f"{base.runtime.name} {prepared.runtime_version}",
    } | base.runtime.options.recorded()
    if quantization := base.runtime.options.quantization:
        facts["quantization"] = quantization
    if refiner is not None and refining_compiled is not None:
        later = refiner.deferred(refining_compiled)
        prepared.pipeline.refiner = later if once else later.load()
        facts |= {"refiner_revision": refiner.checkpoint.revision, "refiner_artefacts": refining_compiled.artefacts}
    return prepared.pipeline, facts


def _loss(
    pictures: np.ndarray,
    base: Preparer,
    refiner: Preparer | None,
    request: Request,
    start: Start | None,
    controls: Controls,
    batch: Batch,
    console: Console,
) -> float:
    """PSNR in dB of quantized pictures (B, H, W, 3) against those that eager torch makes in the same precision."""
    from darkroom.pipeline.pictures import psnr, to_bytes

    plain = find_runtime("torch")
    with console.job("making the same without quantization"):
        pipeline, _ = _prepare(
            base.on(plain),
            refiner and refiner.on(plain),
            replace(request, engine=plain.name),
            start,
            controls,
            once=True,
        )
        expected = pipeline.run(batch, StageClock())
    return psnr(*(to_bytes(made, "a picture of the first batch") for made in (pictures, expected)))


def _timings(clocks: list[StageClock], batch_size: int) -> dict[str, Any]:
    """What the table shows, for programs."""
    timings = {
        "unet_calls": clocks[0].unet_calls,
        "milliseconds": medians(clocks),
        "images_per_second": throughput(clocks, batch_size),
    }
    if refining := [clock.refiner for clock in clocks if clock.refiner]:
        timings |= {"refiner_unet_calls": refining[0].unet_calls, "refiner_milliseconds": medians(refining)}
    return timings


def _warm_up(pipeline: Pipeline, batch: Batch, runs: int, console: Console) -> None:
    """Untimed runs. What they encoded is forgotten, so that the timed run does all of its work."""
    if not runs:
        return
    with console.job("warming up", runs) as advance:
        for _ in range(runs):
            pipeline.forget()
            pipeline.run(batch, StageClock())
            advance()
    pipeline.forget()


def _import_pictures() -> None:
    """Ahead of the code that needs them, which will report what is missing."""
    with suppress(ImportError):
        importlib.import_module("darkroom.pipeline.pictures")


def _keep(
    batch: Batch,
    pictures: np.ndarray,
    start: Start | None,
    facts: dict[str, Any],
    recipe: dict[str, Any] | None,
    folder: Path,
    pipeline: str,
) -> Iterator[dict[str, Any]]:
    """Saves the pictures of a batch, one by one; when a recipe is replayed, the one that it is for."""
    from darkroom.pipeline.pictures import save, to_bytes, upscaled, with_the_rest

    for slot, (prompt, seed, picture) in enumerate(zip(batch.prompts, batch.seeds, pictures, strict=True)):
        image = batch.first + slot + 1
        if recipe is not None and image != recipe["image"]:
            continue
        pixels = to_bytes(picture, f"image {image} (seed {seed})")
        if start and start.choice and start.choice.keep:
            pixels = with_the_rest(pixels, start.pixels, start.mask)
        its_own = {"image": image, "seed": seed, "slot": slot, "prompt": prompt}
        path = save(upscaled(pixels, facts["request"]["upscale"]), folder, pipeline, facts | its_own)
        yield {"path": str(path), "image": image, "seed": seed, "prompt": prompt}


def _warn_of_cuts(pipeline: Pipeline, request: Request, console: Console) -> None:
    for cut in cuts([encoder.tokenizer for encoder in pipeline.encoders], request):
        console.warn(cut)


def _check_limit() -> None:
    """Raises `Failed` where `ulimit -v` leaves too little for any engine."""
    if sys.platform == "win32":
        return
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if 0 <= limit < LEAST_ADDRESSES:
        raise Failed(f"there is not enough memory: `ulimit -v` allows {limit // 2**20} MB, too little for any engine.")
