"""Talking to a Triton server, over HTTP or gRPC, as KServe's v2 protocol has it.

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from darkroom.errors import Failed, InvalidRequest
from darkroom.triton.answers import ENCODED, OUTPUTS, PIXELS, Image, NoAnswer, read_images
from darkroom.triton.prompts import DATATYPES, Prompt

PORTS = {"http": 8000, "grpc": 8001}
"""The protocols, and where Triton listens to each by default."""

HOST = "127.0.0.1"
ANSWERS_WITHIN = 10.0
"""Seconds that a server which is there needs at most to describe a model's inputs and outputs."""

GRACE = 1.0
"""Seconds that a server has, past the deadline of a request, to report itself that it was missed."""

LONGEST = 300
"""Characters of a server's message that are shown."""

BROKEN = (
    "failed to connect",
    "errors resolving",
    "connection reset",
    "goaway",
    "stream removed",
    "broken pipe",
    "socket closed",
)
"""What gRPC says of a connection that broke or was not made; a busy server is UNAVAILABLE in words of its own."""

NUMPY = {"BYTES": np.object_, "UINT64": np.uint64, "INT32": np.int32, "FP32": np.float32}


@dataclass(frozen=True)
class Address:
    protocol: str
    host: str
    port: int

    @property
    def netloc(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.protocol}://{self.netloc}"


def address_of(url: str | None, protocol: str | None) -> Address:
    """`HOST:PORT`, with or without `http://` or `grpc://`. Raises `InvalidRequest` for anything else."""
    prefix, found, rest = (HOST if url is None else url).rpartition("://")
    if found and prefix not in PORTS:
        raise InvalidRequest(f"--url {url}: {prefix}:// is not known here; http:// and grpc:// are.")
    if found and protocol and protocol != prefix:
        raise InvalidRequest(f"--protocol {protocol} and --url {url} contradict each other; leave one out.")
    spoken = prefix or protocol or "http"
    try:
        parts = urlsplit(f"//{rest}")
        port = PORTS[spoken] if parts.port is None else parts.port
    except ValueError:
        parts, port = None, 0
    if not port or not parts.hostname or parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc:
        raise InvalidRequest(f"--url {url}: this is no HOST:PORT.")
    return Address(spoken, parts.hostname, port)


@dataclass(frozen=True)
class Model:
    """A model of a server, and the names of what it takes and of what is requested of it."""

    name: str
    inputs: frozenset[str]
    outputs: tuple[str, ...]


class Server:
    """A connection to a server; one coroutine or many may use it at once."""

    def __init__(self, address: Address, library: ModuleType, connection: Any) -> None:
        self.address = address
        self._library = library
        self._connection = connection
        # Both clients of the library answer alike, but for what gRPC wraps.
        self._plain: dict[str, Any] = {"as_json": True} if address.protocol == "grpc" else {}

    async def model(self, name: str) -> Model:
        """Raises `Failed` where no server answers, and for a model that it has not, or has not ready."""
        try:
            async with asyncio.timeout(ANSWERS_WITHIN):
                why = "" if await self._connection.is_server_live() else "it does not say that it lives"
        except Exception as error:  # the libraries below raise what they like for what is no Triton
            why = f"nothing within {ANSWERS_WITHIN:g} seconds" if isinstance(error, TimeoutError) else _said(error)
        if why:
            other = next(protocol for protocol in PORTS if protocol != self.address.protocol)
            raise Failed(
                f"no Triton server that speaks {self.address.protocol} answers at {self.address} ({why}): start one "
                f"with demo/serve_triton.py, or add --protocol {other}."
            )
        try:
            async with asyncio.timeout(ANSWERS_WITHIN):
                described = await self._connection.get_model_metadata(name, **self._plain)
        except Exception as error:
            raise Failed(f"the server at {self.address} does not describe the model: {_said(error)}.") from None
        inputs, outputs = ([each["name"] for each in described.get(kind, [])] for kind in ("inputs", "outputs"))
        if "prompt" not in inputs or not {PIXELS, ENCODED} & set(outputs):
            raise Failed(
                f"the model {name} makes no pictures from prompts: it takes {', '.join(inputs)} "
                f"and answers {', '.join(outputs)}."
            )
        asked = [each for each in OUTPUTS if each in outputs and (each != ENCODED or PIXELS not in outputs)]
        return Model(name, frozenset(inputs), tuple(asked))

    async def infer(self, model: Model, prompts: list[Prompt], timeout: float | None) -> list[Image]:
        """The images of one request. `timeout` is its deadline in seconds; raises `NoAnswer` past it and for any
        other reason that there are none."""
        inputs = [self._input(name, prompts) for name in prompts[0].fields]
        outputs = [self._library.InferRequestedOutput(name) for name in model.outputs]
        try:
            async with asyncio.timeout(None if timeout is None else timeout + GRACE):
                answer = await self._connection.infer(
                    model.name,
                    inputs,
                    outputs=outputs,
                    timeout=None if timeout is None else round(timeout * 1e6),
                )
            arrays = {name: answer.as_numpy(name) for name in model.outputs}
        except Exception as error:  # what the libraries below raise is of no common kind
            if isinstance(error, TimeoutError) and timeout is not None:
                raise NoAnswer(f"the server did not answer within {timeout:g} seconds") from None
            raise NoAnswer(_reason(error)) from None
        return read_images(prompts, arrays)

    def _input(self, name: str, prompts: list[Prompt]) -> Any:
        """A tensor of shape (B, 1)."""
        values = [prompt.fields[name] for prompt in prompts]
        datatype = DATATYPES[name]
        if datatype == "BYTES":
            values = [value.encode() for value in values]
        tensor = self._library.InferInput(name, [len(values), 1], datatype)
        return tensor.set_data_from_numpy(np.array(values, NUMPY[datatype]).reshape(-1, 1))


@asynccontextmanager
async def connected(address: Address) -> AsyncIterator[Server]:
    """Raises `Failed` without the library. Whether a server is there shows at the first request."""
    # Above warnings gRPC writes lines of its own for every connection that breaks; what they say is reported here.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        if address.protocol == "http":
            import tritonclient.http.aio as library

            # As many connections as there are clients, and no deadline but that of each request.
            settings: dict[str, Any] = {"conn_limit": 0, "conn_timeout": None}
        else:
            import tritonclient.grpc.aio as library

            settings = {}
    except (ImportError, RuntimeError):  # the library's own word for an extra that is missing is a RuntimeError
        raise Failed('talking to Triton needs a package: pip install "tritonclient[http,grpc]"') from None
    async with library.InferenceServerClient(address.netloc, **settings) as connection:
        yield Server(address, library, connection)


def one_line(text: str) -> str:
    """A server's message without its traceback and the name that Triton gives to requests without one."""
    line = text.removeprefix("[request id: <id_unknown>] ").strip().split("\n")[0].strip()
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"


def _unavailable(error: Exception) -> bool:
    """Whether gRPC reports that no server is there."""
    from tritonclient.utils import InferenceServerException

    if not isinstance(error, InferenceServerException) or error.status() != "StatusCode.UNAVAILABLE":
        return False
    return any(words in str(error).lower() for words in BROKEN)


def _reason(error: Exception) -> str:
    """Why a request was not answered."""
    from tritonclient.utils import InferenceServerException

    if isinstance(error, InferenceServerException) and not _unavailable(error):
        return _said(error)
    return f"the connection broke ({_said(error)})"


def _said(error: Any) -> str:
    """The message of an error of either library, in one line."""
    message = getattr(error, "message", None) or str(error)
    return one_line(str(message() if callable(message) else message)).rstrip(".:") or type(error).__name__
