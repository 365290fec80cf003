"""Random inputs that keep to a stage's contract: what graphs are traced with, and they and engines are checked with."""

import numpy as np

from darkroom.contract import CONTROL_FROM, CONTROL_UNTIL, Stage

BYTE_TOKENS = 256
"""Ids below this are tried, as far as there are so many: a byte-level vocabulary begins with one token a byte."""


def example_arrays(stage: Stage, sizes: dict[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    """The stage's inputs, on the given sizes, by name and in the contract's order."""
    chance, inputs = np.random.default_rng(seed), {}
    for tensor in stage.inputs:
        shape = [sizes[size] if isinstance(size, str) else size for size in tensor.shape]
        if tensor.dtype == "int32":
            value = chance.integers(0, min(tensor.count or BYTE_TOKENS, BYTE_TOKENS), shape, np.int32)
        elif tensor.name == "timestep":
            value = chance.uniform(0, 999, shape)
        elif tensor.name.endswith("time_ids"):
            value = chance.integers(0, 1024, shape)
        elif tensor.name in (CONTROL_FROM, CONTROL_UNTIL):
            value = np.full(shape, 999 if tensor.name == CONTROL_FROM else 0)
        elif tensor.name == "guidance_scale":
            value = chance.uniform(1, 8, shape)
        else:
            value = chance.standard_normal(shape)
        inputs[tensor.name] = value.astype(tensor.dtype)
    return inputs
