"""What Triton's model does where an answer cannot be made or sent, with a stand-in for what the backend offers it."""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from darkroom.errors import Failed, InvalidRequest

NAME = "darkroom.triton.model"


class TritonError(Exception):
    UNAVAILABLE, INTERNAL, INVALID_ARG, CANCELLED = "unavailable", "internal", "invalid", "cancelled"

    def __init__(self, text: str, code: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass
class Response:
    output_tensors: list[Any] = field(default_factory=list)
    error: TritonError | None = None


@dataclass
class Sender:
    sent: list[Response] = field(default_factory=list)

    def send(self, response: Response, flags: int) -> None:
        self.sent.append(response)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    backend = ModuleType("triton_python_backend_utils")
    backend.TritonError, backend.InferenceResponse, backend.Tensor = TritonError, Response, lambda *parts: parts
    backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    backend.Logger = SimpleNamespace(log_info=lambda text: None)
    backend.get_input_tensor_by_name = lambda request, name: request.get(name)
    monkeypatch.setitem(sys.modules, backend.__name__, backend)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


@pytest.fixture
def model(module: ModuleType) -> Any:
    made = object.__new__(module.TritonPythonModel)
    made.name, made.seed, made._largest_sent = "a", None, 0
    made.metrics = SimpleNamespace(took=lambda requests: None)
    made.service = SimpleNamespace(recipe=lambda row, made: {})
    return made


def answer(model: Any, *sizes: int) -> Response:
    """What is sent for images of these sizes."""
    sender = Sender()
    clock = SimpleNamespace(milliseconds={}, pipeline=1.0)
    made = [SimpleNamespace(pixels=np.zeros((size, size, 3), np.uint8), clock=clock) for size in sizes]
    rows = [SimpleNamespace(seed=1) for _ in sizes]
    model._answer(sender, rows, set(), SimpleNamespace(set=lambda: None), made)
    (response,) = sender.sent
    return response


@pytest.mark.parametrize("given", [{}, {"seed": 5}, {"prompt": []}])
@pytest.mark.parametrize("seed", [None, 7])
def test_a_request_without_a_prompt_is_the_clients_error(model: Any, given: dict[str, Any], seed: int | None) -> None:
    model.seed = seed
    tensors = {name: SimpleNamespace(as_numpy=lambda value=value: np.array(value)) for name, value in given.items()}
    with pytest.raises(InvalidRequest, match="the input prompt is missing"):
        model._rows(tensors)


def test_an_answer_that_memory_has_no_room_for_is_an_error(
    model: Any, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert answer(model, 64).error is None
    monkeypatch.setattr(module, "_shared_bytes", lambda which: 2**20)
    refused = answer(model, 512)
    assert not refused.output_tensors and refused.error.code == "internal" and "has room for" in str(refused.error)
    assert answer(model, 64).error is None  # its memory is there already


def test_an_answer_that_cannot_be_put_together_is_an_error(model: Any) -> None:
    refused = answer(model, 8, 16)
    assert not refused.output_tensors and refused.error.code == "internal"


def test_a_configuration_whose_largest_answer_cannot_be_sent_is_refused(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(images: int, *sizes: tuple[int, int] | None) -> Any:
        lanes = [SimpleNamespace(size=size) for size in sizes]
        return SimpleNamespace(lanes=lanes, limits=SimpleNamespace(images=images, pixels=1536))

    monkeypatch.setattr(module, "_shared_bytes", lambda which: 64 * 2**20)  # as containers have it
    module._check_largest(plan(8, (64, 64), None))
    with pytest.raises(Failed, match=r"10 images of 1536x1536 pixels has .* lower max_images"):
        module._check_largest(plan(10, (64, 64), None))
    monkeypatch.setattr(module, "_shared_bytes", lambda which: 2**40)
    with pytest.raises(Failed, match="at most 2147483647 can be sent"):
        module._check_largest(plan(1000, (1024, 1024)))
