"""Building TensorRT engines: ONNX graph -> serialized engine, and what is known of it without a GPU.

Networks are strongly typed: they compute in the types that the graph was exported in.
"""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from darkroom.contract import Job, Profile, Stage
from darkroom.engines.runtime import Options, Progress
from darkroom.engines.tensorrt.graph import read_graph, tidy
from darkroom.engines.tensorrt.log import make_log
from darkroom.errors import Failed, gist
from darkroom.files import write_whole

GIB = 1 << 30
MODEL = "model.onnx"


def build_engine(
    trt: Any,
    options: Options,
    job: Job,
    graph: Path,
    plan: Path,
    compute_capabilities: tuple[str, ...],
    progress: Progress,
) -> dict[str, Any]:
    """Builds the engine of a job from its graph, and writes it to `plan`.

    `compute_capabilities` are those of the GPUs that it is for; none leaves that to the library. Returns what can be
    said of the engine: see `_described`. Raises `Failed` naming what TensorRT could not take.
    """
    log = make_log(trt)
    with TemporaryDirectory(dir=plan.parent) as folder:
        tidied = Path(folder) / MODEL
        tidy(read_graph(graph, job.stage), graph.parent, job.stage, tidied)
        builder = trt.Builder(log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(str(tidied)):
            raise Failed(_parser_failure(parser, job.stage, log))
        config = builder.create_builder_config()
        _configure(trt, config, options, compute_capabilities)
        if config.add_optimization_profile(_profile(trt, builder, network, job)) < 0:
            raise Failed(f"TensorRT refuses the sizes of the {job.stage.name} engine: {_last(log)}.")
        monitor = _monitor(trt, progress)
        config.progress_monitor = monitor
        if cache := options.timing_cache:
            times = config.create_timing_cache(Path(cache).read_bytes() if Path(cache).is_file() else b"")
            if times is None or not config.set_timing_cache(times, False):
                raise Failed(f"--timing-cache {cache} is damaged, or of another version or GPU; delete it.")
        serialized = builder.build_serialized_network(network, config)
        if monitor.cancelled:
            raise Failed("the build was cancelled.")
        if serialized is None:
            raise Failed(_builder_failure(job.stage, log))
        if cache:
            write_whole(Path(cache), memoryview(config.get_timing_cache().serialize()))
        with plan.open("wb") as file:
            file.write(memoryview(serialized))
        return _described(network, job.profile, job.stage, _weights_bytes(graph))


def _configure(trt: Any, config: Any, options: Options, compute_capabilities: tuple[str, ...]) -> None:
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 is to mean fp32; half precisions do not know it
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # TensorRT-RTX's graphs cannot be captured without
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options.workspace * GIB))
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.ws:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if compute_capabilities:
        config.num_compute_capabilities = len(compute_capabilities)
        for index, each in enumerate(compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, enum_name(each)), index)


def _profile(trt: Any, builder: Any, network: Any, job: Job) -> Any:
    """The bounds of a job's inputs, by Polygraphy: TensorRT itself takes names that the network does not have."""
    if hasattr(trt, "ComputeCapability"):
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"  # read when Polygraphy is imported
    from polygraphy.backend.trt import Profile as Bounds
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    bounds = Bounds()
    for tensor in job.stage.inputs:
        bounds.add(tensor.name, *job.profile.bounds(tensor))
    try:
        return bounds.to_trt(builder, network)
    except PolygraphyException as error:
        raise Failed(f"TensorRT refuses the sizes of the {job.stage.name} engine: {gist(error)}.") from None


def enum_name(compute_capability: str) -> str:
    """ "8.9" -> "SM89", as TensorRT-RTX writes it."""
    return "SM" + compute_capability.replace(".", "")


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Passes on what TensorRT says of its progress, and stops it when it is no longer wanted."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.cancelled = False
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.cancelled = self.cancelled or not progress(phase_name, step + 1, self._steps.get(phase_name, 0))
            return not self.cancelled

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()


def _parser_failure(parser: Any, stage: Stage, log: Any) -> str:
    """The parser's own words are often no more than "false": the node and its operator tell."""
    error = parser.get_error(0) if parser.num_errors else None
    name, kind, why = (error.node_name(), error.node_operator(), error.desc()) if error else ("", "", _last(log))
    node = f"the node {name or 'without a name'} ({kind})" if kind else "the graph"
    why = "this operator is not supported" if why.strip().lower() in ("", "false") else " ".join(why.split())
    return f"TensorRT cannot read {node} of the {stage.name}: {why.rstrip('.')}; {_advice()}."


def _builder_failure(stage: Stage, log: Any) -> str:
    """The builder names the node in its own words, where one is to blame."""
    advice = _advice("a larger --workspace, ")
    return f"TensorRT could not build the {stage.name} engine: {_last(log).rstrip('.')}; {advice}."


def _advice(first: str = "") -> str:
    return f"try {first}another --onnx-opset, or --engine onnxruntime"


def _last(log: Any) -> str:
    """The first error is the cause; those after it say that something failed."""
    return log.errors[0] if log.errors else "it gives no reason"


def _described(network: Any, profile: Profile, stage: Stage, weights: int) -> dict[str, Any]:
    """What only a loaded engine would give, for machines without a GPU: tensors, bounds, weights, layers."""
    contract = {tensor.name: tensor for tensor in (*stage.inputs, *stage.outputs)}
    tensors = {}
    for kind, count, get in (
        ("input", network.num_inputs, network.get_input),
        ("output", network.num_outputs, network.get_output),
    ):
        for tensor in map(get, range(count)):
            least, best, most = profile.bounds(contract[tensor.name])
            bounds = {"least": list(least), "best": list(best), "most": list(most)}
            tensors[tensor.name] = {"kind": kind, "dtype": tensor.dtype.name, "shape": list(tensor.shape)} | bounds
    return {"tensors": tensors, "layers": network.num_layers, "weights_bytes": weights}


def _weights_bytes(graph: Path) -> int:
    """Bytes of the weights of a graph, external ones too."""
    return sum(path.stat().st_size for path in graph.parent.glob(f"{graph.name}*"))
