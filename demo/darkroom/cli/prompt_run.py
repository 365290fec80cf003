"""The pictures of a file of prompts: those that are there, those that workers make, and what is reported of them."""

import contextlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from darkroom import __version__
from darkroom.cli.console import Console
from darkroom.cli.exit import interrupting
from darkroom.errors import DarkroomError, Failed
from darkroom.flags import OF_ROW
from darkroom.pipeline.pictures import file_name, find
from darkroom.pipeline.timing import RULE, StageClock, medians
from darkroom.prompts.gallery import Failure, Gallery
from darkroom.prompts.journal import ROWS, Journal, Past, Record
from darkroom.prompts.rows import Asked, Prompts
from darkroom.request import Request
from darkroom.serving.service import Plan
from darkroom.serving.workers import Crew, Kept, NotMade, Orders, Task, Tell, Worker
from darkroom.store.fingerprints import hash_json
from darkroom.text.reading import cuts
from darkroom.text.tokenizer import Tokenizer

LOCK = ".lock"
CLOCKS_KEPT = 10_000
"""Images that medians are over: the last."""

SHOWN = 10
"""Of what may be many: how many are reported one by one."""

SECONDS_BETWEEN_GALLERIES = 2.0
GALLERIES_SHARE = 0.05
"""Of the time, at most, that the gallery takes while pictures are made."""


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """With a folder to oneself; what killed runs left half-made in it is removed. Raises `Failed` for one in use."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise Failed(f"{folder} is being filled by another run.") from None
    except OSError as error:
        raise Failed(f"{folder} cannot be written: {error.strerror or error}.") from None
    try:
        for left in folder.glob(".*.tmp"):
            left.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


class Run:
    """One run over a file. `default` is what its rows leave unsaid; `past` is what an earlier run left.

    A picture is there when its file is whole and carries the recipe that its row has now.
    """

    def __init__(self, prompts: Prompts, default: Request, orders: Orders, past: Past, console: Console) -> None:
        self._prompts = prompts
        self._default = default
        self._orders = orders
        self._console = console
        self._failures: dict[int, Failure] = {}
        self._clocks: deque[StageClock] = deque(maxlen=CLOCKS_KEPT)
        self._made = self._cuts = 0
        self._seconds = 0.0
        self._occupancy: float | None = None
        self._workers: dict[str, int] = {}
        self._problem: DarkroomError | None = None
        plan = orders.plan
        self._tokenizers = [Tokenizer.load(folder) for folder in plan.tokenizers]
        head = {
            "darkroom": __version__,
            "script": plan.script,
            "prompts": prompts.path.name,
            "file": str(prompts.path.resolve()),
            "rows": prompts.digest,
            "pixels": hash_json(self._beside_rows()),
            "seed": default.seed,
            "images": prompts.images,
        }
        self._journal = Journal(orders.folder / ROWS, head, self._there(past))
        self._there_already = len(self._journal)
        moved = {"file": head["file"], "prompts": head["prompts"]}
        if past.head and past.head | moved != head:
            console.say(
                f"the file or the flags have changed: {len(self._journal)} of {prompts.images} pictures are still as "
                f"requested."
            )
        elif self._there_already:
            console.say(f"{self._there_already} of {prompts.images} pictures are there already.")
        about = f"{plan.script}, {default.model or 'a model folder'}, {_runtime(plan)}, seed {default.seed}"
        self._gallery = Gallery(orders.folder, prompts.path.name, about, prompts.images, self._journal, prompts.line_of)

    @property
    def missing(self) -> int:
        return self._prompts.images - len(self._journal)

    def close(self) -> None:
        self._journal.close()

    def make(self, starts: Sequence[Callable[[Tell], Worker]]) -> None:
        """Makes what is missing. What keeps it from going on is raised by `report`; Ctrl-C here."""
        try:
            self._show_growing()
            crew = Crew(starts, self._orders.slots, self._console.warn)
            try:
                with interrupting(crew.interrupt), self._console.job("making pictures", self.missing) as advance:
                    for task, news in crew.run(self._tasks()):
                        self._take(task, news)
                        advance()
                        if time.monotonic() > self._next_gallery:
                            self._show_growing()
            finally:
                self._seconds = time.perf_counter() - crew.began if crew.began else 0.0
                self._occupancy = crew.occupancy()
                crew.stop()
                for task, news in crew.rest():
                    self._take(task, news)
                self._workers = crew.made()
        except DarkroomError as error:
            self._problem = error
        finally:
            self._gallery.write(self._failures, running=False)
            if self.missing > len(self._failures):
                self._console.say(
                    f"{len(self._journal)} of {self._prompts.images} pictures are in {self._orders.folder}; "
                    f"the same command goes on from there."
                )

    def report(self, sheet: Callable[[Path, Sequence[Record]], Path] | None = None) -> None:
        """Reports what was made, and raises `Failed` for what was not. A `sheet` of it is made first, if there is to be
        one."""
        self._gallery.write(self._failures, running=False)
        drawn = sheet(self._orders.folder, list(self._journal)) if sheet else None
        console = self._console
        if self._cuts > SHOWN:
            console.warn(f"{self._cuts - SHOWN} more prompts were cut off.")
        if self._made:
            console.say(self._table())
        failing = bool(self._problem or self._failures)
        if console.machine:
            said = self._as_json() | ({"sheet": str(drawn)} if drawn else {})
            console.result(json.dumps(said), failing)
        elif console.quiet:
            for record in self._journal:
                console.result(str(self._orders.folder / record.file), failing)
        else:
            console.result(str(drawn or self._gallery.index), failing)
        if self._problem:
            raise self._problem
        if self._failures:
            raise Failed(self._complaint())

    def _show_growing(self) -> None:
        began = time.monotonic()
        self._gallery.write(self._failures, running=True)
        took = time.monotonic() - began
        self._next_gallery = began + took + max(SECONDS_BETWEEN_GALLERIES, took / GALLERIES_SHARE)

    def _beside_rows(self) -> list[Any]:
        """All that determines pixels, beside rows and seed."""
        plan = self._orders.plan
        defaults = {name: value for name, value in self._default.as_json().items() if name not in ("prompts", "seed")}
        return [__version__, defaults | plan.options.recorded(), plan.revision, _runtime(plan)]

    def _there(self, past: Past) -> Iterator[Record]:
        """What of the run is there, with what the past knows of it."""
        if any(self._orders.folder.glob("*.png")):
            for asked in self._prompts.asked(self._default):
                if path := find(self._orders.folder, self._orders.pipeline, self._orders.plan.recipe(asked.request)):
                    known = past.record(path.name)
                    yield self._record(asked, path.name, known and known.milliseconds)
        past.close()

    def _tasks(self) -> Iterator[Task]:
        """What is missing, one kind after the other: only images of a kind share a UNet call."""
        orders, plan = self._orders, self._orders.plan

        def kind(request: Request) -> tuple[bool, int, int, int]:
            return plan.traits.guided(request), plan.chunks(request), request.height, request.width

        for wanted in dict.fromkeys(kind(asked.request) for asked in self._prompts.rows(self._default)):
            for asked in self._prompts.asked(self._default):
                if asked.number not in self._journal and kind(asked.request) == wanted:
                    self._warn_of_cuts(asked)
                    name = file_name(orders.pipeline, plan.recipe(asked.request))
                    yield Task(asked.number, asked.request, name)

    def _take(self, task: Task, news: Kept | NotMade) -> None:
        """Writes down what became of an image."""
        line = self._prompts.line_of(task.number)
        self._gallery.change(task.number)
        if isinstance(news, NotMade):
            if news.unsaved:
                raise Failed(news.reason)
            self._failures[task.number] = Failure(line, task.request.prompts[0], news.reason)
            self._console.detail(f"image {task.number} (line {line}): {news.reason}")
            return
        record = self._record(Asked(task.number, line, task.request), news.file, news.milliseconds)
        self._journal.add(record)
        self._made += 1
        times = {name: value for name, value in news.milliseconds.items() if name != "Pipeline"}
        self._clocks.append(StageClock(times, pipeline=record.own_milliseconds))
        self._console.detail(f"image {task.number} (line {line}): {news.file}, {record.own_milliseconds:.2f} ms")

    def _record(self, asked: Asked, file: str, milliseconds: dict[str, float] | None) -> Record:
        request = asked.request
        own = self._orders.plan.scheduler.removesuffix("Scheduler")
        row = {name: getattr(request, flag.name) for name, flag in OF_ROW.items() if hasattr(request, flag.name)}
        row |= {"prompt": request.prompts[0], "scheduler": request.scheduler or own}
        return Record(image=asked.number, line=asked.line, file=file, milliseconds=milliseconds, **row)

    def _warn_of_cuts(self, asked: Asked) -> None:
        for cut in cuts(self._tokenizers, asked.request):
            self._cuts += 1
            if self._cuts <= SHOWN:
                self._console.warn(f"{self._prompts.place(asked.line)}: {cut}")

    def _table(self) -> str:
        """What was made: how many, how fast, how full the batch was, and medians of what an image took."""
        slots = f"{self._occupancy or 0:.2f} of {self._orders.slots}"
        facts = {"Images": str(self._made), "Seconds": f"{self._seconds:.2f}", "Slots in use": slots}
        times = {name: f"{value:.2f} ms" for name, value in medians(list(self._clocks)).items()}
        whole = {"Pipeline": times.pop("Pipeline")}
        lines = [RULE]
        for section in (facts, times, whole):
            lines += [*(f"|{name:^17}|{value:>13} |" for name, value in section.items()), RULE]
        return "\n".join([*lines, f"Throughput: {self._made / self._seconds:.2f} image/s"])

    def _as_json(self) -> dict[str, Any]:
        """The same for programs, with all pictures that are there and the images that failed, in order."""
        plan, folder = self._orders.plan, self._orders.folder
        return {
            "darkroom": __version__,
            "script": plan.script,
            "prompts": str(self._prompts.path),
            "request": self._default.as_json(),
            "revision": plan.revision,
            "runtime": _runtime(plan),
            "gallery": str(self._gallery.index),
            "counts": {
                "asked": self._prompts.images,
                "there_already": self._there_already,
                "made": self._made,
                "failed": len(self._failures),
                "missing": self.missing,
            },
            "seconds": self._seconds,
            "images_per_second": self._made / self._seconds if self._made else None,
            "workers": self._workers,
            "slots": self._orders.slots,
            "slots_in_use": self._occupancy,
            "milliseconds": medians(list(self._clocks)) if self._clocks else {},
            "images": [
                {"path": str(folder / record.file)}
                | {name: getattr(record, name) for name in ("line", "image", "seed", "prompt")}
                for record in self._journal
            ],
            "failures": [
                {"line": failure.line, "image": image, "message": failure.reason}
                for image, failure in sorted(self._failures.items())
            ],
        }

    def _complaint(self) -> str:
        """Which images were not made, and why: one line each, for the first few."""
        failures = [failure for _, failure in sorted(self._failures.items())]
        said = [f"{self._prompts.place(failure.line)}: {failure.reason}" for failure in failures[:SHOWN]]
        if len(failures) > SHOWN:
            said.append(f"and {len(failures) - SHOWN} more, which the gallery names.")
        if len(failures) == 1:
            return f"1 of {self._prompts.images} pictures was not made: {said[0]}"
        lines = "\n  ".join(said)
        return f"{len(failures)} of {self._prompts.images} pictures were not made:\n  {lines}"


def _runtime(plan: Plan) -> str:
    return f"{plan.request.engine} {plan.runtime_version}"
