"""The one main that every script calls."""

import argparse
import importlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from darkroom import __version__
from darkroom.checkpoint.catalog import Script, Version
from darkroom.checkpoint.folder import open_checkpoint
from darkroom.checkpoint.hub import fetch, fetch_vae, repository_of
from darkroom.checkpoint.other_vae import check_vae, with_vae
from darkroom.checkpoint.single_file import check_single_file, published_config, unpacked
from darkroom.cli.asked import (
    asked_engine,
    asked_image,
    asked_recipe,
    asked_refiner,
    asked_request,
    asked_vae,
    asked_version,
    refuse_build_flags,
    refuse_flags_for_prompts,
    with_few_steps,
)
from darkroom.cli.console import Console
from darkroom.cli.ending import ended
from darkroom.cli.flags import parsed
from darkroom.cli.loras import asked_loras, check_lora_flags
from darkroom.cli.settings import Folders, Settings, make_folder
from darkroom.cli.start import ENDING
from darkroom.engines import automatic, find_runtime, has_cuda_graphs
from darkroom.engines.runtime import RECORDED, Options, Runtime, asked_as
from darkroom.errors import DarkroomError, InvalidRequest
from darkroom.pipeline.pipeline import Pipeline
from darkroom.pipeline.timing import StageClock, medians, table, throughput
from darkroom.prepare import Preparer, check_precision
from darkroom.request import Batch, Request, check_published_steps, check_steps_left
from darkroom.store.store import Store
from darkroom.text.clip import told_of_cut


def run(script: Script, arguments: list[str] | None = None) -> int:
    """Runs a script of demo/. Returns the exit code: 0 done, 1 failed, 2 asked wrongly."""
    return ended(script.program, lambda: _run(script, parsed(script, arguments)))


def _run(script: Script, flags: argparse.Namespace) -> None:
    console = Console(flags.verbose, flags.quiet, flags.json)
    if getattr(flags, "prompts", None) is not None:
        from darkroom.cli.prompts import make_all  # not above: a run of its own kind, which others need nothing of

        make_all(script, flags, console)
        return
    refuse_flags_for_prompts(flags)
    recipe = asked_recipe(flags, script)
    settings = Settings.from_flags(flags)
    version, second = asked_version(flags, recipe, script), asked_refiner(flags, recipe, script)
    if script.few_steps and recipe is None:
        version = with_few_steps(version, flags, script)
    vae = asked_vae(flags, recipe)
    check_lora_flags(flags)
    image = asked_image(flags, recipe) if script.from_image else None
    engine = asked_engine(flags)
    if recipe is None:
        # What is wrong with the request is said before a model is fetched for it.
        asked = asked_request(flags, version, image, second, None, engine)
        if asked.image_strength is not None and version.name in script.versions:  # none spreads its steps
            check_steps_left(asked.denoising_steps, asked.image_strength)
    runtime = asked_runtime(flags, recipe, engine, settings, console)
    if recipe is None:
        check_precision(runtime, asked.precision)
        if version.name in script.versions and not version.embedded:
            check_published_steps(asked)
    models = Models(script, settings, runtime, vae, console)
    base = models.preparer(version, settings.onnx_dir, settings.engine_dir, flags.config)
    refiner = models.preparer(second, settings.onnx_refiner_dir, settings.engine_refiner_dir) if second else None
    if refiner is not None:
        _check_same_latents(base, refiner)
    base.loras, choices = asked_loras(
        flags, recipe, settings, base.checkpoint.family, base.engines.fingerprints, console
    )
    if recipe is None:
        request = asked_request(flags, version, image, second, base.checkpoint, runtime.name, choices)
    else:
        request = Request.from_json(recipe["request"])
        _check_weights(flags, recipe, base, refiner)
    batches = range(request.batch_total)
    if recipe is not None:
        if not 1 <= recipe["image"] <= request.image_count:
            raise InvalidRequest(f"--recipe {flags.recipe} is for image {recipe['image']} of a run that had fewer.")
        number = (recipe["image"] - 1) // request.batch_size
        batches = range(number, number + 1)
    once = len(batches) == 1 and not settings.num_warmup_runs
    pipeline, made_with = _prepare(base, refiner, request, image, once)
    ENDING.leave(pipeline, runtime)
    if recipe is None:
        say_what_ships(version, flags, script, console)
    facts = {"darkroom": __version__, "script": script.program, "request": request.as_json(), **made_with}
    _warn_of_cuts(pipeline, request, console)
    if recipe is not None:
        if any(recipe.get(key) != facts.get(key) for key in ("artefacts", "refiner_artefacts", "runtime")):
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
                for picture in _keep(batch, pictures, facts, recipe, settings.output_dir, script.pipeline):
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
        told["quantization_psnr"] = _loss(pictures_of_first, base, refiner, request, image, first, console)
        console.say(f"{quantization}: PSNR {told['quantization_psnr']:.1f} dB against the same pictures without it")
    if flags.json:
        console.result(json.dumps(facts | {"images": made} | told))
    else:
        for picture in made:
            console.result(picture["path"])


