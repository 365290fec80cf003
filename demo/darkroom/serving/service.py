"""What serves pictures one by one: engines, schedules, defaults and limits, and how strangers' requests become ours.

A plan holds all of it. It is made where models are compiled, and can be written beside the artefacts: who has both
serves the model without torch, and without the model's weights.
"""

import json
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from darkroom import __version__
from darkroom.contract import DECODER, ENCODER, Job
from darkroom.engines import find_runtime
from darkroom.engines.runtime import Engine, Options, Runtime, asked_as
from darkroom.errors import Failed, InvalidRequest
from darkroom.families.family import Traits
from darkroom.flags import NUM_IMAGES, OF_ROW, option
from darkroom.pipeline.assembly import text_encoders
from darkroom.pipeline.pipeline import TextEncoder
from darkroom.request import DENOISED_BY, MaskChoice, Request, draw_seed, pixels_digest
from darkroom.schedule import SCHEDULERS
from darkroom.schedule.bundle import Bundle, Schedule
from darkroom.schedule.table import Table
from darkroom.serving.batching import Counts, Lane, Made, Original, StepBatcher
from darkroom.store.store import Store
from darkroom.text.reading import chunks
from darkroom.text.tokenizer import Tokenizer
from darkroom.values import from_json, to_json

PLAN = "serving.json"
MODEL_INDEX = "model_index.json"
FORMAT = 2

FIELDS = {name: flag for name, flag in OF_ROW.items() if name != NUM_IMAGES}
"""The fields of a request for each image."""

MEASURED_CALLS = 3

SCHEDULES_KEPT = 64
"""Of those that start from pictures: they are kept on disk, too."""

STARTING = {False: "demo_img2img.py", True: "demo_inpaint.py"}
"""The scripts that replay pictures which start from others: without a mask, and with one."""


@dataclass(frozen=True)
class Part:
    """An engine: the job it was built for, where it is, and its key."""

    job: Job
    folder: Path
    key: str


@dataclass(frozen=True)
class LanePlan:
    """The engines for one size (height and width in pixels; None for any) with guidance or without.

    `denoisers` by batch; None for one that takes any.
    """

    guided: bool
    size: tuple[int, int] | None
    parts: dict[str, Part]
    denoisers: dict[int | None, Part]

    @property
    def chunks(self) -> int:
        """How many chunks of a prompt they take."""
        return next(iter(self.denoisers.values())).job.profile.chunks


@dataclass(frozen=True)
class Limits:
    """What a request may have at most: steps and images, bytes of a prompt, pixels along a side; `multiple` of
    which a free size must be."""

    steps: int = 50
    images: int = 8
    prompt_bytes: int = 2000
    pixels: int = 1536
    multiple: int = 8


