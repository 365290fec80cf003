"""The schedule's step as a network of its own: see `darkroom.schedule.step`."""

from pathlib import Path

from darkroom.contract import Tensor
from darkroom.schedule.step import step_stage

OPSET = 17


def write_step(latents: Tensor, path: Path) -> None:
    """Writes the network of `step_stage` as an ONNX graph; batch and size stay free where `latents` leave them so."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants = [], []

    def constant(name: str, value: list[int]) -> str:
        constants.append(numpy_helper.from_array(np.array(value, np.int64), name))
        return name

    def node(kind: str, inputs: list[str], output: str, **attributes: int | list[int]) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    axis = constant("axis", [0])
    window = constant("window", [-1, 1, 1, 1, 1])
    first, last = constant("first", [0]), constant("last", [3])

    def row(table: str, index: str) -> str:
        return node("Gather", [table, index], f"{table}_at_{index}", axis=0)

    def push(new: str, old: str, name: str) -> str:
        """`new` in front of all of `old` but its oldest."""
        kept = node("Slice", [old, first, last, axis], f"{old}_kept")
        return node("Concat", [node("Unsqueeze", [new, axis], f"{new}_newest"), kept], name, axis=0)

    def weighed(values: str, weights: str) -> str:
        weight = node("Reshape", [row(weights, "step"), window], f"{weights}_column")
        return node(
            "ReduceSum", [node("Mul", [values, weight], f"{values}_weighed"), axis], f"{values}_sum", keepdims=0
        )

    outputs = push("output", "outputs", "next_outputs")
    noise = node(
        "Squeeze", [node("Gather", ["noises", row("noise_index", "step")], "noise_row", axis=0), axis], "noise"
    )
    noise = node("Mul", [noise, row("noise_weights", "step")], "noise_weighed")
    sample = node("Add", [weighed("samples", "sample_weights"), weighed(outputs, "output_weights")], "denoised")
    sample = node("Add", [sample, noise], "sample")
    push(sample, "samples", "next_samples")
    constants.append(numpy_helper.from_array(np.array([1], np.int32), "one"))
    step = node("Add", ["step", "one"], "next_step")
    node("Mul", [sample, row("input_scale", step)], "next_latents")
    batch = node("Slice", [node("Shape", ["output"], "shape"), first, constant("batch", [1]), axis], "images")
    node("Expand", [row("timesteps", step), batch], "next_timestep")

    stage = step_stage(latents)
    kinds = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32}
    inputs, made = (
        [helper.make_tensor_value_info(each.name, kinds[each.dtype], each.shape) for each in tensors]
        for tensors in (stage.inputs, stage.outputs)
    )
    graph = helper.make_graph(nodes, "step", inputs, made, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = 10  # what every runtime reads
    onnx.checker.check_model(model, full_check=True)
    onnx.save_model(model, str(path))
