"""What the server's door lets through, and what it does not, by real requests to the real Triton.

The exploit is the one that worked before there was a door: a model that is loaded from a request's own files.
"""

import asyncio
import base64
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.grpc import service_pb2

from darkroom.triton import door
from darkroom.triton.door import MOST_BYTES, OPEN_PATHS
from darkroom.triton.environment import Installed
from darkroom.triton.server import HTTP_SOCKET, LOCKED, SHARED, Address, Triton, command
from tests.support import ROOT, free_ports, until
from tests.triton import malformed

WAIT = 120.0
SECRETS = {
    "HF_TOKEN": "hf_secret",
    "AWS_SECRET_ACCESS_KEY": "aws_secret",
    "NVIDIA_API_KEY": "nvapi_secret",
    "GOOGLE_APPLICATION_CREDENTIALS": "/secret",
    "AZURE_STORAGE_KEY": "az_secret",
    "TRITON_CLOUD_CREDENTIAL_PATH": "/secret",
    "LD_PRELOAD": "",
    "CUDA_API_TOKEN": "cuda_secret",
}
CLOSED_PATHS = {
    "index": ("POST", "/v2/repository/index"),
    "load": ("POST", "/v2/repository/models/toy/load"),
    "unload": ("POST", "/v2/repository/models/toy/unload"),
    "a named repository": ("POST", "/v2/repository/x/models/toy/load"),
    "system shared memory": ("GET", "/v2/systemsharedmemory/status"),
    "a region of it": ("POST", "/v2/systemsharedmemory/region/x/register"),
    "what frees it": ("POST", "/v2/systemsharedmemory/unregister"),
    "CUDA shared memory": ("GET", "/v2/cudasharedmemory/status"),
    "a region on a GPU": ("POST", "/v2/cudasharedmemory/region/x/register"),
    "tracing": ("GET", "/v2/trace/setting"),
    "tracing, changed": ("POST", "/v2/trace/setting"),
    "tracing of a model": ("POST", "/v2/models/toy/trace/setting"),
    "logging": ("GET", "/v2/logging"),
    "logging, changed": ("POST", "/v2/logging"),
    "configuration": ("GET", "/v2/models/toy/config"),
    "configuration of a version": ("GET", "/v2/models/toy/versions/1/config"),
    "another spelling": ("POST", "/v2/repositor%79/index"),
    "a way around": ("POST", "/v2/models/../repository/index"),
    "another way around": ("POST", "/v2/models/toy/infer/../../../repository/index"),
    "two slashes": ("POST", "//v2/repository/index"),
    "a query": ("POST", "/v2/models/toy/config?infer"),
}
CLOSED_CALLS = {
    "RepositoryIndex": {},
    "RepositoryModelLoad": {"model_name": "toy"},
    "RepositoryModelUnload": {"model_name": "toy"},
    "SystemSharedMemoryStatus": {},
    "SystemSharedMemoryRegister": {"name": "x", "key": "/x", "byte_size": 64},
    "SystemSharedMemoryUnregister": {},
    "CudaSharedMemoryStatus": {},
    "CudaSharedMemoryRegister": {"name": "x", "raw_handle": b"x", "byte_size": 64},
    "CudaSharedMemoryUnregister": {},
    "TraceSetting": {},
    "LogSettings": {},
    "ModelConfig": {"name": "toy"},
}


