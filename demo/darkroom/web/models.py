"""The models of a studio: each with its engines, its step batcher, and the folder that its pictures are kept in."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from darkroom.errors import Failed, InvalidRequest, near_matches
from darkroom.pipeline.pictures import save
from darkroom.pipeline.timing import StageClock
from darkroom.request import Request
from darkroom.schedule.table import Trajectory
from darkroom.serving.batching import Counts, Original
from darkroom.serving.service import Service
from darkroom.web.previews import colours_for, preview

WRITERS = 2
"""Threads that draw previews and write pictures, beside those of the batcher."""

Watch = Callable[[int, Image.Image, int], None]
"""What is called with the number of an image among those requested, a preview of it, and the calls made so far."""


@dataclass(frozen=True)
class Picture:
    """A finished picture: its file, its pixels (H, W, 3) uint8, its request, its recipe, and the clock of its way."""

    path: Path
    pixels: np.ndarray
    request: Request
    recipe: dict[str, Any]
    clock: StageClock


class Job:
    """What was requested together: images on their way, which can be given up.

    `progress` is how many network calls of how many have been made, of all its images.
    """

    def __init__(self, requests: list[Request], calls: list[int]) -> None:
        self.requests = requests
        self.pictures: list[Future[Picture]] = [Future() for _ in requests]
        self.shown: Image.Image | None = None
        self._given_up = threading.Event()
        self._calls = calls
        self._made = [0] * len(requests)

    @property
    def progress(self) -> tuple[int, int]:
        return sum(self._made), sum(self._calls)

    @property
    def wanted(self) -> bool:
        return not self._given_up.is_set()

    def give_up(self) -> None:
        """Nobody waits for it any more: its slots are free within a step."""
        self._given_up.set()

    def count(self, image: int, calls: int) -> None:
        self._made[image] = calls


class Model:
    """A model that is served by this name. Its pictures are written to `folder`, and named after `pipeline`."""

    def __init__(self, name: str, service: Service, slots: int, queue: int, folder: Path, pipeline: str) -> None:
        self.name = name
        self.service = service
        self.plan = service.plan
        self.slots = slots
        self.folder = folder
        self._pipeline = pipeline
        self._colours = colours_for(service)  # while nothing else calls its decoder
        self._batcher = service.batcher(slots, queue)
        self._hands = ThreadPoolExecutor(WRITERS, f"{name}-pictures")
        self.jobs: set[Job] = set()
        """Those that are not done."""
        self.times: dict[str, tuple[int, float]] = {}
        """Of each stage, how many images it has made and in how many seconds."""

    def submit(
        self,
        requests: list[Request],
        previews: int = 0,
        watch: Watch = lambda *_: None,
        original: Original | None = None,
    ) -> Job:
        """Queues what `Service.requests` made, or `Service.starting` of an `original`; `watch` gets so many previews of
        each image, evenly over its steps.

        Raises `InvalidRequest` and `Busy` as the batcher does.
        """
        tables = [self.service.table_of(request) for request in requests]
        job = Job(requests, [len(table) for table in tables])
        steps = [watched_steps(len(table), previews) for table in tables]

        def watching(image: int) -> Callable[[Trajectory, int], None]:
            def called(trajectory: Trajectory, calls: int) -> None:
                job.count(image, calls)
                if calls in steps[image]:
                    self._hands.submit(self._show, job, image, trajectory, calls, watch)

            return called

        made = self._batcher.submit(
            requests,
            wanted=lambda: job.wanted,
            watches=[watching(image) for image in range(len(requests))],
            original=original,
        )
        self.jobs.add(job)
        for image, future in enumerate(made):
            future.add_done_callback(lambda done, image=image: self._hand_over(job, image, done))
        return job

    def counts(self) -> Counts:
        return self._batcher.counts()

    def close(self) -> None:
        """Ends all work: what is not done fails."""
        self._batcher.close()
        self._hands.shutdown()

    def _show(self, job: Job, image: int, trajectory: Trajectory, calls: int, watch: Watch) -> None:
        if not job.wanted or job.pictures[image].done():
            return
        request = job.requests[image]
        job.shown = preview(self._colours, trajectory, calls, (request.width, request.height))
        watch(image, job.shown, calls)

    def _hand_over(self, job: Job, image: int, done: Future) -> None:
        """Writes a finished picture, or passes on why there is none. Nobody's thread but ours waits for the disk."""
        try:
            self._hands.submit(self._finish, job, image, done)
        except RuntimeError:  # it is closing
            job.pictures[image].set_exception(Failed("the server is stopping."))

    def _finish(self, job: Job, image: int, done: Future) -> None:
        request = job.requests[image]
        try:
            made = done.result()
            recipe = self.service.recipe(request, made)
            path = save(made.pixels, self.folder, self._pipeline, recipe)
            self._note(made.clock)
            job.pictures[image].set_result(Picture(path, made.pixels, request, recipe, made.clock))
        except Exception as error:
            job.pictures[image].set_exception(error)
        if all(picture.done() for picture in job.pictures):
            self.jobs.discard(job)

    def _note(self, clock: StageClock) -> None:
        for stage, milliseconds in (clock.milliseconds | {"Pipeline": clock.pipeline}).items():
            count, seconds = self.times.get(stage, (0, 0.0))
            self.times[stage] = count + 1, seconds + milliseconds / 1000


def watched_steps(calls: int, previews: int) -> set[int]:
    """After which of so many calls a preview is drawn: evenly, and not after the last, which the picture follows."""
    count = min(previews, calls - 1)
    return {round(calls * turn / (count + 1)) for turn in range(1, count + 1)}


class Models(Mapping[str, Model]):
    """The models that are served, by name; the first is the default."""

    def __init__(self, models: Iterable[Model]) -> None:
        self._models = {model.name: model for model in models}

    def __getitem__(self, name: str) -> Model:
        return self._models[name]

    def __iter__(self):
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    def named(self, name: str | None) -> Model:
        """The model of this name, the first for None. Raises `InvalidRequest` for one that is not served."""
        if name is None:
            return next(iter(self._models.values()))
        if name not in self._models:
            near = near_matches(name, list(self._models))
            raise InvalidRequest(f"model {name!r} is not served here.{near} There is {', '.join(self._models)}.")
        return self._models[name]

    def close(self) -> None:
        """Ends the work of all of them."""
        with contextlib.ExitStack() as stack:
            for model in self._models.values():
                stack.callback(model.close)
