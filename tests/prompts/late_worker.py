"""A worker's process that still has pictures to tell of when it is stopped. Light, for it is imported once more."""

import time
from typing import Any

PICTURES = 100


def finish_late(connection: Any, *_: Any) -> None:
    """In place of `darkroom.serving.workers._work`."""
    from darkroom.serving.batching import Counts
    from darkroom.serving.workers import Kept, Ready

    connection.send(Ready())
    while connection.recv() is not None:
        pass
    for number in range(PICTURES):
        connection.send(Kept(number, f"{number}.png", {}, Counts(0, 0, 0, 0, 0)))


def report_nonsense(connection: Any, *_: Any) -> None:
    """A worker's process that sends what is no report, and goes on."""
    connection.send_bytes(b"no pickle")
    time.sleep(600)