@dataclass
class Guarded:
    """A server with `toy` behind its door."""

    server: Triton
    repository: Path
    log: list[str] = field(default_factory=list)

    def http(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        """The status and the body of an answer."""
        address = self.server.address
        request = urllib.request.Request(
            f"http://{address.host}:{address.http}{path}",
            body,
            {name.replace("_", "-"): value for name, value in headers.items()},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=WAIT) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def call(self, name: str, /, **fields: Any) -> Any:
        address = self.server.address
        with grpc.insecure_channel(f"{address.host}:{address.grpc}") as channel:
            call = channel.unary_unary(
                f"/inference.GRPCInferenceService/{name}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=getattr(service_pb2, f"{name}Response").FromString,
            )
            return call(getattr(service_pb2, f"{name}Request")(**fields), timeout=WAIT)

    def picture(self, protocol: str = "http") -> np.ndarray:
        """What the toy draws of a seed."""
        module, port = (
            (tritonclient.http, self.server.address.http)
            if protocol == "http"
            else (tritonclient.grpc, self.server.address.grpc)
        )
        with module.InferenceServerClient(f"127.0.0.1:{port}") as client:
            tensors = [module.InferInput("prompt", [1, 1], "BYTES"), module.InferInput("seed", [1, 1], "UINT64")]
            tensors[0].set_data_from_numpy(np.array([[b"a cat"]], np.object_))
            tensors[1].set_data_from_numpy(np.array([[7]], np.uint64))
            return client.infer("toy", tensors).as_numpy("generated_image")


@pytest.fixture(scope="module")
def guarded(triton: Installed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    repository = tmp_path_factory.mktemp("repository")
    toy = ROOT / "tests" / "triton" / "toy_model"
    (repository / "toy" / "1").mkdir(parents=True)
    for file in ("config.pbtxt", "1/model.py"):
        (repository / "toy" / file).write_bytes((toy / file).read_bytes())
    log: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        with Triton(triton, repository, ["toy"], Address("127.0.0.1", *free_ports(3)), log.append) as server:
            server.wait_until_ready(WAIT)
            yield Guarded(server, repository, log)
    assert not list(SHARED.glob(f"{server._shared}*"))


def exploit(proof: Path) -> dict[str, str]:
    """A model that leaves a file where its code runs: its configuration and its code, as Triton takes them."""
    config = {"name": "x", "backend": "python", "max_batch_size": 0, "instance_group": [{"kind": "KIND_CPU"}]}
    config["input"] = [{"name": "a", "data_type": "TYPE_INT32", "dims": [1]}]
    config["output"] = [{"name": "b", "data_type": "TYPE_INT32", "dims": [1]}]
    code = f"open({str(proof)!r}, 'w').close()\nclass TritonPythonModel:\n    def execute(self, requests): return []\n"
    return {"config": json.dumps(config), "file:1/model.py": base64.b64encode(code.encode()).decode()}


def test_nobody_makes_the_server_run_code_over_http(guarded: Guarded, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    status, said = guarded.http(
        "POST", "/v2/repository/models/x/load", json.dumps({"parameters": exploit(proof)}).encode()
    )
    assert status == 403 and b"closed" in said and not proof.exists()


def test_nobody_makes_the_server_run_code_over_grpc(guarded: Guarded, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    files = exploit(proof)
    parameters = {
        "config": service_pb2.ModelRepositoryParameter(string_param=files["config"]),
        "file:1/model.py": service_pb2.ModelRepositoryParameter(bytes_param=base64.b64decode(files["file:1/model.py"])),
    }
    with pytest.raises(grpc.RpcError) as raised:
        guarded.call("RepositoryModelLoad", model_name="x", parameters=parameters)
    assert raised.value.code() is grpc.StatusCode.PERMISSION_DENIED and not proof.exists()


def test_no_browser_page_makes_the_server_run_code(guarded: Guarded, tmp_path: Path) -> None:
    """A page of any origin may post text without asking first."""
    proof = tmp_path / "proof"
    body = json.dumps({"parameters": exploit(proof)}).encode()
    for path in ("/v2/repository/models/x/load", "/v2/models/x/infer", "/v2/models/toy/infer"):
        status, _ = guarded.http("POST", path, body, Content_Type="text/plain", Origin="http://a.page", Cookie="a=b")
        assert status in (400, 403) and not proof.exists()


@pytest.mark.parametrize("case", CLOSED_PATHS)
def test_what_is_not_for_everybody_is_closed_over_http(case: str, guarded: Guarded) -> None:
    method, path = CLOSED_PATHS[case]
    for headers in ({}, {"Content_Type": "text/plain", "Origin": "http://a.page"}):
        status, said = guarded.http(method, path, b"{}" if method == "POST" else None, **headers)
        assert status == 403 and b"this is closed" in said


@pytest.mark.parametrize("name", CLOSED_CALLS)
def test_what_is_not_for_everybody_is_closed_over_grpc(name: str, guarded: Guarded) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        guarded.call(name, **CLOSED_CALLS[name])
    assert raised.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_every_call_of_the_protocol_is_open_or_closed_on_purpose() -> None:
    open_calls = {"ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelStatistics"}
    every = {method.name for method in service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods}
    assert every == CLOSED_CALLS.keys() | open_calls | {"ModelInfer", "ModelStreamInfer"}


def test_inference_health_metadata_and_statistics_are_open(guarded: Guarded) -> None:
    for path in (
        "",
        "/health/live",
        "/health/ready",
        "/models/toy",
        "/models/toy/versions/1/ready",
        "/models/toy/stats",
    ):
        assert guarded.http("GET", f"/v2{path}")[0] == 200
    assert guarded.call("ServerReady").ready and guarded.call("ModelReady", name="toy").ready
    assert guarded.call("ModelMetadata", name="toy").inputs[0].name == "prompt"
    np.testing.assert_array_equal(guarded.picture("http"), guarded.picture("grpc"))


def test_each_request_of_a_stream_is_answered(guarded: Guarded) -> None:
    request = service_pb2.ModelInferRequest(model_name="toy")
    request.inputs.add(name="prompt", datatype="BYTES", shape=[1, 1]).contents.bytes_contents.append(b"a cat")
    wrong = service_pb2.ModelInferRequest(model_name="toy")
    wrong.inputs.add(name="prompt", datatype="BYTES", shape=[1, 1])
    with grpc.insecure_channel(f"127.0.0.1:{guarded.server.address.grpc}") as channel:
        stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        sent = iter([each.SerializeToString() for each in (request, wrong, request)])
        answers = [service_pb2.ModelStreamInferResponse.FromString(each) for each in stream(sent, timeout=WAIT)]
    assert ["shape says" in each.error_message for each in answers] == [False, True, False]
    assert all(each.infer_response.outputs for each in answers if not each.error_message)


def test_pictures_can_be_generated_from_plain_json(guarded: Guarded) -> None:
    for verb, prefix in (("generate", b""), ("generate_stream", b"data: ")):
        body = json.dumps({"prompt": "a cat", "seed": 7}).encode()
        status, answer = guarded.http("POST", f"/v2/models/toy/{verb}", body)
        assert status == 200
        pixels = json.loads(answer.removeprefix(prefix))["generated_image"]
        np.testing.assert_array_equal(np.array(pixels), guarded.picture().ravel())


def test_no_other_user_reaches_the_server_past_its_door(guarded: Guarded) -> None:
    """Its sockets stand where nobody else may enter, and nobody else reads the memory of requests."""
    mine = list(SHARED.glob(f"{guarded.server._shared}*"))
    folder = next(each for each in mine if each.is_dir())
    assert (folder / HTTP_SOCKET).is_socket() and folder.stat().st_mode & 0o777 == 0o700
    assert folder.stat().st_uid == os.getuid()
    memory = [each for each in mine if each.is_file()]
    assert memory and all(each.stat().st_mode & 0o777 == 0o600 for each in memory)
    # The server itself listens nowhere else.
    inodes = {
        os.readlink(each) for each in Path(f"/proc/{guarded.server.process.pid}/fd").iterdir() if each.is_symlink()
    }
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            words = line.split()
            assert words[3] != "0A" or f"socket:[{words[9]}]" not in inodes


def test_what_others_put_beside_the_servers_memory_is_left_alone(guarded: Guarded, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.touch(0o644)
    link = Path(f"{SHARED}/{guarded.server._shared}link")
    link.symlink_to(theirs)
    guarded.server.look_after(WAIT)
    assert theirs.stat().st_mode & 0o777 == 0o644
    link.unlink()


def test_the_server_knows_no_secret_of_who_starts_it(guarded: Guarded) -> None:
    processes = [guarded.server.process.pid, guarded.server._door.process.pid, *guarded.server._running_stubs()]
    assert len(processes) == 4  # of the toy there are two
    for process in processes:
        for file in ("environ", "cmdline"):
            held = Path(f"/proc/{process}/{file}").read_bytes().decode()
            assert not [name for name in SECRETS if name in held] and "secret" not in held
        assert "PATH=" in Path(f"/proc/{process}/environ").read_text()


@pytest.mark.parametrize("encoding", ["plain", "chunked"])
def test_a_body_that_is_too_large_is_refused(encoding: str, guarded: Guarded) -> None:
    body = b" " * (5 * 2**20)
    address = guarded.server.address
    head = b"Transfer-Encoding: chunked" if encoding == "chunked" else b"Content-Length: %d" % len(body)
    with socket.create_connection((address.host, address.http), WAIT) as connection:
        connection.sendall(b"POST /v2/models/toy/infer HTTP/1.1\r\nHost: a\r\n" + head + b"\r\n\r\n")
        try:
            for start in range(0, len(body), 2**16):
                part = body[start : start + 2**16]
                connection.sendall(b"%x\r\n%b\r\n" % (len(part), part) if encoding == "chunked" else part)
        except OSError:
            pass  # it does not read on
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_a_message_that_is_too_large_is_refused(guarded: Guarded) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        guarded.call("ModelInfer", model_name="toy", raw_input_contents=[b" " * 5 * 2**20])
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer"])
def test_a_call_whose_message_never_comes_whole_is_ended(
    method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever is behind the door."""
    monkeypatch.setattr(door, "SECONDS_TO_SEND", 0.2)
    monkeypatch.setattr(door, "SECONDS_IDLE", 0.2)
    (port,) = free_ports(1)

    def send_half() -> bytes:
        with socket.create_connection(("127.0.0.1", port), WAIT) as connection:
            head = malformed.frame(4, 0, 0, b"") + malformed.frame(1, 4, 1, malformed.literal(malformed.head(method)))
            connection.sendall(malformed.PREFACE + head + malformed.frame(0, 0, 1, bytes([0, 0, 0, 0, 9])))
            answer = b""
            while b"did not come" not in answer and (more := connection.recv(2**16)):
                answer += more
            return answer

    async def ask() -> bytes:
        opened = door.GrpcDoor(tmp_path / "socket", ["toy"])
        await opened.open("127.0.0.1", port)
        answer = await asyncio.to_thread(send_half)
        await opened.close()
        return answer

    assert b"did not come" in asyncio.run(ask())


def test_a_door_that_has_died_is_opened_again(guarded: Guarded) -> None:
    server, before = guarded.server, guarded.server._door.process
    before.kill()
    until(lambda: before.poll() is not None, WAIT)
    server.look_after(WAIT)
    until(lambda: server._is_open(), WAIT)
    assert server._door.process is not before and guarded.picture().shape == (1, 16, 16, 3)


def test_a_model_from_a_request_would_run_its_code(guarded: Guarded, tmp_path: Path) -> None:
    """Where nothing is closed, at the server's own sockets, it does: so the refusals above mean something."""
    proof = tmp_path / "proof"
    guarded.server.call("/v2/repository/models/x/load", {"parameters": exploit(proof)})
    assert proof.exists()
    guarded.server.call("/v2/repository/models/x/unload", {})


def test_a_server_by_hand_closes_the_same_and_has_no_key(triton: Installed, guarded: Guarded, tmp_path: Path) -> None:
    """The header that would open it stands in its command line, and cannot be sent."""
    address = Address("127.0.0.1", *free_ports(3))
    line = command(triton.server, triton.backends, guarded.repository, ["toy"], address.flags())
    line += ["--backend-config", f"python,shm-region-prefix-name=darkroom_by_hand_{os.getpid()}_"]
    (header, value) = LOCKED.split(":", 1)[1].split("=")
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(line, env=triton.variables(), stdout=log, stderr=log)
    by_hand = Guarded(SimpleNamespace(address=address), guarded.repository)
    try:

        def is_ready() -> bool:
            assert server.poll() is None, (tmp_path / "log").read_text()
            with contextlib.suppress(OSError):
                return by_hand.http("GET", "/v2/health/ready")[0] == 200
            return False

        until(is_ready, WAIT)
        assert by_hand.picture().shape == (1, 16, 16, 3)
        for method, path in list(CLOSED_PATHS.values())[:16]:
            with socket.create_connection((address.host, address.http), WAIT) as connection:
                head = f"{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 2\r\n"
                connection.sendall(f"{head}{header}: {value}\r\n\r\n{{}}".encode())
                assert connection.recv(1000).startswith(b"HTTP/1.1 403 ")
        for name, fields in CLOSED_CALLS.items():
            with pytest.raises(grpc.RpcError, match="restricted"):
                by_hand.call(name, **fields)
            fields = malformed.head(name) | {f"triton-grpc-protocol-{header}".encode(): value.encode()}
            with socket.create_connection((address.host, address.grpc), WAIT) as connection:
                frames = [malformed.frame(4, 0, 0, b""), malformed.frame(1, 4, 1, malformed.literal(fields))]
                connection.sendall(malformed.PREFACE + b"".join([*frames, malformed.frame(0, 1, 1, bytes(5))]))
                answer = b""
                while b"grpc-status" not in answer and (more := connection.recv(2**16)):
                    answer += more
            assert b"grpc-status\x010" not in answer
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(WAIT)


def test_the_load_balancer_in_the_docs_forwards_inference_health_and_metadata_alone() -> None:
    text = (ROOT / "docs" / "serving.md").read_text()
    forwarded = re.findall(r"location (.+) \{ proxy_pass", text)
    assert forwarded and all(each.startswith("= /") for each in forwarded)  # one exact path each
    for path in (each.removeprefix("= ") for each in forwarded):
        assert any(pattern.fullmatch(path) for pattern in OPEN_PATHS.values()) and "stats" not in path
    assert "client_max_body_size 4m;" in text and MOST_BYTES == 4 * 2**20
    assert re.search(r"location / \{ return 403; \}", text)
