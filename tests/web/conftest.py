"""A server of the tiny model, started as people start it, and what speaks to it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from tests.support import ROOT, free_ports, until

STARTS_WITHIN = 300.0


@dataclass(frozen=True)
class Server:
    """A running server: its address, its pictures, and its process."""

    url: str
    output: Path
    process: subprocess.Popen

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)


def start(stores: Path, model: Path, *arguments: str, **environment: str) -> Server:
    """Starts serve.py, and returns when it is ready."""
    port = arguments[arguments.index("--port") + 1] if "--port" in arguments else free_ports(1)[0]
    output = stores / f"pictures-{port}"
    flags = ["--model", str(model), "--port", str(port), "--output-dir", str(output), "--engine", "openvino"]
    flags += ["--onnx-dir", str(stores / "onnx"), "--engine-dir", str(stores / "engines")]
    flags += ["--schedulers", "Euler", "EulerA", *arguments]
    log = (stores / f"serve-{port}.log").open("w")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "demo/serve.py"), *flags], stdout=log, stderr=log, env=os.environ | environment
    )

    def answers() -> bool:
        assert process.poll() is None, Path(log.name).read_text()
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    until(answers, STARTS_WITHIN)
    return Server(f"http://127.0.0.1:{port}", output, process)


@pytest.fixture(scope="session")
def server(stores: Path, tiny_model: Path) -> Iterator[Server]:
    """One for all tests that leave it as they find it."""
    started = start(stores, tiny_model)
    yield started
    started.process.terminate()
    assert started.process.wait(60) == 0
