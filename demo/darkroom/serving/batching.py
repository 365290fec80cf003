"""A batch that images join and leave between steps.

Every slot holds one image, at its own step of its own schedule, with its own guidance and seed; each turn advances all
of them by one network call. An image whose last step is done leaves its slot to the next one in the queue at once, and
is decoded while the others go on. So a request never waits for the end of another, and gets the picture that it would
have got alone.
"""

import contextlib
import copy
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from darkroom.engines.runtime import Engine
from darkroom.errors import DarkroomError, Failed, InvalidRequest
from darkroom.families.family import Traits
from darkroom.noise import NoiseStream, initial_latents
from darkroom.pipeline.assembly import assemble
from darkroom.pipeline.pipeline import InitialImage, Pipeline, TextEncoder
from darkroom.pipeline.timing import QUEUE, StageClock
from darkroom.request import Request
from darkroom.schedule.table import Table, Trajectory

SECONDS_BETWEEN_LOOKS = 0.05
"""How often it is checked whether images are still wanted: a check may mean a message to another process."""


NEARLY_ALL = 0.9
"""Of an engine's best images a second: what is reached with fewer images at a time is as good, and each ends sooner."""

JOINING = 2
"""Images that may always share: a request for four steps does not wait for the last of another's fifty."""


class Busy(Failed):
    """The queue is full."""


class Late(Failed):
    """The time that an image was given is over."""


class Unwanted(Failed):
    """The image is no longer waited for."""


@dataclass(eq=False)
class Lane:
    """Engines for images that may share a UNet call: those of one size, all with guidance or all without.

    `encoder` reads pictures that images start from, where any may. `denoisers` by the batch that each is for; None for
    one that takes any; they take so many `chunks` of a prompt. The other engines take one image. `costs` are the least
    milliseconds that a call of each batch has taken, where that is measured."""

    traits: Traits
    guided: bool
    encoders: tuple[TextEncoder, ...]
    denoisers: dict[int | None, Engine]
    vae: Engine
    costs: dict[int, float] = field(default_factory=dict)
    chunks: int = 1
    encoder: Engine | None = None

    def parts(self, images: int) -> list[int]:
        """The batches whose calls advance so many images for the least: [4, 1] for five, where eight cost more.

        No engine is called twice if that can be helped: what it keeps of a batch would be lost.
        """
        if None in self.denoisers:
            return [images]
        sizes = sorted(size for size in self.denoisers if size is not None)
        most = sizes[-1]
        if images > sum(sizes):
            return [most, *self.parts(images - most)]
        fitting = (
            chosen
            for count in range(1, len(sizes) + 1)
            for chosen in itertools.combinations(sizes, count)
            if sum(chosen) >= images
        )
        cheapest = min(fitting, key=lambda chosen: (sum(map(self._cost, chosen)), len(chosen)))
        return sorted(cheapest, reverse=True)

    def _cost(self, size: int) -> float:
        """What a call of a batch takes. One that seemed to take longer than a larger batch's was measured at a bad
        moment, and would never be called to find that out."""
        return min((cost for batch, cost in self.costs.items() if batch >= size), default=size)

    def worthwhile(self, slots: int) -> int:
        """How many images at a time gain something by sharing calls, of so many `slots` at most.

        Where a call of eight takes as long as two of four, eight images only make one another late.
        """
        if not self.costs or slots <= JOINING:
            return slots
        rates = [images / sum(map(self._cost, self.parts(images))) for images in range(1, slots + 1)]
        gaining = next(images for images, rate in enumerate(rates, 1) if rate >= NEARLY_ALL * max(rates))
        return max(gaining, JOINING)

    def took(self, batch: int, milliseconds: float) -> bool:
        """A call of a batch took so long. Returns whether that is less than was known, and so changes what gains.

        What was measured when a server started, along with everything else that starts, may have been too much.
        """
        if milliseconds >= self.costs.get(batch, 0.0):
            return False
        self.costs[batch] = milliseconds
        return True


