"""The batcher under delays at every place where one thread hands something to another."""

import random
import time
from collections import Counter
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
import pytest

from darkroom.errors import Failed
from darkroom.serving.batching import Busy, Late, Made, StepBatcher, Unwanted
from tests.serving.test_batching import WAIT, Place, place  # noqa: F401  (a fixture)
from tests.support import until

HAND_OVERS = ("_begin", "_wake", "_admit", "_drop", "_turn", "_decode", "_encode_ahead", "submit")
IMAGES = 120


def delayed(chance: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after each hand-over, and around the end of every future, a thread may lose its turn."""

    def around(owner: type, name: str) -> None:
        whole = getattr(owner, name)

        def slow(*arguments: Any, **more: Any) -> Any:
            if chance.random() < 0.3:
                time.sleep(chance.random() * 0.003)
            try:
                return whole(*arguments, **more)
            finally:
                if chance.random() < 0.3:
                    time.sleep(chance.random() * 0.003)

        monkeypatch.setattr(owner, name, slow)

    for name in HAND_OVERS:
        around(StepBatcher, name)
    for name in ("set_result", "set_exception"):
        around(Future, name)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 30))])
def test_every_image_ends_and_nothing_is_left(seed: int, place: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    chance = random.Random(seed)
    delayed(chance, monkeypatch)
    held: Place = place(slots=4, queue=20)
    broken = {chance.randrange(IMAGES) for _ in range(4)}

    calls: list[set[int]] = []

    def answer(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        shown = {int(step) for step in inputs["timestep"]}
        if {step // 100 for step in shown} & broken and chance.random() < 0.3:
            raise ValueError("the engine fails")
        calls.append(shown)
        return {"output": inputs["latents"]}

    for engine in held.denoisers.values():
        engine.answer = answer
    futures: dict[int, Future[Made]] = {}
    steps: dict[int, int] = {}
    given_up: set[int] = set()
    waiting = list(range(IMAGES))
    while waiting:
        group = [waiting.pop(0) for _ in range(min(chance.randint(1, 3), len(waiting)))]
        wanted = partial(lambda first: first not in given_up, group[0])
        try:
            made = held.submit(
                *group, steps=1 + group[0] % 5, seconds=0.01 if chance.random() < 0.1 else None, wanted=wanted
            )
        except Busy:
            waiting = group + waiting
            time.sleep(0.002)
            continue
        futures |= dict(zip(group, made, strict=True))
        steps |= dict.fromkeys(group, 1 + group[0] % 5)
        if chance.random() < 0.1:
            given_up.add(group[0])
    ends: Counter[str] = Counter()
    for image, future in futures.items():
        error = future.exception(WAIT)
        ends[type(error).__name__] += 1
        assert error is None or isinstance(error, Late | Unwanted | Failed), error
        if error is None:  # its steps were made in order, each once, whoever shared them
            seen = [step % 100 for shown in calls for step in sorted(shown) if step // 100 == image]
            assert seen == list(range(steps[image]))
    assert ends["NoneType"] > IMAGES / 2
    until(lambda: (counts := held.batcher.counts()).waiting == counts.occupied == 0)
    assert held.submit(IMAGES)[0].result(WAIT).pixels.shape == (16, 16, 3)
