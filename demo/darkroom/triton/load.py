"""Requests on their way to a server: clients that send side by side, and what comes of it."""

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from darkroom.errors import InvalidRequest
from darkroom.noise import SEED_LIMIT
from darkroom.triton.answers import Image, NoAnswer
from darkroom.triton.client import Model, Server
from darkroom.triton.prompts import Prompt

ALIKE = ("height", "width", "num_images")
"""What the rows of a request share: their images come back as one array."""


@dataclass(frozen=True)
class Load:
    """Requests of up to `batch_size` rows. Raises `InvalidRequest` for rows that cannot be sent together.

    The prompts are taken in turn. With `requests`, each of the `clients` sends as many, one after another; without,
    every prompt is sent once, and each client takes the next request that none has taken. With a `seed`, image k of
    all has seed + k, save where a prompt has a seed of its own.
    """

    prompts: tuple[Prompt, ...]
    clients: int = 1
    requests: int | None = None
    batch_size: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        images_before = (0, *accumulate(prompt.images for prompt in self.prompts))
        object.__setattr__(self, "_images_before", images_before)
        if self.seed is not None and not 0 <= self.seed <= SEED_LIMIT - self._first_image(self.rows):
            raise InvalidRequest(
                f"--seed must leave each of {self._first_image(self.rows)} images a seed from 0 to {SEED_LIMIT - 1}; "
                f"{self.seed} does not. Without --seed the server draws them."
            )
        # After as many requests as there are prompts, the same rows come together again.
        for index in range(min(self.total, len(self.prompts))):
            first, *others = self.request(index)
            for row in others:
                unlike = first.fields.keys() ^ row.fields.keys()
                unlike |= {name for name in ALIKE if first.fields.get(name) != row.fields.get(name)}
                if unlike:
                    raise InvalidRequest(
                        f"{first.place} and {row.place} differ in {min(unlike)}: they cannot share a request. Change "
                        f"them, or leave out --static-batch-size."
                    )

    @property
    def rows(self) -> int:
        """Prompts that are sent, each as often as it is sent."""
        return len(self.prompts) if self.requests is None else self.clients * self.requests * self.batch_size

    @property
    def total(self) -> int:
        """How many requests are sent."""
        return -(-self.rows // self.batch_size)

    def request(self, index: int) -> list[Prompt]:
        """The rows of a request, their seeds set."""
        first = index * self.batch_size
        return [self._row(row) for row in range(first, min(first + self.batch_size, self.rows))]

    def shares(self) -> list[Iterator[int]]:
        """For each client, the indices of the requests that it sends."""
        if self.requests is None:
            return [iter(range(self.total))] * self.clients  # one for all of them
        return [iter(range(client, self.total, self.clients)) for client in range(self.clients)]

    def _row(self, row: int) -> Prompt:
        prompt = self.prompts[row % len(self.prompts)]
        return prompt if self.seed is None else prompt.seeded(self.seed + self._first_image(row))

    def _first_image(self, row: int) -> int:
        rounds, within = divmod(row, len(self.prompts))
        return rounds * self._images_before[-1] + self._images_before[within]


@dataclass
class Tally:
    """What came of a load.

    `latencies` are milliseconds from sending a request to having its pictures, `failures` why a request has none, both
    by the index of the request.
    """

    latencies: dict[int, float] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    images: list[dict[str, Any]] = field(default_factory=list)
    """What is reported of each: its path, None where pictures are not kept, its request from 1, seed, prompt, and the
    milliseconds of the server's stages."""
    seconds: float = 0.0
    stopped: bool = False
    """Whether it was interrupted before all was sent and answered."""
    unkept: Exception | None = None
    """Why pictures could not be kept any more, which ended it."""

    @property
    def ended(self) -> int:
        return len(self.latencies) + len(self.failures)


async def send(
    server: Server,
    model: Model,
    load: Load,
    timeout: float | None,
    keep: Callable[[Image], Path | None],
    ended: Callable[[int, Tally], Any],
) -> Tally:
    """Sends the load, and returns what came of it; when the task is cancelled, of what ended until then.

    `keep` writes a picture, one at a time, in a thread beside the clients; `ended` gets each request.
    """
    tally, keeping = Tally(), asyncio.Lock()

    async def client(share: Iterator[int]) -> None:
        for index in share:
            began = time.perf_counter()
            try:
                images = await server.infer(model, load.request(index), timeout)
                latency = 1000 * (time.perf_counter() - began)
                async with keeping:
                    paths = [await asyncio.to_thread(keep, image) for image in images]
            except NoAnswer as error:
                tally.failures[index] = str(error)
            else:
                tally.latencies[index] = latency
                tally.images += [
                    {
                        "path": path and str(path),
                        "request": index + 1,
                        "seed": image.seed,
                        "prompt": image.prompt,
                        "milliseconds": image.milliseconds,
                    }
                    for image, path in zip(images, paths, strict=True)
                ]
            ended(index, tally)

    began = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            for share in load.shares():
                group.create_task(client(share))
    except asyncio.CancelledError:
        tally.stopped = True
    except ExceptionGroup as failed:
        tally.unkept = failed.exceptions[0]
    tally.seconds = time.perf_counter() - began
    tally.images.sort(key=lambda image: image["request"])
    return tally