@dataclass(frozen=True)
class Original:
    """What an image starts from: pixels (H, W, 3) uint8, and where they are painted anew (H, W) uint8, None for all."""

    pixels: np.ndarray
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class Made:
    """A picture (H, W, 3) uint8, and the clock of its way: `Queue` is among its stages. `batches` are those of the
    denoisers that made its steps, as `Lane.denoisers` has them."""

    pixels: np.ndarray
    clock: StageClock
    batches: tuple[int | None, ...] = ()


@dataclass(frozen=True)
class Counts:
    """What a batcher is doing: images that wait and that are in slots, and since its start steps and UNet calls made,
    images finished, and turns: each advances all the images in slots, so that steps / turns are in use at a time."""

    waiting: int
    occupied: int
    steps: int
    calls: int
    finished: int
    turns: int = 0


@dataclass(eq=False)
class _Image:
    """One image on its way. `order` says who was first, `group` which images were requested together."""

    request: Request
    lane: Lane
    table: Table
    order: int
    group: int
    future: "Future[Made]"
    wanted: Callable[[], bool]
    watch: Callable[[Trajectory, int], None] | None
    original: Original | None
    deadline: float | None
    arrived: float
    clock: StageClock = field(default_factory=StageClock)
    encoding: "Future[None] | None" = None
    pipeline: Pipeline | None = None
    streams: list[NoiseStream] = field(default_factory=list)
    conditions: dict[str, np.ndarray] = field(default_factory=dict)
    trajectory: Trajectory | None = None
    call: int = 0
    batches: set[int | None] = field(default_factory=set)

    def fail(self, error: BaseException) -> None:
        known = isinstance(error, DarkroomError)
        with contextlib.suppress(InvalidStateError):  # another thread may have ended it already
            self.future.set_exception(error if known else Failed(f"{type(error).__name__}: {error}"))

    def end_if_late(self) -> bool:
        """Whether its time is over; then it fails."""
        if self.deadline is None or time.perf_counter() <= self.deadline:
            return False
        self.fail(Late(f"not finished within the {self.deadline - self.arrived:g} seconds it was given."))
        return True

    def end_if_unwanted(self, wanted: bool) -> bool:
        """Whether it is no longer waited for, by `wanted`; then it fails."""
        if not wanted:
            self.fail(Unwanted("it is no longer waited for."))
        return not wanted

    @property
    def ready(self) -> bool:
        return self.encoding is not None and self.encoding.done()


