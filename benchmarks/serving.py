#!/usr/bin/env python3
"""A batch that requests join between steps, against a window of whole requests: same engines, same slots, same run.

    python benchmarks/serving.py [--version emoji] [--slots 8] [--clients 8] [--requests 32] [--rounds 5]

The window batcher is what Triton's `dynamic_batching` makes of requests: it takes those that wait, up to the slots, and
runs them together until the longest ends, and then takes the next. Arrivals are Poisson, near what the engines can do,
by as many clients as there are, each with one request at a time. Both kinds take turns, the median of the rounds
counts.
"""

import argparse
import itertools
import json
import queue
import random
import statistics
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))


from darkroom.checkpoint.folder import open_checkpoint
from darkroom.cli.prebuild import versions
from darkroom.cli.settings import home
from darkroom.engines import find_runtime
from darkroom.prepare import Preparer
from darkroom.request import Request
from darkroom.serving.planning import planned
from darkroom.serving.service import Limits, Service
from darkroom.store.store import Store

PROMPTS = ("a red apple", "a cat", "a rocket, noto style", "a slice of pizza, blue background")


class WindowBatcher:
    """Whole requests at a time: none joins before all of the last window are done, which are handed out together."""

    def __init__(self, batcher: Any, slots: int) -> None:
        self._batcher, self._slots = batcher, slots
        self._waiting: queue.Queue = queue.Queue()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, requests: list[Request]) -> list[Future]:
        futures = [Future() for _ in requests]
        for request, future in zip(requests, futures, strict=True):
            self._waiting.put((request, future))
        return futures

    def _run(self) -> None:
        while True:
            window = [self._waiting.get()]
            while len(window) < self._slots and not self._waiting.empty():
                window.append(self._waiting.get())
            made = [each.result() for each in self._batcher.submit([request for request, _ in window])]
            for (_, future), picture in zip(window, made, strict=True):
                future.set_result(picture)


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
    parser.add_argument("--version", default="emoji")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()

    version = versions()[flags.version]
    graphs, engines = Store(home() / "onnx"), Store(home() / "engines")
    checkpoint = open_checkpoint(Path(version.source), engines.fingerprints)
    preparer = Preparer(checkpoint, find_runtime("openvino"), graphs, engines, name=version.name)
    size = {"height": version.size, "width": version.size}
    request = Request(model=version.name, prompts=("a",), denoising_steps=20, guidance_scale=version.guidance_scale,
                      engine="openvino", **size)  # fmt: skip
    batches = sorted({*(2**power for power in range(flags.slots.bit_length())), flags.slots} - {0})
    batches = [batch for batch in batches if batch <= flags.slots]
    schedules = [(None, steps) for steps in range(1, 31)]
    guided = (preparer.traits.guided(request),)
    plan = planned(preparer, request, "demo_txt2img.py", [(request.height, request.width)], batches, guided, schedules,
                   Limits())  # fmt: skip
    service = Service(plan)
    joining = service.batcher(flags.slots, 10**6)
    window = WindowBatcher(service.batcher(flags.slots, 10**6), flags.slots)
    chance = random.Random(0)
    works = {
        "steps from 4 to 30": [chance.randint(4, 30) for _ in range(flags.requests)],
        "all alike, 17 steps": [17] * flags.requests,
    }
    for name, steps in works.items():
        # Near saturation: requests come as fast as they are done when nobody has to wait for them.
        waiting = [load(joining, service, steps, [0.0] * len(steps), flags.clients) for _ in range(3)]
        rate = statistics.median(each["images_per_second"] for each in waiting)
        found: dict[str, list[dict[str, float]]] = {"joining": [], "window": []}
        for turn in range(flags.rounds):
            chance = random.Random(turn)
            gaps = [chance.expovariate(rate) for _ in steps]
            for kind, batcher in (("joining", joining), ("window", window)):
                found[kind].append(load(batcher, service, steps, gaps, flags.clients))
        medians = {
            kind: {key: round(statistics.median(each[key] for each in rounds), 3) for key in rounds[0]}
            for kind, rounds in found.items()
        }
        print(json.dumps({"work": name, "arrivals_per_second": round(rate, 3), "rounds": flags.rounds, **medians}))
    joining.close()


if __name__ == "__main__":
    main()
