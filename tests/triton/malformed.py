"""Requests that no client should send, the same ones for the same number: what a server must outlive."""

import gzip
import json
import random
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from darkroom.triton.server import Address

ANSWERED_WITHIN = 60.0
"""Seconds in which a request that has come is answered, or its connection closed, on a machine that is busy."""

SERVICE = "/inference.GRPCInferenceService/"
JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    2**64,
    10**400,
    -(2**63) - 1,
    1.5,
    1e308,
    "",
    "\0",
    "\ud800",
    "a" * 5000,
    [],
    {},
    [[]],
    [{}],
    {"a": {}},
    [None] * 100,
    [[[[[1]]]]],
    ["a", 1],
]
NUMBERS = [
    "-1",
    "0",
    "1",
    "7",
    "+5",
    "0x10",
    "1e3",
    "99999999999999999999",
    "4294967296",
    "-9223372036854775809",
    "",
    "a",
]


def attack(number: int, address: Address, model: str) -> None:
    """Sends one. Fails where it is neither answered nor its connection closed."""
    chance = random.Random(number)
    port = address.http if number % 2 else address.grpc
    make = chance.choice(HTTP if number % 2 else GRPC)
    made = make(chance, model)
    if isinstance(made, bytes):
        send(made, (address.host, port), chance)
    else:
        call(*made, f"{address.host}:{port}")


def send(data: bytes, to: tuple[str, int], chance: random.Random) -> None:
    """Over a connection of its own, now and then in small parts or cut off; nothing comes after it."""
    if chance.random() < 0.15:
        data = data[: chance.randrange(len(data) + 1)]
    step = chance.choice([1, 7, 100]) if len(data) < 500 and chance.random() < 0.2 else max(1, len(data))
    with socket.create_connection(to, ANSWERED_WITHIN) as connection:
        try:
            for start in range(0, len(data), step):
                connection.sendall(data[start : start + step])
                if step < 100:
                    time.sleep(0.001)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(2**16):  # raises where neither comes
                pass
        except OSError as error:  # closed
            assert not isinstance(error, TimeoutError), "no answer"


def call(method: str, data: list[bytes], streamed: bool, to: str) -> None:
    with grpc.insecure_channel(to) as channel:
        try:
            if streamed:
                list(channel.stream_stream(SERVICE + method)(iter(data), timeout=ANSWERED_WITHIN))
            else:
                channel.unary_unary(SERVICE + method)(data[0], timeout=ANSWERED_WITHIN)
        except grpc.RpcError as error:
            assert error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED, "no answer"


def dawdle(address: Address, model: str) -> list[socket.socket]:
    """Connections that have sent a part of a request, and send no more."""
    whole = request(model, b"{}" * 100)
    parts = [b"", whole[:10], whole[:-150]]
    held = [socket.create_connection((address.host, address.http), ANSWERED_WITHIN) for _ in parts]
    held.append(socket.create_connection((address.host, address.grpc), ANSWERED_WITHIN))
    for connection, part in zip(held, [*parts, b"PRI * HTTP"], strict=True):
        connection.sendall(part)
    return held


# HTTP.


def asked(chance: random.Random) -> dict[str, Any]:
    """A request that is whole."""
    tensors = {
        "prompt": ("BYTES", "a cat"),
        "seed": ("UINT64", 7),
        "steps": ("INT32", 1),
        "guidance_scale": ("FP32", 2.5),
    }
    kept = ["prompt", *(name for name in tensors if name != "prompt" and chance.random() < 0.5)]
    inputs = [
        {"name": name, "datatype": tensors[name][0], "shape": [1, 1], "data": [tensors[name][1]]} for name in kept
    ]
    return {"id": "1", "inputs": inputs, "outputs": [{"name": "used_seed", "parameters": {"binary_data": False}}]}


