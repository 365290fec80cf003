"""The main of build_triton_repository.py: a model, and all that serving it takes, as Triton wants to have it."""

import argparse
import shlex
from dataclasses import fields, replace
from pathlib import Path

from darkroom.checkpoint.catalog import SCRIPTS, TURBO, TXT2IMG, Script, Version, find_version
from darkroom.checkpoint.folder import open_checkpoint
from darkroom.cli.console import Console
from darkroom.cli.exit import exit_code
from darkroom.cli.flags import DEFAULT_OPSET, add_place_arguments, add_tensorrt_arguments
from darkroom.cli.from_flags import unnamed
from darkroom.cli.opening import open_model
from darkroom.cli.parser import Parser, named
from darkroom.cli.prebuild import pixel_size
from darkroom.cli.settings import artefact_folders, bounds_of, home, options_of, stores_of
from darkroom.contract import PRECISIONS
from darkroom.engines import automatic, find_runtime
from darkroom.engines.runtime import ON_NVIDIA, asked_as
from darkroom.errors import InvalidRequest, near_matches
from darkroom.prepare import BATCHES, Preparer
from darkroom.request import BUILDS, Request
from darkroom.schedule import SCHEDULERS
from darkroom.serving.planning import batches_for, every_schedule, planned
from darkroom.serving.service import PLAN, Limits, Plan
from darkroom.triton.config import CONFIG, Instances, Parameters, changed_text, config_text, ensemble_texts, read_config
from darkroom.triton.environment import RUNTIME_PACKAGES, Installed, installed
from darkroom.triton.repository import VERSION, Contents, tree, write_ensemble, write_text, write_version
from darkroom.triton.server import Address, command

PROGRAM = "build_triton_repository.py"
REPOSITORY = "diffusion-models"
"""What tutorials call the repository."""

ENVIRONMENTS = ".triton"
"""Where the server's environment is."""

ALIASES = {"stable_diffusion_xl": "xl-1.0", "stable_diffusion_1_5": "1.5"}
"""What tutorials call models."""

MAX_BATCH_SIZE = 4
GUIDANCE = {"on": (True,), "off": (False,), "both": (True, False)}
FORMATS = ("png", "jpeg")
OF_CONFIG = tuple(field.name for field in fields(Parameters) if field.name != "version")


def served() -> dict[str, tuple[Script, Version]]:
    """Every model that can be served by its name, and the script that replays its pictures."""
    return {
        name: (script, version)
        for script in reversed(SCRIPTS.values())
        if not script.from_image
        for name, version in script.versions.items()
    }


