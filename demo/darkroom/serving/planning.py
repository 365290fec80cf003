"""Compiles what serving a model takes, and writes it down in a `Plan`."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from darkroom.contract import AUTO, spelled
from darkroom.errors import InvalidRequest
from darkroom.flags import BUILDS
from darkroom.prepare import TABLE_REVISION, Compiled, Preparer
from darkroom.processes.child import run_in_child
from darkroom.request import Request
from darkroom.schedule import Chosen, schedulers_for
from darkroom.schedule.bundle import Schedule
from darkroom.serving.service import LanePlan, Limits, Part, Plan
from darkroom.store.producers import made_with
from darkroom.store.store import Key

LARGE_TO_SERVE = 2 * 10**8
"""Weights from which on a UNet is loaded once, for any batch, and not once for each."""


def planned(
    preparer: Preparer,
    request: Request,
    script: str,
    sizes: Sequence[tuple[int, int]],
    batches: Sequence[int | None],
    guided: Sequence[bool],
    schedules: Collection[Schedule],
    limits: Limits,
    from_image: bool = False,
) -> Plan:
    """Builds what is not there: engines for every one of these sizes (height, width), with and without guidance as
    asked, and the schedules.

    `request` is what a request is by default. UNets are built for each of `batches`; None means one for any batch. With
    a `request` whose build is "dynamic-shape", engines are for any size and batch. With `from_image`, images may start
    from pictures.
    Raises `InvalidRequest` and `Failed` as `Preparer.compile` does; what does not fit is refused before any is built.
    """
    most = max(batch or 1 for batch in batches)
    for height, width in sizes:
        preparer.check(replace(request, height=height, width=width, batch_size=most))
    free = request.build == "dynamic-shape"
    request = settled(preparer, request, sizes, batches, guided, from_image)
    denoiser, lanes = preparer.checkpoint.family.denoiser, []
    for height, width in sizes[:1] if free else sizes:
        for with_guidance in guided:
            one = _one_image(request, (height, width), with_guidance)
            denoisers = {}
            for batch in [None] if free else batches:
                denoisers[batch] = _part(preparer.compile(_of_batch(one, batch), {denoiser}), denoiser)
            compiled = preparer.compile(one, preparer.stages_for(one, from_image) - {denoiser})
            parts = {name: _part(compiled, name) for name in compiled.jobs}
            lanes.append(LanePlan(with_guidance, None if free else (height, width), parts, denoisers))
    folder = compiled_schedules(preparer, request, schedules)
    return Plan(
        request=request,
        script=script,
        revision=preparer.checkpoint.revision,
        scheduler=preparer.checkpoint.scheduler(None).class_name,
        runtime_version=preparer.runtime.version(),
        options=preparer.runtime.options,
        traits=preparer.traits,
        tokenizers=tuple(folder.absolute() for folder in compiled.tokenizers),
        schedules=folder.absolute(),
        schedule_keys={
            schedule.name: preparer.schedule_key(_asking(request, schedule))[1].digest for schedule in schedules
        },
        lanes=tuple(lanes),
        limits=replace(limits, multiple=preparer.checkpoint.free_multiple),
    )


def settled(
    preparer: Preparer,
    request: Request,
    sizes: Sequence[tuple[int, int]],
    batches: Sequence[int | None],
    guided: Sequence[bool],
    from_image: bool = False,
) -> Request:
    """The request with its precisions, measured where it leaves them open: with the first of the sizes and the most
    images. Whatever shares a batch is computed in the same."""
    if request.precision != AUTO:
        return request
    one = _one_image(request, sizes[0], guided[0])
    denoiser = preparer.checkpoint.family.denoiser
    others = preparer.stages_for(one, from_image) - {denoiser}
    chosen = preparer.chosen(_of_batch(one, batches[-1]), {denoiser}) | preparer.chosen(one, others)
    return replace(request, precision=spelled(chosen))


def _one_image(request: Request, size: tuple[int, int], guided: bool) -> Request:
    scale = max(request.guidance_scale, 2.0) if guided else 1.0
    build = request.build if request.build == "dynamic-shape" else BUILDS[0]
    return replace(
        request, height=size[0], width=size[1], guidance_scale=scale, batch_size=1, batch_count=1, build=build
    )


def _of_batch(request: Request, batch: int | None) -> Request:
    """The request of one image, for so many at a time, or any number."""
    if request.build == "dynamic-shape":
        return request
    return replace(request, build="dynamic-batch") if batch is None else replace(request, batch_size=batch)


def _part(compiled: Compiled, stage: str) -> Part:
    return Part(compiled.jobs[stage], compiled.sources[stage].absolute(), compiled.artefacts[stage])


def _asking(request: Request, schedule: Schedule) -> Request:
    height, width = schedule.size or (request.height, request.width)
    return replace(request, scheduler=schedule.scheduler, denoising_steps=schedule.steps, height=height, width=width)


def batches_for(preparer: Preparer, slots: int) -> list[int | None]:
    """The batches that UNets are built for where up to `slots` images are made together: 1, 2, 4 ... and all.

    A large model's weights are not loaded once for each: one UNet takes any batch, as those that run as they are do, or
    all of it where none can.
    """
    if not preparer.runtime.compiles:
        return [None]
    if preparer.checkpoint.weights(preparer.checkpoint.family.denoiser) > LARGE_TO_SERVE:
        return [None] if slots > 1 and preparer.runtime.free_sizes else [slots]
    return sorted({*(2**power for power in range(slots.bit_length()) if 2**power <= slots), slots})


def schedule_of(preparer: Preparer, request: Request) -> Schedule:
    """The schedule of a request: of its size alone where the model's steps depend on that."""
    sized = preparer.scheduler(request).mu is not None
    return Schedule(request.scheduler, request.denoising_steps, (request.height, request.width) if sized else None)


