"""The main of build_triton_repository.py: a model, and all that serving it takes, as Triton wants to have it."""

import argparse
import shlex
from dataclasses import fields, replace
from pathlib import Path

from darkroom.checkpoint.catalog import TURBO, TXT2IMG, Script, Version, find_version, served
from darkroom.cli.console import Console
from darkroom.cli.exit import exit_code
from darkroom.cli.flags import add_flags, refuse_below
from darkroom.cli.from_flags import PROVISIONAL_SIZE, make_request, unnamed
from darkroom.cli.opening import Models, refuse_inpainting
from darkroom.cli.parser import Parser, named
from darkroom.cli.settings import artefact_folders, bounds_of, home, options_of
from darkroom.contract import AUTO
from darkroom.engines import automatic, find_runtime
from darkroom.engines.runtime import ON_NVIDIA, asked_as
from darkroom.errors import InvalidRequest, check_known, near_matches
from darkroom.flags import BUILDS, TRITON, option
from darkroom.prepare import BATCHES, Preparer
from darkroom.request import Request
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


def parser() -> Parser:
    flags = Parser(
        prog=PROGRAM,
        allow_abbrev=False,
        description="Writes a model repository for Triton Inference Server: engines, schedules and configuration.",
    )
    model = flags.add_argument_group("what is served")
    model.add_argument(
        "--model", metavar="NAME", required=True, help=f"what it is served as: {', '.join((*ALIASES, *served()))}"
    )
    model.add_argument("--version", metavar="NAME", help="the version that is served; default: that of --model")
    model.add_argument(
        "--model-path", type=named, metavar="PATH_OR_REPO", help="another model: its folder or hub repository"
    )
    served_with = flags.add_argument_group("what requests may ask for")
    served_with.add_argument(
        "--max-batch-size",
        type=int,
        metavar="N",
        help=f"images that are made together; default: what {CONFIG} says, {MAX_BATCH_SIZE} for a new one",
    )
    served_with.add_argument(
        "--batches",
        nargs="+",
        type=int,
        metavar="B",
        help="batches that UNets are built for, the smallest that fits is used; default: 1, 2, 4 ... and N, or one "
        "UNet for any where it is large",
    )
    served_with.add_argument("--build-dynamic-batch", action="store_true", help="one UNet for any batch")
    served_with.add_argument(
        "--build-dynamic-shape", action="store_true", help="engines for any batch and size, up to max_pixels"
    )
    served_with.add_argument(
        "--guidance", choices=list(GUIDANCE), help="what UNets are built for; default: what the model is used with"
    )
    served_with.add_argument("--schedulers", nargs="+", metavar="NAME", help="default: all, " + ", ".join(SCHEDULERS))
    add_flags(flags, TRITON, engines=", ".join(RUNTIME_PACKAGES))
    flags.set_defaults(engine="auto", precision=AUTO)
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
        config.add_argument(option(name), metavar="X", help=words[name])
    ensemble = flags.add_argument_group("an ensemble around the model")
    ensemble.add_argument(
        "--ensemble",
        action="store_true",
        help="also NAME_ensemble: prompts are cleaned up, and pictures come back as files",
    )
    ensemble.add_argument("--encode", choices=FORMATS, help=f"the files' format; default {FORMATS[0]}")
    ensemble.add_argument("--upscale", type=int, metavar="N", help="pictures N times as large; default 1")
    folders = flags.add_argument_group("where it is written")
    folders.add_argument("--model-repository", type=named, metavar="DIR", help=f"default: {REPOSITORY}")
    folders.add_argument(
        "--environment-dir", type=named, metavar="DIR", help=f"the server's environment; default: {ENVIRONMENTS}"
    )
    folders.add_argument("--copy", action="store_true", help="copy artefacts, where hard links would do")
    return flags


def run(arguments: list[str] | None = None) -> int:
    """Runs `build_triton_repository.py`. Returns the exit code: 0 done, 1 failed, 2 an invalid request."""
    return exit_code(PROGRAM, lambda: _build(parser().parse_args(arguments)))


