"""ONNX Runtime's sessions over bound arrays, and its providers: on the CPU for real, on CUDA over host memory."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from darkroom.contract import Job, Profile, Stage, Tensor
from darkroom.engines import find_runtime, options_for
from darkroom.engines.onnxruntime import providers as onnxruntime_providers
from darkroom.engines.onnxruntime import runtime as runtime_file
from darkroom.engines.onnxruntime.run import HOST, DeviceEngine, HostEngine, _Buffers
from darkroom.engines.runtime import Options
from darkroom.errors import Failed, InvalidRequest
from tests.engines.stand_ins import CudaStandIn
from tests.support import Diffusers, Studio, assert_refused, psnr

PROMPT = "red apple"
STAGE = Stage(
    "made up",
    (Tensor("latents", ("B", 4, "h", "w")), Tensor("text", ("B", 4))),
    (Tensor("images", ("B", 3, "H", "W")), Tensor("sum", ("B", 4))),
    steady=("text",),
)
JOB = Job(STAGE, Profile(None, None, None, vae_factor=2), "fp32")


@pytest.mark.parametrize(
    ("said", "missing"),
    [
        ("libcudnn.so.9: cannot open shared object file", "libcudnn.so.9: cannot open shared object file"),
        ("libonnxruntime_providers_cuda.so: undefined symbol: Provider_GetHost", None),
    ],
)
def test_provider_that_lacks_its_host_alone_lacks_nothing(
    said: str, missing: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(path: str) -> None:
        raise OSError(said)

    (tmp_path / "capi").mkdir()
    (tmp_path / "capi" / "libonnxruntime_providers_cuda.so").write_bytes(b"")
    monkeypatch.setattr(onnxruntime, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnxruntime_providers.ctypes, "CDLL", load)
    assert onnxruntime_providers.missing_library.__wrapped__("cuda") == missing


def expected(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What `session` computes, by NumPy."""
    shaded = np.exp(inputs["latents"] * inputs["text"][:, :, None, None])
    large = shaded[:, :3].repeat(2, axis=2).repeat(2, axis=3)
    return {"images": large, "sum": inputs["latents"].sum((2, 3)) + inputs["text"]}


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> onnxruntime.InferenceSession:
    """latents, text -> exp(latents * text), three channels of it twice as large; and sum(latents) + text."""
    constants = {"end": [0], "three": [3], "axis": [1], "places": [2, 3], "factors": [1, 1, 2, 2]}
    made = [
        helper.make_tensor(name, TensorProto.FLOAT if name == "factors" else TensorProto.INT64, [len(value)], value)
        for name, value in constants.items()
    ]
    nodes = [
        helper.make_node("Unsqueeze", ["text", "places"], ["columns"]),
        helper.make_node("Mul", ["latents", "columns"], ["product"]),
        helper.make_node("Exp", ["product"], ["shaded"]),
        helper.make_node("Slice", ["shaded", "end", "three", "axis"], ["colours"]),
        helper.make_node(
            "Resize",
            ["colours", "", "factors"],
            ["images"],
            mode="nearest",
            nearest_mode="floor",
            coordinate_transformation_mode="asymmetric",
        ),
        helper.make_node("ReduceSum", ["latents", "places"], ["total"], keepdims=0),
        helper.make_node("Add", ["total", "text"], ["sum"]),
    ]
    ports = [
        [helper.make_tensor_value_info(each.name, TensorProto.FLOAT, each.shape) for each in tensors]
        for tensors in (STAGE.inputs, STAGE.outputs)
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "made_up", *ports, made), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 10
    path = tmp_path_factory.mktemp("made-up") / "engine.onnx"
    onnx.save(model, path)
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.fixture(params=["host", "device"])
def engine(request: pytest.FixtureRequest, session: onnxruntime.InferenceSession) -> HostEngine | DeviceEngine:
    """From the caller's memory, and from memory of its own."""
    return HostEngine(session, JOB) if request.param == "host" else DeviceEngine(session, JOB, HOST)


def arrays(seed: int, batch: int = 2, size: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "latents": rng.normal(size=(batch, 4, size, size)).astype(np.float32),
        "text": rng.normal(size=(batch, 4)).astype(np.float32),
    }


def agrees(found: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> None:
    for name, value in expected(inputs).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)


