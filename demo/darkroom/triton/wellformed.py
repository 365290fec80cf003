"""Whether a request for inference is whole: what it says of its tensors is what it brings.

Triton 2.51 reads some requests that are not past the end of their bytes, or down its stack, so only these reach it.
The protocol: https://github.com/kserve/open-inference-protocol/tree/main/specification/protocol
"""

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

from darkroom.errors import InvalidRequest

BYTES = "BYTES"
WIDTHS = {"BOOL": 1, "INT8": 1, "INT16": 2, "INT32": 4, "INT64": 8, "UINT8": 1, "UINT16": 2, "UINT32": 4, "UINT64": 8}
WIDTHS |= {"FP16": 2, "BF16": 2, "FP32": 4, "FP64": 8, BYTES: None}
"""Bytes of an element, by datatype; those of BYTES say their length themselves, in 4 bytes."""

FIELDS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    BYTES: "bytes_contents",
}
"""Where gRPC's typed contents stand."""

MOST_TENSORS = 64
MOST_CHARACTERS = 1000
"""Of a name or a parameter."""

LENGTH_BYTES = 4


def json_body(body: bytes) -> bytes:
    """A request to generate, written anew. Raises `InvalidRequest` for what is no flat JSON object."""
    asked = _object(body)
    for value in asked.values():
        for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]:
            _check(not isinstance(each, dict | list), "values must not be nested")
    return _written(asked)


def infer_body(body: bytes, header: str | None) -> tuple[bytes, int]:
    """A request for inference over HTTP, written anew: its body and the length of the JSON that it begins with.

    `header` is what `Inference-Header-Content-Length` says: behind so many bytes of JSON come binary tensors. Raises
    `InvalidRequest` for what is not whole.
    """
    length = len(body)
    if header is not None:
        _check(
            header.isascii() and header.isdigit() and len(header) < 10, "Inference-Header-Content-Length is no length"
        )
        length = int(header)
        _check(0 < length <= len(body), f"Inference-Header-Content-Length must be from 1 to {len(body)}")
    asked, rest = _object(body[:length]), memoryview(body)[length:]
    written: dict[str, Any] = {"parameters": _json_parameters(asked)}
    if "id" in asked:
        written["id"] = _text(asked["id"], "id")
    written["inputs"] = [_json_input(each) for each in _objects(asked, "inputs")]
    if "outputs" in asked:
        written["outputs"] = [
            {"name": _text(each.get("name"), "an output's name"), "parameters": _json_parameters(each)}
            for each in _objects(asked, "outputs")
        ]
    _once(each["name"] for each in written["inputs"])
    for tensor in written["inputs"]:
        if (size := tensor["parameters"].get("binary_data_size")) is not None:
            _binary(tensor["name"], tensor["datatype"], tensor["shape"], rest[:size])
            rest = rest[size:]
    _check(not rest, f"{len(rest)} bytes behind the tensors belong to none of them")
    text = _written(written)
    return text + body[length:], len(text)


def infer_message(message: Any) -> None:
    """Checks gRPC's `ModelInferRequest`. Raises `InvalidRequest` for what is not whole."""
    raw = message.raw_input_contents
    _check(max(len(message.inputs), len(message.outputs)) <= MOST_TENSORS, f"more than {MOST_TENSORS} tensors")
    _check(len(raw) in (0, len(message.inputs)), f"{len(raw)} raw_input_contents for {len(message.inputs)} inputs")
    _text(message.id, "id")
    _parameters({name: _value(each) for name, each in message.parameters.items()})
    for tensor in (*message.inputs, *message.outputs):
        _text(tensor.name, "a tensor's name")
        _parameters({name: _value(each) for name, each in tensor.parameters.items()})
    _once(each.name for each in message.inputs)
    for index, tensor in enumerate(message.inputs):
        _shape(tensor.name, tensor.datatype, list(tensor.shape))
        given = {field.name: len(values) for field, values in tensor.contents.ListFields()}
        if raw:
            _check(not given, f"{tensor.name} has contents, and raw ones as well")
            _binary(tensor.name, tensor.datatype, tensor.shape, memoryview(raw[index]))
        else:
            wanted = FIELDS.get(tensor.datatype)
            _check(wanted is not None, f"{tensor.name}: {tensor.datatype} comes as raw contents alone")
            _check(given.keys() <= {wanted}, f"{tensor.name}: {tensor.datatype} comes as {wanted}")
            _count(tensor.name, tensor.shape, given.get(wanted, 0))


