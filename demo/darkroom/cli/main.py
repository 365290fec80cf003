"""The one main that every script calls."""

import json
import sys
from pathlib import Path
from typing import Any

from darkroom import __version__
from darkroom.catalog import TXT2IMG, Version, find_version
from darkroom.checkpoint import Checkpoint, open_checkpoint
from darkroom.cli.console import Console
from darkroom.cli.flags import DEFAULT_OPSET, OPSETS, txt2img_parser
from darkroom.cli.settings import Settings, make_folder
from darkroom.errors import AskedWrongly, DarkroomError

PIPELINE = "txt2img"

REPLAYED = (
    "negative_prompt", "height", "width", "denoising_steps", "guidance_scale", "scheduler", "seed", "clip_skip",
    "batch_size", "batch_count", "version", "engine", "precision", "build", "onnx_opset",
)
"""Flags that a recipe fixes, and that are refused beside --recipe."""


def txt2img(arguments: list[str] | None = None, program: str = "demo_txt2img.py") -> int:
    """Text to image. Returns the exit code: 0 done, 1 failed, 2 asked wrongly."""
    try:
        flags = txt2img_parser(program, list(TXT2IMG)).parse_args(arguments)
        _run(flags)
    except DarkroomError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{program}: stopped; nothing half-made was kept.", file=sys.stderr)
        return 130
    return 0


def _run(flags) -> None:
    from darkroom.engines import find_runtime
    from darkroom.engines.store import Store
    from darkroom.prepare import Preparer
    from darkroom.timing import StageClock, medians, table, throughput

    console = Console(flags.verbose, flags.quiet, flags.json)
    recipe = _recipe(flags) if flags.recipe else None
    settings = Settings.from_flags(flags)
    version = _version(flags, recipe)
    # What is wrong with the request is said before a model is fetched or opened for it.
    request = _request(flags, version, None) if recipe is None else _replayed(recipe)
    runtime = find_runtime(request.engine)
    graphs, engines = Store(settings.onnx_dir), Store(settings.engine_dir)
    checkpoint = _open(version, settings, engines, console)
    if recipe is None:
        request = _request(flags, version, checkpoint, engine=runtime.name)
    elif recipe.get("revision") != checkpoint.revision:
        raise AskedWrongly(
            f"--recipe {flags.recipe}: the picture was made with other weights than those in {checkpoint.folder}."
            + ("" if request.model else " Name the model's folder with --model.")
        )
    preparer = Preparer(checkpoint, runtime, graphs, engines, settings.threads, flags.verbose, console.job)
    prepared = preparer.prepare(request)
    engines.fingerprints.remember()
    graphs.fingerprints.remember()
    common = {
        "darkroom": __version__, "request": request.as_json(), "revision": checkpoint.revision,
        "scheduler": prepared.scheduler, "artefacts": prepared.artefacts,
        "runtime": f"{runtime.name} {prepared.runtime_version}",
    }
    if recipe is not None and {key: recipe.get(key) for key in ("artefacts", "runtime")} != {
        key: common[key] for key in ("artefacts", "runtime")
    }:
        console.warn(f"the picture was made by {recipe.get('runtime')} and other engines; this one's pixels may differ.")
    _warn_of_cuts(prepared.pipeline.tokenizer, request, console)

    batches = list(request.batches())
    if recipe is not None:
        batches = [batch for batch in batches if batch.first <= recipe["image"] - 1 < batch.first + request.batch_size]
    if flags.seed is None and recipe is None:
        console.say(f"seed: {request.seed}")
    if settings.num_warmup_runs:
        with console.job("warming up", settings.num_warmup_runs) as advance:
            for _ in range(settings.num_warmup_runs):
                prepared.pipeline.run(batches[0], StageClock())
                advance()
        prepared.pipeline.forget()

    make_folder(settings.output_dir)
    clocks, made = [], []
    with console.job("denoising", len(batches) * len(prepared.pipeline.table)) as advance:
        for batch in batches:
            clock = StageClock()
            pictures = prepared.pipeline.run(batch, clock, advance)
            clocks.append(clock)
            made += _keep(batch, pictures, common, recipe, settings.output_dir)
    if flags.json:
        result = {
            "images": made, "request": request.as_json(), "revision": checkpoint.revision,
            "runtime": common["runtime"], "artefacts": prepared.artefacts, "unet_calls": clocks[0].unet_calls,
            "milliseconds": medians(clocks), "images_per_second": throughput(clocks, request.batch_size),
        }
        console.say(table(clocks, request.batch_size))
        console.result(json.dumps(result))
    else:
        console.say(table(clocks, request.batch_size))
        for picture in made:
            console.result(picture["path"])


