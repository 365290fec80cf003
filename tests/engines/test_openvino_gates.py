"""A gated layer whose product is parted is still the same layer: torch's."""

import numpy as np
import openvino
import pytest
from openvino import opset13 as ops

from darkroom.engines.openvino.gates import part_gates
from tests.engines.graphs import drawn, kinds, outputs

torch = pytest.importorskip("torch")

BATCH, TOKENS, WIDTH, INNER = 2, 3, 4, 5
END = np.iinfo(np.int64).max


WEIGHTS, BIAS = drawn(1, 2 * INNER, WIDTH), drawn(2, 2 * INNER)


def geglu(
    cut: tuple[tuple[int, int], ...] = ((0, INNER), (INNER, END)),
    axis: int = -1,
    step: int = 1,
    turned: bool = True,
    also_read: bool = False,
) -> openvino.Model:
    """x -> a product with WEIGHTS and BIAS, cut -> values * gelu(gates); and the product if it is `also_read`."""
    x = ops.parameter([BATCH, TOKENS, WIDTH], np.float32, name="x")
    weights = ops.constant(WEIGHTS if turned else np.ascontiguousarray(WEIGHTS.T))
    product = ops.add(ops.constant(BIAS), ops.matmul(x, weights, False, turned))
    values, gates = (
        ops.slice(product, *(ops.constant(np.array([each])) for each in (start, stop, step, axis)))
        for start, stop in cut
    )
    layer = ops.multiply(values, ops.gelu(gates, "erf"))
    return openvino.Model([ops.result(each) for each in (layer, *([product] if also_read else []))], [x])


def by_torch(x: np.ndarray) -> np.ndarray:
    product = torch.nn.functional.linear(*map(torch.from_numpy, (x, WEIGHTS, BIAS)))
    values, gates = product.chunk(2, dim=-1)
    return (values * torch.nn.functional.gelu(gates)).numpy()


@pytest.mark.parametrize("turned", (False, True))
@pytest.mark.parametrize("axis", (-1, 2))
def test_parted_layer_is_torchs(turned: bool, axis: int) -> None:
    model, x = geglu(turned=turned, axis=axis), drawn(3, BATCH, TOKENS, WIDTH)
    assert part_gates(model) == 1
    assert "Slice" not in kinds(model)
    np.testing.assert_allclose(outputs(model, x)[0], by_torch(x), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "other",
    (
        {"also_read": True},
        {"axis": 1, "cut": ((0, 1), (1, 2))},
        {"step": 2, "cut": ((0, INNER), (INNER, 2 * INNER))},
        {"cut": ((-2 * INNER, -INNER), (-INNER, END))},
    ),
    ids=lambda other: next(iter(other)),
)
def test_anything_else_stays_as_it_is(other: dict) -> None:
    model = geglu(**other)
    before = kinds(model)
    assert part_gates(model) == 0
    assert kinds(model) == before