@dataclass(frozen=True)
class Models:
    """Opens models, each with the VAE that goes into all, for one runtime."""

    script: Script
    settings: Settings
    runtime: Runtime
    vae: str | None
    console: Console
    stores: dict[Path, Store] = field(default_factory=dict)

    def preparer(self, version: Version, onnx_dir: Path, engine_dir: Path, config: str | None = None) -> Preparer:
        """What compiles a model; it is fetched where it is not there, and checked."""
        settings, console = self.settings, self.console
        graphs, engines = (
            self.stores.setdefault(folder, Store(folder, console.warn)) for folder in (onnx_dir, engine_dir)
        )
        folder = open_model(version, config, settings, graphs, console)
        if self.vae is not None:
            folder = with_vae(folder, _open_vae(self.vae, settings, console), graphs)
        return Preparer(
            open_checkpoint(folder, engines.fingerprints, self.script.families),
            self.runtime,
            graphs,
            engines,
            name=version.name,
            threads=settings.threads,
            batches=settings.dynamic_batches,
            pixels=settings.dynamic_sizes,
            verbose=console.verbose,
            job=console.job,
            detail=console.detail,
        )


def asked_runtime(
    flags: argparse.Namespace, recipe: dict[str, Any] | None, engine: str, settings: Settings, console: Console
) -> Runtime:
    """The runtime that is meant. Refuses flags that it has no use for."""
    options = settings.options
    if recipe:
        recorded = {name: recipe[name] for name in RECORDED if isinstance(recipe.get(name), str)}
        options = replace(options, quantization=recipe.get("quantization"), **recorded)
    runtime = _runtime(recipe["request"]["engine"] if recipe else engine, options, console)
    refuse_bounds(flags, [recipe["request"]["build"] if recipe else flags.build], runtime)
    if settings.threads and not runtime.threaded:
        raise InvalidRequest(f"--threads has no effect with {asked_as(runtime)}.")
    if recipe is None:
        refuse_build_flags(flags, runtime)
    return runtime


def say_what_ships(version: Version, flags: argparse.Namespace, script: Script, console: Console) -> None:
    """Without a model in the flags a small one runs, and this says so."""
    if version.embedded and not (flags.version or flags.model):
        console.say(f"model: {version.name}, which ships with Darkroom; a real one: --version {script.real}")


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
    kinds = [
        [each.checkpoint.vae_factor, *(each.checkpoint.vae.get(name) for name in ("latent_channels", "scaling_factor"))]
        for each in (base, refiner)
    ]
    if kinds[0] != kinds[1]:
        raise InvalidRequest(
            f"--enable-refiner: {refiner.name or refiner.checkpoint.folder} reads the latents of another VAE than "
            f"that of {base.name or base.checkpoint.folder}."
        )


def _prepare(
    base: Preparer, refiner: Preparer | None, request: Request, image: np.ndarray | None, once: bool
) -> tuple[Pipeline, dict[str, Any]]:
    """The pipeline, with its refiner if there is one, and what a recipe records of both.

    Where it runs `once`, the refiner is loaded when the first model is gone.
    """
    if refiner is not None:
        refiner.check(request.refining())  # before anything is built for the first model
    compiled = base.compile(request, base.stages_for(request, image is not None, decodes=refiner is None))
    refining_compiled = refiner.compile(request.refining()) if refiner is not None else None
    # Pillow takes a step's time to import: that passes while the engines load.
    Thread(target=_import_pictures).start()
    prepared = base.load(compiled, request, image)
    facts = {
        "revision": base.checkpoint.revision,
        "scheduler": prepared.scheduler,
        "artefacts": prepared.artefacts,
        "runtime": f"{base.runtime.name} {prepared.runtime_version}",
    } | base.runtime.options.recorded()
    if quantization := base.runtime.options.quantization:
        facts["quantization"] = quantization
    if refiner is not None and refining_compiled is not None:
        later = refiner.deferred(refining_compiled, request.refining())
        prepared.pipeline.refiner = later if once else later.load()
        facts |= {"refiner_revision": refiner.checkpoint.revision, "refiner_artefacts": refining_compiled.artefacts}
    return prepared.pipeline, facts