def _keep(batch, pictures, common: dict[str, Any], recipe: dict[str, Any] | None, folder: Path) -> list[dict[str, Any]]:
    """Saves the pictures of a batch (the one that is remade, when a recipe is replayed)."""
    from darkroom.pictures import save, to_bytes

    kept = []
    for slot, (prompt, seed, picture) in enumerate(zip(batch.prompts, batch.seeds, pictures, strict=True)):
        image = batch.first + slot + 1
        if recipe is not None and image != recipe["image"]:
            continue
        pixels = to_bytes(picture, f"image {image} (seed {seed})")
        own = common | {"image": image, "seed": seed, "slot": slot, "prompt": prompt}
        path = save(pixels, folder, PIPELINE, own)
        kept.append({"path": str(path), "image": image, "seed": seed, "prompt": prompt})
    return kept


def _recipe(flags) -> dict[str, Any]:
    from darkroom.pictures import read_recipe

    if flags.prompt:
        raise AskedWrongly("a prompt cannot be given beside --recipe, which holds its own.")
    for name in REPLAYED:
        if getattr(flags, name) is not None:
            flag = "--build-..." if name == "build" else f"--{name.replace('_', '-')}"
            raise AskedWrongly(f"{flag} cannot be given beside --recipe, which fixes it.")
    return read_recipe(Path(flags.recipe))


def _replayed(recipe: dict[str, Any]):
    from darkroom.request import Request

    return Request.from_json(recipe["request"])


def _version(flags, recipe: dict[str, Any] | None) -> Version:
    """The model that is meant: by its version name, its folder, its hub repository, or a recipe's record of it."""
    from darkroom.hub import REPOSITORY

    if flags.model is not None and flags.version is not None:
        raise AskedWrongly("--model and --version cannot be given together: each names the model.")
    if flags.model is not None:
        if Path(flags.model).is_dir() or not REPOSITORY.fullmatch(flags.model):
            return Version("", flags.model, 0, embedded=True)
        return Version(flags.model, flags.model, 0)
    if recipe is not None:
        name = recipe["request"].get("model")
        if not name:
            raise AskedWrongly(f"--recipe {flags.recipe}: made with a model folder; name it with --model.")
        return TXT2IMG[name] if name in TXT2IMG else Version(name, name, 0)
    return find_version(flags.version or next(iter(TXT2IMG)), TXT2IMG)


def _open(version: Version, settings: Settings, engines, console: Console) -> Checkpoint:
    if version.embedded:
        folder = Path(version.source)
    else:
        from darkroom.hub import fetch

        with console.job(f"fetching {version.source}"):
            folder = fetch(version.source, settings.hf_token, settings.framework_model_dir)
    return open_checkpoint(folder, engines.fingerprints)


def _request(flags, version: Version, checkpoint: Checkpoint | None, engine: str | None = None):
    """The request that the flags make. Without a checkpoint sizes and seed are stand-ins, for an early check."""
    from darkroom.request import Request, draw_seed

    if flags.seed is None and checkpoint is not None:
        seed = draw_seed()
    else:
        seed = 0 if flags.seed is None else flags.seed
    size = version.size or (checkpoint.default_size if checkpoint else 512)
    opset = _or(flags.onnx_opset, DEFAULT_OPSET)
    if opset not in OPSETS:
        raise AskedWrongly(f"--onnx-opset must be from {OPSETS[0]} to {OPSETS[-1]}, not {opset}.")
    return Request(
        model=version.name or None,
        prompts=tuple(flags.prompt),
        negative_prompt=_or(flags.negative_prompt, ""),
        batch_size=_or(flags.batch_size, 1),
        batch_count=_or(flags.batch_count, 1),
        height=_or(flags.height, size),
        width=_or(flags.width, size),
        denoising_steps=_or(flags.denoising_steps, version.steps),
        guidance_scale=_or(flags.guidance_scale, version.guidance_scale),
        clip_skip=_or(flags.clip_skip, 0),
        scheduler=flags.scheduler,
        seed=seed,
        engine=engine or _or(flags.engine, "auto"),
        precision=_precision(flags.precision),
        build=_or(flags.build, "static"),
        onnx_opset=opset,
    )


def _precision(asked: str | None) -> str:
    from darkroom.engines.runtime import PRECISIONS
    from darkroom.errors import near_matches

    if asked is not None and asked not in PRECISIONS:
        raise AskedWrongly(f"--precision {asked!r} is not known here.{near_matches(asked, list(PRECISIONS))} Known: {', '.join(PRECISIONS)}.")
    return asked or "fp32"


def _warn_of_cuts(tokenizer, request, console: Console) -> None:
    texts = [*dict.fromkeys(request.prompts), *([request.negative_prompt] if request.guided else [])]
    for cut in tokenizer.encode(texts).cut:
        if cut:
            console.warn(f"the prompt is longer than the {tokenizer.context} tokens CLIP reads; this was cut: {cut!r}")


def _or(value, default):
    return default if value is None else value
