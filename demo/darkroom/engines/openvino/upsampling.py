"""Upsampling with less than half of the work, to the same result.

An upsampler of a UNet or a VAE doubles a picture by repeating its pixels, and convolves what it got with a 3x3 kernel.
The nine pixels under the kernel are only four of the small picture: so it is a 2x2 convolution of that one, with the
weights of what is repeated added up, and another one for each of the four places in a doubled pixel. Together the
four take 4/9 of the multiplications. Their results are then put into their places, as in sub-pixel convolution
(https://arxiv.org/abs/1609.05158).
"""

from itertools import product

import numpy as np
import openvino
from openvino import opset13 as ops

GATHERED = (
    np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]),
    np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]),
)
"""For the first and the second of two pixels that were one: which rows (or columns) of the 3x3 kernel, (2, 3), fall on
which of two neighbours in the small picture. These are the pixel before and the pixel itself for the first, the pixel
itself and the one after for the second."""

REPEATS = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}


def convolve_before_doubling(model: openvino.Model) -> int:
    """Rewrites the 3x3 convolutions of doubled pictures in `model`, in place, and returns how many there were."""
    rewritten = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Convolution" and _takes_neighbours(node) and _is_doubled(node.input_value(0)):
            small = node.input_value(0).get_node().input_value(0)
            doubled = _convolved(small, node.input_value(1).get_node().data)
            doubled.set_friendly_name(node.get_friendly_name())
            for reader in list(node.output(0).get_target_inputs()):
                reader.replace_source_output(doubled.output(0))
            rewritten += 1
    model.validate_nodes_and_infer_types()
    return rewritten


def _takes_neighbours(convolution: openvino.Node) -> bool:
    """Whether each pixel of the result is made of the nine around it, zeros beyond the edges, by known weights."""
    weights, attributes = convolution.input_value(1).get_node(), convolution.get_attributes()
    return (
        weights.get_type_name() == "Constant"
        and weights.data.dtype == np.float32
        and weights.data.shape[2:] == (3, 3)
        and attributes["auto_pad"] == "explicit"
        and all(list(attributes[name]) == [1, 1] for name in ("strides", "dilations", "pads_begin", "pads_end"))
    )


def _is_doubled(picture: openvino.Output) -> bool:
    """Whether it is (B, C, 2H, 2W), made of (B, C, H, W) by repeating pixels."""
    node = picture.get_node()
    if node.get_type_name() != "Interpolate" or node.get_input_size() != 2:
        return False
    attributes, scales = node.get_attributes(), node.input_value(1).get_node()
    return (
        attributes["shape_calculation_mode"] == "scales"
        and scales.get_type_name() == "Constant"
        and scales.data.tolist() == [1, 1, 2, 2]
        and all(attributes[name] == value for name, value in REPEATS.items())
        and not any((*attributes["pads_begin"], *attributes["pads_end"]))
    )


def _convolved(small: openvino.Output, weights: np.ndarray) -> openvino.Node:
    """(B, I, H, W) and a kernel (O, I, 3, 3) -> (B, O, 2H, 2W)."""
    parts = []
    for row, column in product((0, 1), repeat=2):
        gathered = np.einsum("ak,oikl,bl->oiab", GATHERED[row], weights.astype(np.float64), GATHERED[column])
        kernel = ops.constant(np.ascontiguousarray(gathered, np.float32))
        begin, end = [1 - row, 1 - column], [row, column]
        parts.append(ops.convolution(small, kernel, [1, 1], begin, end, [1, 1]))
    return ops.depth_to_space(ops.concat(parts, axis=1), "blocks_first", 2)
