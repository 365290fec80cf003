"""An engine is held against its graph when it is built, and one that computes something else is not kept."""

import json
from pathlib import Path
from typing import Any

import pytest

from darkroom.store.manifest import MANIFEST
from tests.support import Studio, flags, one_line

PROMPT = "a red apple"


def test_what_was_found_stands_in_the_manifest(studio: Studio) -> None:
    for engine in ("openvino", "onnxruntime"):
        studio.draw(PROMPT, engine=engine)
    folders = [
        path for engine in ("openvino", "onnxruntime") for path in studio.engines.glob(f"[!.]*-b1-*{engine}-fp32-*")
    ]
    assert len(folders) >= 6
    for folder in folders:
        made = json.loads((folder / MANIFEST).read_text())["made"]
        assert 0 <= made["error_against_graph"] < 1e-3 and made["checked_in"] > 0


def test_rewrite_that_changes_the_network_is_found_out(empty_studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino

    def broken(model: openvino.Model) -> None:
        """Every convolution's result 2% larger."""
        for node in [each for each in model.get_ops() if each.get_type_name() == "Convolution"]:
            targets = list(node.output(0).get_target_inputs())
            larger = openvino.opset13.multiply(node.output(0), openvino.opset13.constant(1.02, openvino.Type.f32))
            for target in targets:
                target.replace_source_output(larger.output(0))

    monkeypatch.setattr("darkroom.engines.openvino.norms.fold_scales", broken)
    ended = empty_studio.here(PROMPT, *flags(model=empty_studio.model, engine="openvino"), *empty_studio.folders())
    assert ended.code == 1 and one_line(ended.err) and "differs from its graph by" in ended.err
    assert not list(empty_studio.engines.glob("unet-*"))


def test_broken_engine_of_onnxruntime_is_found_out(empty_studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx

    from darkroom.engines.onnxruntime.runtime import OnnxRuntime

    optimise = OnnxRuntime._optimise

    def broken(self: OnnxRuntime, job: Any, graph: Path, folder: Path) -> None:
        optimise(self, job, graph, folder)
        (file,) = folder.glob("*.onnx")
        model = onnx.load(file)
        weight = max(model.graph.initializer, key=lambda each: len(each.raw_data))
        weight.raw_data = bytes(len(weight.raw_data))
        onnx.save(model, file)

    monkeypatch.setattr(OnnxRuntime, "_optimise", broken)
    asked = flags(model=empty_studio.model, engine="onnxruntime")
    ended = empty_studio.here(PROMPT, *asked, *empty_studio.folders())
    assert ended.code == 1 and one_line(ended.err) and "differs from its graph by" in ended.err
    assert not list(empty_studio.engines.glob("clip-*"))
