"""A convolution of a doubled picture that is computed before doubling is still the same: torch's."""

from typing import Any

import numpy as np
import openvino
import pytest
from openvino import opset13 as ops

from darkroom.engines.openvino.upsampling import convolve_before_doubling
from tests.engines.graphs import drawn, kinds, outputs

torch = pytest.importorskip("torch")

IN, OUT = 5, 7
REPEATS = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}


WEIGHTS = drawn(1, OUT, IN, 3, 3)


def upsampler(
    shape: list[int],
    scale: float = 2,
    mode: str = "nearest",
    weights: np.ndarray = WEIGHTS,
    stride: int = 1,
    pad: int = 1,
    repeats: dict[str, Any] = REPEATS,
    also_read: bool = False,
) -> openvino.Model:
    """x (B, IN, H, W) -> scaled -> convolved; and what was scaled, where it is `also_read`."""
    x = ops.parameter(shape, np.float32, name="x")
    scales = ops.constant(np.array([1, 1, scale, scale], np.float32))
    larger = ops.interpolate(x, scales, mode, "scales", [0] * 4, [0] * 4, **repeats)
    convolved = ops.convolution(larger, ops.constant(weights), [stride] * 2, [pad] * 2, [pad] * 2, [1, 1])
    return openvino.Model([ops.result(each) for each in (convolved, *([larger] if also_read else []))], [x])


def by_torch(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the upsampler makes of x, and x doubled."""
    doubled = torch.nn.functional.interpolate(torch.from_numpy(x), scale_factor=2, mode="nearest")
    return torch.nn.functional.conv2d(doubled, torch.from_numpy(WEIGHTS), padding=1).numpy(), doubled.numpy()


@pytest.mark.parametrize("free", (False, True))
@pytest.mark.parametrize("size", ((6, 4), (1, 3), (1, 1)))
def test_convolution_before_doubling_is_torchs_after_it(size: tuple[int, int], free: bool) -> None:
    x = drawn(2, 2, IN, *size)
    model = upsampler([-1, IN, -1, -1] if free else list(x.shape))
    assert convolve_before_doubling(model) == 1
    assert "Interpolate" not in kinds(model)
    np.testing.assert_allclose(outputs(model, x)[0], by_torch(x)[0], rtol=0, atol=2e-5)


def test_doubled_picture_that_something_else_reads_is_still_made() -> None:
    x = drawn(3, 1, IN, 4, 4)
    model = upsampler(list(x.shape), also_read=True)
    assert convolve_before_doubling(model) == 1
    for ours, theirs in zip(outputs(model, x), by_torch(x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "other",
    (
        {"scale": 3},
        {"mode": "linear_onnx"},
        {"weights": drawn(4, OUT, IN, 5, 5), "pad": 2},
        {"pad": 0},
        {"stride": 2},
        {"repeats": REPEATS | {"nearest_mode": "ceil"}},
    ),
    ids=lambda other: next(iter(other)),
)
def test_anything_else_stays_as_it_is(other: dict[str, Any]) -> None:
    model = upsampler([1, IN, 4, 4], **other)
    before = kinds(model)
    assert convolve_before_doubling(model) == 0
    assert kinds(model) == before
