"""Request -> everything it needs is compiled and in the store; returns a pipeline of loaded engines.

The one door between the half that compiles (torch, diffusers, ONNX) and the half that runs. Compiling happens in
child processes, so this process never imports the heavy half unless the runtime itself is torch.
"""

import io
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from darkroom.checkpoint.folder import Checkpoint
from darkroom.checkpoint.lora import REVISION as LORA_REVISION
from darkroom.contract import (
    AUTO,
    DECODER,
    DENOISER,
    ENCODER,
    FREE,
    PRECISIONS,
    TEXT,
    Inversion,
    Job,
    Lora,
    Profile,
    Stage,
    Tensor,
    precision_of,
    precisions_by_stage,
    spelled,
)
from darkroom.engines.runtime import Engine, Options, Progress, Runtime, asked_as
from darkroom.engines.turns import Turns
from darkroom.errors import DarkroomError, Failed, InvalidRequest
from darkroom.flags import SYNTAXES, option
from darkroom.forecast import Planned, disk_of, memory_of, refuse_what_cannot_fit
from darkroom.pipeline.assembly import assemble, text_encoders
from darkroom.pipeline.pipeline import DeferredRefiner, InitialImage, Pipeline
from darkroom.processes.child import run_in_child
from darkroom.processes.memory import machine_memory, peak_memory
from darkroom.processes.progress import Line
from darkroom.request import OF_REFINER, Request, check_steps_left
from darkroom.schedule import GIVEN, KEPT, SPREADABLE, Chosen
from darkroom.schedule.table import Table
from darkroom.store.manifest import read_manifest
from darkroom.store.producers import made_with
from darkroom.store.store import Key, Store
from darkroom.text.compile import compile_tokenizer
from darkroom.text.reading import chunks
from darkroom.text.tokenizer import Tokenizer
from darkroom.values import to_json

GRAPH_REVISION = 3
TABLE_REVISION = 3
TOKENIZER_REVISION = 1
CHOICE_REVISION = 1
"""Raised when a change to what makes them makes other artefacts from the same facts."""

TABLE_FILE = "table.npz"

BYTES_OF_A_PIXEL = 12
"""Of a decoded picture: three numbers in float32."""

SMALL = 2**21
"""Weights below which `auto` leaves a network in float32: it takes a few milliseconds, once a picture."""

LARGE = 2**26
"""Weights from which a network is large, to runtimes to which that makes a difference."""

ANY = "any"
"""In the place of a precision, in the key of an engine that can be loaded in each."""

BATCHES = (1, 1, 8)
"""Images that an engine with a free batch takes: least, best, most."""

ShowJob = Callable[[str], AbstractContextManager[Line]]


@dataclass(frozen=True)
class Compiled:
    """What a request needs, found or built in the stores; `artefacts` are its keys, which a recipe records. The
    `request` is the one that was compiled, with the precisions that were chosen for it."""

    request: Request
    jobs: dict[str, Job]
    sources: dict[str, Path]
    table_folder: Path
    tokenizers: list[Path]
    scheduler: str
    artefacts: dict[str, str]


@dataclass(frozen=True)
class Prepared:
    """A pipeline that is ready to run, and what a recipe records of it: the keys of its artefacts. The `request` is as
    in `Compiled`."""

    request: Request
    pipeline: Pipeline
    scheduler: str
    artefacts: dict[str, str]
    runtime_version: str


