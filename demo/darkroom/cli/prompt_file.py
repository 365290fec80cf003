"""The mode of --prompts: what its flags and rows request, and the engines that it takes."""

import argparse
import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from darkroom.checkpoint.catalog import Script, Version
from darkroom.checkpoint.folder import Checkpoint
from darkroom.cli.console import Console
from darkroom.cli.flags import refuse_without
from darkroom.cli.from_flags import (
    engine_of,
    refiner_of,
    refuse_flags_beside_prompts,
    request_of,
    starts_from_image,
    vae_of,
    version_of,
)
from darkroom.cli.inversions import check_embedding_flags, chosen, inversions_of
from darkroom.cli.loras import check_lora_flags, loras_of
from darkroom.cli.opening import models_of, precision_asked, refuse_inpainting, runtime_of, say_what_ships
from darkroom.cli.prompt_run import Run, alone
from darkroom.cli.settings import Settings, make_folder
from darkroom.engines import RUNTIMES, find_runtime
from darkroom.engines.runtime import ON_NVIDIA, Runtime, asked_as
from darkroom.errors import InvalidRequest
from darkroom.flags import SLOTS, SYNTAXES
from darkroom.prepare import Preparer
from darkroom.prompts.journal import ROWS, Past, Record
from darkroom.prompts.rows import Asked, Prompts
from darkroom.request import EmbeddingChoice, LoraChoice, Request, draw_seed
from darkroom.schedule.bundle import Bundle, Schedule
from darkroom.serving.planning import batches_for, compiled_schedules, planned, schedule_of, settled
from darkroom.serving.service import Limits, Plan, in_fields
from darkroom.serving.workers import CPU, Here, Orders, Tell, Worker, on_devices, visible_gpu
from darkroom.text.drawing import Drawing


def make_all(
    script: Script,
    flags: argparse.Namespace,
    console: Console,
    sheet: Callable[[Path, Sequence[Record]], Path] | None = None,
) -> None:
    """Runs a script with --prompts. What can be refused is refused before a model is fetched or an engine built.

    `sheet` makes one picture of those in a folder, of which the records tell, and returns where it is.
    """
    refuse_flags_beside_prompts(flags)
    settings = Settings.from_flags(flags)
    prompts = _asked_prompts(flags)
    slots = SLOTS if flags.batch_size is None else flags.batch_size
    if slots < 1:
        raise InvalidRequest(f"--batch-size must be 1 or more, not {slots}.")
    version = version_of(flags, None, script)
    refiner_of(flags, None, script)
    starts_from_image(flags, None, script)
    for needed in ("controlnet", "controlnet_type"):
        refuse_without(flags, needed)
    vae = vae_of(flags, None)
    check_lora_flags(flags)
    check_embedding_flags(flags)
    engine = engine_of(flags)
    for _ in prompts.rows(_default(flags, version, None, engine)):
        pass
    runtime = runtime_of(flags, None, engine, settings, console)
    flags.precision = precision_asked(flags, engine, runtime, console)
    _check_devices(flags, runtime)
    if flags.dynamic_batches is None:
        settings = replace(settings, dynamic_batches=(1, 1, max(slots, settings.dynamic_batches[2])))

    preparer = models_of(script, settings, runtime, vae, console).preparer(version, config=flags.config)
    refuse_inpainting(preparer, script)
    preparer.loras, choices = loras_of(flags, None, settings, preparer, console)
    preparer.inversions = inversions_of(flags, None, preparer, console)
    words = chosen(preparer.inversions)
    default = _default(flags, version, preparer.checkpoint, runtime.name, choices, words)
    say_what_ships(version, flags, script, console)
    folder = folder_of(prompts.path, settings.output_dir)
    default = replace(default, seed=_seed(flags, folder))
    plan = _plan(prompts, default, slots, preparer, script)

    with alone(make_folder(folder)):
        past = Past(folder / ROWS)
        if flags.seed is None:
            console.say(f"seed: {default.seed}")
        orders = Orders(plan, slots, folder, script.pipeline, settings.threads, device=plan.options.device)
        default = replace(default, precision=plan.request.precision)
        with contextlib.closing(Run(prompts, default, orders, past, console)) as run:
            if run.missing:
                with _cluster(flags):
                    run.make(_starts(flags, runtime, orders))
            run.report(sheet)


