"""A normalisation that is written otherwise is still the same normalisation: torch's."""

import numpy as np
import openvino
import pytest
from openvino import opset13 as ops

from darkroom.engines.openvino.norms import fold_scales, keep_layouts
from tests.engines.graphs import drawn, kinds, outputs

torch = pytest.importorskip("torch")

BATCH, TOKENS, WIDTH, INNER = 2, 5, 8, 6


SCALE, SHIFT = 1 + drawn(1, WIDTH) / 2, drawn(2, WIDTH)
WEIGHTS = [drawn(3, WIDTH, INNER), drawn(4, INNER, WIDTH)]
"""Of two products, (in, out) and (out, in)."""


def layer_norm(also_read: bool = False) -> openvino.Model:
    """x (BATCH, TOKENS, WIDTH) -> LayerNorm -> two products, and the norm itself where it is `also_read`."""
    x = ops.parameter([BATCH, TOKENS, WIDTH], np.float32, name="x")
    norm = ops.mvn(x, np.array([2]), True, 1e-5, "inside_sqrt")
    scaled = ops.add(ops.multiply(norm, ops.constant(SCALE)), ops.constant(SHIFT))
    products = [
        ops.matmul(scaled, ops.constant(weights), False, turned)
        for weights, turned in zip(WEIGHTS, (False, True), strict=True)
    ]
    return openvino.Model([ops.result(each) for each in (*products, *([scaled] if also_read else []))], [x])


def test_scale_and_shift_are_taken_into_the_products_that_follow() -> None:
    model, x = layer_norm(), 3 + drawn(5, BATCH, TOKENS, WIDTH)
    assert fold_scales(model) == 1
    assert "Multiply" not in kinds(model)
    norm = torch.nn.functional.layer_norm(torch.from_numpy(x), (WIDTH,))
    norm = norm * torch.from_numpy(SCALE) + torch.from_numpy(SHIFT)
    first, second = outputs(model, x)
    np.testing.assert_allclose(first, (norm @ torch.from_numpy(WEIGHTS[0])).numpy(), rtol=0, atol=2e-5)
    np.testing.assert_allclose(second, (norm @ torch.from_numpy(WEIGHTS[1]).T).numpy(), rtol=0, atol=2e-5)


def test_scale_that_something_else_reads_stays() -> None:
    assert fold_scales(layer_norm(also_read=True)) == 0


@pytest.mark.parametrize("side", (16, 32))
def test_group_norm_is_torchs_whether_rewritten_or_not(side: int) -> None:
    channels, groups = 6, 3
    x = ops.parameter([BATCH, channels, side, side], np.float32, name="x")
    flat = ops.reshape(x, np.array([0, groups, -1]), special_zero=True)
    norm = ops.mvn(flat, np.array([2]), True, 1e-5, "inside_sqrt")
    model = openvino.Model([ops.result(ops.reshape(norm, ops.shape_of(x), special_zero=False))], [x])
    assert keep_layouts(model) == (side == 32)
    picture = 2 + drawn(6, BATCH, channels, side, side)
    expected = torch.nn.functional.group_norm(torch.from_numpy(picture), groups).numpy()
    np.testing.assert_allclose(outputs(model, picture)[0], expected, rtol=0, atol=2e-5)