def _build(flags: argparse.Namespace) -> None:
    console = Console(flags.verbose)
    script, version = _asked_model(flags)
    refuse_below(flags, max_batch_size=1, upscale=1, instances=1, batches=1)
    repository = Path(flags.model_repository) if flags.model_repository else home() / REPOSITORY
    folder = repository / flags.model
    file = folder / CONFIG
    config = read_config(file) if file.exists() else None
    changes = {name: str(getattr(flags, name)) for name in OF_CONFIG if getattr(flags, name) is not None}
    given = {name: value.string_value for name, value in config.parameters.items()} if config else {}
    parameters = Parameters.read(given | changes)
    slots = flags.max_batch_size if flags.max_batch_size is not None else config.max_batch_size if config else None
    slots = MAX_BATCH_SIZE if slots is None else slots
    if "max_images" not in given | changes:
        parameters = replace(parameters, max_images=max(parameters.max_images, slots))
    for name in ("encode", "upscale"):
        if getattr(flags, name) is not None and not flags.ensemble:
            raise InvalidRequest(f"--{name} has no effect without --ensemble.")
    instances = _instances(flags)
    free = [name for name in ("build_dynamic_batch", "build_dynamic_shape") if getattr(flags, name)]
    if len(free) + bool(flags.batches) > 1:
        raise InvalidRequest("--batches, --build-dynamic-batch and --build-dynamic-shape exclude each other: pass one.")
    if flags.size and flags.build_dynamic_shape:
        raise InvalidRequest("--size has no effect with --build-dynamic-shape, which takes any.")
    for name in flags.schedulers or ():
        check_known("--schedulers", name, SCHEDULERS)

    engine = automatic(options_of(flags)) if flags.engine == "auto" else flags.engine
    runtime = find_runtime(engine, options_of(flags))
    if engine not in RUNTIME_PACKAGES:
        raise InvalidRequest(f"--engine {engine} is not served by Triton here: {', '.join(RUNTIME_PACKAGES)} are.")
    if flags.gpus and engine != "tensorrt" and runtime.options.provider not in ON_NVIDIA:
        raise InvalidRequest(f"--gpus are NVIDIA's, and have no effect with {asked_as(runtime)}.")
    _request(flags, version, parameters, engine, PROVISIONAL_SIZE)  # refused before a model is fetched
    models = Models(
        families=script.families,
        folders=artefact_folders(flags),
        runtime=runtime,
        console=console,
        batches=bounds_of(flags, "dynamic_batches") or (BATCHES[0], BATCHES[1], max(slots, 1)),
        pixels=bounds_of(flags, "dynamic_sizes"),
    )
    preparer = models.preparer(version)
    refuse_inpainting(preparer, script)
    source = preparer.checkpoint.folder
    request = _request(flags, version, parameters, engine, version.size or preparer.checkpoint.default_size)
    sizes = list(dict.fromkeys([(request.height, request.width), *(flags.size or ())]))
    guided = GUIDANCE[flags.guidance or ("on" if preparer.traits.guided(request) else "off")]
    if guided != (False,) and preparer.traits.embeds_guidance:
        raise InvalidRequest("--guidance has no effect: this model's UNet takes the guidance scale as an input.")
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
    names = [flags.model, *(texts if flags.ensemble else ())]
    if flags.ensemble:
        console.say(f"and beside it {', '.join(names[1:])}")
    console.say("")
    console.say("Serve it with:")
    console.say(f"  python demo/serve_triton.py --model-repository {there} --model {' '.join(names)}")
    console.say("or by hand, where its requests are not checked and it is not started again:")
    parts = environment(flags.environment_dir, repository, [flags.model], console)
    line = command(parts.server, parts.backends, repository.absolute(), names, Address().flags())
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
    if any(gpu < 0 for gpu in flags.gpus or ()):
        raise InvalidRequest("--gpus are numbers from 0.")
    return Instances("gpu" if flags.gpus else "cpu", flags.instances or 1, tuple(flags.gpus or ()))


def _request(flags: argparse.Namespace, version: Version, parameters: Parameters, engine: str, own: int) -> Request:
    """What a request is by default."""
    size = flags.size[0] if flags.size else (own, own)
    build = BUILDS[2] if flags.build_dynamic_shape else BUILDS[0]
    values = vars(parameters) | {"denoising_steps": parameters.steps, "seed": parameters.seed, "build": build}
    values |= {name: getattr(flags, name) for name in ("precision", "onnx_opset")}
    return make_request(values, version, size, engine=engine)


def _batches(flags: argparse.Namespace, slots: int, preparer: Preparer) -> list[int | None]:
    """The batches that UNets are built for."""
    if flags.build_dynamic_batch or flags.build_dynamic_shape:
        return [None]
    if flags.batches:
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
