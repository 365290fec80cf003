"""The model that Triton's Python backend runs: requests go to a step batcher at once, and are answered one by one.

Nothing here waits: `execute` hands over and returns, and each request's response sender is used when its pictures are
done. That keeps the default transaction mode, which plain HTTP and gRPC inference need.
"""

import json
import os
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # what the backend offers its models

from darkroom.errors import DarkroomError, Failed, InvalidRequest
from darkroom.flags import NUM_IMAGES, OF_ROW
from darkroom.request import Request
from darkroom.serving.batching import Busy, Counts, Late, Made, StepBatcher, Unwanted, all_of
from darkroom.serving.service import PLAN, Plan, Service
from darkroom.triton.config import Parameters
from darkroom.triton.server import IN_FLIGHT, SHARED

CODES = {
    InvalidRequest: "INVALID_ARG",
    Busy: "UNAVAILABLE",
    Late: "UNAVAILABLE",
    Unwanted: "CANCELLED",
}
"""Triton's names for what may be wrong. Its module has them only where a model runs, not where one is looked at."""

SECONDS_BETWEEN_REPORTS = 0.2

LARGEST_MESSAGE = 2**31 - 1
"""Bytes: gRPC has no larger answers."""

BESIDE_PIXELS = 2**20
"""Bytes that an answer has at most beside its pixels, and by which the memory for answers grows at least."""


class TritonPythonModel:
    """What the backend looks for in `model.py`."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        self.name = args["model_name"]
        if args["model_instance_kind"] == "GPU":
            os.environ["CUDA_VISIBLE_DEVICES"] = args["model_instance_device_id"]
        folder = Path(args["model_repository"]) / args["model_version"]
        given = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        try:
            parameters = Parameters.read(given)
            plan = Plan.read(folder / PLAN)
            plan = replace(plan, request=parameters.request(plan), limits=parameters.limits(plan))
            self.seed = parameters.seed
            self.service = Service(plan, parameters.threads)
            self.service.requests({"prompt": "a picture"})  # what the configuration has by default can be made
            _check_largest(plan)
        except DarkroomError as error:
            raise pb_utils.TritonModelException(f"{self.name}: {error}") from None
        self._largest_sent = 0
        self.metrics = Metrics(self.name, args["model_version"])
        slots = max(1, int(config["max_batch_size"]))
        self.batcher: StepBatcher = self.service.batcher(slots, parameters.queue, self._joined, self.metrics.observe)
        self._log(f"{self.name}: {slots} slots, {plan.request.engine} {plan.runtime_version}")

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            self.metrics.took(1)
            refused = threading.Event()  # with one of its images; then the others are wanted no more
            try:
                rows = self._rows(request)
                seconds = request.timeout() / 1e6 or None
                wanted = partial(_is_wanted, sender, refused)
                futures = self.batcher.submit(rows, seconds, wanted)
            except Exception as error:  # of this request alone
                self._refuse(sender, error)
                continue
            names = set(request.requested_output_names())
            all_of(futures, partial(self._answer, sender, rows, names, refused))

    def finalize(self) -> None:
        self.batcher.close()
        self.metrics.close()

    def _rows(self, request: Any) -> list[Request]:
        """The requested images: each row of the inputs is a prompt with its fields."""
        columns = {name: _values(request, name) for name in OF_ROW}
        columns = {name: values for name, values in columns.items() if values is not None}
        if not columns.get("prompt"):
            raise InvalidRequest("the input prompt is missing.")
        if self.seed is not None:
            columns.setdefault("seed", [self.seed] * len(columns["prompt"]))
        rows: list[Request] = []
        for index in range(len(columns["prompt"])):
            fields = {name: values[index] for name, values in columns.items()}
            rows += self.service.requests(fields, fields.pop(NUM_IMAGES, 1))
        if len(rows) > (most := self.service.plan.limits.images):
            raise InvalidRequest(f"{len(rows)} images are more than the {most} that a request may have.")
        if len({(row.height, row.width) for row in rows}) > 1:
            raise InvalidRequest("the pictures of one request are of one height and width: they come as one array.")
        return rows

    def _answer(
        self,
        sender: Any,
        rows: list[Request],
        wanted: set[str],
        refused: threading.Event,
        made: list[Made] | BaseException,
    ) -> None:
        try:
            if isinstance(made, BaseException):
                refused.set()
                raise made
            self._send(sender, self._response(rows, wanted, made))
        except BaseException as error:
            self._refuse(sender, error)

    def _response(self, rows: list[Request], wanted: set[str], made: list[Made]) -> Any:
        """Raises `Failed` for an answer that shared memory has no room for: what fails while it is sent is not to be
        taken back, and leaves the client to wait for ever."""
        times = [
            json.dumps({name: round(value, 3) for name, value in each.clock.milliseconds.items()}
                       | {"Pipeline": round(each.clock.pipeline, 3)})
            for each in made
        ]  # fmt: skip
        outputs = {
            "generated_image": np.stack([each.pixels for each in made]),
            "used_seed": np.array([[row.seed] for row in rows], np.uint64),
            "recipe": _texts(json.dumps(self.service.recipe(*each)) for each in zip(rows, made, strict=True)),
            "stage_times": _texts(times),
        }
        outputs = {name: value for name, value in outputs.items() if not wanted or name in wanted}
        size = sum(value.nbytes for value in outputs.values()) + BESIDE_PIXELS
        # Memory that was enough once is kept.
        if size > self._largest_sent and size > (free := _shared_bytes("f_bavail")):
            raise Failed(f"the answer has {size} bytes, and {SHARED} has room for {free}.")
        self._largest_sent = max(size, self._largest_sent)
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in outputs.items()])

    def _refuse(self, sender: Any, error: BaseException) -> None:
        name = next((name for kind, name in CODES.items() if isinstance(error, kind)), "INTERNAL")
        said = str(error) if isinstance(error, DarkroomError) else f"{type(error).__name__}: {error}"
        problem = pb_utils.TritonError(said, getattr(pb_utils.TritonError, name))
        self._send(sender, pb_utils.InferenceResponse(error=problem))

    def _send(self, sender: Any, response: Any) -> None:
        self.metrics.took(-1)
        try:
            sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception as error:  # the client is gone, or the server is going: there is no one to answer
            self._log(f"{self.name}: an answer could not be sent: {error}")
            self._largest_sent = 0

    def _joined(self, requests: int, images: int) -> None:
        self._log(f"{self.name}: Client Requests in Batch:{requests}")
        self._log(f"{self.name}: Prompts in Batch:{images}")

    def _log(self, text: str) -> None:
        pb_utils.Logger.log_info(text)


class Metrics:
    """What a batcher does, on Triton's own metrics endpoint.

    Numbers are passed on by one thread, a few times a second. Triton 2.51 does not bear more: with several threads that
    report, or one at every step, its Python backend crashes the server within a few hundred requests.
    """

    def __init__(self, model: str, version: str) -> None:
        # By process: or else, while a model is loaded again, the old one and the new would have the same metrics, which
        # Triton frees with the first of them. And a user who watches the server learns which process has died.
        labels = {"model": model, "version": version, "process": str(os.getpid())}
        self._families = []  # a metric must not outlive its family

        def metric(name: str, description: str, kind: Any) -> Any:
            self._families.append(pb_utils.MetricFamily(name=name, description=description, kind=kind))
            return self._families[-1].Metric(labels=labels)

        gauge, counter = pb_utils.MetricFamily.GAUGE, pb_utils.MetricFamily.COUNTER
        self._gauges = {
            "waiting": metric("darkroom_queue_images", "Images that wait for a slot", gauge),
            "occupied": metric("darkroom_slots_occupied", "Images in slots", gauge),
            "in_flight": metric(IN_FLIGHT, "Requests taken and not answered", gauge),
        }
        self._counters = {
            "steps": metric("darkroom_steps_total", "Denoising steps made, of all images", counter),
            "calls": metric("darkroom_unet_calls_total", "Calls of the UNet, of whole batches", counter),
            "finished": metric("darkroom_images_total", "Images that left the batch", counter),
        }
        self._told = dict.fromkeys((*self._gauges, *self._counters), 0)
        self._numbers = dict(self._told)
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._gauges["in_flight"].set(0)
        self._thread = threading.Thread(target=self._report, daemon=True)
        self._thread.start()

    def observe(self, counts: Counts) -> None:
        """What a batcher counts now."""
        with self._lock:
            self._numbers |= {name: getattr(counts, name) for name in self._told if hasattr(counts, name)}

    def took(self, requests: int) -> None:
        """So many were taken off Triton's hands; less than none were answered."""
        with self._lock:
            self._numbers["in_flight"] += requests

    def close(self) -> None:
        """Takes the metrics off Triton's endpoint: without a family last, which would not let them go."""
        self._ending.set()
        self._thread.join()
        self._gauges.clear()
        self._counters.clear()
        self._families.clear()

    def _report(self) -> None:
        while not self._ending.wait(SECONDS_BETWEEN_REPORTS):
            with self._lock:
                numbers = dict(self._numbers)
            for name, value in numbers.items():
                if value == self._told[name]:
                    continue
                if name in self._gauges:
                    self._gauges[name].set(value)
                else:
                    self._counters[name].increment(value - self._told[name])
            self._told = numbers