def parser() -> Parser:
    flags = Parser(
        prog=PROGRAM,
        allow_abbrev=False,
        description="Writes a model repository for Triton Inference Server: engines, schedules and configuration.",
    )
    model = flags.add_argument_group("the model")
    model.add_argument(
        "--model", metavar="NAME", required=True, help=f"what it is served as: {', '.join((*ALIASES, *served()))}"
    )
    model.add_argument("--version", metavar="NAME", help="the version that is served; default: what --model says")
    model.add_argument(
        "--model-path", type=named, metavar="PATH_OR_REPO", help="another model: its folder or hub repository"
    )
    model.add_argument("--hf-token", metavar="TOKEN", help="for gated models on the hub; default: $HF_TOKEN")
    model.add_argument("--framework-model-dir", type=named, metavar="DIR", help="download models here")
    engines = flags.add_argument_group("the engines")
    engines.add_argument(
        "--max-batch-size",
        type=int,
        metavar="N",
        help=f"images that are made together; default: what {CONFIG} says, {MAX_BATCH_SIZE} for a new one",
    )
    engines.add_argument(
        "--batches",
        nargs="+",
        type=int,
        metavar="B",
        help="batches that UNets are built for, the smallest that fits is used; default: 1, 2, 4 ... and N, or one "
        "UNet for any where it is large",
    )
    engines.add_argument("--build-dynamic-batch", action="store_true", help="one UNet for any batch")
    engines.add_argument(
        "--build-dynamic-shape", action="store_true", help="engines for any batch and size, up to max_pixels"
    )
    engines.add_argument(
        "--size", nargs="+", type=pixel_size, metavar="HxW", help="sizes that can be asked for; default: the model's"
    )
    engines.add_argument(
        "--guidance", choices=list(GUIDANCE), help="what UNets are built for; default: what the model is used with"
    )
    engines.add_argument(
        "--schedulers", nargs="+", metavar="NAME", help=f"that can be asked for; default: all, {', '.join(SCHEDULERS)}"
    )
    engines.add_argument("--engine", default="auto", metavar="NAME", help=f"auto or {', '.join(RUNTIME_PACKAGES)}")
    add_place_arguments(engines)
    engines.add_argument("--precision", default=PRECISIONS[0], metavar="NAME", help=", ".join(PRECISIONS))
    engines.add_argument("--onnx-opset", type=int, metavar="N", help=f"default {DEFAULT_OPSET}")
    add_tensorrt_arguments(flags)
    config = flags.add_argument_group(f"what {CONFIG} says")
    config.add_argument("--instances", type=int, metavar="N", help="copies that run, on each GPU if there are any")
    config.add_argument("--gpus", nargs="+", type=int, metavar="I", help="the GPUs that it runs on; default: the CPU")
    words = {
        "steps": "of a request that names none",
        "guidance_scale": "of a request that names none",
        "scheduler": "of a request that names none",
        "seed": "of a request that names none; default: drawn",
        "height": "of a request that names none",
        "width": "of a request that names none",
        "max_steps": f"a request's most; default {Limits.steps}",
        "max_images": f"a request's most; default {Limits.images}, or N where that is more",
        "max_prompt_bytes": f"a prompt's most; default {Limits.prompt_bytes}",
        "max_pixels": f"of a free side, the most; default {Limits.pixels}",
        "queue": "images that may wait; more are refused",
        "threads": "CPU threads",
    }
    for name in OF_CONFIG:
        config.add_argument(f"--{name.replace('_', '-')}", metavar="X", help=words[name])
    ensemble = flags.add_argument_group("an ensemble around the model")
    ensemble.add_argument(
        "--ensemble",
        action="store_true",
        help="also NAME_ensemble: prompts are cleaned up, and pictures come back as files",
    )
    ensemble.add_argument("--encode", choices=FORMATS, help=f"the files' format; default {FORMATS[0]}")
    ensemble.add_argument("--upscale", type=int, metavar="N", help="pictures N times as large; default 1")
    folders = flags.add_argument_group("folders")
    folders.add_argument("--model-repository", type=named, metavar="DIR", help=f"default: {REPOSITORY}")
    folders.add_argument("--onnx-dir", type=named, metavar="DIR", help="ONNX graphs; default: onnx")
    folders.add_argument("--engine-dir", type=named, metavar="DIR", help="engines and schedules; default: engines")
    folders.add_argument(
        "--environment-dir", type=named, metavar="DIR", help=f"the server's environment; default: {ENVIRONMENTS}"
    )
    folders.add_argument("--copy", action="store_true", help="copy artefacts, where hard links would do")
    flags.add_argument("--verbose", action="store_true", help="also what is loaded, built and reused")
    return flags


def run(arguments: list[str] | None = None) -> int:
    """Runs `build_triton_repository.py`. Returns the exit code: 0 done, 1 failed, 2 an invalid request."""
    return exit_code(PROGRAM, lambda: _build(parser().parse_args(arguments)))


