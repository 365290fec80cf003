"""With --low-vram one network is in memory at a time, and the picture is the same."""

import gc
import weakref
from typing import Any
from unittest import mock

import numpy as np
import pytest

from darkroom.engines.openvino.runtime import OpenVino
from tests.support import Studio


@pytest.mark.parametrize("batches", [1, 2])
def test_one_network_is_loaded_at_a_time(batches: int, studio: Studio) -> None:
    expected = studio.draw("a red apple", batch_count=batches)
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most, real = 0, OpenVino.load

    def load(*arguments: Any) -> Any:
        nonlocal most
        gc.collect()
        engine = real(*arguments)
        alive.add(engine)
        most = max(most, len(alive))
        return engine

    with mock.patch.object(OpenVino, "load", load):
        drawn = studio.draw("a red apple", batch_count=batches, low_vram=True)
    assert most == 1
    np.testing.assert_array_equal(drawn.pictures, expected.pictures)
    assert drawn.result["milliseconds"].keys() == expected.result["milliseconds"].keys()
