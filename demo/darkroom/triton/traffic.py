"""A load on its way to a server: clients that send side by side, and what comes of it."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from darkroom.triton.answers import Image, NoAnswer
from darkroom.triton.client import Model, Server
from darkroom.triton.load import Load

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Kept:
    """What is remembered of an image; `path` is None where pictures are not kept."""

    request: int
    prompt: str
    seed: int | None
    milliseconds: dict[str, float]
    path: Path | None


@dataclass
class Tally:
    """What came of a load.

    `latencies` are milliseconds from sending a request to having its pictures, `failures` why a request has none, both
    by the index of the request.
    """

    latencies: dict[int, float] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    images: list[Kept] = field(default_factory=list)
    seconds: float = 0.0
    stopped: bool = False
    """Whether it was interrupted before all was sent and answered."""
    unkept: Exception | None = None
    """Why pictures could not be kept any more, which ended it."""

    @property
    def ended(self) -> int:
        return len(self.latencies) + len(self.failures)

    @property
    def images_per_second(self) -> float:
        return len(self.images) / self.seconds if self.seconds else 0.0

    def latency(self) -> dict[str, float]:
        """Mean, percentiles (interpolated between the nearest two, as NumPy does) and most; empty without answers."""
        values = list(self.latencies.values())
        if not values:
            return {}
        percentiles = np.percentile(values, PERCENTILES).tolist()
        named = {f"p{each}": value for each, value in zip(PERCENTILES, percentiles, strict=True)}
        return {"mean": mean(values)} | named | {"max": max(values)}

    def stages(self) -> dict[str, float]:
        """Median milliseconds of the server's stages over the images, in the order in which it names them."""
        names = dict.fromkeys(name for image in self.images for name in image.milliseconds)
        known = [image.milliseconds for image in self.images]
        return {name: median(times[name] for times in known if name in times) for name in names}

    def reasons(self) -> list[tuple[str, int]]:
        """The different failures and how many requests had each, the most frequent first."""
        return Counter(self.failures.values()).most_common()


async def send(
    server: Server,
    model: Model,
    load: Load,
    timeout: float | None,
    keep: Callable[[Image], Path | None],
    ended: Callable[[int, Tally], Any],
) -> Tally:
    """Sends the load, and returns what came of it; when the task is cancelled, of what ended until then.

    `keep` writes a picture, in a thread of its own, beside the clients; `ended` is told of each request.
    """
    tally = Tally()
    answered: asyncio.Queue[tuple[int, list[Image]] | None] = asyncio.Queue()
    keeper = asyncio.create_task(_keep_all(answered, keep, tally))

    async def client(share: Iterator[int]) -> None:
        for index in share:
            if tally.unkept:
                return
            began = time.perf_counter()
            try:
                images = await server.infer(model, load.request(index), timeout)
            except NoAnswer as error:
                tally.failures[index] = str(error)
            else:
                tally.latencies[index] = 1000 * (time.perf_counter() - began)
                answered.put_nowait((index, images))
            ended(index, tally)

    began = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            for share in load.shares():
                group.create_task(client(share))
    except asyncio.CancelledError:
        tally.stopped = True
    finally:
        tally.seconds = time.perf_counter() - began
        answered.put_nowait(None)
        await keeper
        tally.images.sort(key=lambda image: image.request)
    return tally


async def _keep_all(
    answered: "asyncio.Queue[tuple[int, list[Image]] | None]", keep: Callable[[Image], Path | None], tally: Tally
) -> None:
    """Keeps pictures until there is a None among them, or one cannot be kept."""
    while (answer := await answered.get()) is not None:
        index, images = answer
        try:
            paths = [await asyncio.to_thread(keep, image) for image in images]
        except NoAnswer as error:
            # It was answered, but not with a picture.
            del tally.latencies[index]
            tally.failures[index] = str(error)
        except Exception as error:
            tally.unkept = error
            return
        else:
            tally.images += [
                Kept(index, image.prompt, image.seed, image.milliseconds, path)
                for image, path in zip(images, paths, strict=True)
            ]