def every_schedule(
    preparer: Preparer,
    request: Request,
    sizes: Sequence[tuple[int, int]],
    steps: int,
    schedulers: Sequence[str] | None = None,
) -> list[Schedule]:
    """The model's own scheduler and each of those named, None for all that fit it, with every number of steps."""
    own = preparer.checkpoint.scheduler(None)
    fitting = schedulers_for(own.class_name, own.config) if schedulers is None else schedulers
    first = [
        schedule_of(preparer, _asking(request, Schedule(scheduler, 1, size)))
        for scheduler in (None, *fitting)
        for size in sizes
    ]
    return [each._replace(steps=count) for each in dict.fromkeys(first) for count in range(1, steps + 1)]


def compiled_schedules(preparer: Preparer, request: Request, wanted: Collection[Schedule]) -> Path:
    """The folder of a `Bundle` of these schedules, compiled in one child where it is not there."""
    of: dict[str, Any] = {}
    for schedule in sorted(wanted, key=str):
        choice = preparer.scheduler(_asking(request, schedule))
        entry = of.setdefault(schedule.group, {"scheduler": choice.as_json(), "steps": []})
        entry["steps"].append(schedule.steps)
    for entry in of.values():
        entry["steps"].sort()
    key = Key(
        f"schedules-{preparer.name}",
        {"kind": "schedules", "of": of, "revision": TABLE_REVISION} | made_with("diffusers"),
    )
    if folder := preparer.engines.find(key):
        preparer.engines.note_use(folder)
        return folder
    count = sum(len(entry["steps"]) for entry in of.values())
    with preparer.job(f"compiling {count} schedules"):

        def build(folder: Path) -> dict[str, Any]:
            return run_in_child(compile_bundle, of, folder, verbose=preparer.verbose)

        return preparer.engines.make(key, build)


def compile_bundle(of: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Runs in a child: it imports diffusers. What cannot be compiled is kept with the reason why."""
    import diffusers

    from darkroom.schedule.bundle import save
    from darkroom.schedule.compile import compile_schedule

    tables: dict[str, Any] = {}
    for group, entry in of.items():
        for steps in entry["steps"]:
            try:
                tables[f"{group}/{steps}"] = compile_schedule(Chosen(**entry["scheduler"]), steps)
            except InvalidRequest as error:
                tables[f"{group}/{steps}"] = str(error)
    save(folder, tables)
    return {"schedules": len(tables), "diffusers": diffusers.__version__}
