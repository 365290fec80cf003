"""Makes and keeps many pictures: in this process, or in several that take their work from one queue.

A worker has a plan's engines and a step batcher of its own. A picture is saved where it is made, as soon as it is done;
what comes back is its name and how long it took. The GPUs of `--devices` have not been tried: no machine with one was
at hand.
"""

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Protocol

from darkroom.errors import DarkroomError, Failed, InvalidRequest
from darkroom.pipeline.pictures import save
from darkroom.processes.child import deaf_to_interrupts, end_with_parent
from darkroom.request import Request
from darkroom.serving.batching import Counts, Made
from darkroom.serving.service import Plan, Service

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

CPU = "cpu"
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"

HELD_PER_SLOT = 2
"""Images that a worker is given for each slot: the texts of the next are read while others are in the slots."""

TRIES = 2
"""How many workers may end while they make an image before it is given up."""

SECONDS_TO_END = 10.0
"""What a worker that is stopped has to finish its step in."""


@dataclass(frozen=True)
class Task:
    """An image to be made: its number in the run, and the name that its picture would like to have."""

    number: int
    request: Request
    name: str


@dataclass(frozen=True)
class Orders:
    """The orders of a worker: where pictures go, what begins their names, and which `share` of the cores is its own, of
    how many. `threads` is None for as many as there are cores; `device` is OpenVINO's, None with other engines."""

    plan: Plan
    slots: int
    folder: Path
    pipeline: str
    threads: int | None = None
    share: tuple[int, int] = (0, 1)
    device: str | None = None


@dataclass(frozen=True)
class Ready:
    """A worker has its engines."""


@dataclass(frozen=True)
class Kept:
    """An image is made, and saved under this name; its stages in milliseconds."""

    number: int
    file: str
    milliseconds: dict[str, float]
    counts: Counts


@dataclass(frozen=True)
class NotMade:
    """An image could not be made; or not be saved, and then no other can."""

    number: int
    reason: str
    counts: Counts | None = None
    unsaved: bool = False


@dataclass(frozen=True)
class Gone:
    """A worker has ended, and what it was making with it."""

    reason: str


News = Ready | Kept | NotMade | Gone
Tell = Callable[[News], None]


class Maker:
    """Engines, and a batcher whose pictures are kept. Raises `Failed` for engines that cannot be loaded."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        plan = orders.plan  # whose recipes name the requested device, whichever of its kind this is
        if orders.device is not None:
            plan = replace(plan, options=replace(plan.options, device=orders.device))
        self._batcher = Service(plan, orders.threads).batcher(orders.slots, HELD_PER_SLOT * orders.slots)

    def make(self, task: Task, tell: Tell) -> None:
        """Begins an image; `tell` gets what became of it, in another thread."""
        try:
            (future,) = self._batcher.submit([task.request])
        except DarkroomError as error:
            tell(NotMade(task.number, str(error)))
        else:
            future.add_done_callback(partial(self._keep, task, tell))

    def close(self) -> None:
        """Ends: what is in a slot is not made."""
        self._batcher.close()

    def _keep(self, task: Task, tell: Tell, future: "Future[Made]") -> None:
        counts = self._batcher.counts()
        if error := future.exception():
            tell(NotMade(task.number, str(error), counts))
            return
        made, orders = future.result(), self._orders
        try:
            path = save(made.pixels, orders.folder, orders.pipeline, orders.plan.recipe(task.request, made))
        except Exception as error:
            reason = str(error) if isinstance(error, DarkroomError) else f"{type(error).__name__}: {error}"
            tell(NotMade(task.number, reason, counts, unsaved=True))
            return
        times = made.clock.milliseconds | {"Pipeline": made.clock.pipeline}
        tell(Kept(task.number, path.name, {name: round(value, 3) for name, value in times.items()}, counts))


class Worker(Protocol):
    """Makes images. It reports them, and its own end, to what started it."""

    name: str

    def give(self, task: Task) -> None: ...

    def stop(self) -> None:
        """Ends it. What it has not finished is not made."""
        ...


class Here(Worker):
    """A worker in this process."""

    name = "this process"

    def __init__(self, orders: Orders, tell: Tell) -> None:
        self._tell = tell
        self._maker = Maker(orders)
        tell(Ready())

    def give(self, task: Task) -> None:
        self._maker.make(task, self._tell)

    def stop(self) -> None:
        self._maker.close()


class Process(Worker):
    """A worker in a process of its own, which ends with this one; `variables` are added to its environment."""

    def __init__(self, name: str, orders: Orders, variables: dict[str, str], tell: Tell) -> None:
        import multiprocessing

        self.name = name
        self._tell = tell
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, os.getpid(), orders, variables), daemon=True)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        try:
            with deaf_to_interrupts():
                self.process.start()
            theirs.close()
            self._listener.start()
        except BaseException:
            if self.process.pid is not None:  # it has begun, and is known here alone
                self.process.kill()
                self.process.join()
            raise

    def give(self, task: Task) -> None:
        self._send(task)

    def stop(self) -> None:
        self._send(None)
        self.process.join(SECONDS_TO_END)
        self.process.kill()
        self.process.join()
        self._listener.join()  # what it had finished is reported before that is asked for

    def _send(self, task: Task | None) -> None:
        try:
            self._connection.send(task)
        except OSError:  # it has ended, as its listener will report
            pass

    def _listen(self) -> None:
        reason = None
        try:
            while True:
                self._tell(self._connection.recv())
        except (EOFError, OSError):
            pass
        except Exception as error:  # what it sent cannot be read, and nothing that follows can
            reason = f"its report could not be read ({type(error).__name__}: {error})"
            self.process.kill()
        self.process.join()
        code = self.process.exitcode
        ended = "it was killed: out of memory?" if code == -signal.SIGKILL else f"exit code {code}"
        self._tell(Gone(reason or ended))


def _work(connection: "Connection", parent: int, orders: Orders, variables: dict[str, str]) -> None:
    """What a worker's process does."""
    end_with_parent(parent=parent)
    for number in (signal.SIGINT, signal.SIGTERM):  # which reach all of a group: they are its parent's to pass on
        signal.signal(number, signal.SIG_IGN)
    os.environ.update(variables)
    lock = threading.Lock()

    def tell(news: News) -> None:
        with lock:
            connection.send(news)

    try:
        maker = Maker(on_its_share(orders))
    except DarkroomError as error:
        tell(Gone(str(error)))
        return
    tell(Ready())
    while (task := connection.recv()) is not None:
        maker.make(task, tell)
    maker.close()


