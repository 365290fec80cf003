"""What tests of rewritten OpenVINO graphs share."""

import numpy as np
import openvino


def drawn(seed: int, *shape: int) -> np.ndarray:
    """Normal numbers, float32."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def kinds(model: openvino.Model) -> list[str]:
    """The operations of a graph, by their types' names."""
    return [node.get_type_name() for node in model.get_ops()]


def request(model: openvino.Model) -> openvino.InferRequest:
    """The graph, compiled for the CPU in float32."""
    settings = {openvino.properties.hint.inference_precision: openvino.Type.f32}
    return openvino.Core().compile_model(model, "CPU", settings).create_infer_request()


def outputs(model: openvino.Model, x: np.ndarray) -> list[np.ndarray]:
    """What a graph of one input makes of it."""
    return list(request(model).infer([x]).values())
