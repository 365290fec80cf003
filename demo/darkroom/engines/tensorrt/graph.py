"""ONNX graphs on their way to TensorRT, or to a provider of ONNX Runtime: found to be whole, then tidied."""

import os
import shutil
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from onnx_graphsurgeon.logger import G_LOGGER

from darkroom.contract import Stage
from darkroom.errors import Failed

OPSETS = range(7, onnx.defs.onnx_opset_version() + 1)


def read_graph(path: Path, stage: Stage) -> onnx.ModelProto:
    """The graph of a stage, its external data left where it is.

    Raises `Failed` for what TensorRT's parser takes for an empty network or gives up on without a word: files that
    are empty, cut off or not ONNX, opsets that do not exist, data files that are missing or short.
    """
    again = "delete its folder, and it is exported again"
    if not path.stat().st_size:
        raise Failed(f"{path} is empty; {again}.")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own, which is another package's
        raise Failed(f"{path} is cut off or no ONNX file ({error}); {again}.") from None
    opset = next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), 0)
    if model.graph.node and opset not in OPSETS:
        raise Failed(
            f"{path} is of ONNX opset {opset}; known are {OPSETS[0]} to {OPSETS[-1]}. Name another --onnx-opset."
        )
    weights = {tensor.name for tensor in model.graph.initializer}
    named = {each.name for each in model.graph.input} - weights, {each.name for each in model.graph.output}
    for what, found, tensors in zip(("inputs", "outputs"), named, (stage.inputs, stage.outputs), strict=True):
        if missing := {tensor.name for tensor in tensors} - found:
            raise Failed(f"{path} is cut off or another network's: its {what} have no {min(missing)}; {again}.")
    for tensor in model.graph.initializer:
        if uses_external_data(tensor):
            place = ExternalDataInfo(tensor)
            data = path.parent / place.location
            size = data.stat().st_size if data.is_file() else -1
            if size < (place.offset or 0) + (place.length or 0):
                raise Failed(
                    f"{data}, with the weight {tensor.name}, is {'cut off' if size >= 0 else 'missing'}; {again}."
                )
    return model


def tidy(model: onnx.ModelProto, data: Path, stage: Stage, path: Path) -> None:
    """Writes the graph to `path` with its constants folded, without what nothing reads, and its outputs by name.

    Weights that are external stay so, in a link to (or a copy of) the files in the folder `data`.
    """
    locations = {ExternalDataInfo(each).location for each in model.graph.initializer if uses_external_data(each)}
    external = {each.name for each in model.graph.initializer if uses_external_data(each)}
    graph = gs.import_onnx(model)

    def reads_external(node: gs.Node) -> bool:
        return any(tensor.name in external for tensor in node.inputs)

    G_LOGGER.severity = G_LOGGER.CRITICAL  # bfloat16 constants it cannot fold; it leaves them, and says so at length
    outputs = {tensor.name: tensor for tensor in graph.outputs}
    graph.outputs = [outputs[tensor.name] for tensor in stage.outputs]
    graph.fold_constants(should_exclude_node=reads_external).cleanup().toposort()
    for location in locations:
        try:
            os.link(data / location, path.parent / location)
        except OSError:  # another disk, or one without links
            shutil.copyfile(data / location, path.parent / location)
    onnx.save_model(gs.export_onnx(graph), str(path))