def spoiled(value: Any, chance: random.Random) -> Any:
    """With something else somewhere in it."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        if chance.random() < 0.15:
            return {name: each for name, each in value.items() if name != key}
        if chance.random() < 0.1:
            return {
                **value,
                chance.choice(["shared_memory_region", "binary_data_size", "data", "x"]): chance.choice(JUNK),
            }
        return {**value, key: spoiled(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.9:
        at = chance.randrange(len(value))
        if chance.random() < 0.15:
            return value + value
        return [*value[:at], spoiled(value[at], chance), *value[at + 1 :]]
    return chance.choice(JUNK)


def request(model: str, body: bytes, *headers: str, verb: str = "infer", length: str | None = None) -> bytes:
    lines = [f"POST /v2/models/{model}/{verb} HTTP/1.1", "Host: a", "Connection: close", *headers]
    if length is None and not any("chunked" in header for header in headers):
        length = str(len(body))
    lines += [f"Content-Length: {length}"] if length is not None else []
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body


def wrong_values(chance: random.Random, model: str) -> bytes:
    made = asked(chance)
    for _ in range(chance.randrange(1, 4)):
        made = spoiled(made, chance)
    return request(
        model, json.dumps(made).encode(), verb=chance.choice(["infer", "infer", "generate", "generate_stream"])
    )


def wrong_shapes(chance: random.Random, model: str) -> bytes:
    made = asked(chance)
    lengths = [-1, 0, 1, 2, 3, 2**16, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63]
    chance.choice(made["inputs"])["shape"] = [chance.choice(lengths) for _ in range(chance.randrange(7))]
    return request(model, json.dumps(made).encode())


def wrong_binary(chance: random.Random, model: str) -> bytes:
    data = chance.choice(
        [struct.pack("<I", 5) + b"a cat", struct.pack("<I", 2**32 - 1) + b"a", b"\1", b"", bytes(1000)]
    )
    size = chance.choice([len(data), len(data) + 1, 0, -1, 2**31, 2**63, "4"])
    shape = chance.choice([[1, 1], [0], [2, 1], [2**30, 2**33]])
    tensor = {"name": "prompt", "datatype": chance.choice(["BYTES", "FP32", "INT8", "X"]), "shape": shape}
    head = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": size}}]}).encode()
    said = chance.choice([str(len(head)), str(len(head) + 1), *NUMBERS])
    return request(model, head + data, f"Inference-Header-Content-Length: {said}")


def wrong_lengths(chance: random.Random, model: str) -> bytes:
    body = json.dumps(asked(chance)).encode()
    extra = chance.choice([[], ["Content-Length: 5"], ["Transfer-Encoding: chunked"], ["Transfer-Encoding: x"]])
    return request(model, body, *extra, length=chance.choice([*NUMBERS, str(len(body) + 5), str(len(body) - 5)]))


def wrong_chunks(chance: random.Random, model: str) -> bytes:
    chunks = chance.choice(
        [
            b"1\r\n{\r\n" * chance.choice([10, 1000, 200_000]) + b"0\r\n\r\n",
            b"ffffffffffffffff\r\n{}\r\n0\r\n\r\n",
            b"-1\r\n{}\r\n0\r\n\r\n",
            b"zz\r\n{}\r\n0\r\n\r\n",
            b"5\r\n{}\r\n0\r\n\r\n",
            b"2;" + b"a" * 20_000 + b"\r\n{}\r\n0\r\n\r\n",
        ]
    )
    return request(model, chunks, "Transfer-Encoding: chunked")


def nested(chance: random.Random, model: str) -> bytes:
    depth = chance.choice([10, 500, 100_000, 1_000_000])
    opened, closed = chance.choice([(b"[", b"]"), (b'{"a":', b"}")])
    body = b'{"inputs":' + opened * depth + b"1" + closed * depth + b"}"
    return request(model, body, verb=chance.choice(["infer", "generate"]))


def no_text(chance: random.Random, model: str) -> bytes:
    body = bytearray(json.dumps(asked(chance)).encode())
    for _ in range(chance.randrange(1, 10)):
        body[chance.randrange(len(body))] = chance.randrange(256)
    return request(model, bytes(body))


def large_numbers(chance: random.Random, model: str) -> bytes:
    number = chance.choice(
        [b"9" * 5000, b"1e999", b"-1e999", b"NaN", b"Infinity", b"0." + b"1" * 5000, b"1" + b"0" * 300]
    )
    return request(
        model, json.dumps(asked(chance)).encode().replace(b"[1, 1]", b"[1, %s]" % number, 1).replace(b"7", number)
    )


def packed(chance: random.Random, model: str) -> bytes:
    body = chance.choice(
        [gzip.compress(json.dumps(asked(chance)).encode()), gzip.compress(bytes(50_000_000), 1), b"\x1f\x8b"]
    )
    return request(model, body, f"Content-Encoding: {chance.choice(['gzip', 'deflate', 'x', 'gzip, gzip'])}")


def odd_headers(chance: random.Random, model: str) -> bytes:
    odd = [
        "Accept-Encoding: gzip;q=1e999",
        "Accept-Encoding: gzip;q=x, deflate;q=-1",
        "A: " + "a" * chance.choice([100, 100_000]),
        "\xff: \xfe",
        "no colon",
        ": no name",
        "Expect: 100-continue",
        "Upgrade: websocket",
        "Upgrade: h2c",
        "Connection: keep-alive, \0",
    ]
    many = [f"X-{each}: {each}" for each in range(chance.choice([1, 5000]))]
    return request(model, json.dumps(asked(chance)).encode(), *chance.choice([chance.sample(odd, 2), many]))


def odd_lines(chance: random.Random, model: str) -> bytes:
    method = chance.choice(
        ["GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PRI", "X" * 9000, "\xff"]
    )
    paths = [
        "/",
        "*",
        "",
        "//",
        f"/v2/models/{model}",
        "/v2/models/%00/infer",
        f"/v2/models/{'a' * 20_000}",
        "/v2/models//infer",
    ]
    paths += [f"/v2/models/{model}/versions/{number}/infer" for number in NUMBERS]
    paths += [f"/v2/models/{model}/versions/{number}/ready" for number in NUMBERS]
    paths += [
        "/v2/repository/index",
        "/v2/systemsharedmemory/status",
        "/v2/trace/setting",
        "http://a/v2",
        "/v2?" + "a" * 9000,
    ]
    version = chance.choice(["HTTP/1.1", "HTTP/1.0", "HTTP/9.9", "HTTP/2.0", "", "X"])
    return f"{method} {chance.choice(paths)} {version}\r\nHost: a\r\nConnection: close\r\n\r\n".encode("latin-1")


def noise(chance: random.Random, model: str) -> bytes:
    return chance.randbytes(chance.choice([1, 10, 1000, 100_000]))


# gRPC.

Call = tuple[str, list[bytes], bool]


def message(chance: random.Random, model: str) -> Any:
    """A request that is whole."""
    made = service_pb2.ModelInferRequest(model_name=model, id="1")
    raw = {"prompt": ("BYTES", struct.pack("<I", 5) + b"a cat"), "seed": ("UINT64", struct.pack("<Q", 7))}
    for name, (datatype, data) in raw.items():
        made.inputs.add(name=name, datatype=datatype, shape=[1, 1])
        made.raw_input_contents.append(data)
    made.outputs.add(name="used_seed")
    return made


def _sent(made: Any, chance: random.Random) -> Call:
    return ("ModelStreamInfer", [made.SerializeToString()] * 2, True) if chance.random() < 0.3 else (
        "ModelInfer", [made.SerializeToString()], False)  # fmt: skip


def wrong_tensors(chance: random.Random, model: str) -> Call:
    made = message(chance, model)
    tensor = chance.choice(made.inputs)

    def shape() -> None:
        del tensor.shape[:]
        tensor.shape.extend(
            chance.choice([-1, 0, 1, 3, 2**31, 2**32, 2**62, 2**63 - 1]) for _ in range(chance.randrange(7))
        )

    def datatype() -> None:
        tensor.datatype = chance.choice(["", "FP32", "BYTES", "INT8", "bytes", "X" * 5000, "FP16", "BF16"])

    def data() -> None:
        made.raw_input_contents[chance.randrange(2)] = chance.choice(
            [
                b"",
                b"\1",
                struct.pack("<I", 2**32 - 1),
                struct.pack("<I", 2**31 - 4) + b"a",
                bytes(999),
                chance.randbytes(50),
            ]
        )

    def fewer() -> None:
        del made.raw_input_contents[chance.randrange(2) :]

    def more() -> None:
        made.raw_input_contents.extend([b"a"] * chance.choice([1, 1000]))

    def typed() -> None:
        field = chance.choice(["int_contents", "uint64_contents", "bool_contents", "fp32_contents"])
        getattr(tensor.contents, field).extend([1] * chance.choice([1, 2, 5000]))
        if chance.random() < 0.7:
            del made.raw_input_contents[:]

    def names() -> None:
        tensor.name = chance.choice(["", "seed", "x", "\0", "a" * 5000])

    def models() -> None:
        made.model_name = chance.choice(["", "..", "a/b", "\0", "x" * 5000, "repository"])

    def versions() -> None:
        made.model_version = chance.choice([*NUMBERS, "9" * 5000])

    def parameters() -> None:
        where = chance.choice([made, tensor, made.outputs[0]]).parameters
        name = chance.choice(
            ["shared_memory_region", "shared_memory_byte_size", "classification", "timeout", "priority", "x"]
        )
        name = chance.choice([name, "sequence_id", "sequence_start", "triton_x", "binary_data_size"])
        kind = chance.choice(["string_param", "int64_param", "bool_param", "double_param", "uint64_param", None])
        value = {
            "string_param": "a",
            "int64_param": -5,
            "bool_param": True,
            "double_param": 1e308,
            "uint64_param": 2**64 - 1,
        }
        where[name].CopyFrom(service_pb2.InferParameter(**({kind: value[kind]} if kind else {})))

    def outputs() -> None:
        for _ in range(chance.choice([1, 5000])):
            made.outputs.add(name=chance.choice(["used_seed", "x", ""]))

    def inputs() -> None:
        for _ in range(chance.choice([1, 5000])):
            made.inputs.add().CopyFrom(tensor)

    changes = [shape, datatype, data, fewer, more, typed, names, models, versions, parameters, outputs, inputs]
    for change in chance.sample(changes, chance.choice([1, 1, 2])):
        if made.raw_input_contents or change is not data:
            change()
    return _sent(made, chance)


def wrong_bytes(chance: random.Random, model: str) -> Call:
    data = bytearray(message(chance, model).SerializeToString())
    for _ in range(chance.randrange(1, 6)):
        data[chance.randrange(len(data))] = chance.randrange(256)
    method = chance.choice(["ModelInfer", "ModelInfer", "ModelMetadata", "ModelReady", "ModelStatistics", "ServerLive"])
    return method, [bytes(data[: chance.randrange(len(data) + 1)] if chance.random() < 0.3 else data)], False


def wrong_calls(chance: random.Random, model: str) -> Call:
    method = chance.choice(["RepositoryModelLoad", "SystemSharedMemoryRegister", "TraceSetting", "Nothing", "", "a/b"])
    return method, [chance.randbytes(chance.choice([0, 10, 1000]))], chance.random() < 0.3


def large(chance: random.Random, model: str) -> Call:
    made = message(chance, model)
    made.raw_input_contents[0] = bytes(5 * 2**20)
    return _sent(made, chance)


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, flags: int, stream: int, data: bytes, length: int | None = None) -> bytes:
    """Of HTTP/2, which says another length than it has where one is given."""
    return (
        (len(data) if length is None else length).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + data
    )


def head(method: str) -> dict[bytes, bytes]:
    """The headers of a call."""
    path = f"{SERVICE}{method}".encode()
    fields = {b":method": b"POST", b":scheme": b"http", b":path": path, b":authority": b"a"}
    return fields | {b"te": b"trailers", b"content-type": b"application/grpc"}


def literal(fields: dict[bytes, bytes]) -> bytes:
    """Headers, as HPACK has them where nothing is packed."""
    return b"".join(b"\x10" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in fields.items())


def frames(chance: random.Random, model: str) -> bytes:
    """HTTP/2 that goes wrong somewhere."""
    fields = head("ModelInfer") | {b"a:b": b"\xff\0"}
    for name in list(fields):
        if chance.random() < 0.15:
            del fields[name]
    data = message(chance, model).SerializeToString()
    length = chance.choice([len(data), 0, len(data) + 1, 2**32 - 1])
    body = bytes([chance.choice([0, 0, 1, 255])]) + struct.pack(">I", length) + data
    made = [
        frame(4, 0, 0, b""),
        frame(1, 4, 1, literal(fields)),
        frame(0, 1, 1, body, chance.choice([None, None, 2**24 - 1, 0])),
        frame(
            chance.randrange(256), chance.randrange(256), chance.randrange(5), chance.randbytes(chance.randrange(50))
        ),
        frame(3, 0, 1, bytes(4)),
    ]
    if chance.random() < 0.5:
        chance.shuffle(made)
    return PREFACE + b"".join(made)


Maker = Callable[[random.Random, str], "bytes | Call"]
HTTP: list[Maker] = [
    wrong_values,
    wrong_values,
    wrong_shapes,
    wrong_binary,
    wrong_lengths,
    wrong_chunks,
    nested,
    no_text,
]
HTTP += [large_numbers, packed, odd_headers, odd_lines, noise]
GRPC: list[Maker] = [
    wrong_tensors,
    wrong_tensors,
    wrong_tensors,
    wrong_bytes,
    wrong_calls,
    large,
    frames,
    frames,
    noise,
]