def _check_largest(plan: Plan) -> None:
    """Raises `Failed` where the largest answer that a request may have could never be sent."""
    sizes = [lane.size or (plan.limits.pixels, plan.limits.pixels) for lane in plan.lanes]
    height, width = max(sizes, key=lambda size: size[0] * size[1])
    largest = plan.limits.images * height * width * 3 + BESIDE_PIXELS
    # The backend takes as much again at once, before any answer.
    if largest > (room := min(_shared_bytes("f_blocks") - BESIDE_PIXELS, LARGEST_MESSAGE)):
        raise Failed(
            f"an answer with {plan.limits.images} images of {height}x{width} pixels has {largest} bytes, and at most "
            f"{room} can be sent: lower max_images, or give {SHARED} more room."
        )


def _shared_bytes(which: str) -> int:
    """Of the memory that answers are sent through: all (`f_blocks`), or what is free (`f_bavail`)."""
    found = os.statvfs(SHARED)
    return getattr(found, which) * found.f_frsize


def _is_wanted(sender: Any, refused: threading.Event) -> bool:
    return not refused.is_set() and not sender.is_cancelled()


def _values(request: Any, name: str) -> list[Any] | None:
    """The column of an input, a value for each row; None where the request leaves it out."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    values = tensor.as_numpy().reshape(-1)
    if OF_ROW[name].kind is str:
        try:
            return [bytes(value).decode("utf-8") for value in values]
        except UnicodeDecodeError:
            raise InvalidRequest(f"{name} is not UTF-8 text.") from None
    if OF_ROW[name].kind is float:
        # The number that was typed, not the float32 next to it: 7.3, which a recipe then says too.
        return [float(str(value)) for value in values]
    return [int(value) for value in values]


def _texts(values: Any) -> np.ndarray:
    return np.array([[text.encode()] for text in values], np.object_)
