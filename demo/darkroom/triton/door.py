"""The door of a Triton server: it listens in the server's stead, and lets requests for pictures through alone.

A client that reaches Triton's model control runs code in it; a key for that would stand in its command line for all to
read; it has no limit for a request's size; and some malformed requests end it. So Triton listens at sockets in a folder
that only its user can enter, and this process at the address: inference, health, metadata and statistics go through it,
checked, and all else is closed.

    python -m darkroom.triton.door FOLDER HOST HTTP_PORT GRPC_PORT METRICS_PORT MODEL ...
"""

import asyncio
import json
import logging
import re
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import aiohttp
import grpc
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from darkroom.errors import InvalidRequest, near_matches
from darkroom.triton.server import ENDING, GRPC_SOCKET, HTTP_SOCKET, METRICS_SOCKET
from darkroom.triton.wellformed import infer_body, infer_message, json_body

MOST_BYTES = 4 * 2**20
"""Of a request: gRPC's own default, and thousands of prompts."""

SECONDS_TO_SEND = 15
"""What a client may take to send a request."""

SECONDS_IDLE = 75
"""How long a connection is kept for another request."""

SECONDS_TO_END = 5
"""What answers on their way have to arrive in when the door is closed."""

NAME = r"[\w+-][\w.+-]*"
MODEL = rf"/v2/models/(?P<model>{NAME})(?:/versions/\d{{1,9}})?"
OPEN_PATHS = {
    "GET": re.compile(rf"/v2|/v2/health/(?:live|ready)|/v2/models/stats|{MODEL}(?:/(?:ready|stats))?", re.ASCII),
    "POST": re.compile(rf"{MODEL}/(?P<verb>infer|generate|generate_stream)", re.ASCII),
}
LENGTH = "Inference-Header-Content-Length"
PASSED_BACK = ("Content-Type", "Content-Encoding", LENGTH)

SERVICE = "/inference.GRPCInferenceService/"
INFER, STREAM, HEALTH = f"{SERVICE}ModelInfer", f"{SERVICE}ModelStreamInfer", "/grpc.health.v1.Health/Check"
OPEN_CALLS = {HEALTH, INFER, STREAM} | {
    f"{SERVICE}{name}"
    for name in ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelStatistics")
}

CLOSED = "this is closed: inference, health, metadata and statistics alone are open."
NOT_THERE = "the server is not ready: it is starting, or ending."
BROKEN = ("failed to connect", "connection re", "socket closed", "goaway", "broken pipe", "stream removed")
"""What gRPC itself says of a server that is not there, or not any more."""


class HttpDoor:
    """What goes through over HTTP, and the metrics at a port of their own."""

    def __init__(self, socket: Path, paths: dict[str, re.Pattern[str]], models: list[str]) -> None:
        self._ending = socket.with_name(ENDING)
        self._paths = paths
        self._models = models
        self._patience: dict[Any, asyncio.TimerHandle] = {}
        # A connection for each request: Triton does not end before those that are kept have ended.
        connector = aiohttp.UnixConnector(str(socket), limit=0, force_close=True)
        self._triton = aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(total=None), auto_decompress=False
        )
        app = web.Application(client_max_size=MOST_BYTES)
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(
            app, access_log=None, keepalive_timeout=SECONDS_IDLE, shutdown_timeout=SECONDS_TO_END
        )

    async def open(self, host: str, port: int) -> None:
        await self._runner.setup()
        self._listener = await asyncio.get_running_loop().create_server(self._connected, host, port)

    async def close(self) -> None:
        self._listener.close()
        await self._runner.cleanup()
        await self._triton.close()

    def _connected(self) -> Any:
        """What speaks HTTP over a new connection, which is closed if no request has come through it in time."""
        connection = self._runner.server()

        def drop() -> None:
            del self._patience[connection]
            connection.force_close()

        self._patience[connection] = asyncio.get_running_loop().call_later(SECONDS_TO_SEND, drop)
        return connection

    async def _answer(self, request: web.Request) -> web.Response:
        if timer := self._patience.pop(request.protocol, None):
            timer.cancel()
        path = request.rel_url.raw_path
        if request.method not in self._paths or not (found := self._paths[request.method].fullmatch(path)):
            return _told(403, CLOSED)
        named = found.groupdict()
        try:
            body, headers = await _read(request, named["verb"]) if "verb" in named else (None, {})
            if self._ending.exists():
                return _told(503, NOT_THERE)
            async with self._triton.request(
                request.method, f"http://triton{path}", data=body, headers=headers
            ) as reply:
                content = await reply.read()
        except InvalidRequest as error:
            return _told(400, str(error))
        except web.HTTPRequestEntityTooLarge:
            return _told(413, f"a request must not have more than {MOST_BYTES} bytes.")
        except TimeoutError:
            return _told(408, f"the request did not come within {SECONDS_TO_SEND} seconds.")
        except (aiohttp.ClientError, OSError):
            return _told(503, NOT_THERE)
        if reply.status >= 400 and (hint := _hint(named.get("model"), self._models)):
            return _told(reply.status, f"{_error(content)}{hint}")
        response = web.Response(status=reply.status, body=content)
        response.headers.update({name: reply.headers[name] for name in PASSED_BACK if name in reply.headers})
        return response