def _seed(flags: argparse.Namespace, folder: Path) -> int:
    """The one that is meant, or that of an earlier run, or a new one."""
    if flags.seed is not None:
        return flags.seed
    with contextlib.closing(Past(folder / ROWS)) as past:
        return draw_seed() if past.seed is None else past.seed


def folder_of(file: Path, output: Path) -> Path:
    """Where the pictures of a file go: a folder named after it, with a number behind the name where another file's
    pictures are. A file that is gone leaves its folder to the next of its name, which it may be moved."""
    for number in itertools.count(1):
        folder = output / (file.stem if number == 1 else f"{file.stem}-{number}")
        owner = Past(folder / ROWS).head.get("file")
        if not isinstance(owner, str) or owner == str(file.resolve()) or not os.path.exists(owner):
            return folder
    raise AssertionError("numbers do not end")


def _asked_prompts(flags: argparse.Namespace) -> Prompts:
    if flags.prompts == "-":
        raise InvalidRequest("--prompts -: name a file, which the pictures' folder is named after.")
    path = Path(flags.prompts)
    if not path.stem.strip("."):
        raise InvalidRequest(f"--prompts {flags.prompts!r}: no folder can be named after this file.")
    return Prompts(path, Drawing.asked(flags.prompt_syntax or SYNTAXES[0], flags.wildcards))


def _default(
    flags: argparse.Namespace,
    version: Version,
    checkpoint: Checkpoint | None,
    engine: str,
    loras: tuple[LoraChoice, ...] = (),
    embeddings: tuple[EmbeddingChoice, ...] = (),
) -> Request:
    """What rows leave out. Its seed is a stand-in where none is passed."""
    of_one_image = {"prompt": ["a picture"], "batch_size": 1, "batch_count": 1, "seed": flags.seed or 0}
    asked = argparse.Namespace(**vars(flags) | of_one_image)
    return request_of(asked, version, None, None, checkpoint, engine, loras, embeddings=embeddings)


def _check_devices(flags: argparse.Namespace, runtime: Runtime) -> None:
    if flags.ray is not None:
        from darkroom.serving.ray_workers import check_installed

        check_installed()
        options = runtime.options
        if not runtime.threaded and (options.device is not None or options.provider not in (None, *ON_NVIDIA)):
            raise InvalidRequest(f"--ray hands out cores and NVIDIA GPUs, which {asked_as(runtime)} has no use for.")
    if flags.devices and "devices" in RUNTIMES[runtime.name].options:
        raise InvalidRequest(
            f"--devices cannot be given beside --prompts with --engine {runtime.name}, whose devices divide a batch: "
            f"the lines of a file join and leave theirs one by one."
        )
    for device in flags.devices or ():
        if device == CPU:
            if not runtime.threaded:
                raise InvalidRequest(f"--devices {CPU} cannot run {asked_as(runtime)}: name its GPUs by number.")
        elif not (device.isascii() and device.isdigit()):
            raise InvalidRequest(f"--devices {device!r} is neither {CPU} nor the number of a GPU.")
        elif runtime.threaded:
            raise InvalidRequest(f"--devices {device} has no effect with {asked_as(runtime)}, on the CPU.")
        elif flags.ray is not None:
            raise InvalidRequest(f"--devices {device} cannot be given beside --ray, which hands out GPUs itself.")
        elif (asked := runtime.options.device) is not None:
            _check_number(device, asked, runtime)
        elif runtime.options.provider in (None, *ON_NVIDIA):
            visible_gpu(int(device))
        else:
            raise InvalidRequest(f"--devices {device} has no effect with {asked_as(runtime)}.")