@dataclass(frozen=True)
class Plan:
    """All that serving a model takes.

    `request` is what a request is by default; its prompt and seed do not matter. `script` is what replays the pictures,
    `scheduler` the model's own; `tokenizers` are artefacts' folders; `schedules` is the folder of a
    `Bundle`, and `schedule_keys` are the keys that its tables have each alone, by their names there.
    """

    request: Request
    script: str
    revision: str
    scheduler: str
    runtime_version: str
    options: Options
    traits: Traits
    tokenizers: tuple[Path, ...]
    schedules: Path
    schedule_keys: dict[str, str]
    lanes: tuple[LanePlan, ...]
    limits: Limits

    def folders(self) -> list[Path]:
        """Where all its artefacts are."""
        parts = [part for lane in self.lanes for part in (*lane.parts.values(), *lane.denoisers.values())]
        return list(dict.fromkeys([*(part.folder for part in parts), *self.tokenizers, self.schedules]))

    def lane_for(self, request: Request) -> LanePlan:
        """The engines for a request: of its size, and with guidance if it has any. Raises `InvalidRequest` for none."""
        count = self.chunks(request)
        long = [lane for lane in self.lanes if lane.chunks == count]
        if not long:
            known = " or ".join(map(str, dict.fromkeys(lane.chunks for lane in self.lanes)))
            raise InvalidRequest(f"prompt takes engines for {count} chunks of tokens, and these are for {known}.")
        sized = [lane for lane in long if lane.size in (None, (request.height, request.width))]
        if not sized:
            sizes = ", ".join(dict.fromkeys(f"{lane.size[0]}x{lane.size[1]}" for lane in self.lanes))
            raise InvalidRequest(f"height and width {request.height}x{request.width} are not made here, but {sizes}.")
        if sized[0].size is None:
            for name in ("height", "width"):
                pixels = getattr(request, name)
                if pixels > self.limits.pixels or pixels % self.limits.multiple:
                    raise InvalidRequest(
                        f"{name} must be a multiple of {self.limits.multiple} up to {self.limits.pixels}, not {pixels}."
                    )
        guided = self.traits.guided(request)
        for lane in sorted(sized, key=lambda each: each.guided != guided):
            if lane.guided or not guided:
                return lane
        raise InvalidRequest(
            f"guidance_scale {request.guidance_scale:g}: this model is served without guidance, which is 1 or less."
        )

    def chunks(self, request: Request) -> int:
        """How many chunks of the request's prompts a denoiser takes."""
        return chunks(self.tokenizers, request, self.traits.guided(request))

    def recipe(self, request: Request, made: Made | None = None, schedule: str | None = None) -> dict[str, Any]:
        """What a picture records of itself: the same as if it had been made alone, by the script, but for the denoisers
        that made its steps, which are known once it is `made`. Who shared the batch decides that, so they are no part
        of what tells pictures apart. `schedule` is the key of one that is not among the plan's."""
        lane = self.lane_for(request)
        unused = ENCODER if request.input_image is None else None
        keys = {name: part.key for name, part in lane.parts.items() if part.job.stage.role != unused}
        denoisers = [lane.denoisers[batch].key for batch in made.batches] if made else []
        keys |= {"schedule": schedule or self.schedule_keys[_schedule_of(request).among(self.schedule_keys)]}
        return {
            "darkroom": __version__,
            "script": self.script if request.input_image is None else STARTING[request.mask is not None],
            "request": request.as_json(),
            "revision": self.revision,
            "scheduler": SCHEDULERS[request.scheduler][0] if request.scheduler else self.scheduler,
            "artefacts": keys,
            "runtime": f"{self.request.engine} {self.runtime_version}",
            "image": 1,
            "seed": request.seed,
            "slot": 0,
            "prompt": request.prompts[0],
            **({DENOISED_BY: denoisers} if denoisers else {}),
        } | self.options.recorded()

    def moved(self, place: Callable[[Path], Path]) -> "Plan":
        """The same with its folders elsewhere."""

        def parts(old: dict) -> dict:
            return {name: replace(part, folder=place(part.folder)) for name, part in old.items()}

        lanes = (replace(lane, parts=parts(lane.parts), denoisers=parts(lane.denoisers)) for lane in self.lanes)
        tokenizers = tuple(map(place, self.tokenizers))
        return replace(self, tokenizers=tokenizers, schedules=place(self.schedules), lanes=tuple(lanes))

    def as_json(self, root: Path) -> dict[str, Any]:
        """As JSON values, with folders as they are called from `root`."""
        plan = self.moved(lambda folder: folder.relative_to(root))
        return {"format": FORMAT, "darkroom": __version__} | to_json(plan)

    @classmethod
    def read(cls, file: Path) -> "Plan":
        """The plan in a file; folders are below the file's own. Raises `Failed` for anything else."""
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
            if fields.pop("format") != FORMAT:
                raise ValueError("it was written by another version of Darkroom")
            del fields["darkroom"]
            return from_json(cls, fields).moved(lambda folder: file.absolute().parent / folder)
        except OSError as error:
            raise Failed(f"{file} cannot be read: {error.strerror}.") from None
        except (ValueError, KeyError, TypeError, AttributeError, InvalidRequest) as error:
            raise Failed(f"{file} cannot be read ({error}): build the model repository again.") from None


