"""Exports one stage to ONNX and checks the graph against the torch module before anyone may keep it."""

import logging
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from darkroom.contract import Stage
from darkroom.errors import Failed, InvalidRequest, gist
from darkroom.processes.memory import peak_memory

GRAPH = "model.onnx"
GRAPH_DATA = "model.onnx.data"

TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}
"""Largest difference from torch in float32 that a graph may show, relative to the largest value."""

TRACED_LATENTS, TRACED_TOKENS = 8, 8
WORTH_A_FILE = 256 * 2**20
"""Bytes of a graph from which on its weights stand in a file of their own."""

PAGE = 4096
"""Bytes; offsets of tensors in the data file are multiples."""

WIDENING = ["ConstantFolding", "FuseFp16InitializerToFp32NodeTransformer"]
"""The optimisers that would make float32 of weights that are kept in float16 and cast where they are used."""

Run = Callable[[Path, Stage, dict[str, Any]], list[Any]]
"""Runs a graph once: its inputs by name -> its outputs in the contract's order."""


def export_stage(
    model_folder: Path,
    stage: Stage,
    precision: str,
    opset: int,
    fixed: tuple[int, int] | None,
    vae_factor: int,
    folder: Path,
) -> dict:
    """Writes `model.onnx` (and `model.onnx.data`, where it is large) for a stage into `folder`.

    Weights and arithmetic have the precision; inputs and outputs are float32 at each. The batch is free. Height and
    width are free too, in steps that survive every halving in the UNet, unless `fixed` gives them in latents.
    Raises `InvalidRequest` for a network that does not take the size, `Failed` when it cannot be exported or the
    graph disagrees with torch. Returns facts for the manifest: the error that was measured, the exporter's
    versions, and the most memory that it took. Tokens of a prompt that may have several chunks are free.
    """
    import onnx
    import torch

    from darkroom.networks.load import DTYPES, example_inputs, load_module

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    module = load_module(stage, model_folder, DTYPES[precision])
    _write_out_rms_norms(module)
    height, width = fixed or (TRACED_LATENTS, TRACED_LATENTS)
    # An example batch of 1 would be traced as a constant; 2 stays free.
    inputs = example_inputs(stage, _sizes(2, height, width, vae_factor, TRACED_TOKENS))
    free = {"B", "T"} if fixed else {"B", "T", "h", "w", "H", "W"}
    axes = {
        tensor.name: {axis: size for axis, size in enumerate(tensor.shape) if size in free}
        for tensor in (*stage.inputs, *stage.outputs)
    }
    path = folder / GRAPH
    try:
        with torch.no_grad():
            torch.onnx.export(
                module,
                tuple(inputs.values()),
                str(path),
                dynamo=False,
                opset_version=opset,
                dynamic_axes=axes,
                input_names=list(inputs),
                output_names=[tensor.name for tensor in stage.outputs],
                # Folded, the casts of half weights would leave all of them in float32.
                do_constant_folding=not (stage.half_weights and precision == "fp32"),
            )
    except Exception as error:
        pixels = f"{height * vae_factor}x{width * vae_factor}"
        folders = " and ".join(str(model_folder / network.part) for network in stage.networks)
        raise _refusal(module, inputs, folders, pixels) or Failed(
            f"the {stage.name} cannot be exported: {gist(error)}. Try another --onnx-opset, or --engine torch."
        ) from error
    _gather_external_data(path)
    height, width = fixed or (2 * TRACED_LATENTS, TRACED_LATENTS)
    if precision != "fp32":
        del module  # before the next is loaded: of the largest networks there is no room for two
        module = load_module(stage, model_folder)
    run = {"fp32": by_onnxruntime, "fp16": _halved, "bf16": by_openvino}[precision]
    error = _error_against_torch(path, stage, module, run, _sizes(1, height, width, vae_factor, 2 * TRACED_TOKENS))
    if not error <= TOLERANCES[precision]:
        raise Failed(
            f"the exported {stage.name} graph differs from torch by {error:.1e} (allowed: {TOLERANCES[precision]:.0e})"
            f": it was not kept. Try another --onnx-opset, --precision fp32, or --engine torch."
        )
    return {
        "error_against_torch": error,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "peak_bytes": peak_memory(),
    }


