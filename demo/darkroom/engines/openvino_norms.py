"""Group normalisation written so that OpenVINO's CPU plugin need not leave the convolutions' memory layout.

Exported graphs hold GroupNorm as a reshape to (B, groups, rest), a normalisation, and a reshape back. The reshape
wants plain NCHW where convolutions work in a channels-last layout, so every norm costs two reorders of the whole
tensor: a quarter of the embedded model's VAE decoder. Means over height and width, averaged over the channels of a
group, need no reshape of anything but B x C numbers.
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