def on_devices(devices: Sequence[str], orders: Orders) -> list[Callable[[Tell], Worker]]:
    """What starts a process for each device: "cpu", or the number of a GPU: OpenVINO's, where the orders are for its
    devices, or NVIDIA's. CPUs share the cores."""
    starts: list[Callable[[Tell], Worker]] = []
    for number, device in enumerate(devices, start=1):
        own, variables, place = orders, {}, f"GPU {device}"
        if device == CPU:
            own, place = replace(orders, share=(devices[: number - 1].count(CPU), devices.count(CPU))), CPU
        elif orders.device is not None:
            own = replace(orders, device=f"GPU.{device}")
        else:
            variables = {VISIBLE_GPUS: visible_gpu(int(device))}
        starts.append(partial(Process, f"worker {number} ({place})", own, variables))
    return starts


def on_its_share(orders: Orders) -> Orders:
    """Keeps this process to its share of the cores, and its engines to as many threads.

    OpenVINO ties the threads of every process to the first cores that it may use, where they would wait for each other.
    """
    which, of = orders.share
    if of == 1:
        return orders
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    own = cores[len(cores) * which // of : len(cores) * (which + 1) // of]
    threads = orders.threads or max(1, len(own))
    if threads <= len(own) and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, own)
    return replace(orders, threads=threads)


def visible_gpu(number: int) -> str:
    """What CUDA is to see of a GPU, by its number among those that this process sees."""
    if not (visible := os.environ.get(VISIBLE_GPUS)):
        return str(number)
    names = visible.split(",")
    if number >= len(names):
        raise InvalidRequest(f"--devices {number}: {VISIBLE_GPUS} is {visible}, which has no such GPU.")
    return names[number]


@dataclass(eq=False)
class _Post:
    """A worker, what it holds by the images' numbers, and its own last report."""

    worker: Worker
    held: dict[int, Task] = field(default_factory=dict)
    ready: bool = False
    counts: Counts | None = None
    made: int = 0


