"""Which requests for inference are whole: no server is needed."""

import json
import struct
from typing import Any

import pytest
from tritonclient.grpc import service_pb2

from darkroom.errors import InvalidRequest
from darkroom.triton.wellformed import infer_body, infer_message, json_body

A_CAT = struct.pack("<I", 5) + b"a cat"


def tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "prompt", "datatype": "BYTES", "shape": [1, 1], "data": ["a cat"]} | changes


def body(*inputs: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **more}).encode()


def test_what_is_whole_says_the_same_when_it_is_written_anew() -> None:
    outputs = [{"name": "used_seed", "parameters": {"binary_data": True}}]
    asked = body(tensor(), tensor(name="seed", datatype="UINT64", data=[[2**64 - 1]]), id="7", outputs=outputs)
    written, length = infer_body(asked, None)
    assert length == len(written)
    found = json.loads(written)
    assert found["id"] == "7" and found["outputs"] == outputs
    assert [each["data"] for each in found["inputs"]] == [["a cat"], [2**64 - 1]]


def test_binary_tensors_stay_as_they_are() -> None:
    head = body(
        {"name": "prompt", "datatype": "BYTES", "shape": [1, 1], "parameters": {"binary_data_size": len(A_CAT)}},
        {"name": "steps", "datatype": "INT32", "shape": [1, 1], "parameters": {"binary_data_size": 4}},
    )
    written, length = infer_body(head + A_CAT + struct.pack("<i", 3), str(len(head)))
    assert written[length:] == A_CAT + struct.pack("<i", 3)
    assert [each["parameters"]["binary_data_size"] for each in json.loads(written[:length])["inputs"]] == [9, 4]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (b"", "no JSON"),
        (b"\xff{}", "no JSON"),
        (b"[]", "must be an object"),
        (b"{}", "inputs must list objects"),
        (b'{"inputs":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"inputs": [], "inputs": NaN}', "NaN is no number"),
        (body(tensor(shape=[1, -1])), "not a list of lengths"),
        (body(tensor(shape=[1, True])), "not a list of lengths"),
        (body(tensor(shape=[2**31])), "not a list of lengths"),
        (body(tensor(shape=[2**30, 2**30, 2**30])), "1 elements, and its shape says"),
        (body(tensor(shape=[2, 1])), "1 elements, and its shape says 2"),
        (body(tensor(data="a cat")), "has no data"),
        (body(tensor(data=[5])), "is not BYTES"),
        (body(tensor(datatype="FP32")), "is not FP32"),
        (body(tensor(datatype="TEXT")), "the datatype of prompt is none of"),
        (body(tensor(name=5)), "must be text"),
        (body(tensor(), tensor()), "comes twice"),
        (body(*[tensor(name=str(each)) for each in range(65)]), "more than 64"),
        (body(tensor(parameters=[])), "parameters must be an object"),
        (body(tensor(parameters={"shared_memory_region": "a"})), "shared memory is closed"),
        (body(tensor(parameters={"a": [1]})), "neither text nor number"),
        (body(tensor(), outputs=[{"name": "a", "parameters": {"shared_memory_region": 1}}]), "shared memory is closed"),
        (body(tensor(datatype="FP64", data=[0])).replace(b"[0]", b"[1e999]"), "too large"),
        (body(tensor(datatype="FP64", data=[0])).replace(b"[0]", b"[" + b"9" * 5000 + b"]"), "no JSON"),
    ],
)  # fmt: skip
def test_what_is_not_whole_is_refused(asked: bytes, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        infer_body(asked, None)


@pytest.mark.parametrize(
    ("shape", "size", "data", "length", "said"),
    [
        ([1, 1], 9, A_CAT, "x", "is no length"),
        ([1, 1], 9, A_CAT, "-1", "is no length"),
        ([1, 1], 9, A_CAT, "99999999999999999999", "is no length"),
        ([1, 1], 9, A_CAT, "0", "must be from 1"),
        ([1, 1], 9, A_CAT, "5000", "must be from 1"),
        ([1, 1], -9, A_CAT, None, "is no length"),
        ([1, 1], "9", A_CAT, None, "is no length"),
        ([1, 1], 8, A_CAT, None, "cut off"),
        ([1, 1], 90, A_CAT[:-1], None, "cut off"),
        ([1, 1], 4, struct.pack("<I", 2**32 - 1), None, "cut off"),
        ([2, 1], 9, A_CAT, None, "1 elements, and its shape says 2"),
        ([1, 1], 9, A_CAT + b"a", None, "1 bytes behind the tensors"),
    ],
)
def test_binary_tensors_that_do_not_fit_are_refused(
    shape: list[int], size: Any, data: bytes, length: str | None, said: str
) -> None:
    head = body({"name": "prompt", "datatype": "BYTES", "shape": shape, "parameters": {"binary_data_size": size}})
    with pytest.raises(InvalidRequest, match=said):
        infer_body(head + data, str(len(head)) if length is None else length)


@pytest.mark.parametrize("asked", [b"[]", b'{"a": [[1]]}', b'{"a": {"b": {}}}', b'{"a": [{}]}'])
def test_what_is_generated_from_is_flat(asked: bytes) -> None:
    assert json.loads(json_body(b'{"prompt": "a", "parameters": {"b": 1}, "c": [1, 2]}'))["c"] == [1, 2]
    with pytest.raises(InvalidRequest):
        json_body(asked)


def message(**changes: Any) -> Any:
    made = service_pb2.ModelInferRequest(model_name="a")
    made.inputs.add(**({"name": "prompt", "datatype": "BYTES", "shape": [1, 1]} | changes))
    return made


def test_messages_that_are_whole_pass() -> None:
    made = message()
    made.raw_input_contents.append(A_CAT)
    infer_message(made)
    infer_message(message(contents={"bytes_contents": [b"a cat"]}))
    infer_message(message(shape=[0, 1]))


@pytest.mark.parametrize(
    ("changes", "raw", "said"),
    [
        ({}, [], "0 elements, and its shape says 1"),
        ({}, [A_CAT, A_CAT], "2 raw_input_contents for 1 inputs"),
        ({}, [A_CAT[:-1]], "cut off"),
        ({"shape": [-1]}, [A_CAT], "not a list of lengths"),
        ({"shape": [2**62, 2**62]}, [A_CAT], "not a list of lengths"),
        ({"datatype": "FP32"}, [A_CAT], "9 bytes, and its shape says 4"),
        ({"datatype": "FP16", "contents": {"fp32_contents": [1]}}, [], "raw contents alone"),
        ({"datatype": "INT32", "contents": {"fp32_contents": [1]}}, [], "comes as int_contents"),
        ({"contents": {"bytes_contents": [b"a"]}}, [A_CAT], "and raw ones as well"),
        ({"contents": {"bytes_contents": [b"a"] * 2}}, [], "2 elements"),
        ({"parameters": {"shared_memory_region": {"string_param": "a"}}}, [A_CAT], "shared memory is closed"),
        ({"parameters": {"a": {}}}, [A_CAT], "neither text nor number"),
        ({"name": "a" * 1001}, [A_CAT], "too long"),
    ],
)
def test_messages_that_are_not_whole_are_refused(changes: dict[str, Any], raw: list[bytes], said: str) -> None:
    made = message(**changes)
    made.raw_input_contents.extend(raw)
    with pytest.raises(InvalidRequest, match=said):
        infer_message(made)