def _check_number(number: str, device: str, runtime: Runtime) -> None:
    """Raises `InvalidRequest` where OpenVINO's GPU of this number would not take the engines of `device`."""
    if device.partition(".")[0] != "GPU":
        raise InvalidRequest(f"--devices {number} is the number of a GPU, and --device is {device}.")
    own = find_runtime(runtime.name, replace(runtime.options, device=f"GPU.{number}")).device()
    if not runtime.runs(own):
        raise InvalidRequest(f"--devices {number} is a {own}, and the engines are for {runtime.device()}.")


def _plan(prompts: Prompts, default: Request, slots: int, preparer: Preparer, script: Script) -> Plan:
    """Engines and schedules for what the rows request, and no more. What cannot be made is refused with its line."""
    preparer.check(replace(default, batch_size=slots))
    sizes: dict[tuple[bool, int], dict[tuple[int, int], Asked]] = {}
    schedules: dict[Schedule, Asked] = {}
    for asked in prompts.rows(default):
        request = asked.request
        size = (request.height, request.width)
        with _at(prompts.place(asked.line)):
            preparer.traits.check(request)
            kind = (preparer.traits.guided(request), preparer.chunks(request))
        sizes.setdefault(kind, {}).setdefault(size, asked)
        schedules.setdefault(Schedule(request.scheduler, request.denoising_steps, size), asked)
    for of_kind in sizes.values():
        for (height, width), asked in of_kind.items():
            with _at(prompts.place(asked.line)):
                preparer.check(replace(default, height=height, width=width, batch_size=slots))
    wanted = {}
    for asked in schedules.values():
        with _at(prompts.place(asked.line)):
            wanted.setdefault(schedule_of(preparer, asked.request), asked)
    bundle = Bundle(compiled_schedules(preparer, default, wanted))
    for schedule, asked in wanted.items():
        with _at(prompts.place(asked.line)):
            bundle.table(schedule)
    batches = [None] if default.build != "static-batch" else batches_for(preparer, slots)
    if None in batches:
        preparer.check(replace(default, batch_size=slots, build="dynamic-batch"))
    default = settled(preparer, default, list(next(iter(sizes.values()))), batches, [guided for guided, _ in sizes])
    limits = Limits(pixels=max(side for of_kind in sizes.values() for size in of_kind for side in size))
    plans = [
        planned(
            preparer,
            _like(next(iter(of_kind.values())), default),
            script.program,
            list(of_kind),
            batches,
            kind[:1],
            wanted,
            limits,
        )
        for kind, of_kind in sizes.items()
    ]
    return replace(plans[0], request=default, lanes=tuple(lane for plan in plans for lane in plan.lanes))


def _like(asked: Asked, default: Request) -> Request:
    """What rows leave out, with texts that are as long as those of one of them."""
    names = ("prompts", "negative_prompt", "prompt_2", "negative_prompt_2")
    return replace(default, **{name: getattr(asked.request, name) for name in names})


@contextlib.contextmanager
def _at(place: str) -> Iterator[None]:
    """Puts the place that a refused request came from before the refusal, which then names fields, not flags."""
    try:
        yield
    except InvalidRequest as error:
        raise InvalidRequest(f"{place}: {in_fields(str(error))}") from None


def _cluster(flags: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """Connected to Ray's, if it is to be used."""
    if flags.ray is None:
        return contextlib.nullcontext()
    from darkroom.serving.ray_workers import cluster

    return cluster(flags.ray)


def _starts(flags: argparse.Namespace, runtime: Runtime, orders: Orders) -> list[Callable[[Tell], Worker]]:
    """What starts the requested workers."""
    if flags.ray is not None:
        from darkroom.serving.ray_workers import actors

        return actors(len(flags.devices or ()), not runtime.threaded, orders)
    if flags.devices is not None:
        return on_devices(flags.devices, orders)
    return [partial(Here, orders)]
