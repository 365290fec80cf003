"""A network split into what is computed once a picture and what at every step is still the same network."""

import numpy as np
import openvino
import pytest
from openvino import opset13 as ops

from darkroom.contract import Stage, Tensor
from darkroom.engines.openvino.runtime import _SplitEngine
from darkroom.engines.openvino.split import split
from tests.engines.graphs import drawn, request

STEADY = ("text", "scale")


def network() -> openvino.Model:
    """x, text (2, 4) and scale (2, 1): exp(text @ weights) * x * scale + text + (x @ weights)."""
    x, text, scale = (ops.parameter([2, width], np.float32, name=name) for name, width in INPUTS.items())
    for name, parameter in zip(INPUTS, (x, text, scale), strict=True):
        parameter.output(0).get_tensor().set_names({name})
    weights = ops.constant(drawn(0, 4, 4))
    slow = ops.exp(ops.matmul(text, weights, False, False))
    fast = ops.add(ops.multiply(ops.multiply(slow, x), scale), ops.add(text, ops.matmul(x, weights, False, False)))
    result = ops.result(fast)
    result.output(0).get_tensor().set_names({"y"})
    return openvino.Model([result], [x, text, scale])


INPUTS = {"x": 4, "text": 4, "scale": 1}


STAGE = Stage("made up", (), (Tensor("y", (2, 4)),), steady=STEADY)


def arrays(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(2, width)).astype(np.float32) for name, width in INPUTS.items()}


@pytest.fixture
def whole() -> openvino.InferRequest:
    return request(network())


@pytest.fixture
def halves() -> _SplitEngine:
    beforehand, rest = split(network(), set(STEADY))
    assert {name for i in beforehand.inputs for name in i.get_names()} >= {"text"}
    assert not any(op.get_type_name() == "Exp" for op in rest.get_ops())
    return _SplitEngine(request(rest), request(beforehand), STAGE)


def test_both_halves_together_give_what_the_whole_gives(whole, halves):
    inputs = arrays(1)
    for step in range(3):
        inputs["x"] = arrays(10 + step)["x"]
        np.testing.assert_allclose(halves(inputs)["y"], whole.infer(inputs)[0], rtol=1e-6)


@pytest.mark.parametrize("name", STEADY)
def test_steady_input_that_changes_is_noticed_even_in_place(whole, halves, name):
    inputs = arrays(1)
    before = halves(inputs)["y"]
    inputs[name] *= 2
    after = halves(inputs)["y"]
    assert not np.allclose(before, after)
    np.testing.assert_allclose(after, whole.infer(inputs)[0], rtol=1e-6)


def test_nothing_to_compute_beforehand_is_no_split():
    assert split(network(), set()) is None
    assert split(network(), {"scale"}) is None