class Service:
    """A plan's engines, loaded. Raises `Failed` where one is damaged or cannot be loaded here.

    `compiled` gives the key and the schedule of a request that starts from a picture, and may take seconds for one that
    nobody has asked for before; None where none may.
    """

    def __init__(
        self, plan: Plan, threads: int | None = None, compiled: Callable[[Request], tuple[str, Table]] | None = None
    ) -> None:
        self.plan = plan
        self._compiled = compiled
        self._from_pictures: dict[Request, tuple[str, Table]] = {}
        runtime = find_runtime(plan.request.engine, plan.options)
        if reason := runtime.unusable():
            raise Failed(f"the engines cannot be run here: {reason}.")
        if threads is not None and not runtime.threaded:
            raise InvalidRequest(f"threads have no effect with {asked_as(runtime)}.")
        if runtime.compiles and runtime.version() != plan.runtime_version:
            raise Failed(
                f"the engines were built by {runtime.name} {plan.runtime_version}, and {runtime.version()} is here: "
                f"build the model repository again."
            )
        check_whole(plan)
        self.store = Store(plan.schedules.parent)
        runtime.keep_in(self.store)
        self._bundle = Bundle(plan.schedules)
        tokenizers = [Tokenizer.load(folder) for folder in plan.tokenizers]
        engines = _load_all(plan, runtime, threads)
        self._encoders: list[tuple[TextEncoder, ...]] = []
        self._lanes = [self._lane(lane, engines, tokenizers) for lane in plan.lanes]

    def batcher(
        self,
        slots: int,
        queue: int,
        on_join: Callable[[int, int], None] = lambda groups, images: None,
        observe: Callable[[Counts], None] = lambda counts: None,
    ) -> StepBatcher:
        """What makes pictures on these engines: see `StepBatcher`."""
        return StepBatcher(self.lane_of, self.table_of, slots, queue, on_join, observe)

    def requests(self, fields: Mapping[str, Any], images: int = 1) -> list[Request]:
        """What a client requests, as a request for each of so many images: image k gets the seed S+k.

        `fields` are some of FIELDS; None stands for one that is left out. Raises `InvalidRequest`, naming the field,
        for what no picture could be made of here.
        """
        try:
            return self._requests(fields, images)
        except InvalidRequest as error:
            raise InvalidRequest(in_fields(str(error))) from None

    def _requests(self, fields: Mapping[str, Any], images: int) -> list[Request]:
        plan, limits = self.plan, self.plan.limits
        fields = {name: value for name, value in fields.items() if value is not None}
        check_fields(fields)
        for name in ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2"):
            size = len((fields.get(name) or "").encode("utf-8", "surrogatepass"))
            if size > limits.prompt_bytes:
                raise InvalidRequest(f"{name} has {size} bytes; {limits.prompt_bytes} is the most here.")
        steps = fields.get("steps", plan.request.denoising_steps)
        if steps > limits.steps:
            raise InvalidRequest(f"steps {steps} is more than the {limits.steps} that are made here.")
        if not 1 <= images <= limits.images:
            raise InvalidRequest(f"num_images must be from 1 to {limits.images}, not {images}.")
        first = asked_for({"seed": draw_seed()} | fields, plan.request)
        plan.traits.check(first)
        made = [first, *(replace(first, seed=first.seed + image) for image in range(1, images))]
        self.lane_of(first)
        self.table_of(first)
        return made

    def starting(
        self, requests: list[Request], original: Original, strength: float, mask: MaskChoice | None
    ) -> list[Request]:
        """Requests that `requests` made, from a picture: its pixels have their size. What takes seconds is done
        here."""
        from_image = {"input_image": pixels_digest(original.pixels), "image_strength": strength}
        try:
            made = [replace(each, mask=mask, **from_image) for each in requests]
            self.table_of(made[0])
        except InvalidRequest as error:
            raise InvalidRequest(in_fields(str(error))) from None
        return made

    def recipe(self, request: Request, made: Made | None = None) -> dict[str, Any]:
        """See `Plan.recipe`."""
        return self.plan.recipe(request, made, None if request.input_image is None else self._table(request)[0])

    def table_of(self, request: Request) -> Table:
        """The request's schedule."""
        return self._bundle.table(_schedule_of(request)) if request.input_image is None else self._table(request)[1]

    def _table(self, request: Request) -> tuple[str, Table]:
        """The key and the schedule of a request that starts from a picture, whichever that is."""
        alike = replace(request, prompts=("a",), seed=0, input_image="", mask=request.mask and MaskChoice(""))
        if (found := self._from_pictures.get(alike)) is None:
            if self._compiled is None:
                raise InvalidRequest("input_image: pictures that start from others are not made here.")
            found = self._compiled(request)
            kept = [*self._from_pictures.items(), (alike, found)]
            self._from_pictures = dict(kept[-SCHEDULES_KEPT:])  # at once: other threads read what there was
        return found

    def lane_of(self, request: Request) -> Lane:
        """The engines for a request: see `Plan.lane_for`."""
        return self._lanes[self.plan.lanes.index(self.plan.lane_for(request))]

    def _lane(self, lane: LanePlan, engines: dict[str, Engine], tokenizers: list[Tokenizer]) -> Lane:
        parts = {name: engines[part.key] for name, part in lane.parts.items()}
        denoisers = {batch: engines[part.key] for batch, part in lane.denoisers.items()}
        encoders = self._shared_encoders(text_encoders(self.plan.traits, tokenizers, parts))
        costs = milliseconds_of(
            {batch: (denoisers[batch], part.job) for batch, part in lane.denoisers.items() if batch}
        )
        decoder = next(name for name, part in lane.parts.items() if part.job.stage.role == DECODER)
        encoder = next((parts[name] for name, part in lane.parts.items() if part.job.stage.role == ENCODER), None)
        return Lane(self.plan.traits, lane.guided, encoders, denoisers, parts[decoder], costs, lane.chunks, encoder)

    def _shared_encoders(self, encoders: tuple[TextEncoder, ...]) -> tuple[TextEncoder, ...]:
        """The same objects for lanes with the same engines, which then know what the others have encoded."""
        for known in self._encoders:
            if [each.engine for each in known] == [each.engine for each in encoders]:
                return known
        self._encoders.append(encoders)
        return encoders


