#!/usr/bin/env python3
"""A batch that requests join between steps, against windows of requests: same engines, same slots, same run.

    python benchmarks/serving.py --output benchmarks/results/serving.jsonl [--version emoji] [--slots 8] [--clients 8]

A window takes those that wait, up to the slots, and none joins it. Everything else is as good as for the batch that is
joined: an image that has had its steps leaves the UNet's calls, which go on with smaller engines; it is decoded and
handed out while others are in the UNet; and the next window begins when the last image of one leaves the UNet, its
texts encoded by then, not when that image is decoded. A window of equal steps holds the oldest request and those that
are like it, so that nobody in it waits for longer ones; one of any steps is what Triton's `dynamic_batching` makes of
requests.

Arrivals are Poisson, near what the engines can do, by as many clients as there are, each with one request at a time.
The batchers take turns, in another order each round, and the median of the rounds counts. Every round is a line of the
output; medians are printed. It ends within --minutes, with fewer rounds on a slow machine.
"""

import argparse
import itertools
import json
import random
import statistics
import sys
import threading
import time
from concurrent.futures import Future
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))

from darkroom import __version__
from darkroom.bench.machine import machine
from darkroom.bench.results import append
from darkroom.checkpoint.folder import open_checkpoint
from darkroom.cli.prebuild import versions
from darkroom.cli.settings import home
from darkroom.engines import find_runtime
from darkroom.prepare import Preparer
from darkroom.request import Request
from darkroom.schedule.bundle import Schedule
from darkroom.schedule.table import Trajectory
from darkroom.serving.batching import StepBatcher
from darkroom.serving.planning import planned
from darkroom.serving.service import Limits, Service
from darkroom.store.store import Store

PROMPTS = ("a red apple", "a cat", "a rocket, noto style", "a slice of pizza, blue background")


class WindowBatcher:
    """Images that begin together, on the engines of a batcher that has no others: see above."""

    def __init__(self, service: Service, batcher: StepBatcher, alike: bool) -> None:
        self._service, self._batcher, self._alike = service, batcher, alike
        self._waiting: list[tuple[Request, Future]] = []
        self._changed = threading.Condition()
        self._inside = 0
        """Images that have steps to go."""
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, requests: list[Request]) -> list[Future]:
        futures: list[Future] = [Future() for _ in requests]
        with self._changed:
            self._waiting += zip(requests, futures, strict=True)
            self._changed.notify()
        return futures

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting and not self._inside)
                steps = self._waiting[0][0].denoising_steps
                fitting = [each for each in self._waiting if not self._alike or each[0].denoising_steps == steps]
                window = fitting[: self._batcher.slots]
                self._waiting = [each for each in self._waiting if each not in window]
                self._inside = len(window)
            requests = [request for request, _ in window]
            watches = [partial(self._watch, len(self._service.table_of(request))) for request in requests]
            made = self._batcher.submit(requests, watches=watches)
            for inner, (_, future) in zip(made, window, strict=True):
                inner.add_done_callback(partial(self._hand_out, future))

    def _watch(self, steps: int, _: Trajectory, calls: int) -> None:
        # A step before the end: the texts of the next window are encoded while the last step of this one is made.
        if calls == max(1, steps - 1):
            with self._changed:
                self._inside -= 1
                self._changed.notify()

    @staticmethod
    def _hand_out(future: Future, inner: Future) -> None:
        future.set_result(inner.result())


def load(batcher: object, service: Service, steps: list[int], gaps: list[float], clients: int) -> dict[str, float]:
    """Clients that each send one request at a time, not before it is due. Returns images a second and latencies."""
    due = list(itertools.accumulate(gaps))
    numbers, lock = iter(range(len(steps))), threading.Lock()
    latencies: list[float] = []
    start = time.perf_counter()

    def work() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            wait = due[number] - (time.perf_counter() - start)
            if wait > 0:
                time.sleep(wait)
            fields = {"prompt": PROMPTS[number % len(PROMPTS)], "seed": number, "steps": steps[number]}
            (future,) = batcher.submit(service.requests(fields))
            future.result()
            with lock:
                latencies.append(time.perf_counter() - start - due[number])

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    ordered = sorted(latencies)
    return {
        "images_per_second": len(steps) / seconds,
        "p50": statistics.median(ordered),
        "p95": ordered[int(0.95 * (len(ordered) - 1))],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a line is added for each round")
    parser.add_argument("--version", default="emoji")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="of each batcher and work, at most")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no round begins")
    flags = parser.parse_args()
    end = time.monotonic() + 60 * flags.minutes

    version = versions()[flags.version]
    graphs, engines = Store(home() / "onnx"), Store(home() / "engines")
    checkpoint = open_checkpoint(Path(version.source), engines.fingerprints)
    preparer = Preparer(checkpoint, find_runtime("openvino"), graphs, engines, name=version.name)
    size = {"height": version.size, "width": version.size}
    request = Request(model=version.name, prompts=("a",), denoising_steps=20, guidance_scale=version.guidance_scale,
                      engine="openvino", **size)  # fmt: skip
    batches = sorted({*(2**power for power in range(flags.slots.bit_length())), flags.slots} - {0})
    batches = [batch for batch in batches if batch <= flags.slots]
    schedules = [Schedule(None, steps) for steps in range(1, 31)]
    guided = (preparer.traits.guided(request),)
    plan = planned(preparer, request, "demo_txt2img.py", [(request.height, request.width)], batches, guided, schedules,
                   Limits())  # fmt: skip
    service = Service(plan)
    inner = [service.batcher(flags.slots, 10**6) for _ in range(3)]
    batchers = {
        "joined between steps": inner[0],
        "windows of equal steps": WindowBatcher(service, inner[1], alike=True),
        "windows of any steps": WindowBatcher(service, inner[2], alike=False),
    }
    chance = random.Random(0)
    works = {
        "steps from 4 to 30": [chance.randint(4, 30) for _ in range(flags.requests)],
        "steps of 10, 20 or 30": [chance.choice([10, 20, 30]) for _ in range(flags.requests)],
        "all alike, 17 steps": [17] * flags.requests,
    }
    settings = {name: value for name, value in vars(flags).items() if name not in ("output", "minutes")}
    facts = {"settings": settings | {"engine": "openvino"}, "machine": machine(), "darkroom": __version__}
    # Near saturation: requests come as fast as they are done when nobody has to wait for them.
    rates = {}
    for name, steps in works.items():
        waiting = [load(inner[0], service, steps, [0.0] * len(steps), flags.clients) for _ in range(2)]
        rates[name] = max(each["images_per_second"] for each in waiting)
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for turn in range(flags.rounds):
        for name, steps in works.items():
            if time.monotonic() > end:
                break
            chance = random.Random(turn)
            gaps = [chance.expovariate(rates[name]) for _ in steps]
            for kind in chance.sample(list(batchers), len(batchers)):
                measured = load(batchers[kind], service, steps, gaps, flags.clients)
                found.setdefault((name, kind), []).append(measured)
                line = {"work": name, "batcher": kind, "round": turn, "arrivals_per_second": rates[name], **measured}
                append(flags.output, line | facts)
    for (name, kind), rounds in found.items():
        medians = {key: round(statistics.median(each[key] for each in rounds), 3) for key in rounds[0]}
        print(json.dumps({"work": name, "batcher": kind, "rounds": len(rounds), **medians}))
    for batcher in inner:
        batcher.close()


if __name__ == "__main__":
    main()
