"""What is sent to a server: which prompts make up which request, and which client sends it."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

from darkroom.errors import InvalidRequest
from darkroom.noise import SEED_LIMIT
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
    _images_before: tuple[int, ...] = field(init=False, repr=False)
    """For each prompt, the images of those before it; then of all."""

    def __post_init__(self) -> None:
        before = [0]
        for prompt in self.prompts:
            before.append(before[-1] + prompt.images)
        object.__setattr__(self, "_images_before", tuple(before))
        if self.seed is not None and not 0 <= self.seed <= SEED_LIMIT - self._first_image(self.rows):
            raise InvalidRequest(
                f"--seed must leave each of {self._first_image(self.rows)} images a seed from 0 to {SEED_LIMIT - 1}; "
                f"{self.seed} does not. Without --seed the server draws them."
            )
        # After as many requests as there are prompts, the same rows come together again.
        for index in range(min(self.total, len(self.prompts))):
            _check_together(self.request(index))

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
        if self.seed is None or prompt.seed is not None:
            return prompt
        return dataclasses.replace(prompt, seed=self.seed + self._first_image(row))

    def _first_image(self, row: int) -> int:
        rounds, within = divmod(row, len(self.prompts))
        return rounds * self._images_before[-1] + self._images_before[within]


def _check_together(rows: list[Prompt]) -> None:
    """Raises `InvalidRequest` for rows that do not set the same fields, or whose images would differ in size."""
    first = rows[0]
    for row in rows[1:]:
        if unlike := first.asked().keys() ^ row.asked().keys():
            name = min(unlike)
            one, other = (first, row) if name in first.asked() else (row, first)
            why = f"{one.place} sets {name} and {other.place} does not"
        elif unlike := [name for name in ALIKE if getattr(first, name) != getattr(row, name)]:
            why = f"{first.place} and {row.place} differ in {unlike[0]}"
        else:
            continue
        raise InvalidRequest(f"{why}: they cannot share a request. Change them, or leave out --static-batch-size.")