def _schedule_of(request: Request) -> Schedule:
    return Schedule(request.scheduler, request.denoising_steps, (request.height, request.width))


def asked_for(fields: Mapping[str, Any], default: Request) -> Request:
    """The request of one image: `default` with the `fields` that are not None.

    Raises `InvalidRequest`, naming the field, for what no picture could be made of.
    """
    try:
        return asked_by_flags(fields, default)
    except InvalidRequest as error:
        raise InvalidRequest(in_fields(str(error))) from None


def asked_by_flags(fields: Mapping[str, Any], default: Request) -> Request:
    """As `asked_for`, with complaints about flags."""
    fields = {name: value for name, value in fields.items() if value is not None}
    check_fields(fields)
    values = {FIELDS[name].name: value for name, value in fields.items() if name != "prompt"}
    if "guidance_scale" in values:
        values["guidance_scale"] = float(values["guidance_scale"])
    asked = replace(default, prompts=(fields.get("prompt", ""),), batch_size=1, batch_count=1, **values)
    if asked.guided:
        return asked
    for name in asked.negative_prompts:
        if name in fields:
            raise InvalidRequest(
                f"{option(name)} acts through guidance, which --guidance-scale {asked.guidance_scale} turns off."
            )
    return replace(asked, negative_prompt=None, negative_prompt_2=None)


def check_whole(plan: Plan) -> None:
    """Raises `Failed` for artefacts that are missing or damaged."""
    stores: dict[Path, Store] = {}
    for folder in plan.folders():
        if (folder / MODEL_INDEX).exists():
            continue  # a model's own folder, for engines that run it as it is
        store = stores.setdefault(folder.parent, Store(folder.parent))
        if (damage := store.damage(folder)) is not None:
            raise Failed(f"{folder} is damaged ({damage}): build it again.")
    for store in stores.values():
        store.fingerprints.remember()


def _load_all(plan: Plan, runtime: Runtime, threads: int | None) -> dict[str, Engine]:
    """The engines by their keys: those that run a model as it is are all of one folder."""
    parts = {part.key: part for lane in plan.lanes for part in (*lane.parts.values(), *lane.denoisers.values())}
    with ThreadPoolExecutor(len(parts) if runtime.compiles else 1) as pool:
        loading = {key: pool.submit(runtime.load, part.job, part.folder, threads) for key, part in parts.items()}
        return {key: future.result() for key, future in loading.items()}


def milliseconds_of(denoisers: Mapping[int, tuple[Engine, Job]]) -> dict[int, float]:
    """What a call of each of several UNets takes: the least of a few, after one that warms it up; {} for one UNet.

    They take turns, so that a machine busy with something else hurts all alike.
    """
    if len(denoisers) < 2:
        return {}
    took: dict[int, list[float]] = {batch: [] for batch in denoisers}
    for _ in range(1 + MEASURED_CALLS):
        for batch, (engine, job) in denoisers.items():
            inputs = {tensor.name: np.zeros(job.profile.shape(tensor), tensor.dtype) for tensor in job.stage.inputs}
            start = perf_counter()
            engine(inputs)
            took[batch].append(1000 * (perf_counter() - start))
    for engine, _ in denoisers.values():
        engine.forget()
    return {batch: min(calls[1:]) for batch, calls in took.items()}


def in_fields(complaint: str) -> str:
    """A complaint about flags in the names of fields, for those who send a request or write a file of prompts."""
    fields = {flag.name: name for name, flag in OF_ROW.items()}

    def renamed(found: re.Match[str]) -> str:
        name = found[1].replace("-", "_")
        return fields.get(name, name)

    return re.sub(r"--([a-z]+(?:-[a-z]+)*)", renamed, complaint)


def check_fields(fields: Mapping[str, Any]) -> None:
    """Raises `InvalidRequest`, naming the flag, for fields that there are not and values that none takes."""
    for name, value in fields.items():
        if name not in FIELDS:
            raise InvalidRequest(f"{name!r} is not a field of a request. Known: {', '.join(FIELDS)}.")
        if wrong := FIELDS[name].wrong(value):
            raise InvalidRequest(f"{option(FIELDS[name].name)} {wrong}")
