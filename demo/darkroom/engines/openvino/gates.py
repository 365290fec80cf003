"""Gated layers (GEGLU, https://arxiv.org/abs/2002.05202) without the copies.

The feed-forward layers of a UNet's transformers are one product, whose result is cut in two: values, and gates that
they are multiplied with. OpenVINO's CPU plugin cuts by copying both, plainly. Two products of half the weights each
give the same two results where they are wanted.
"""

import numpy as np
import openvino
from openvino import opset13 as ops


def part_gates(model: openvino.Model) -> int:
    """Rewrites products that are cut along their last axis in `model`, in place, and returns how many there were.

    What cuts them must be known: constants are folded before.
    """
    rewritten = 0
    for node in model.get_ordered_ops():
        if not (factors := _factors(node)):
            continue
        cuts = [reader.get_node() for reader in node.output(0).get_target_inputs()]
        columns = [_columns(cut) for cut in cuts]
        if len(cuts) < 2 or None in columns:
            continue
        x, weights, bias = factors
        for cut, those in zip(cuts, columns, strict=True):
            part = ops.matmul(x, ops.constant(np.ascontiguousarray(weights[:, those])), False, False)
            part = ops.add(part, ops.constant(bias[those]))
            for reader in list(cut.output(0).get_target_inputs()):
                reader.replace_source_output(part.output(0))
        rewritten += 1
    model.validate_nodes_and_infer_types()
    return rewritten


def _factors(node: openvino.Node) -> tuple[openvino.Output, np.ndarray, np.ndarray] | None:
    """x, weights (in, out) and bias (out,), where the node is `x @ weights + bias`; or None."""
    if node.get_type_name() != "Add":
        return None
    for side in (0, 1):
        product, bias = node.input_value(side).get_node(), node.input_value(1 - side).get_node()
        if product.get_type_name() == "MatMul" and bias.get_type_name() == "Constant":
            break
    else:
        return None
    weights, attributes = product.input_value(1).get_node(), product.get_attributes()
    if weights.get_type_name() != "Constant" or weights.data.ndim != 2 or attributes["transpose_a"]:
        return None
    matrix = weights.data.T if attributes["transpose_b"] else weights.data
    if bias.data.shape != matrix.shape[1:]:
        return None
    return product.input_value(0), matrix, bias.data


def _columns(cut: openvino.Node) -> slice | None:
    """Which of the last axis a node takes, where that is all it does."""
    if cut.get_type_name() != "Slice" or cut.get_input_size() != 5:
        return None
    bounds = [cut.input_value(index).get_node() for index in range(1, 5)]
    if any(each.get_type_name() != "Constant" or each.data.size != 1 for each in bounds):
        return None
    start, stop, step, axis = (int(each.data.item()) for each in bounds)
    last = cut.input_value(0).get_partial_shape().rank.get_length() - 1
    return slice(start, stop) if step == 1 and start >= 0 and stop >= 0 and axis in (-1, last) else None
