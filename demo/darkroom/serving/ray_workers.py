"""The workers of `darkroom.serving.workers` as Ray actors: on this machine, or on all those of a cluster.

Every node must see this folder of Darkroom, and those of engines and pictures, under the paths that they have here.
Ray's processes listen on all of a machine's addresses, and guarding them is up to who runs Ray. Actors on GPUs have
not been tried.
"""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from darkroom.errors import DarkroomError, Failed, InvalidRequest
from darkroom.serving.workers import (
    HELD_PER_SLOT,
    SECONDS_TO_END,
    Gone,
    Maker,
    News,
    Orders,
    Ready,
    Task,
    Tell,
    Worker,
    on_its_share,
)

INSTALL = 'pip install "ray>=2.60,<3"'
LOCAL = "local"
"""The address that means: a cluster of this machine alone, for this run alone."""

PACKAGES = Path(__file__).resolve().parents[2]


def check_installed() -> None:
    if importlib.util.find_spec("ray") is None:
        raise InvalidRequest(f"--ray needs the package ray: {INSTALL}")


@contextlib.contextmanager
def cluster(address: str) -> Iterator[None]:
    """Connected to the cluster at an address; "auto" is the one that this machine is part of."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else it reports every run to its makers
    import ray

    paths = os.pathsep.join([str(PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        ray.init(
            address=address,
            include_dashboard=False if address == LOCAL else None,
            log_to_driver=False,
            logging_level="error",
            runtime_env={"env_vars": {"PYTHONPATH": paths}},
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise Failed(f"--ray {address}: {' '.join(str(error).split()) or type(error).__name__}") from None
    try:
        yield
    finally:
        ray.shutdown()


def actors(count: int, on_gpus: bool, orders: Orders) -> list[Callable[[Tell], Worker]]:
    """What starts each actor in the cluster that is connected: `count` of them; for 0 one on each GPU, or node."""
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0))
    nodes = [node for node in ray.nodes() if node["Alive"]]
    wanted = count or (gpus if on_gpus else len(nodes))
    if on_gpus and not 0 < wanted <= gpus:
        raise InvalidRequest(f"--ray: the cluster has {gpus} GPUs, which --engine {orders.plan.request.engine} needs.")
    remote = ray.remote(_Making).options(
        num_cpus=0,
        num_gpus=int(on_gpus),
        scheduling_strategy="SPREAD",
        max_concurrency=HELD_PER_SLOT * orders.slots + 1,
    )
    # Ray spreads them over the nodes, one after the other.
    on_each = 1 if on_gpus else -(-wanted // len(nodes))
    shares = [(number // len(nodes) % on_each, on_each) for number in range(wanted)]
    return [
        partial(Actor, f"actor {number}", remote, replace(orders, share=share))
        for number, share in enumerate(shares, start=1)
    ]


class _Making:
    """What an actor does: a call for each image, as many at a time as it may hold."""

    def __init__(self, orders: Orders) -> None:
        try:
            self._maker = Maker(on_its_share(orders))
        except DarkroomError as error:
            self._state: News = Gone(str(error))
        else:
            self._state = Ready()

    def ready(self) -> News:
        return self._state

    def make(self, task: Task) -> News:
        made: Future[News] = Future()
        self._maker.make(task, made.set_result)
        return made.result()

    def close(self) -> None:
        self._maker.close()


class Actor(Worker):
    """A worker that Ray has placed somewhere."""

    def __init__(self, name: str, remote: Any, orders: Orders, tell: Tell) -> None:
        self.name = name
        self._tell = tell
        self._actor = remote.remote(orders)
        self._pass_on(self._actor.ready.remote())

    def give(self, task: Task) -> None:
        self._pass_on(self._actor.make.remote(task))

    def stop(self) -> None:
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self._actor.close.remote(), timeout=SECONDS_TO_END)
        ray.kill(self._actor)

    def _pass_on(self, answer: Any) -> None:
        answer.future().add_done_callback(self._answered)

    def _answered(self, future: "Future[News]") -> None:
        error = future.exception()
        # Ray's message goes on for pages.
        self._tell(future.result() if error is None else Gone(str(error).strip().partition("\n")[0]))
