"""How large networks are kept and loaded on the CPU, so that their weights are in memory once.

Importing a blob copies its weights before the kernels lay out their own copy; a model's weights are mapped, and the
kernels' copy is the only one: Stable Diffusion 1.5's UNet takes 3.5 GB instead of 6.7, and half the time to load.

Weights in float16 are made float32 before anything else, and kept for as long as the network is loaded, unless their
conversions are decompressions: those are left for last. That spares as much again, but matrix products take other
kernels then, a twentieth slower; so it is for weights that are in float16 for want of room, and for no others.
"""

import openvino

DECOMPRESSION = "decompression_0"
"""OpenVINO's name for what it knows of a conversion. It looks only whether it is there."""


def widen_late(model: openvino.Model) -> None:
    """Marks the conversions of float16 weights as decompressions."""
    for node in model.get_ops():
        if node.get_type_name() == "Convert" and node.get_input_element_type(0) == openvino.Type.f16:
            if node.input_value(0).get_node().get_type_name() == "Constant":
                node.get_rt_info()[DECOMPRESSION] = ""