def _loss(
    pictures: np.ndarray,
    base: Preparer,
    refiner: Preparer | None,
    request: Request,
    image: np.ndarray | None,
    batch: Batch,
    console: Console,
) -> float:
    """PSNR in dB of quantized pictures (B, H, W, 3) against those that eager torch makes in the same precision."""
    from darkroom.pipeline.pictures import psnr, to_bytes

    plain = find_runtime("torch")
    with console.job("making the same without quantization"):
        pipeline, _ = _prepare(
            base.on(plain), refiner and refiner.on(plain), replace(request, engine=plain.name), image, once=True
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


def _runtime(engine: str, options: Options, console: Console) -> Runtime:
    """The runtime that is meant. A line from a tutorial still makes its picture where there is no NVIDIA GPU."""
    if engine == "auto":
        engine = automatic(options)
        if options.use_cuda_graph and not has_cuda_graphs(engine, options):
            console.warn(f"--use-cuda-graph does nothing here: the engine is {engine}, without CUDA.")
            options = replace(options, use_cuda_graph=False)
    return find_runtime(engine, options)


def refuse_bounds(flags: argparse.Namespace, builds: list[str | None], runtime: Runtime) -> None:
    """Raises `InvalidRequest` for bounds of free sizes where nothing is free, or free means any."""
    for name, free in (("dynamic_batches", ("dynamic-batch", "dynamic-shape")), ("dynamic_sizes", ("dynamic-shape",))):
        if getattr(flags, name) is None:
            continue
        flag = f"--{name.replace('_', '-')}"
        if not runtime.bounded:
            raise InvalidRequest(f"{flag} has no effect with --engine {runtime.name}, whose free sizes are any.")
        if not set(builds) & set(free):
            raise InvalidRequest(f"{flag} has no effect without {' or '.join(f'--build-{each}' for each in free)}.")


def open_model(version: Version, config: str | None, settings: Folders, graphs: Store, console: Console) -> Path:
    """The model's folder: fetched from the hub, or unpacked from a single file, where it is not one already.

    `config` says where a single file's configuration is, None for the published one.
    """

    def fetched(repository: str, weights: bool, typed: bool) -> Path:
        with console.job(f"fetching {repository}"):
            return fetch(repository, settings.hf_token, settings.framework_model_dir, weights, typed)

    if not version.embedded:
        return fetched(version.source, weights=True, typed=version.name == version.source)
    if not os.path.isfile(version.source):
        return Path(version.source)
    file = Path(version.source)
    check_single_file(file)
    typed = config is not None
    if config is None:
        # Two models of one architecture may differ in what their configurations say alone.
        config = published_config(file)
        console.say(f"{file.name}: taken for a model like {config}; --config names another")
    described = fetched(config, weights=False, typed=typed) if repository_of(config) else Path(config)
    with console.job(f"unpacking {file.name}"):
        return unpacked(file, described, graphs, verbose=console.verbose)


def _open_vae(source: str, settings: Folders, console: Console) -> Path:
    if repository := repository_of(source):
        with console.job(f"fetching {repository}"):
            return check_vae(fetch_vae(repository, settings.hf_token, settings.framework_model_dir))
    return check_vae(Path(source))


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
    """Ahead of those who need them, who will say what is missing."""
    with suppress(ImportError):
        importlib.import_module("darkroom.pipeline.pictures")


def _keep(
    batch: Batch,
    pictures: np.ndarray,
    facts: dict[str, Any],
    recipe: dict[str, Any] | None,
    folder: Path,
    pipeline: str,
) -> Iterator[dict[str, Any]]:
    """Saves the pictures of a batch, one by one; when a recipe is replayed, the one that it is for."""
    from darkroom.pipeline.pictures import save, to_bytes

    for slot, (prompt, seed, picture) in enumerate(zip(batch.prompts, batch.seeds, pictures, strict=True)):
        image = batch.first + slot + 1
        if recipe is not None and image != recipe["image"]:
            continue
        pixels = to_bytes(picture, f"image {image} (seed {seed})")
        its_own = {"image": image, "seed": seed, "slot": slot, "prompt": prompt}
        path = save(pixels, folder, pipeline, facts | its_own)
        yield {"path": str(path), "image": image, "seed": seed, "prompt": prompt}


def _warn_of_cuts(pipeline: Pipeline, request: Request, console: Console) -> None:
    tokenizer = pipeline.encoders[0].tokenizer
    texts = list(dict.fromkeys(request.prompts))
    if request.guided and request.negative_prompt:
        texts.append(request.negative_prompt)
    for cut in tokenizer.encode(texts).cut:
        if cut:
            console.warn(told_of_cut(cut, tokenizer.context))