def _json_input(tensor: dict[str, Any]) -> dict[str, Any]:
    name, datatype, shape = _text(tensor.get("name"), "an input's name"), tensor.get("datatype"), tensor.get("shape")
    _shape(name, datatype, shape)
    written = {"name": name, "datatype": datatype, "shape": shape, "parameters": _json_parameters(tensor)}
    if (size := written["parameters"].get("binary_data_size")) is not None:
        _check(type(size) is int and size >= 0, f"binary_data_size of {name} is no length")
        _check("data" not in tensor, f"{name} has data, and binary data as well")
        return written
    _check(isinstance(tensor.get("data"), list), f"{name} has no data")
    written["data"] = list(_leaves(tensor["data"]))
    kinds = {BYTES: str, "BOOL": bool}.get(datatype, int | float)
    _check(all(isinstance(each, kinds) for each in written["data"]), f"the data of {name} is not {datatype}")
    _count(name, shape, len(written["data"]))
    return written


def _shape(name: str, datatype: Any, shape: Any) -> None:
    _check(isinstance(datatype, str) and datatype in WIDTHS, f"the datatype of {name} is none of {', '.join(WIDTHS)}")
    whole = isinstance(shape, list) and len(shape) <= MOST_TENSORS
    whole = whole and all(type(each) is int and 0 <= each < 2**31 for each in shape)
    _check(whole, f"the shape of {name} is not a list of lengths")


def _count(name: str, shape: Iterable[int], elements: int) -> None:
    _check(elements == (wanted := math.prod(shape)), f"{name} has {elements} elements, and its shape says {wanted}")


def _binary(name: str, datatype: str, shape: Iterable[int], data: memoryview) -> None:
    """Checks that a tensor's bytes are what its datatype and shape say."""
    width = WIDTHS[datatype]
    if width is not None:
        wanted = width * math.prod(shape)
        _check(len(data) == wanted, f"{name} has {len(data)} bytes, and its shape says {wanted}")
        return
    elements = at = 0
    while at < len(data):
        elements, at = elements + 1, at + LENGTH_BYTES + int.from_bytes(data[at : at + LENGTH_BYTES], "little")
    _check(at == len(data), f"the last element of {name} is cut off")
    _count(name, shape, elements)


def _json_parameters(holder: dict[str, Any]) -> dict[str, Any]:
    parameters = holder.get("parameters", {})
    _check(isinstance(parameters, dict), "parameters must be an object")
    _parameters(parameters)
    return parameters


def _parameters(parameters: dict[str, Any]) -> None:
    for name, value in parameters.items():
        _text(name, "a parameter's name")
        _check(not name.startswith("shared_memory"), "shared memory is closed here")
        _check(isinstance(value, str | int | float), f"the parameter {name} is neither text nor number")
        if isinstance(value, str):
            _text(value, f"the parameter {name}")


def _value(parameter: Any) -> Any:
    """Of gRPC's `InferParameter`, which may be none."""
    kind = parameter.WhichOneof("parameter_choice")
    return None if kind is None else getattr(parameter, kind)


def _object(text: bytes) -> dict[str, Any]:
    def not_a_number(literal: str) -> None:
        raise ValueError(f"{literal} is no number")

    try:
        found = json.loads(text.decode("utf-8"), parse_constant=not_a_number)
    except RecursionError:
        raise InvalidRequest("the JSON is nested too deeply.") from None
    except ValueError as error:
        raise InvalidRequest(f"this is no JSON: {error}.") from None
    _check(isinstance(found, dict), "the JSON must be an object")
    return found


def _objects(holder: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found = holder.get(name)
    _check(isinstance(found, list) and all(isinstance(each, dict) for each in found), f"{name} must list objects")
    _check(len(found) <= MOST_TENSORS, f"more than {MOST_TENSORS} {name}")
    return found


def _leaves(data: list[Any]) -> Iterator[Any]:
    """The elements of nested lists, in order."""
    for each in data:
        if isinstance(each, list):
            yield from _leaves(each)  # no deeper than what was read as JSON
        else:
            yield each


def _text(value: Any, what: str) -> str:
    _check(isinstance(value, str), f"{what} must be text")
    _check(len(value) <= MOST_CHARACTERS and "\0" not in value, f"{what} is too long or holds a zero byte")
    return value


def _once(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        _check(name not in seen, f"the input {name} comes twice")
        seen.add(name)


def _written(asked: dict[str, Any]) -> bytes:
    try:
        return json.dumps(asked, allow_nan=False).encode()
    except ValueError:  # such as 1e999
        raise InvalidRequest("a number is too large.") from None


def _check(true: bool, otherwise: str) -> None:
    if not true:
        raise InvalidRequest(f"{otherwise}.")
