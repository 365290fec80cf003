"""Splits a network in two: what is computed once a picture, and what is computed at every step.

The text's keys and values for cross-attention and the guidance scale do not change from step to step, and yet stand
in the same graph as all that does: a tenth of the embedded model's UNet.
"""

import openvino
from openvino import opset13 as ops

KEPT = "kept_"
"""What begins the names of the tensors that one half hands to the other."""


def split(model: openvino.Model, steady: set[str]) -> tuple[openvino.Model, openvino.Model] | None:
    """`model` as two: the first takes the inputs named in `steady` and computes all that depends on nothing else; the
    second takes, by name, what the first gives, the other inputs, and those of `steady` that it uses as they are.

    None when nothing can be computed beforehand. Otherwise `model` has been taken apart.
    """
    changing = _changing(model, steady)
    border: dict[tuple[str, int], tuple[openvino.Output, list[openvino.Input]]] = {}
    for node in model.get_ordered_ops():
        if changing.get(node.get_friendly_name()):
            for index in range(node.get_input_size()):
                source = node.input_value(index)
                name = source.get_node().get_friendly_name()
                if changing.get(name) is False:
                    border.setdefault((name, source.get_index()), (source, []))[1].append(node.input(index))
    if all(_is_input(source) for source, _ in border.values()):
        return None
    results, received = [], []
    for number, (source, readers) in enumerate(border.values()):
        stand_in = ops.parameter(source.get_partial_shape(), source.get_element_type())
        for reader in readers:
            reader.replace_source_output(stand_in.output(0))
        received.append(stand_in)
        names = source.get_names() if _is_input(source) else {f"{KEPT}{number}"}
        stand_in.output(0).get_tensor().set_names(names)
        if not _is_input(source):
            results.append(ops.result(source))
            results[-1].output(0).get_tensor().set_names(names)
    parameters: dict[bool, list] = {False: [], True: []}
    for parameter in model.get_parameters():
        parameters[changing[parameter.get_friendly_name()]].append(parameter)
    return (
        openvino.Model(results, parameters[False]),
        openvino.Model(model.get_results(), parameters[True] + received),
    )


def _is_input(source: openvino.Output) -> bool:
    return source.get_node().get_type_name() == "Parameter"


def _changing(model: openvino.Model, steady: set[str]) -> dict[str, bool]:
    """Whether each node depends on an input that is not steady, by its name; nodes without any input are left out."""
    changing: dict[str, bool] = {}
    for node in model.get_ordered_ops():
        name = node.get_friendly_name()
        if node.get_type_name() == "Parameter":
            changing[name] = not node.output(0).get_names() & steady
            continue
        sources = (node.input_value(index).get_node().get_friendly_name() for index in range(node.get_input_size()))
        known = [changing[source] for source in sources if source in changing]
        if known:
            changing[name] = any(known) or node.get_type_name() == "Result"
    return changing
