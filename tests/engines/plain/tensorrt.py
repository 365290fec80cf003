"""In place of plain TensorRT 11, whose libraries are not on the package index: those of TensorRT-RTX, which build where
there is no GPU, less what plain TensorRT does not have: `test_tensorrt_build.py` holds that against its bindings."""

from typing import Any

import tensorrt_rtx
from tensorrt_rtx import *  # noqa: F403
from tensorrt_rtx import __doc__ as __doc__

__version__ = "11.4.0"

OF_RTX_ALONE = (
    "ComputeCapability",
    "DynamicShapesKernelSpecializationStrategy",
    "CudaGraphStrategy",
    "num_compute_capabilities",
    "set_compute_capability",
    "REQUIRE_USER_ALLOCATION",
)

for name in OF_RTX_ALONE:
    globals().pop(name, None)


class Without:
    """An object of TensorRT-RTX without what it alone has."""

    def __init__(self, real: Any) -> None:
        vars(self)["real"] = real

    def __getattr__(self, name: str) -> Any:
        if name in OF_RTX_ALONE:
            raise AttributeError(f"plain TensorRT has no {name}")
        return getattr(self.real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OF_RTX_ALONE:
            raise AttributeError(f"plain TensorRT has no {name}")
        setattr(self.real, name, value)


BuilderFlag = Without(tensorrt_rtx.BuilderFlag)


class Builder(Without):
    def __init__(self, log: Any) -> None:
        super().__init__(tensorrt_rtx.Builder(log))

    def create_network(self, flags: int = 0) -> Any:
        # TensorRT 10 would choose types of its own, and TensorRT 11 does as if it was passed.
        assert flags == 1 << int(tensorrt_rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        return self.real.create_network(flags)

    def create_builder_config(self) -> Any:
        return Without(self.real.create_builder_config())

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        return self.real.build_serialized_network(network, config.real)
