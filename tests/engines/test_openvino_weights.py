"""Large networks are kept as models whose weights are mapped, and float16 weights are widened late."""

import numpy as np
import openvino
import pytest
from openvino import opset13 as ops

from darkroom.engines.openvino.weights import DECOMPRESSION, widen_late
from tests.engines.graphs import drawn, outputs
from tests.support import Diffusers, Studio, psnr

PROMPT = "red apple"


def network() -> openvino.Model:
    """x (2, 4), and x @ weights in float16 + a constant of float32, both converted to float32."""
    x = ops.parameter([2, 4], np.float32, name="x")
    rng = np.random.default_rng(0)
    weights = ops.convert(ops.constant(rng.normal(size=(4, 4)).astype(np.float16)), "f32")
    halved = ops.convert(ops.convert(x, "f16"), "f32")
    made = ops.add(ops.matmul(halved, weights, False, False), ops.constant(rng.normal(size=4).astype(np.float32)))
    return openvino.Model([made], [x])


def test_conversions_of_float16_weights_alone_are_decompressions() -> None:
    model = network()
    widen_late(model)
    marked = {node for node in model.get_ops() if DECOMPRESSION in node.get_rt_info()}
    assert [node.input_value(0).get_node().get_type_name() for node in marked] == ["Constant"]
    assert len([node for node in model.get_ops() if node.get_type_name() == "Convert"]) == 3
    found, expected = (outputs(each, drawn(1, 2, 4))[0] for each in (model, network()))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_what_is_kept_as_a_model_makes_the_picture_of_diffusers(
    empty_studio: Studio, diffusers_tiny: Diffusers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("darkroom.prepare.LARGE", 10_000)
    made = empty_studio.draw(PROMPT)
    assert psnr(made.pictures[0], diffusers_tiny.draw(PROMPT)[0]) >= 45
    (unet,) = empty_studio.engines.glob("unet-*")
    assert {path.name for path in unet.iterdir()} >= {"engine.xml", "engine.bin"}
    assert not (unet / "engine.blob").exists()
    again = empty_studio.draw(PROMPT)
    assert again.children == [] and np.array_equal(again.pictures[0], made.pictures[0])