class Crew:
    """Workers that make the images of one run. `tell` gets those that are lost.

    What a worker was making when it ended is made by another, once. Raises `Failed` when no worker is left.
    """

    def __init__(self, starts: Sequence[Callable[[Tell], Worker]], slots: int, tell: Callable[[str], None]) -> None:
        self._most = HELD_PER_SLOT * slots
        self._say = tell
        self._news: SimpleQueue[tuple[int, News] | None] = SimpleQueue()
        self._interrupted = False
        self._again: deque[Task] = deque()
        self._ends: dict[int, int] = {}
        """How many workers have ended while they made an image."""
        self.began: float | None = None
        """When the first worker was ready, by `time.perf_counter`."""
        self._posts: list[_Post] = []
        try:
            for place, start in enumerate(starts):
                self._posts.append(_Post(start(partial(self._hear, place))))
        except BaseException:
            self.stop()
            raise
        self._working = list(self._posts)

    def run(self, tasks: Iterator[Task]) -> Iterator[tuple[Task, Kept | NotMade]]:
        """Makes all of `tasks`, and yields each with what became of it, as it ends. See `interrupt`."""
        while not self._hand_out(tasks) or any(post.held for post in self._working):
            if (heard := self._news.get()) is None:
                raise KeyboardInterrupt
            yield from self._heard(*heard)

    def interrupt(self) -> None:
        """Nothing more is begun, and `run` raises `KeyboardInterrupt` when it has yielded what it heard before.

        A signal's handler may call it.
        """
        self._interrupted = True
        self._news.put(None)

    def stop(self) -> None:
        """Ends all workers: see `rest`."""
        if self._posts:
            with ThreadPoolExecutor(len(self._posts)) as pool:
                list(pool.map(lambda post: post.worker.stop(), self._posts))

    def rest(self) -> Iterator[tuple[Task, Kept | NotMade]]:
        """What workers had still finished when they were stopped."""
        while not self._news.empty():
            if (heard := self._news.get()) and isinstance(heard[1], Kept):
                yield from self._heard(*heard)

    def made(self) -> dict[str, int]:
        """How many pictures are each worker's."""
        return {post.worker.name: post.made for post in self._posts}

    def occupancy(self) -> float | None:
        """Images in slots at a time, over the turns of all workers; None where there was none."""
        known = [post.counts for post in self._posts if post.counts is not None]
        turns = sum(counts.turns for counts in known)
        return sum(counts.steps for counts in known) / turns if turns else None

    def _hear(self, place: int, news: News) -> None:
        self._news.put((place, news))

    def _hand_out(self, tasks: Iterator[Task]) -> bool:
        """Gives tasks to the worker that holds the fewest, as long as any has room. Returns whether none are left."""
        while not self._interrupted and (
            free := [post for post in self._working if post.ready and len(post.held) < self._most]
        ):
            post = min(free, key=lambda post: len(post.held))
            if (task := self._next(tasks, post)) is None:
                return not self._again
            post.held[task.number] = task
            post.worker.give(task)
        return False

    def _next(self, tasks: Iterator[Task], post: _Post) -> Task | None:
        """A task whose file name no other worker is about to take: two that save under it at once would lose a picture.

        No worker gets two that a worker has ended of: the one that is to blame would take the other with it again.
        """
        taken = {task.name for each in self._working for task in each.held.values()}
        suspicious = bool(self._ends.keys() & post.held.keys())
        for task in self._again:
            if task.name not in taken and not (suspicious and task.number in self._ends):
                self._again.remove(task)
                return task
        while len(self._again) <= self._most * len(self._posts):
            task = next(tasks, None)
            if task is None or task.name not in taken:
                return task
            self._again.append(task)
        return None

    def _heard(self, place: int, news: News) -> Iterator[tuple[Task, Kept | NotMade]]:
        post = self._posts[place]
        if post not in self._working:
            return  # what it held is another's by now
        if isinstance(news, Ready):
            post.ready = True
            self.began = self.began or time.perf_counter()
        elif isinstance(news, Gone):
            self._working.remove(post)
            yield from self._lost(post, news.reason.rstrip("."))
        else:
            post.counts = news.counts or post.counts
            if task := post.held.pop(news.number, None):
                post.made += isinstance(news, Kept)
                yield task, news

    def _lost(self, post: _Post, reason: str) -> Iterator[tuple[Task, NotMade]]:
        if not self._working:
            raise Failed(f"{post.worker.name} has ended, and no other is left: {reason}.")
        self._say(f"{post.worker.name} has ended ({reason}); others make what it was making.")
        for task in post.held.values():
            self._ends[task.number] = self._ends.get(task.number, 0) + 1
            if self._ends[task.number] < TRIES:
                self._again.append(task)
            else:
                yield task, NotMade(task.number, f"{TRIES} workers have ended while they made it: {reason}.")
