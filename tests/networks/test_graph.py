"""Weights that the exporter scatters over files end up in one, as they were; graphs unlike torch are refused."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from darkroom.networks import graph
from darkroom.networks.graph import GRAPH, GRAPH_DATA, PAGE, _gather_external_data
from tests.support import Studio, assert_refused, changed_copy, flags, one_line, silence_libraries


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"first": rng.normal(size=(7, 5)).astype(np.float16), "second": rng.normal(size=(5, 3)).astype(np.float32)}


@pytest.fixture
def scattered(weights: dict[str, np.ndarray], tmp_path: Path) -> Path:
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


def test_one_file_holds_all_tensors_each_on_a_page(scattered: Path, weights: dict[str, np.ndarray]) -> None:
    import onnxruntime

    _gather_external_data(scattered)
    assert {path.name for path in scattered.parent.iterdir()} == {GRAPH, GRAPH_DATA}
    places = onnx.load(str(scattered), load_external_data=False).graph.initializer
    offsets = [int({each.key: each.value for each in tensor.external_data}["offset"]) for tensor in places]
    assert offsets == [0, PAGE]
    session = onnxruntime.InferenceSession(str(scattered), providers=["CPUExecutionProvider"])
    expected = weights["first"].astype(np.float32) @ weights["second"]
    np.testing.assert_allclose(session.run(None, {})[0], expected, rtol=1e-5)


def test_a_graph_with_its_weights_inside_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / GRAPH
    path.write_bytes(b"a graph")
    _gather_external_data(path)
    assert path.read_bytes() == b"a graph" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("factor", [1.01, np.nan], ids=["a hundredth off", "NaN"])
def test_a_graph_that_differs_from_torch_is_not_kept(
    factor: float, empty_studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disturb(path: Path) -> None:
        model = onnx.load(str(path))
        weights = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        changed = numpy_helper.to_array(weights) * np.float32(factor)
        weights.CopyFrom(numpy_helper.from_array(changed, weights.name))
        onnx.save_model(model, str(path))

    monkeypatch.setattr(graph, "_gather_external_data", disturb)
    arguments = ["a red apple", "--model", str(empty_studio.model), "--engine=openvino", "--denoising-steps=1"]
    ended = empty_studio.here(*arguments, *empty_studio.folders())
    assert ended.code == 1 and one_line(ended.err) and "graph differs from torch by" in ended.err
    assert not [path for path in empty_studio.onnx.iterdir() if path.is_dir()]
    assert not list(empty_studio.output.glob("*.png"))


def with_attention_on_the_way_up(model: Path) -> None:
    """A UNet whose block on the way up doubles whatever it gets, so that an odd size comes back as an even one."""
    import torch
    from diffusers import UNet2DConditionModel

    silence_libraries()
    torch.manual_seed(1)
    config = UNet2DConditionModel.load_config(model / "unet") | {
        "up_block_types": ["AttnUpBlock2D", "CrossAttnUpBlock2D"]
    }
    UNet2DConditionModel.from_config(config).save_pretrained(model / "unet")


def test_size_that_a_network_does_not_take_is_refused(empty_studio: Studio, tmp_path: Path) -> None:
    model = changed_copy(empty_studio.model, tmp_path / "attention", with_attention_on_the_way_up)
    ended = empty_studio.here("a red apple", *flags(model=model, height=72, engine="openvino"), *empty_studio.folders())
    assert_refused(ended, str(model / "unet"), "72x64 pixels", "Expected size 10 but got size 9", "multiples of 64")
    assert not list(empty_studio.onnx.glob("unet*")) and not list(empty_studio.onnx.glob(".*.tmp"))


def test_size_that_a_network_does_not_take_is_told_where_nothing_is_exported(
    empty_studio: Studio, tmp_path: Path
) -> None:
    model = changed_copy(empty_studio.model, tmp_path / "attention", with_attention_on_the_way_up)
    ended = empty_studio.here("a red apple", *flags(model=model, height=72, engine="torch"), *empty_studio.folders())
    said = "torch cannot run the unet for this size and batch: "
    assert ended.code == 1 and said in ended.err and "Expected size 10 but got size 9" in ended.err
    assert "Traceback" not in ended.err and not list(empty_studio.output.glob("*.png"))


def test_network_that_cannot_be_exported_is_told_in_one_line(
    empty_studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unable(*_: object, **__: object) -> None:
        raise RuntimeError("Unsupported operator.\nHere are pages of it.")

    monkeypatch.setattr("torch.onnx.export", unable)
    ended = empty_studio.here(
        "a red apple", *flags(model=empty_studio.model, engine="openvino"), *empty_studio.folders()
    )
    assert ended.code == 1 and "cannot be exported: Unsupported operator. Try another --onnx-opset" in ended.err
    assert ended.err.splitlines()[-1].startswith("demo_txt2img.py: ")