def _build(flags: argparse.Namespace) -> None:
    console = Console(flags.verbose)
    script, version = _asked_model(flags)
    repository = Path(flags.model_repository) if flags.model_repository else home() / REPOSITORY
    folder = repository / flags.model
    file = folder / CONFIG
    config = read_config(file) if file.exists() else None
    changes = {name: str(getattr(flags, name)) for name in OF_CONFIG if getattr(flags, name) is not None}
    given = {name: value.string_value for name, value in config.parameters.items()} if config else {}
    parameters = Parameters.read(given | changes)
    slots = flags.max_batch_size if flags.max_batch_size is not None else config.max_batch_size if config else None
    slots = MAX_BATCH_SIZE if slots is None else slots
    if slots < 1:
        raise InvalidRequest(f"--max-batch-size must be 1 or more, not {slots}.")
    if "max_images" not in given | changes:
        parameters = replace(parameters, max_images=max(parameters.max_images, slots))
    for name in ("encode", "upscale"):
        if getattr(flags, name) is not None and not flags.ensemble:
            raise InvalidRequest(f"--{name} has no effect without --ensemble.")
    if flags.upscale is not None and flags.upscale < 1:
        raise InvalidRequest(f"--upscale must be 1 or more, not {flags.upscale}.")
    instances = _instances(flags)
    free = [name for name in ("build_dynamic_batch", "build_dynamic_shape") if getattr(flags, name)]
    if len(free) + bool(flags.batches) > 1:
        raise InvalidRequest("--batches, --build-dynamic-batch and --build-dynamic-shape say the same: give one.")
    if flags.size and flags.build_dynamic_shape:
        raise InvalidRequest("--size has no effect with --build-dynamic-shape, which takes any.")
    for name in flags.schedulers or ():
        if name not in SCHEDULERS:
            known = ", ".join(SCHEDULERS)
            raise InvalidRequest(
                f"--schedulers {name!r} is not known here.{near_matches(name, list(SCHEDULERS))} Known: {known}."
            )

    engine = automatic(options_of(flags)) if flags.engine == "auto" else flags.engine
    runtime = find_runtime(engine, options_of(flags))
    if engine not in RUNTIME_PACKAGES:
        raise InvalidRequest(f"--engine {engine} is not served by Triton here: {', '.join(RUNTIME_PACKAGES)} are.")
    if flags.gpus and engine != "tensorrt" and runtime.options.provider not in ON_NVIDIA:
        raise InvalidRequest(f"--gpus are NVIDIA's, and have no effect with {asked_as(runtime)}.")
    places = artefact_folders(flags)
    graphs, engines = stores_of(places, console)
    request = _request(flags, version, parameters, engine, 512)  # what is wrong is said before a model is fetched
    source = open_model(version, None, places, graphs, console)
    preparer = Preparer(
        open_checkpoint(source, engines.fingerprints, script.families),
        runtime,
        graphs,
        engines,
        name=version.name,
        batches=bounds_of(flags.dynamic_batches, "--dynamic-batches") or (BATCHES[0], BATCHES[1], max(slots, 1)),
        pixels=bounds_of(flags.dynamic_sizes, "--dynamic-sizes"),
        verbose=flags.verbose,
        job=console.job,
        detail=console.detail,
    )
    request = _request(flags, version, parameters, engine, version.size or preparer.checkpoint.default_size)
    sizes = list(dict.fromkeys([(request.height, request.width), *(flags.size or ())]))
    guided = GUIDANCE[flags.guidance or ("on" if preparer.traits.guided(request) else "off")]
    if guided != (False,) and preparer.traits.embeds_guidance:
        raise InvalidRequest("--guidance has no effect: this model's UNet is told the guidance scale.")
    if preparer.traits.guided(request) and True not in guided:
        raise InvalidRequest(f"--guidance off: requests get the guidance scale {request.guidance_scale:g} by default.")
    batches = _batches(flags, slots, preparer)
    plan = planned(
        preparer,
        request,
        script.program,
        sizes,
        batches,
        guided,
        every_schedule(preparer, request, sizes, parameters.max_steps, flags.schedulers),
        Limits(),
    )
    contents = Contents(
        version.name or source.name,
        plan,
        slots,
        tuple(dict.fromkeys(_graphs(preparer, request, sizes, guided))),
        source.absolute(),
        flags.copy,
    )
    if config is None:
        parameters = replace(
            parameters,
            version=version.name or None,
            steps=request.denoising_steps,
            guidance_scale=request.guidance_scale,
            scheduler=request.scheduler,
            height=request.height,
            width=request.width,
        )
        text = config_text(flags.model, slots, instances or Instances(), parameters)
    else:
        text = changed_text(config, slots, instances, changes)
    with console.job("writing the model repository"):
        version_folder = write_version(folder, contents)
        if config is None or changes or instances or flags.max_batch_size is not None:
            write_text(file, text)
        if flags.ensemble:
            texts = ensemble_texts(flags.model, slots, flags.upscale or 1, flags.encode or FORMATS[0])
            write_ensemble(repository, flags.model, texts)
    there = shlex.quote(str(repository))
    console.say("\n".join(tree(folder)))
    models = [flags.model, *(texts if flags.ensemble else ())]
    if flags.ensemble:
        console.say(f"and beside it {', '.join(models[1:])}")
    console.say("")
    console.say("Serve it with:")
    console.say(f"  python demo/serve_triton.py --model-repository {there} --model {' '.join(models)}")
    console.say("or by hand, with nobody who checks its requests or starts it again:")
    parts = environment(flags.environment_dir, repository, [flags.model], console)
    line = command(parts.server, parts.backends, repository.absolute(), models, Address().flags())
    console.say(f"  {parts.line(line)}")
    console.result(str(version_folder.parent))


