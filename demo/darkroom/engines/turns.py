"""Engines of which one is loaded at a time, where memory has no room for all of them."""

import time
from collections.abc import Callable
from threading import Lock

import numpy as np

from darkroom.engines.runtime import Engine


class Turns:
    """Lends its place in memory to one engine after the other."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.holder: Turn | None = None

    def engine(self, load: Callable[[], Engine]) -> Engine:
        """What `load` returns, loaded when it is called."""
        return Turn(self, load)


class Turn(Engine):
    """An engine that is loaded when it is called, unless it was the last one, and then stays until another is. Loading
    is not part of its `milliseconds`."""

    def __init__(self, turns: Turns, load: Callable[[], Engine]) -> None:
        self._turns = turns
        self._load = load
        self._engine: Engine | None = None

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with self._turns.lock:
            if self._engine is None:
                if self._turns.holder is not None:
                    self._turns.holder._engine = None
                self._turns.holder, self._engine = self, self._load()
            began = time.perf_counter()
            made = self._engine(inputs)
            self.milliseconds = (self.milliseconds or 0.0) + 1000 * (time.perf_counter() - began)
            return made

    def forget(self) -> None:
        if self._engine is not None:
            self._engine.forget()
