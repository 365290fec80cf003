"""What TensorRT logs while it builds and runs."""

from typing import Any


def make_log(trt: Any) -> Any:
    """A logger that keeps what TensorRT calls errors, in `errors`."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            # Without a driver it queries the GPU all the same, and logs that this failed.
            noise = "cudaError 35" in message or "cudaErrorInsufficientDriver" in message
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR) and not noise:
                self.errors.append(" ".join(message.split()))

    return Log()