async def _read(request: web.Request, verb: str) -> tuple[bytes, dict[str, str]]:
    """A request for inference, checked, and the headers that go with it."""
    try:
        async with asyncio.timeout(SECONDS_TO_SEND):
            body = await request.read()
    except (web.RequestPayloadError, aiohttp.ClientPayloadError) as error:
        raise InvalidRequest(f"the request is broken: {error}") from None
    # Triton packs answers for those who want it; what it makes of odd weights is not for everybody to try.
    packed = [each for each in ("gzip", "deflate") if each in request.headers.get("Accept-Encoding", "")]
    headers = {"Content-Type": "application/json", "Accept-Encoding": ", ".join(packed) or "identity"}
    if verb != "infer":
        return json_body(body), headers
    body, length = infer_body(body, request.headers.get(LENGTH))
    return body, headers | {LENGTH: str(length)}


def _told(status: int, error: str) -> web.Response:
    return web.json_response({"error": error}, status=status)


def _error(content: bytes) -> str:
    try:
        return str(json.loads(content)["error"])
    except (ValueError, KeyError, TypeError):
        return content.decode(errors="replace")


def _hint(model: str | None, models: list[str]) -> str:
    """What helps a client that names a model that is not served."""
    if not model or model in models:
        return ""
    return f".{near_matches(model, models)} It has: {', '.join(models)}."


class GrpcDoor(grpc.GenericRpcHandler):
    """What goes through over gRPC."""

    def __init__(self, socket: Path, models: list[str]) -> None:
        self._ending = socket.with_name(ENDING)
        self._models = models
        # Triton may be started again at any time: it is looked for anew at once, not after gRPC's two minutes.
        options = [(f"grpc.{name}_reconnect_backoff_ms", 200) for name in ("initial", "min", "max")]
        self._triton = grpc.aio.insecure_channel(
            f"unix:{socket}", options=[*options, ("grpc.max_receive_message_length", -1)]
        )
        self._server = grpc.aio.server(
            handlers=[self],
            options=[
                ("grpc.max_receive_message_length", MOST_BYTES),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
                ("grpc.server_handshake_timeout_ms", 1000 * SECONDS_TO_SEND),
                ("grpc.max_connection_idle_ms", 1000 * SECONDS_IDLE),
            ],
        )

    async def open(self, host: str, port: int) -> None:
        self._server.add_insecure_port(f"{host}:{port}")
        await self._server.start()

    async def close(self) -> None:
        await self._server.stop(SECONDS_TO_END)
        await self._triton.close()

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        if call.method == STREAM:
            return grpc.stream_stream_rpc_method_handler(self._stream)

        async def answer(requests: Any, context: Any) -> bytes:
            try:
                if call.method not in OPEN_CALLS:
                    raise Refused(grpc.StatusCode.PERMISSION_DENIED, CLOSED)
                request = await _next(requests, SECONDS_TO_SEND)
                if request is None:
                    raise Refused(grpc.StatusCode.INVALID_ARGUMENT, "the call has no message.")
                return await self._forward(call.method, request, context)
            except Refused as refused:
                await context.abort(refused.code, refused.text)

        # As if there could be several requests: gRPC waits for a single one itself, and has no limit for that.
        return grpc.stream_unary_rpc_method_handler(answer)

    async def _stream(self, requests: Any, context: Any) -> None:
        """Requests for inference, one after another: each has one answer."""
        while True:
            try:
                request = await _next(requests, SECONDS_IDLE)
            except Refused as refused:
                await context.abort(refused.code, refused.text)
            if request is None:
                return
            try:
                infer_response = service_pb2.ModelInferResponse.FromString(await self._forward(INFER, request, context))
                answer = service_pb2.ModelStreamInferResponse(infer_response=infer_response)
            except Refused as refused:
                answer = service_pb2.ModelStreamInferResponse(error_message=refused.text)
            await context.write(answer.SerializeToString())

    async def _forward(self, method: str, request: bytes, context: Any) -> bytes:
        """What Triton answers. Raises `Refused` where it does not, or gets no request."""
        model = None
        try:
            if method != HEALTH:
                message = getattr(service_pb2, f"{method.removeprefix(SERVICE)}Request").FromString(request)
                if method == INFER:
                    infer_message(message)
                model = _model_of(message)
            if self._ending.exists():
                raise Refused(grpc.StatusCode.UNAVAILABLE, NOT_THERE)
            return await self._triton.unary_unary(method)(request, timeout=context.time_remaining())
        except DecodeError:
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, "the message cannot be read.") from None
        except InvalidRequest as error:
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None
        except grpc.aio.AioRpcError as error:
            code, text = error.code(), error.details() or ""
            if code is grpc.StatusCode.UNAVAILABLE and any(words in text.lower() for words in BROKEN):
                raise Refused(code, NOT_THERE) from None
            raise Refused(code, f"{text}{_hint(model, self._models)}") from None