class TestBoundArrays:
    def test_give_what_is_computed_from_them_at_any_size(self, engine: HostEngine | DeviceEngine) -> None:
        for batch, size in ((2, 3), (1, 5), (2, 3), (4, 2)):
            inputs = arrays(batch, batch, size)
            agrees(engine(inputs), inputs)

    def test_results_are_the_callers_to_keep(self, engine: HostEngine | DeviceEngine) -> None:
        first = engine(inputs := arrays(1))
        engine(arrays(2))
        agrees(first, inputs)
        first["images"][:] = 0
        agrees(engine(inputs), inputs)

    @pytest.mark.parametrize("name", ["latents", "text"])
    def test_input_that_changes_in_place_is_noticed(self, engine: HostEngine | DeviceEngine, name: str) -> None:
        inputs = arrays(1)
        engine(inputs)
        inputs[name] *= 2
        agrees(engine(inputs), inputs)

    def test_input_may_lie_in_memory_in_any_way(self, engine: HostEngine | DeviceEngine) -> None:
        inputs = arrays(1)
        inputs = {name: np.asfortranarray(value.astype(np.float64)) for name, value in inputs.items()}
        agrees(engine(inputs), inputs)
        inputs["text"] *= 2
        agrees(engine(inputs), inputs)

    def test_are_not_copied_on_the_cpu(self, session: onnxruntime.InferenceSession, monkeypatch) -> None:
        """ONNX Runtime reads and writes the very memory that the caller has."""
        seen = set()
        made = onnxruntime.OrtValue.ortvalue_from_numpy
        monkeypatch.setattr(
            onnxruntime.OrtValue,
            "ortvalue_from_numpy",
            lambda array: seen.add((value := made(array)).data_ptr()) or value,
        )
        inputs = arrays(1)
        outputs = HostEngine(session, JOB)(inputs)
        assert seen == {array.ctypes.data for array in (*inputs.values(), *outputs.values())}

    def test_forgetting_uploads_what_is_steady_again(
        self, session: onnxruntime.InferenceSession, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        written = uploads(monkeypatch)
        engine, inputs = DeviceEngine(session, JOB, HOST), arrays(1)
        engine(inputs), engine(inputs)
        assert written == {"latents": 2, "text": 1}
        engine.forget()
        engine(inputs)
        assert written == {"latents": 3, "text": 2}


def uploads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each input was written to a device."""
    written: Counter[str] = Counter()
    write = _Buffers.write

    def counted(self: _Buffers, name: str, value: np.ndarray) -> None:
        written[name] += 1
        write(self, name, value)

    monkeypatch.setattr(_Buffers, "write", counted)
    return written


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[list]:
    """ONNX Runtime with the CPU as its provider cuda, and host memory for a GPU's; yields what sessions are given."""
    asked: list[list] = []
    stack = onnxruntime_providers.stack

    def on_cpu(*arguments: object, **more: object) -> list:
        asked.append(stack(*arguments, **more))
        return [("CPUExecutionProvider", {})]

    monkeypatch.setattr(onnxruntime_providers, "available", lambda: ["tensorrt", "cuda", "cpu"])
    monkeypatch.setattr(runtime_file, "available", lambda: ["tensorrt", "cuda", "cpu"])
    monkeypatch.setattr(runtime_file, "runtime_api", lambda: CudaStandIn())
    monkeypatch.setattr(runtime_file, "missing_library", lambda provider: None)
    monkeypatch.setattr(runtime_file, "stack", on_cpu)
    monkeypatch.setattr(runtime_file, "MEMORY", HOST)
    return asked


class TestLoopOnTheDevice:
    """`DeviceUnet`, in host memory: what is bound to what, and the schedule's step, are those of a GPU."""

    @pytest.mark.parametrize("scheduler", [None, "EulerA", "Heun", "LCM"])
    def test_makes_the_pictures_of_diffusers(
        self, studio: Studio, diffusers_tiny: Diffusers, cuda: list, scheduler: str | None
    ) -> None:
        drawn = studio.draw(PROMPT, engine="onnxruntime", provider="cuda", scheduler=scheduler)
        (picture,) = diffusers_tiny.draw(PROMPT, scheduler=scheduler)
        assert psnr(drawn.pictures[0], picture) >= 45

    def test_makes_batch_after_batch(self, studio: Studio, diffusers_tiny: Diffusers, cuda: list) -> None:
        prompts = (PROMPT, "blue cat", "green dog")
        asked = {"batch_size": 2, "scheduler": "EulerA", "build_dynamic_shape": True}
        drawn = studio.draw(*prompts, engine="onnxruntime", provider="cuda", **asked)
        for index, picture in enumerate(drawn.pictures):
            prompt, seed = prompts[index // 2], 5 + index
            assert psnr(picture, diffusers_tiny.draw(prompt, seed=seed, scheduler="EulerA")[0]) >= 45

    def test_computes_graphs_in_half_precision(self, studio: Studio, diffusers_tiny: Diffusers, cuda: list) -> None:
        drawn = studio.draw(PROMPT, engine="onnxruntime", provider="cuda", precision="fp16")
        assert psnr(drawn.pictures[0], diffusers_tiny.draw(PROMPT)[0]) >= 35

    def test_uploads_nothing_between_its_steps(self, studio: Studio, cuda: list, monkeypatch) -> None:
        written = uploads(monkeypatch)
        drawn = studio.draw(PROMPT, engine="onnxruntime", provider="cuda", denoising_steps=6)
        assert drawn.result["unet_calls"] == 7  # PNDM's
        steady = ("text_embeddings", "negative_text_embeddings", "guidance_scale", "timestep", "samples", "noises")
        assert {name: written[name] for name in steady} == dict.fromkeys(steady, 1)

    def test_is_captured_where_that_is_asked(self, studio: Studio, cuda: list) -> None:
        studio.draw(PROMPT, engine="onnxruntime", provider="cuda", use_cuda_graph=True)
        captured = [providers[0][1]["enable_cuda_graph"] for providers in cuda]
        assert sorted(captured) == [0, 0, 0, 1]  # the UNet, not the schedule's step, whose buffers change places

    def test_has_nothing_to_capture_that_the_cpu_would_compute(self, studio: Studio, cuda: list, tmp_path) -> None:
        """At fixed sizes no arithmetic on shapes is left, which CUDA has no kernels for."""
        studio.draw(PROMPT, engine="onnxruntime", provider="cuda", use_cuda_graph=True)
        (folder,) = studio.engines.glob("unet-*-b1-*-onnxruntime-cuda-fp32-*")
        options = onnxruntime.SessionOptions()
        for symbol, size in Profile(1, 64, 64).sizes().items():
            options.add_free_dimension_override_by_name(symbol, size)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        onnxruntime.InferenceSession(str(folder / "engine.onnx"), options, providers=["CPUExecutionProvider"])
        operators = {node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node}
        assert "Conv" in operators and not operators & {"Shape", "Size", "NonZero", "If", "Loop", "ConstantOfShape"}

    def test_is_not_captured_with_free_sizes(self, studio: Studio, cuda: list) -> None:
        arguments = ["--engine=onnxruntime", "--provider=cuda", "--use-cuda-graph", "--build-dynamic-batch"]
        ended = studio.here(PROMPT, f"--model={studio.model}", *arguments, *studio.folders())
        assert_refused(ended, "--build-static-batch")


class TestProviders:
    @pytest.mark.parametrize("name", ["cuda", "CUDA", "CUDAExecutionProvider", "cudaexecutionprovider"])
    def test_that_is_absent_is_refused_with_what_brings_it(self, name: str, studio: Studio) -> None:
        ended = studio.here(PROMPT, f"--model={studio.model}", f"--provider={name}", *studio.folders())
        way = 'pip uninstall -y onnxruntime && pip install "onnxruntime-gpu[cuda,cudnn]"'
        assert_refused(ended, "--provider cuda", "which has cpu", way)

    @pytest.mark.parametrize("name", ["coda", "", "azure"])
    def test_that_nobody_knows_is_refused(self, name: str) -> None:
        with pytest.raises(InvalidRequest, match=f"--provider '{name}'.*Here are cpu"):
            find_runtime("onnxruntime", Options(provider=name))

    def test_named_for_another_engine_is_refused(self) -> None:
        with pytest.raises(InvalidRequest, match=r"--provider has no effect.*openvino.*for onnxruntime"):
            find_runtime("openvino", Options(provider="cpu"))

    def test_names_its_engine(self) -> None:
        assert find_runtime("auto", Options(provider="cpu")).name == "onnxruntime"
        assert find_runtime("auto", Options(device="CPU")).name == "openvino"

    def test_without_cuda_has_no_graphs(self) -> None:
        with pytest.raises(InvalidRequest, match=r"--use-cuda-graph.*--provider cuda"):
            find_runtime("onnxruntime", Options(use_cuda_graph=True))

    def test_without_cuda_has_no_graphs_where_another_engine_has(self) -> None:
        asked = Options(use_cuda_graph=True)
        assert not options_for("onnxruntime", asked, ["tensorrt", "onnxruntime"]).use_cuda_graph
        assert options_for("onnxruntime", asked, ["openvino", "onnxruntime"]).use_cuda_graph, "it is refused"

    def test_that_does_not_come_up_is_not_taken_for_one_that_has(self, cuda: list, tmp_path: Path, monkeypatch) -> None:
        """ONNX Runtime goes on with the next one, and says so in its log alone."""
        real = onnxruntime.InferenceSession

        def fallen(path: str, options: object, providers: list, **more: object) -> onnxruntime.InferenceSession:
            return real(path, options, providers=["CPUExecutionProvider"])

        monkeypatch.setattr(runtime_file, "stack", onnxruntime_providers.stack)
        monkeypatch.setattr(onnxruntime, "InferenceSession", fallen)
        node = helper.make_node("Identity", ["x"], ["y"])
        ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
        graph = helper.make_graph([node], "g", ports[:1], ports[1:])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        model.ir_version = 10
        onnx.save(model, tmp_path / "engine.onnx")
        stage = Stage("vae", (Tensor("x", (1,)),), (Tensor("y", (1,)),))
        with pytest.raises(Failed, match="--provider cuda could not be started"):
            find_runtime("onnxruntime", Options(provider="cuda")).load(Job(stage, JOB.profile, "fp32"), tmp_path, None)

    def test_of_a_gpu_that_is_not_there_build_and_say_so(self, cuda: list, studio: Studio, monkeypatch) -> None:
        without = CudaStandIn(devices=0)
        monkeypatch.setattr(runtime_file, "runtime_api", lambda: without)
        arguments = ["--engine=onnxruntime", "--provider=cuda", "--denoising-steps=3"]
        ended = studio.here(PROMPT, f"--model={studio.model}", *arguments, *studio.folders())
        assert ended.code == 1 and "there is no NVIDIA GPU on this machine" in ended.err.splitlines()[-1]

    def test_are_part_of_the_key(self, cuda: list) -> None:
        devices = {
            find_runtime("onnxruntime", Options(provider=name)).device() for name in (None, "cpu", "cuda", "tensorrt")
        }
        assert len(devices) == 3  # cpu is the default
        assert "tensorrt: Stand-In 9000 (8.9)" in devices

    def test_of_tensorrt_take_one_shape(self, cuda: list) -> None:
        with pytest.raises(InvalidRequest, match="--provider tensorrt needs engines of one batch and size"):
            find_runtime("onnxruntime", Options(provider="tensorrt")).check(Profile(None, 64, 64))

    def test_are_told_to_compute_in_float32_and_to_keep_what_they_build(self, tmp_path: Path) -> None:
        providers = onnxruntime_providers.stack("tensorrt", "fp32", tmp_path, cuda_graph=True)
        assert [name for name, _ in providers] == [
            "TensorrtExecutionProvider",
            "CUDAExecutionProvider",
            "CPUExecutionProvider",
        ]
        tensorrt, cuda, _ = (options for _, options in providers)
        assert cuda["use_tf32"] == tensorrt["trt_fp16_enable"] == cuda["enable_cuda_graph"] == 0
        assert tensorrt["trt_cuda_graph_enable"] == tensorrt["trt_engine_cache_enable"] == 1
        assert Path(tensorrt["trt_engine_cache_path"]).parent == tmp_path

    def test_on_the_cpu_are_told_how_many_threads(self, tmp_path: Path) -> None:
        ((_, options), _) = onnxruntime_providers.stack("openvino", "fp32", tmp_path, threads=3)
        assert options == {"device_type": "CPU", "precision": "FP32", "num_of_threads": "3"}

    def test_are_threads_of_the_cpu_alone(self, cuda: list, studio: Studio) -> None:
        arguments = ["--engine=onnxruntime", "--provider=cuda", "--threads=1"]
        ended = studio.here(PROMPT, f"--model={studio.model}", *arguments, *studio.folders())
        assert_refused(ended, "--threads", "--provider cuda")
