"""Normalisations written so that OpenVINO's CPU plugin has less to do.

Exported graphs hold GroupNorm as a reshape to (B, groups, rest), a normalisation, and a reshape back. The reshape
wants plain NCHW where convolutions work in a channels-last layout, so every norm costs two reorders of the whole
tensor: a quarter of the embedded model's VAE decoder. Means over height and width, averaged over the channels of a
group, need no reshape of anything but B x C numbers.

The scale and shift of LayerNorm are an operation of their own, whose code is generated whenever the engine is loaded;
the products that follow have room for them in their weights.
"""

import numpy as np
import openvino
from openvino import opset13 as ops
from openvino.passes import ConstantFolding, Manager

WORTHWHILE = 32 * 32
"""Height times width from which on the rewritten norm was faster (two cores with AVX-512: 16 x 16 was not)."""


def keep_layouts(model: openvino.Model) -> int:
    """Rewrites the group normalisations of large pictures in `model`, in place, and returns how many there were."""
    manager = Manager()
    manager.register_pass(ConstantFolding())
    manager.run_passes(model)
    rewritten = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MVN" and (end := _reshape_back(node)):
            flattened = node.input_value(0).get_node()
            groups = flattened.get_output_partial_shape(0)[1].get_length()
            normalised = _group_norm(flattened.input_value(0), groups, node.get_attributes()["eps"])
            for consumer in end.output(0).get_target_inputs():
                consumer.replace_source_output(normalised.output(0))
            rewritten += 1
    model.validate_nodes_and_infer_types()
    return rewritten


def _reshape_back(norm: openvino.Node) -> openvino.Node | None:
    """The reshape that ends `(B, C, H, W) -> (B, groups, rest) -> norm -> (B, C, H, W)`, or None if it is no such."""
    flattened = norm.input_value(0).get_node()
    if flattened.get_type_name() != "Reshape":
        return None
    before, after = flattened.input_value(0).get_partial_shape(), flattened.get_output_partial_shape(0)
    if before.rank.get_length() != 4 or after.rank.get_length() != 3 or after[1].is_dynamic:
        return None
    if (
        any(size.is_dynamic for size in list(before)[1:])
        or before[2].get_length() * before[3].get_length() < WORTHWHILE
    ):
        return None
    node = norm
    while True:
        consumers = list(node.output(0).get_target_inputs())
        if len(consumers) != 1:
            return None
        following = consumers[0].get_node()
        kind = following.get_type_name()
        if kind == "Reshape":
            shape = following.get_output_partial_shape(0)
            return following if shape.rank.get_length() == 4 and shape[1] == before[1] else None
        neutral = {"Multiply": 1.0, "Add": 0.0}.get(kind)
        constant = following.input_value(1 - consumers[0].get_index()).get_node()
        if neutral is None or constant.get_type_name() != "Constant" or np.any(constant.data != neutral):
            return None
        node = following


def _group_norm(x: openvino.Output, groups: int, epsilon: float) -> openvino.Node:
    """(x - mean) / sqrt(variance + epsilon) over each group of channels of (B, C, H, W), in two passes."""
    channels = x.get_partial_shape()[1].get_length()

    def group_mean(values: openvino.Output) -> openvino.Node:
        """(B, C, H, W) -> (B, C, 1, 1): the mean of each channel's group."""
        of_channels = ops.reduce_mean(values, np.array([2, 3]), keep_dims=True)
        grouped = ops.reshape(of_channels, np.array([0, groups, channels // groups, 1]), special_zero=True)
        mean = ops.reduce_mean(grouped, np.array([2]), keep_dims=True)
        spread = ops.broadcast(mean, np.array([1, 1, channels // groups, 1]), broadcast_spec="BIDIRECTIONAL")
        return ops.reshape(spread, np.array([0, channels, 1, 1]), special_zero=True)

    centred = ops.subtract(x, group_mean(x))
    variance = group_mean(ops.multiply(centred, centred))
    scale = ops.power(ops.add(variance, np.float32(epsilon)), np.float32(-0.5))
    return ops.multiply(centred, scale)


def fold_scales(model: openvino.Model) -> int:
    """Takes the scale and shift of normalisations into the products that follow, in place; returns how many there were.

    `product(norm * scale + shift)` is `product'(norm) + product(shift)` with the scale in the weights: one operation
    less for each norm of a transformer, to compile when an engine is loaded and to run at every step.
    """
    folded = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MVN" and (found := _scaled(node)):
            scale, shift, readers = found
            for reader in readers:
                _take_in(reader, node.output(0), scale, shift)
            folded += 1
    model.validate_nodes_and_infer_types()
    return folded


def _scaled(norm: openvino.Node) -> tuple[np.ndarray, np.ndarray, list[openvino.Input]] | None:
    """Scale, shift, and the products that read `norm * scale + shift`, or None if anything else does."""
    output, taken = norm.output(0), []
    for kind in ("Multiply", "Add"):
        readers = list(output.get_target_inputs())
        if len(readers) != 1 or readers[0].get_node().get_type_name() != kind:
            return None
        node = readers[0].get_node()
        constant = node.input_value(1 - readers[0].get_index()).get_node()
        width = output.get_partial_shape()[-1]
        if constant.get_type_name() != "Constant" or width.is_dynamic or constant.data.size != width.get_length():
            return None
        if constant.data.shape[-1] != constant.data.size:
            return None
        taken.append(constant.data.reshape(-1).astype(np.float64))
        output = node.output(0)
    readers = list(output.get_target_inputs())
    return (taken[0], taken[1], readers) if readers and all(map(_is_weighted, readers)) else None


def _is_weighted(reader: openvino.Input) -> bool:
    """Whether it is the first input of a product with constant weights (in, out) or (out, in)."""
    node = reader.get_node()
    if node.get_type_name() != "MatMul" or reader.get_index() != 0 or node.get_attributes()["transpose_a"]:
        return False
    weights = node.input_value(1).get_node()
    return weights.get_type_name() == "Constant" and weights.data.ndim == 2 and weights.data.dtype == np.float32


def _take_in(reader: openvino.Input, norm: openvino.Output, scale: np.ndarray, shift: np.ndarray) -> None:
    product = reader.get_node()
    transposed = product.get_attributes()["transpose_b"]
    weights = product.input_value(1).get_node().data.astype(np.float64)
    scaled = weights * scale if transposed else weights * scale[:, None]
    shifted = weights @ shift if transposed else shift @ weights
    replaced = ops.matmul(norm, ops.constant(scaled.astype(np.float32)), False, transposed)
    replaced.set_friendly_name(product.get_friendly_name())
    end = ops.add(replaced, ops.constant(shifted.astype(np.float32)))
    for following in list(product.output(0).get_target_inputs()):
        following.replace_source_output(end.output(0))