def environment(root: str | None, repository: Path, models: list[str], console: Console) -> Installed:
    """Triton, with what the engines of these models need."""
    runtimes = {
        Plan.read(file).request.engine for model in models if (file := repository / model / VERSION / PLAN).exists()
    }
    with console.job("the server's environment") as line:
        return installed(Path(root) if root else home() / ENVIRONMENTS, tuple(sorted(runtimes)), line.show)


def _asked_model(flags: argparse.Namespace) -> tuple[Script, Version]:
    known = served()
    if flags.model_path is not None:
        if flags.version is not None:
            raise InvalidRequest("--version and --model-path cannot be given together: each names the model.")
        near = known.get(ALIASES.get(flags.model, flags.model))
        script = near[0] if near else TURBO  # which takes any family
        version = unnamed(flags.model_path, (script if near else TXT2IMG).unnamed)
        return script, version
    name = flags.version or ALIASES.get(flags.model, flags.model)
    if flags.version is None and name not in known:
        near = near_matches(flags.model, [*ALIASES, *known])
        raise InvalidRequest(
            f"--model {flags.model!r} is not known here.{near} Any name goes with --version NAME or --model-path."
        )
    version = find_version(name, {name: version for name, (_, version) in known.items()})
    return known[version.name][0], version


def _instances(flags: argparse.Namespace) -> Instances | None:
    if flags.instances is None and flags.gpus is None:
        return None
    if flags.instances is not None and flags.instances < 1:
        raise InvalidRequest(f"--instances must be 1 or more, not {flags.instances}.")
    if any(gpu < 0 for gpu in flags.gpus or ()):
        raise InvalidRequest("--gpus are numbers from 0.")
    return Instances("gpu" if flags.gpus else "cpu", flags.instances or 1, tuple(flags.gpus or ()))


def _request(flags: argparse.Namespace, version: Version, parameters: Parameters, engine: str, size: int) -> Request:
    """What a request is by default."""
    height, width = flags.size[0] if flags.size else (size, size)
    return Request(
        model=version.name or None,
        prompts=("a picture",),
        negative_prompt=None,
        batch_size=1,
        batch_count=1,
        height=height if parameters.height is None else parameters.height,
        width=width if parameters.width is None else parameters.width,
        denoising_steps=version.steps if parameters.steps is None else parameters.steps,
        guidance_scale=version.guidance_scale if parameters.guidance_scale is None else parameters.guidance_scale,
        clip_skip=0,
        scheduler=parameters.scheduler or version.scheduler,
        seed=parameters.seed or 0,
        engine=engine,
        precision=flags.precision,
        build=BUILDS[2] if flags.build_dynamic_shape else BUILDS[0],
        onnx_opset=DEFAULT_OPSET if flags.onnx_opset is None else flags.onnx_opset,
    )


def _batches(flags: argparse.Namespace, slots: int, preparer: Preparer) -> list[int | None]:
    """The batches that UNets are built for."""
    if flags.build_dynamic_batch or flags.build_dynamic_shape:
        return [None]
    if flags.batches:
        if min(flags.batches) < 1:
            raise InvalidRequest(f"--batches must be 1 or more, not {min(flags.batches)}.")
        return sorted(set(flags.batches))
    return batches_for(preparer, slots)


def _graphs(preparer: Preparer, request: Request, sizes: list[tuple[int, int]], guided: tuple[bool, ...]) -> list[Path]:
    """The folders of the ONNX graphs that the engines were built from; none for engines that run the model as it is."""
    if not preparer.runtime.compiles:
        return []
    found = []
    for height, width in sizes:
        for with_guidance in guided:
            scale = max(request.guidance_scale, 2.0) if with_guidance else 1.0
            found += preparer.export(replace(request, height=height, width=width, guidance_scale=scale))
    return found