async def _next(requests: Any, seconds: float) -> bytes | None:
    """The next request of a call, None where there are no more. Raises `Refused` where it does not come in time."""
    try:
        async with asyncio.timeout(seconds):
            return await anext(requests, None)
    except TimeoutError:
        text = f"the request did not come within {seconds} seconds."
        raise Refused(grpc.StatusCode.DEADLINE_EXCEEDED, text) from None


class Refused(Exception):
    """A call over gRPC is not answered: why, as gRPC has it and in words."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code, self.text = code, text


def _model_of(message: Any) -> str | None:
    """The model that a message is about, if it is about one. Raises `InvalidRequest` for a name that no model has."""
    fields = message.DESCRIPTOR.fields_by_name
    name = next((getattr(message, field) for field in ("model_name", "name") if field in fields), None)
    version = next((getattr(message, field) for field in ("model_version", "version") if field in fields), "")
    if not re.fullmatch(rf"(?:{NAME})?", name or "", re.ASCII) or not re.fullmatch(r"\d{0,9}", version, re.ASCII):
        raise InvalidRequest("the name or the version of the model is none.")
    return name


async def serve(folder: Path, host: str, ports: tuple[int, int, int], models: list[str]) -> None:
    """Keeps the doors open until a signal says that it is over."""
    over = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, over.set)
    metrics = {"GET": re.compile("/metrics")}
    doors = [
        HttpDoor(folder / HTTP_SOCKET, OPEN_PATHS, models),
        GrpcDoor(folder / GRPC_SOCKET, models),
        HttpDoor(folder / METRICS_SOCKET, metrics, models),
    ]
    for door, port in zip(doors, ports, strict=True):
        await door.open(host, port)
    await over.wait()
    await asyncio.gather(*(door.close() for door in doors))


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether what is logged is no client's fault: anybody may send what cannot be read, or connect too often, and so
    fill a log."""
    theirs = HttpProcessingError | web.RequestPayloadError | OSError
    return not (record.exc_info and isinstance(record.exc_info[1], theirs))


if __name__ == "__main__":
    for name in ("aiohttp.server", "asyncio"):
        logging.getLogger(name).addFilter(_is_ours)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # so many connections, before no other gets one
    folder, host, http, grpc_port, metrics, *models = sys.argv[1:]
    try:
        asyncio.run(serve(Path(folder), host, (int(http), int(grpc_port), int(metrics)), models))
    except (OSError, RuntimeError) as error:  # an address that cannot be had
        sys.exit(f"error: {error}")