class Preparer:
    """Compiles what a request on one model needs, or finds it compiled.

    `graphs` and `engines` are the stores, `name` is what people call the model, `loras` are fused into it; `job`
    wraps each long job in whatever shows its progress, and `detail` gets where each artefact is. `batches` and
    `pixels` bound free sizes where the runtime needs that: least, best, most; None for what suits the model.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        runtime: Runtime,
        graphs: Store,
        engines: Store,
        name: str = "",
        loras: tuple[Lora, ...] = (),
        threads: int | None = None,
        batches: tuple[int, int, int] = BATCHES,
        pixels: tuple[int, int, int] | None = None,
        verbose: bool = False,
        job: ShowJob = lambda title: nullcontext(Line()),
        detail: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.checkpoint = checkpoint
        self.family = checkpoint.family
        self.traits = self.family.traits(checkpoint)
        self.runtime = runtime
        self.graphs = graphs
        self.engines = engines
        self.name = name or checkpoint.folder.name
        self.loras = loras
        self.inversions: tuple[Inversion, ...] = ()
        """What the text encoders learn beside."""
        self.threads = threads
        self.batches = batches
        self.pixels = pixels
        self.verbose = verbose
        self.job = job
        self.detail = detail
        self.made: list[Path] = []
        """The folders of the graphs and engines that were built, in their order."""

    def on(self, runtime: Runtime) -> "Preparer":
        """What compiles the same model for another runtime."""
        other = copy(self)
        other.runtime = runtime
        return other

    def compile(self, request: Request, stages: Collection[str] | None = None) -> Compiled:
        """Builds what is not there; `stages` are those that are wanted, None for those of text to image.

        Raises `InvalidRequest` before any engine is built when model, runtime and request do not fit.
        """
        scheduler, table_key, table_folder, tokenizers = self.check(request, stages)
        request = self.settled(request, stages)
        jobs = self._jobs(request, stages)
        keys = {name: self._engine_key(job, request) for name, job in jobs.items()}
        # What LoRAs change goes first: one that does not fit is refused before anything else is built.
        order = sorted(jobs, key=lambda name: -len(jobs[name].stage.loras) if jobs[name].stage.denoises else 0)
        sources = {name: self._source(jobs[name], keys[name], request) for name in order}
        for store in (self.graphs, self.engines):
            store.fingerprints.remember()
            store.sweep()
        names = [self.checkpoint.tokenizer(part).name for part in self.checkpoint.texts]
        texts = dict(zip(names, tokenizers, strict=True))
        for part, source in {"schedule": table_folder, **texts, **sources}.items():
            self.detail(f"{part}: {source}")
        artefacts = {"schedule": self.engines.digest_of(table_key, table_folder)}
        artefacts |= {name: self.engines.digest_of(key, sources[name]) for name, key in keys.items()}
        return Compiled(request, jobs, sources, table_folder, tokenizers, scheduler, artefacts)

    def settled(self, request: Request, stages: Collection[str] | None = None) -> Request:
        """The request, with the precision of each of the `stages` where it left them open. What measures them builds
        engines, and keeps the better ones. Raises as `compile` does."""
        if request.precision != AUTO:
            return request
        return replace(request, precision=spelled(self.chosen(request, stages)))

    def chosen(self, request: Request, stages: Collection[str] | None = None) -> dict[str, str]:
        """The precisions of stages by their names, for a request that leaves them open."""
        return {name: self._chosen(job, request) for name, job in self._jobs(request, stages).items()}

    def export(self, request: Request, stages: Collection[str] | None = None) -> list[Path]:
        """The folders of the ONNX graphs alone, exported where they are not there. Raises as `compile` does."""
        self._check_fit(request)
        folders = [self._graph(job, request).parent for job in self._jobs(request, stages).values()]
        self.graphs.fingerprints.remember()
        return folders

    def plan(self, request: Request, stages: Collection[str] | None = None) -> list[Planned]:
        """What `compile` needs, what is there, and what the rest would take. Makes nothing."""
        self._check_fit(request)
        planned = [Planned(each.key.label, self.engines.find(each.key)) for each in self._read_off(request)]
        for job in self._jobs(request, stages).values():
            run = self._takes("run", job, request)
            if not self.runtime.compiles:
                planned.append(Planned(job.stage.name, self.checkpoint.folder, run=run))
                continue
            graph, engine = self._graph_key(job, request), self._engine_key(job, request)
            folder = self.engines.find(engine) or self.engines.find_for(engine, self.runtime.runs)
            # An engine that is there needs its graph no more.
            if folder is None and self.runtime.from_graph:
                planned.append(self._planned(graph.label, self.graphs, self.graphs.find(graph), "export", job, request))
            planned.append(replace(self._planned(engine.label, self.engines, folder, "build", job, request), run=run))
        return planned

    def _planned(self, label: str, store: Store, folder: Path | None, work: str, job: Job, request: Request) -> Planned:
        if folder is not None:
            return Planned(label, folder)
        # What is not made of a graph is code, without the weights.
        weights = disk_of(self.checkpoint, job, self._graph_precision(job)) if self.runtime.from_graph else None
        return Planned(label, None, store.root, weights, self._takes(work, job, request))

    def _takes(self, work: str, job: Job, request: Request) -> int | None:
        """The peak memory of a process that does `work` on a stage: see `memory_of`."""
        by = work
        if work != "export":
            by = " ".join([self.runtime.name, *self.runtime.options.place().values(), work])
        batch = job.profile.batch or request.batch_size
        sizes = replace(job.profile, batch=batch, height=request.height, width=request.width)
        return memory_of(by, self.checkpoint, job, sizes)

    def _jobs(self, request: Request, stages: Collection[str] | None) -> dict[str, Job]:
        wanted = self.stages_for(request, from_image=False) if stages is None else stages
        profile = self._profile(request)
        # One picture to start from for the whole batch, encoded alone as diffusers encodes it.
        alone = replace(profile, batch=1)
        jobs = {}
        for name, stage in self._contracts(request).items():
            if name in wanted:
                job = Job(stage, alone if stage.role == ENCODER else profile, self._plain)
                if not stage.takes_chunks:
                    job = replace(job, profile=replace(job.profile, chunks=1))
                if request.precision == AUTO:
                    asked = self._known_choice(job, request) or self._plain
                else:
                    asked = precision_of(request.precision, name)
                jobs[name] = replace(job, precision=self.family.precision(self.checkpoint, stage, asked))
        return jobs

    @property
    def _plain(self) -> str:
        """Float32, where the runtime has it."""
        offered = self.runtime.precisions()
        return PRECISIONS[0] if PRECISIONS[0] in offered else offered[0]

    def _tried(self, job: Job) -> list[str]:
        """The precisions that may be better than the plain one for a stage."""
        if self.runtime.unusable() is not None or self._weights_of(job.stage) < SMALL:
            return []
        native = [precision for precision in self.runtime.native() if precision != self._plain]
        return [each for each in native if self.family.precision(self.checkpoint, job.stage, each) == each]

    def _weights_of(self, stage: Stage) -> int:
        return sum(self.checkpoint.weights(network.part) for network in stage.networks)

    def _known_choice(self, job: Job, request: Request) -> str | None:
        """The precision of a stage that was measured before, or is that of an engine from elsewhere; None where it has
        to be measured."""
        if not (tried := self._tried(job)):
            return self._plain
        if folder := self.engines.find(self._choice_key(job, tried, request)):
            return str(read_manifest(folder)["made"]["chosen"])
        if self.runtime.compiles:
            for precision in (self._plain, *tried):
                key = self._engine_key(replace(job, precision=precision), request)
                if not self.engines.find(key) and self.engines.find_for(key, self.runtime.runs):
                    return precision
        return None

    def _chosen(self, job: Job, request: Request) -> str:
        """The precision of a stage, measured where that is not known: see `darkroom.engines.choice`."""
        if known := self._known_choice(job, request):
            self.detail(f"{job.stage.name}: {known}")
            return known
        from darkroom.engines.choice import choose

        key = self._choice_key(job, self._tried(job), request)
        sources: dict[str, Path] = {}
        refused: dict[str, str] = {}

        def build(folder: Path) -> dict[str, Any]:
            for precision in (self._plain, *self._tried(job)):
                each = replace(job, precision=precision)
                try:
                    sources[precision] = self._source(each, self._engine_key(each, request), request)
                except (DarkroomError, RuntimeError) as error:
                    if precision == self._plain:
                        raise
                    refused[precision] = str(error)
            with self.job(f"choosing the precision of the {job.stage.name}"):
                arguments = (self.runtime.name, self.runtime.options, job, sources)
                return run_in_child(choose, *arguments, verbose=self.verbose) | {"refused": refused}

        folder = self.engines.make(key, build)
        made = read_manifest(folder)["made"]
        chosen = str(made["chosen"])
        self.made.append(folder)
        for source in sources.values():
            if source != sources[chosen] and source in self.made:
                self.engines.remove(source)
                self.made.remove(source)
        self.detail(f"{job.stage.name}: {chosen}, {made['why']}")
        return chosen

    def prepare(self, request: Request, image: np.ndarray | None = None) -> Prepared:
        """Compiles and loads: see `compile` and `load`."""
        return self.load(self.compile(request, self.stages_for(request, image is not None)), image)

    def stages_for(self, request: Request, from_image: bool, decodes: bool = True) -> set[str]:
        """The stages that make pictures: `decodes` is false for a model whose latents a refiner takes."""
        left_out = {ENCODER: not from_image, DECODER: not decodes}
        return {name for name, stage in self._contracts(request).items() if not left_out.get(stage.role)}

    def load(
        self,
        compiled: Compiled,
        image: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        controls: Sequence[np.ndarray] = (),
    ) -> Prepared:
        """The pipeline of what was compiled. `image`: the pixels (H, W, 3) uint8 to start from, and `mask` (H, W)
        uint8, from 128 where they are painted anew, if the request has any; `controls` are the maps (H, W, 3) uint8 of
        its ControlNets.

        Raises `Failed` where the engines are for another machine.
        """
        if reason := self.runtime.unusable():
            raise Failed(f"the engines are built and kept in {self.engines.root}: {reason}.")
        request, jobs, sources = compiled.request, compiled.jobs, compiled.sources
        self.runtime.keep_in(self.engines)
        # Engines load side by side, one on each core, and the UNet's, which takes longest, first. torch's networks do
        # not: the libraries patch torch while they load one.
        side_by_side = min(len(jobs), os.cpu_count() or 1) if self.runtime.compiles else 1
        turns = Turns() if self.runtime.options.low_vram else None

        def engine(name: str) -> Engine:
            load = partial(self.runtime.load, jobs[name], sources[name], self.threads)
            return turns.engine(load) if turns else load()

        with ThreadPoolExecutor(max_workers=side_by_side) as pool:
            loading = {
                name: pool.submit(engine, name) for name in sorted(jobs, key=lambda name: not jobs[name].stage.denoises)
            }
            schedule = Table.load(compiled.table_folder / TABLE_FILE)
            tokenizers = [Tokenizer.load(folder) for folder in compiled.tokenizers]
            loaded: dict[str, Engine] = {name: future.result() for name, future in loading.items()}
        if self.runtime.compiles:
            for source in sources.values():
                self.engines.note_use(source)
        for folder in (compiled.table_folder, *compiled.tokenizers):
            self.engines.note_use(folder)
        # There is one stage of each role beside the text encoders.
        of = {jobs[name].stage.role: engine for name, engine in loaded.items()}
        pipeline = assemble(
            self.traits,
            text_encoders(self.traits, tokenizers, loaded),
            of[DENOISER],
            of.get(DECODER),
            schedule,
            request,
            controls=controls,
            start=None if image is None else InitialImage.of(image, mask, of[ENCODER]),
            chunks=next(job.profile.chunks for job in jobs.values() if job.stage.denoises),
        )
        return Prepared(request, pipeline, compiled.scheduler, compiled.artefacts, self.runtime.version())

    def deferred(self, compiled: Compiled) -> DeferredRefiner:
        """What loads the pipeline when its turn comes, as `load` does."""
        calls = len(Table.load(compiled.table_folder / TABLE_FILE))
        return DeferredRefiner(calls, lambda: self.load(compiled).pipeline)

    def _contracts(self, request: Request) -> dict[str, Stage]:
        """The contracts of all stages, with what fused LoRAs and large weights make of them."""
        contracts = self._stages(request)
        for name, stage in contracts.items():
            parts = [network.part for network in stage.networks]
            half = any(map(self.checkpoint.is_large, parts))
            large = half or self._weights_of(stage) >= LARGE
            loras = tuple(lora for lora in self.loras if not lora.networks.isdisjoint(parts))
            inversions = self.inversions if stage.role == TEXT else ()
            contracts[name] = replace(stage, loras=loras, inversions=inversions, half_weights=half, large=large)
        return contracts

    def _stages(self, request: Request) -> dict[str, Stage]:
        return self.family.stages(self._model(request), self.traits.guided(request), request.clip_skip)

    def _model(self, request: Request) -> Checkpoint:
        """The model, reading as much of a prompt as the request says."""
        if request.max_sequence_length is None:
            return self.checkpoint
        return replace(self.checkpoint, text_length=request.max_sequence_length)

    def check(self, request: Request, stages: Collection[str] | None = None) -> tuple[str, Key, Path, list[Path]]:
        """What can be refused is refused here, before any network is touched; only a schedule and tokenizers may be
        compiled.

        Returns the scheduler's class, its table's key and folder, and the folders of the tokenizers.
        """
        refuse_what_cannot_fit(self.plan(request, stages))
        scheduler, key = self.schedule_key(request)
        table, *tokenizers = self._found_or_compiled(self._read_off(request))
        return scheduler, key, table, tokenizers

    def _read_off(self, request: Request) -> list["ReadOff"]:
        """The schedule, and the tokenizers in the order of their text encoders."""
        _, key = self.schedule_key(request)
        facts = key.facts
        choice = Chosen(**facts["scheduler"])
        title = f"the schedule {choice.class_name} of {facts['steps']} steps"
        arguments = (choice, facts["steps"], facts["skipped"], facts.get("share", 1.0), facts.get("mask"))
        tokenizers = [self._tokenizer(part, self._model(request)) for part in self.checkpoint.texts]
        return [ReadOff(key, title, compile_table, arguments), *tokenizers]

    def _tokenizer(self, part: str, model: Checkpoint) -> "ReadOff":
        source = folder, class_name, context, known, chat = model.tokenizer_source(part)
        learned = [(each.word, each.vectors) for each in self.inversions]
        facts = {
            "kind": "tokenizer",
            "class": class_name,
            "files": self.checkpoint.tokenizers[part],
            "context": context,
            "vocab_size": known,
            "revision": TOKENIZER_REVISION,
        } | made_with("transformers", "tokenizers")
        facts |= ({"chat": True} if chat else {}) | ({"learned": learned} if learned else {})
        arguments = (*source, learned)
        return ReadOff(Key(f"{folder.name}-{self.name}", facts), "the tokenizer", compile_tokenizer, arguments)

    def _found_or_compiled(self, wanted: list["ReadOff"]) -> list[Path]:
        """Their folders. What is missing is compiled in one child before the store is touched: what cannot be made
        leaves nothing behind."""
        folders = {each.key.folder_name: self.engines.find(each.key) for each in wanted}
        missing = {each.key.folder_name: each for each in wanted if folders[each.key.folder_name] is None}
        if missing:
            titles = " and ".join(dict.fromkeys(each.title for each in missing.values()))
            calls = [(each.function, each.arguments) for each in missing.values()]
            with self.job(f"compiling {titles}"):
                contents = run_in_child(call_each, calls, verbose=self.verbose)
            for (name, each), content in zip(missing.items(), contents, strict=True):
                folders[name] = self.engines.make(each.key, partial(_write, *content))
        return [folders[each.key.folder_name] for each in wanted]

    def _check_fit(self, request: Request) -> None:
        """Raises `InvalidRequest` when model, runtime and request do not fit."""
        check_precision(self.runtime, request.precision)
        stages = self._stages(request)
        for name in precisions_by_stage(request.precision):
            if name not in stages and not name.startswith(OF_REFINER):
                known = ", ".join(stages)
                raise InvalidRequest(f"--precision {request.precision}: this model has no {name}, but {known}.")
        self.traits.check(request)
        if request.prompt_syntax != SYNTAXES[0] and not any(stage.takes_chunks for stage in stages.values()):
            raise InvalidRequest(
                f"--prompt-syntax {request.prompt_syntax} is for models that read prompts with CLIP alone."
            )
        layers = self.family.layers_to_skip(self.checkpoint)
        if request.clip_skip > layers:
            raise InvalidRequest(
                f"--clip-skip {request.clip_skip} is more than the {layers} layers that this model can leave out."
            )
        self._check_text_length(request.max_sequence_length)
        factor, multiple = max(self.checkpoint.vae_factor, self.family.multiple), self.checkpoint.free_multiple
        most = self.family.most_pixels(self.checkpoint)
        for name in ("height", "width"):
            pixels = getattr(request, name)
            if pixels % factor:
                raise InvalidRequest(f"--{name} must be a multiple of {factor} for this model, not {pixels}.")
            if most is not None and pixels > most:
                raise InvalidRequest(
                    f"--{name} {pixels} is more than the {most} pixels that this model has places for."
                )
            if request.build == "dynamic-shape" and pixels % multiple:
                raise InvalidRequest(
                    f"--{name} {pixels}: with --build-dynamic-shape sizes are multiples of {multiple} for this model."
                )

        least = BYTES_OF_A_PIXEL * request.batch_size * request.height * request.width
        room = machine_memory()
        if room is not None and least > room:
            raise InvalidRequest(
                f"--batch-size {request.batch_size} with {request.width}x{request.height} pixels: the pictures alone "
                f"would take {least / 1e9:,.0f} GB, and this machine has {room / 1e9:,.0f}."
            )
        self._check_bounds(request)

    def _check_text_length(self, length: int | None) -> None:
        longest = self.family.longest_text(self.checkpoint)
        if length is not None and not longest:
            raise InvalidRequest("--max-sequence-length has no effect with this model, which reads no long prompts.")
        if length is not None and length > longest:
            raise InvalidRequest(
                f"--max-sequence-length {length} is more than the {longest} tokens that this model reads."
            )

    def _check_bounds(self, request: Request) -> None:
        """Raises `InvalidRequest` for sizes that are outside of what engines with free sizes are bounded to."""
        profile = self._profile(request)
        self.runtime.check(profile)
        if not self.runtime.bounded:
            return
        asked = {"batch_size": (profile.batch, profile.batches)}
        asked |= {name: (getattr(profile, name), profile.pixels) for name in ("height", "width")}
        for name, (fixed, (least, _, most)) in asked.items():
            value = getattr(request, name)
            bounds = "--dynamic-batches" if name == "batch_size" else "--dynamic-sizes"
            if fixed is None and not least <= value <= most:
                raise InvalidRequest(f"{option(name)} {value} is outside of {least} to {most}, which {bounds} sets.")

    def scheduler(self, request: Request) -> Chosen:
        """The scheduler of a request, with what the model's pipeline gives it for a picture of this size."""
        choice = self.checkpoint.scheduler(request.scheduler, request.sigmas, request.shift)
        return self.family.scheduler(self.checkpoint, choice, request.height, request.width)

    def table(self, request: Request) -> tuple[str, Table]:
        """The key's digest and the table of a request's schedule, compiled where it is not there. Raises as
        `schedule_key` does."""
        (folder,) = self._found_or_compiled(self._read_off(request)[:1])
        return self.schedule_key(request)[1].digest, Table.load(folder / TABLE_FILE)

    def schedule_key(self, request: Request) -> tuple[str, Key]:
        """The scheduler's class, and its table's key. Raises `InvalidRequest` where a picture to start from leaves no
        step."""
        choice = self.scheduler(request)
        class_name = choice.class_name
        facts = {
            "kind": "schedule",
            "scheduler": choice.as_json(),
            "steps": request.denoising_steps,
            "skipped": None,
            "revision": TABLE_REVISION,
        } | made_with("diffusers")
        if request.mask is not None:
            facts["mask"] = GIVEN if self.traits.inpaints else KEPT
        if request.image_strength is not None:
            if request.mask is None and self.family.spreads_steps(self.checkpoint) and class_name == SPREADABLE:
                facts |= {"skipped": 0, "share": request.image_strength}
            else:
                left = self.family.steps_left(request.denoising_steps, request.image_strength)
                check_steps_left(request.denoising_steps, request.image_strength, left)
                facts["skipped"] = request.denoising_steps - left
        return class_name, Key(f"schedule-{class_name}-{request.denoising_steps}", facts)

    def _profile(self, request: Request) -> Profile:
        batch = request.batch_size if request.build == "static-batch" else None
        free_size = request.build == "dynamic-shape"
        height, width = (None, None) if free_size else (request.height, request.width)
        best, multiple = self.checkpoint.default_size, self.checkpoint.free_multiple
        pixels = self.pixels or (best, best, best * 3 // 2 // multiple * multiple)
        for size in pixels if free_size else ():
            if size % multiple:
                raise InvalidRequest(f"--dynamic-sizes are multiples of {multiple} for this model, not {size}.")
        context = self.checkpoint.context(next(iter(self.checkpoint.texts)))
        of = self.checkpoint.vae_factor, self.batches, pixels, context, self.chunks(request)
        return Profile(batch, height, width, *of)

    def chunks(self, request: Request) -> int:
        """How many chunks of the request's prompts the denoiser takes. Before the tokenizers are compiled, as if one
        were enough for each."""
        if request.prompt_syntax == SYNTAXES[0]:
            return 1
        model = self._model(request)
        folders = [self.engines.find(self._tokenizer(part, model).key) for part in model.texts]
        return 1 if None in folders else chunks(folders, request, self.traits.guided(request))

    def _fixed_latents(self, job: Job) -> tuple[int, int] | None:
        """The latent size a graph must be traced at, or None when one traced with free sizes will do."""
        profile, multiple = job.profile, self.checkpoint.free_multiple
        if profile.height is None or (profile.height % multiple == 0 and profile.width % multiple == 0):
            return None
        return profile.height // profile.vae_factor, profile.width // profile.vae_factor

    def _graph_key(self, job: Job, request: Request) -> Key:
        stage, fixed = job.stage, self._fixed_latents(job) if job.stage.spatial else None
        facts = {
            "kind": "graph",
            "stage": stage.name,
            "options": stage.options,
            "shapes": {tensor.name: list(tensor.shape) for tensor in (*stage.inputs, *stage.outputs)},
            "opset": request.onnx_opset,
            "weights": self._weights(stage),
            "fixed": list(fixed) if fixed else None,
            "precision": self._graph_precision(job),
            "revision": GRAPH_REVISION,
        } | _facts_of_weights(stage)
        facts |= made_with(*_makers(stage), "onnx")
        return Key(f"{stage.name}-{self.name}-{facts['precision']}", facts)

    def _weights(self, stage: Stage) -> dict[str, str]:
        """What identifies the weights of a stage's networks, and the code that computes them."""
        digests = {network.part: self.checkpoint.digests[network.part] for network in stage.networks}
        return digests | {"module": stage.module}

    def _graph_precision(self, job: Job) -> str:
        return job.precision if self.runtime.typed else "fp32"

    def _choice_key(self, job: Job, tried: Collection[str], request: Request) -> Key:
        """What the choice of a precision depends on: all that the engine does."""
        engine = self._engine_key(job, request)
        facts = engine.facts | {"kind": "choice", "precision": AUTO, "tried": list(tried)}
        facts |= {"choice_revision": CHOICE_REVISION}
        return Key(f"precision-{engine.label.removesuffix(f'-{job.precision}')}", facts)

    def _engine_key(self, job: Job, request: Request) -> Key:
        precision = ANY if self.runtime.serves_any_precision(job.stage) else job.precision
        facts: dict[str, Any] = {
            "kind": "engine",
            "stage": job.stage.name,
            "options": job.stage.options,
            "precision": precision,
            "modules": GRAPH_REVISION,
            "weights": self._weights(job.stage),
            "shapes": {tensor.name: self._shape(job.profile, tensor) for tensor in job.stage.inputs},
            "runtime": self.runtime.name,
            "version": self.runtime.version(),
            "revision": self.runtime.revision,
            "device": self.runtime.device(),
        }
        facts |= _facts_of_weights(job.stage) | self.runtime.facts()
        if self.runtime.from_graph:
            facts["graph"] = self._graph_key(job, request).facts
        else:
            facts |= made_with(*_makers(job.stage))
        sizes = job.profile.label(job.stage.spatial)
        by = "-".join([self.runtime.name, *self.runtime.options.place().values()])
        return Key(f"{job.stage.name}-{self.name}-{sizes}-{by}-{precision}", facts)

    def _shape(self, profile: Profile, tensor: Tensor) -> list[Any]:
        """A shape as a key has it: with its bounds where it has any."""
        shape = profile.shape(tensor)
        if self.runtime.bounded and FREE in shape:
            return [list(bound) for bound in profile.bounds(tensor)]
        return list(shape)

    def _source(self, job: Job, key: Key, request: Request) -> Path:
        """The folder that an engine is loaded from; built first if it is not there."""
        if not self.runtime.compiles:
            return self.checkpoint.folder
        if folder := self.engines.find(key) or self.engines.find_for(key, self.runtime.runs):
            return folder
        source = self._graph(job, request) if self.runtime.from_graph else self.checkpoint.folder
        sizes = job.profile.label(job.stage.spatial)
        with self.job(f"building the {job.stage.name} engine ({self.runtime.name}, {sizes}, {job.precision})") as line:

            def build(folder: Path) -> dict[str, Any]:
                arguments = (self.runtime.name, self.runtime.options, job, source, folder)
                made = run_in_child(build_engine, *arguments, verbose=self.verbose, progress=line.phase)
                made |= self.runtime.finish(job, folder)
                return made | self._origin(job) | {"options": self.runtime.options.place()}

            self.made.append(self.engines.make(key, build))
        return self.made[-1]

    def _origin(self, job: Job) -> dict[str, Any]:
        """What a manifest needs so that an artefact can be held against torch again."""
        return {"model": self.name, "model_folder": str(self.checkpoint.folder.absolute()), "job": to_json(job)}

    def _graph(self, job: Job, request: Request) -> Path:
        from darkroom.networks.graph import GRAPH, export_stage

        key = self._graph_key(job, request)
        if not (folder := self.graphs.find(key)):

            def build(folder: Path) -> dict[str, Any]:
                fixed = tuple(key.facts["fixed"]) if key.facts["fixed"] else None
                factor = self.checkpoint.vae_factor
                arguments = (self.checkpoint.folder, job.stage, self._graph_precision(job), request.onnx_opset)
                arguments += (fixed, factor, folder)
                return run_in_child(export_stage, *arguments, verbose=self.verbose) | self._origin(job)

            with self.job(f"exporting the {job.stage.name} to ONNX"):
                folder = self.graphs.make(key, build)
            self.made.append(folder)
        self.graphs.note_use(folder)
        return folder / GRAPH


def check_precision(runtime: Runtime, precision: str) -> None:
    """Raises `InvalidRequest` for one that the runtime does not compute in on this machine."""
    if not offers(runtime, precision):
        raise InvalidRequest(
            f"--precision {precision} cannot be computed by {asked_as(runtime)} on this machine; "
            f"it offers {' and '.join(runtime.precisions())}."
        )


def offers(runtime: Runtime, precision: str) -> bool:
    """Whether a runtime computes in a precision, or in all that it names for networks, on this machine."""
    return {*(precisions_by_stage(precision).values() or [precision])} <= {AUTO, *runtime.precisions()}


def _facts_of_weights(stage: Stage) -> dict[str, Any]:
    """What a stage's weights are beside those in the model's folder."""
    facts: dict[str, Any] = {"half_weights": True} if stage.half_weights else {}
    if stage.loras:
        facts["loras"] = [[lora.sha256, lora.weight, lora.scale, LORA_REVISION] for lora in stage.loras]
    if stage.inversions:
        facts["inversions"] = [[each.sha256, each.tensors] for each in stage.inversions]
    return facts


def _makers(stage: Stage) -> list[str]:
    """The packages that make a stage's network of what is in the model's folder."""
    return ["torch", "diffusers", "transformers"]


@dataclass(frozen=True)
class ReadOff:
    """A small artefact that the libraries are read off into: `function` returns its file's name and content, and facts
    worth recording. `title` says to people what it is."""

    key: Key
    title: str
    function: Callable[..., tuple[str, bytes, dict[str, Any]]]
    arguments: tuple[Any, ...]


def call_each(calls: list[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
    """Runs in a child: the libraries that all of them import are imported once."""
    return [function(*arguments) for function, arguments in calls]


def compile_table(
    choice: Chosen, steps: int, skipped: int | None, share: float, mask: str | None
) -> tuple[str, bytes, dict[str, Any]]:
    """Runs in a child: it imports diffusers, whose version it returns too."""
    import diffusers

    from darkroom.schedule.compile import compile_schedule

    table, content = compile_schedule(choice, steps, skipped, share, mask), io.BytesIO()
    table.save(content)
    return TABLE_FILE, content.getvalue(), {"calls": len(table), "diffusers": diffusers.__version__}


def _write(name: str, content: bytes, made: dict[str, Any], folder: Path) -> dict[str, Any]:
    (folder / name).write_bytes(content)
    return made


def build_engine(
    runtime: str, options: Options, job: Job, source: Path, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Runs in a child: its memory goes back when it is done."""
    from darkroom.engines import find_runtime

    its = find_runtime(runtime, options)
    made = its.build(job, source, folder, progress)
    if its.from_graph and its.unusable() is None:
        from darkroom.engines.parity import held_against_graph

        progress("checking", 0, 0)
        made |= held_against_graph(its, job, source, folder)
    return made | {"peak_bytes": peak_memory()}