class StepBatcher:
    """Makes pictures of requests for one image each, `slots` at a time; as many as `queue` may wait.

    `lane_of` and `table_of` find the engines and the schedule of a request, and raise `InvalidRequest` where there are
    none. `on_join` gets how many requests and images fill the slots when images have joined; `observe` gets the counts
    when they have changed. Both are called from the batcher's own threads.
    """

    def __init__(
        self,
        lane_of: Callable[[Request], Lane],
        table_of: Callable[[Request], Table],
        slots: int,
        queue: int,
        on_join: Callable[[int, int], None] = lambda groups, images: None,
        observe: Callable[[Counts], None] = lambda counts: None,
    ) -> None:
        self.slots = slots
        self.queue = queue
        self._lane_of = lane_of
        self._table_of = table_of
        self._on_join = on_join
        self._observe = observe
        self._waiting: list[_Image] = []
        self._running: list[_Image] = []
        self._decoding = 0
        self._numbers = itertools.count()
        self._rooms: dict[Lane, int] = {}
        self._steps = self._calls = self._finished = self._turns = 0
        self._stacked: dict[tuple[Lane, tuple[int, ...]], tuple[list[_Image], dict[str, np.ndarray]]] = {}
        self._looked = 0.0
        self._closing = False
        self._changed = threading.Condition()
        self._encoder = ThreadPoolExecutor(1, "encoder")
        self._decoder = ThreadPoolExecutor(1, "decoder")
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def submit(
        self,
        requests: Sequence[Request],
        seconds: float | None = None,
        wanted: Callable[[], bool] = lambda: True,
        watches: Sequence[Callable[[Trajectory, int], None]] = (),
        original: Original | None = None,
    ) -> "list[Future[Made]]":
        """Queues requests for one image each, all of them or none; their results come in any order.

        Those not finished after so many seconds end with `Late`, those that are no longer `wanted` with `Unwanted`.
        `watches`, one for each image, get where it stands and the calls that were made after each of them; they are
        called between two steps, and so have to return at once. All start from the `original`, where there is one.
        Raises `InvalidRequest` for what cannot be made here, `Busy` when the queue has no room.
        """
        now = time.perf_counter()
        for request in requests:
            if request.image_count != 1:
                raise InvalidRequest(f"a slot holds one image, not the {request.image_count} of this request.")
        found = [(request, self._lane_of(request), self._table_of(request)) for request in requests]
        with self._changed:
            if self._closing:
                raise Failed("the server is stopping.")
            if len(self._waiting) + len(found) > self.queue:
                raise Busy(f"the queue is full: {len(self._waiting)} of {self.queue} images wait; try again later.")
            group = next(self._numbers)
            images = [
                _Image(
                    request=request,
                    lane=lane,
                    table=table,
                    order=next(self._numbers),
                    group=group,
                    future=Future(),
                    wanted=wanted,
                    watch=watch,
                    original=original,
                    deadline=None if seconds is None else now + seconds,
                    arrived=now,
                )
                for (request, lane, table), watch in itertools.zip_longest(found, watches)
            ]
            self._waiting += images
            self._encode_ahead()
            self._changed.notify()
        return [image.future for image in images]

    def counts(self) -> Counts:
        return Counts(len(self._waiting), len(self._running), self._steps, self._calls, self._finished, self._turns)

    def close(self) -> None:
        """Ends the work: what is not decoded yet fails. Returns when nothing is running any more."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self._encoder.shutdown(cancel_futures=True)
        self._decoder.shutdown()

    def _run(self) -> None:
        while not self._closing:
            try:
                self._next()
            except Exception as error:  # a fault of ours: its images fail, and the rest goes on
                with self._changed:
                    for image in (*self._waiting, *self._running):
                        image.fail(error)
                    self._waiting, self._running = [], []
        with self._changed:
            for image in (*self._waiting, *self._running):
                image.fail(Failed("the server is stopping."))
            self._waiting, self._running = [], []

    def _next(self) -> None:
        """Waits until there is something to do, and does one turn of it."""
        with self._changed:
            self._look_after()
            while not self._closing and not self._running and not self._can_admit():
                # Those who wait in vain are looked after even when nothing else happens.
                self._changed.wait(SECONDS_BETWEEN_LOOKS if self._waiting else None)
                self._look_after()
            if self._closing:
                return
            joined = self._admit()
            self._encode_ahead()
        if joined:
            self._on_join(len({image.group for image in self._running}), len(self._running))
        self._turn()
        with self._changed:
            self._observe(self.counts())

    def _look_after(self) -> None:
        """Lets go of those who are late or not wanted, and has the texts of those encoded who may join next."""
        self._drop()
        self._encode_ahead()

    def _encode_ahead(self) -> None:
        """Texts are encoded while their images wait, and while others are in a turn."""
        for image in self._in_turn()[: self.slots]:
            if image.encoding is None:
                image.encoding = self._encoder.submit(self._begin, image)
                image.encoding.add_done_callback(self._wake)  # not before: `ready` asks whether it is done

    def _begin(self, image: _Image) -> None:
        request, lane = image.request, image.lane
        try:
            original, start = image.original, None
            if original is not None:
                assert lane.encoder is not None, "who plans engines for pictures to start from has an encoder's"
                start = InitialImage.of(original.pixels, original.mask, lane.encoder)
            image.pipeline = assemble(
                lane.traits,
                lane.encoders,
                next(iter(lane.denoisers.values())),
                lane.vae,
                image.table,
                request,
                start,
                guided=lane.guided,
                chunks=lane.chunks,
            )
            image.streams = [NoiseStream(request.seed)]
            begun = image.pipeline.begin(request.batch(0), image.streams, None, image.clock)
            image.conditions = begun.conditions
            image.trajectory = Trajectory(image.table, begun.noise, begun.image, begun.mask)
        except Exception as error:
            image.fail(error)

    def _wake(self, _: "Future[None]") -> None:
        with self._changed:
            self._changed.notify()

    def _in_turn(self) -> list[_Image]:
        """Those who wait, in the order in which they join: who came first, but nobody's second image before another's
        first."""
        inside: dict[int, int] = {}
        for image in self._running:
            inside[image.group] = inside.get(image.group, 0) + 1
        places = []
        for image in self._waiting:
            places.append((inside.get(image.group, 0), image.order, image))
            inside[image.group] = inside.get(image.group, 0) + 1
        return [image for *_, image in sorted(places, key=lambda place: place[:2])]

    def _can_admit(self) -> bool:
        """Whether an image may join now. Those that are being decoded count: pictures must not pile up there."""
        if self._decoding >= self.slots:
            return False
        lanes = {image.lane for image in self._running}
        for image in self._in_turn()[:1]:
            room = max(self._worthwhile(lane) for lane in (image.lane, *lanes))
            return image.ready and len(self._running) < room
        return False

    def _worthwhile(self, lane: Lane) -> int:
        if lane not in self._rooms:
            self._rooms[lane] = lane.worthwhile(self.slots)
        return self._rooms[lane]

    def _admit(self) -> bool:
        joined = False
        while self._can_admit():
            image = self._in_turn()[0]
            self._waiting.remove(image)
            if image.future.done():  # its text could not be encoded
                continue
            waited = 1000 * (time.perf_counter() - image.arrived)
            encoding = sum(image.clock.milliseconds.values())
            image.clock.milliseconds[QUEUE] = max(0.0, waited - encoding)
            self._running.append(image)
            joined = True
        return joined

    def _drop(self) -> None:
        """Lets go of images that are late or not wanted any more, and of those that failed while they waited."""
        now = time.perf_counter()
        if now - self._looked < SECONDS_BETWEEN_LOOKS:
            return
        self._looked = now
        answers: dict[int, bool] = {}
        for image in (*self._waiting, *self._running):
            if image.end_if_late():
                continue
            if image.group not in answers:
                answers[image.group] = image.wanted()
            image.end_if_unwanted(answers[image.group])
        before = len(self._waiting) + len(self._running)
        self._waiting = [image for image in self._waiting if not image.future.done()]
        self._running = [image for image in self._running if not image.future.done()]
        if len(self._waiting) + len(self._running) < before:
            self._observe(self.counts())

    def _turn(self) -> None:
        """Advances every image in a slot by one network call."""
        self._turns += 1
        # An engine for any size takes one at a time.
        lanes: dict[tuple[Lane, tuple[int, ...]], list[_Image]] = {}
        for image in self._running:
            lanes.setdefault((image.lane, image.pipeline.latent_shape), []).append(image)
        done: set[_Image] = set()
        for (lane, shape), images in lanes.items():
            rest = iter(images)
            for place, size in enumerate(lane.parts(len(images))):
                part = list(itertools.islice(rest, size))
                try:
                    self._advance(lane, (*shape, place), part, size)
                except Exception as error:  # of this call alone: the others go on
                    for image in part:
                        image.fail(error)
                done.update(image for image in part if image.future.done() or image.call == len(image.table))
        # What is no longer run must not be held.
        self._stacked = {key: value for key, value in self._stacked.items() if (key[0], key[1][:-1]) in lanes}
        with self._changed:
            self._running = [image for image in self._running if image not in done]
            for image in done:
                if not image.future.done():
                    self._decoding += 1
                    self._decoder.submit(self._decode, image)

    def _advance(self, lane: Lane, place: tuple[int, ...], images: list[_Image], size: int) -> None:
        """One call of the engine for a batch of `size`, with these images in it and the first of them in what is left
        over."""
        start = time.perf_counter()
        padding = [images[0]] * (size - len(images))
        shown = [image.trajectory.network_input(image.call) for image in (*images, *padding)]
        times = [image.table.timesteps[image.call] for image in (*images, *padding)]
        changing = {"latents": np.concatenate(shown), "timestep": np.array(times, np.float32)}
        batch = None if None in lane.denoisers else size
        engine = lane.denoisers[batch]
        given = changing | self._conditions(lane, place, [*images, *padding])
        called = time.perf_counter()
        output = engine(given)["output"]
        if lane.took(size, 1000 * (time.perf_counter() - called)):
            self._rooms.pop(lane, None)
        for row, image in enumerate(images):
            drawn = image.table.noise_drawn[image.call]
            noise = initial_latents(image.streams, image.pipeline.latent_shape) if drawn else None
            image.trajectory.advance(image.call, output[row : row + 1].copy(), noise)
            image.call += 1
            image.batches.add(batch)
            if image.watch:
                image.watch(copy.copy(image.trajectory), image.call)
            image.clock.unet_calls += 1
        took = 1000 * (time.perf_counter() - start)
        for image in images:
            row = image.lane.traits.rows[1]
            image.clock.milliseconds[row] = image.clock.milliseconds.get(row, 0.0) + took
        self._calls += 1
        self._steps += len(images)

    def _conditions(self, lane: Lane, place: tuple[int, ...], images: list[_Image]) -> dict[str, np.ndarray]:
        """The UNet's inputs for the images, side by side; kept while they are the same."""
        kept, stacked = self._stacked.get((lane, place), ([], {}))
        if kept != images:
            names = images[0].conditions
            stacked = {name: np.concatenate([image.conditions[name] for image in images]) for name in names}
            self._stacked[lane, place] = (images, stacked)
        return stacked

    def _decode(self, image: _Image) -> None:
        try:
            # It may have waited here for others: past its deadline, or past the time that its client waits.
            if not image.end_if_late() and not image.end_if_unwanted(image.wanted()):
                made = self._picture(image)
                if not image.end_if_late():
                    image.future.set_result(made)
        except Exception as error:
            image.fail(error)
        with self._changed:
            self._decoding -= 1
            self._finished += 1
            self._observe(self.counts())
            self._changed.notify()

    @staticmethod
    def _picture(image: _Image) -> Made:
        from darkroom.pipeline.pictures import to_bytes, upscaled, with_the_rest

        with image.clock.time("VAE-Dec", image.lane.vae):
            (picture,) = image.pipeline.decode(image.trajectory.sample)
        pixels = to_bytes(picture, f"the picture (seed {image.request.seed})")
        mask = image.request.mask
        if mask is not None and mask.keep:
            pixels = with_the_rest(pixels, image.original.pixels, image.original.mask)
        image.clock.pipeline = 1000 * (time.perf_counter() - image.arrived)
        batches = tuple(sorted(image.batches, key=lambda batch: batch or 0))
        return Made(upscaled(pixels, image.request.upscale), image.clock, batches)


def all_of(futures: Iterable["Future[Made]"], then: Callable[[list[Made] | BaseException], None]) -> None:
    """Calls `then` once: with all results in their order when the last is there, or with the first error."""
    futures = list(futures)
    lock, left, told = threading.Lock(), len(futures), False

    def one(future: "Future[Made]") -> None:
        nonlocal left, told
        error = future.exception()
        with lock:
            left -= 1
            if told or (error is None and left):
                return
            told = True
        then(error if error is not None else [each.result() for each in futures])

    for future in futures:
        future.add_done_callback(one)
