"""Weights that the exporter scatters over files end up in one, each tensor as it was."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from darkroom.export.graph import GRAPH, GRAPH_DATA, PAGE, _gather_external_data


@pytest.fixture
def weights():
    rng = np.random.default_rng(0)
    return {"first": rng.normal(size=(7, 5)).astype(np.float16), "second": rng.normal(size=(5, 3)).astype(np.float32)}


@pytest.fixture
def scattered(weights, tmp_path):
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    nodes = [
        helper.make_node("Cast", ["first"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["wide", "second"], ["y"]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, (7, 3))]
    graph = helper.make_graph(nodes, "two", [], outputs, tensors)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])
    path = tmp_path / GRAPH
    onnx.save(model, str(path), save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=0)
    assert len(list(tmp_path.iterdir())) == 3
    return path


def test_one_file_holds_all_tensors_each_on_a_page(scattered, weights):
    import onnxruntime

    _gather_external_data(scattered)
    assert {path.name for path in scattered.parent.iterdir()} == {GRAPH, GRAPH_DATA}
    places = onnx.load(str(scattered), load_external_data=False).graph.initializer
    offsets = [int({each.key: each.value for each in tensor.external_data}["offset"]) for tensor in places]
    assert offsets == [0, PAGE]
    session = onnxruntime.InferenceSession(str(scattered), providers=["CPUExecutionProvider"])
    expected = weights["first"].astype(np.float32) @ weights["second"]
    np.testing.assert_allclose(session.run(None, {})[0], expected, rtol=1e-5)


def test_a_graph_with_its_weights_inside_is_left_alone(tmp_path):
    path = tmp_path / GRAPH
    path.write_bytes(b"a graph")
    _gather_external_data(path)
    assert path.read_bytes() == b"a graph" and len(list(tmp_path.iterdir())) == 1