def _write_out_rms_norms(module: Any) -> None:
    """Lets torch's own RMSNorm (Zhang and Sennrich 2019) compute by its formula, in float32 as the fused one does: the
    exporter knows no other way to write it."""
    import torch

    def forward(norm: Any, value: Any) -> Any:
        wide = value.float()
        normal = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + norm.eps)
        return normal.to(value.dtype) * norm.weight

    for each in module.modules():
        if isinstance(each, torch.nn.RMSNorm):
            each.forward = partial(forward, each)


def _refusal(module: Any, inputs: dict[str, Any], network: str, pixels: str) -> InvalidRequest | None:
    """The message where it is the network itself that cannot do with the inputs; None where it can."""
    import torch

    try:
        with torch.no_grad():
            module(*inputs.values())
    except Exception as error:
        return InvalidRequest(
            f"the network in {network} cannot be run for a height and width of {pixels} pixels: {gist(error)}. Some "
            f"UNets take only what stays whole at each of their halvings: with most, multiples of 64."
        )
    return None


def _sizes(batch: int, height: int, width: int, factor: int, tokens: int) -> dict[str, int]:
    return {"B": batch, "h": height, "w": width, "H": height * factor, "W": width * factor, "T": tokens}


def _gather_external_data(path: Path) -> None:
    """Puts the weights of a large graph into one file beside it, a tensor at a time, from where they can be mapped.

    Above 2 GB the exporter has written one file for each tensor.
    """
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    strays = [stray for stray in path.parent.iterdir() if stray != path]
    if not strays and path.stat().st_size < WORTH_A_FILE:
        return
    graph = onnx.load(str(path), load_external_data=False)
    with (path.parent / GRAPH_DATA).open("wb") as file:
        for tensor in graph.graph.initializer:
            external = uses_external_data(tensor)
            if not external and len(tensor.raw_data) < PAGE:
                continue
            file.write(bytes(-file.tell() % PAGE))  # on a page of its own, a tensor can be mapped
            data = (path.parent / ExternalDataInfo(tensor).location).read_bytes() if external else tensor.raw_data
            place = {"location": GRAPH_DATA, "offset": file.tell(), "length": len(data)}
            file.write(data)
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            del tensor.external_data[:]
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
    onnx.save_model(graph, str(path))
    for stray in strays:
        stray.unlink()


def _error_against_torch(path: Path, stage: Stage, module: Any, run: Run, sizes: dict[str, int]) -> float:
    """Of the graph, run on the CPU: see `relative_error`."""
    from darkroom.networks.load import example_inputs, outputs_of

    inputs = example_inputs(stage, sizes, seed=1)
    expected = outputs_of(module, stage, inputs).values()
    found = run(path, stage, {name: value.numpy() for name, value in inputs.items()})
    return relative_error(zip(expected, found, strict=True))


def relative_error(outputs: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    """Largest difference of what was found from what was expected before it, relative to the largest value expected;
    infinite where their shapes differ, NaN where any number is."""
    errors = []
    for expected, found in outputs:
        if found.shape != expected.shape:
            return float("inf")
        errors.append(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))
    return float(np.max(errors))


def by_onnxruntime(path: Path, stage: Stage, inputs: dict[str, Any], widen: bool = True) -> list[Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        str(path),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=None if widen and not stage.half_weights else WIDENING,
    )
    return session.run(None, inputs)


def _halved(path: Path, stage: Stage, inputs: dict[str, Any]) -> list[Any]:
    """Weights stay in float16, and are widened as they are used."""
    return by_onnxruntime(path, stage, inputs, widen=False)


def by_openvino(path: Path, stage: Stage, inputs: dict[str, Any]) -> list[Any]:
    """It computes bfloat16 graphs on any CPU, which ONNX Runtime does on none."""
    import openvino

    core = openvino.Core()
    model = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = model(inputs)
    return [results[tensor.name] for tensor in stage.outputs]
