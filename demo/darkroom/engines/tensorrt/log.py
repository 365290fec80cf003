"""What TensorRT logs while it builds and runs."""

from typing import Any

NO_GPU = {35: "cudaErrorInsufficientDriver", 100: "cudaErrorNoDevice"}
"""CUDA's errors where there is no driver, and where a driver has no GPU, or one that CUDA_VISIBLE_DEVICES hides."""


def make_log(trt: Any) -> Any:
    """A logger that keeps what TensorRT calls errors, in `errors`."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            # Without a driver, or a GPU, it queries that all the same, and logs that this failed.
            noise = any(f"cudaError {each}" in message or name in message for each, name in NO_GPU.items())
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR) and not noise:
                self.errors.append(" ".join(message.split()))

    return Log()
