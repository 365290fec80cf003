"""TensorRT's building half, for real: TensorRT-RTX builds engines on a machine without a GPU."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from darkroom.contract import Job, Profile, Stage, Tensor
from darkroom.engines import find_runtime
from darkroom.engines.cuda import missing, runtime_api
from darkroom.engines.runtime import Options
from darkroom.engines.tensorrt import runtime as tensorrt
from darkroom.engines.tensorrt.graph import read_graph, tidy
from darkroom.errors import Failed, InvalidRequest
from darkroom.store.store import MANIFEST
from tests.engines.stand_ins import CudaStandIn, TensorRtStandIn
from tests.support import ROOT, SOON, Ended, Studio, assert_refused, flags, listing, one_line, until

tensorrt_rtx = pytest.importorskip("tensorrt_rtx")

WITHOUT_GPU = missing(runtime_api())
"""No driver; or one, and no GPU that these tests may use: see `pytest_configure`."""

PROMPT = "red apple"
STAGE = Stage("vae", (Tensor("latents", ("B", 4, "h", "w")),), (Tensor("images", ("B", 4, "h", "w")),))
JOB = Job(STAGE, Profile(1, 64, 64), "fp32")


def build(studio: Studio, *more: str, **values: Any) -> Ended:
    """A run of the script that can only build here."""
    arguments = flags(model=studio.model, engine="tensorrt", **{"seed": 5, "denoising_steps": 3} | values)
    return studio.here(PROMPT, *more, *arguments, *studio.folders())


def engines(studio: Studio) -> dict[str, dict[str, Any]]:
    """The manifests of the TensorRT engines in the store, by stage."""
    manifests = [json.loads(path.read_text()) for path in studio.engines.glob(f"*tensorrt*/{MANIFEST}")]
    return {manifest["key"]["stage"]: manifest for manifest in manifests}


def graph(path: Path, kind: str = "Relu", opset: int = 17, external: bool = False, **attributes: Any) -> Path:
    """A graph of one node to the contract of STAGE."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    tensors = [helper.make_tensor_value_info(each.name, 1, each.shape) for each in (*STAGE.inputs, *STAGE.outputs)]
    weight = numpy_helper.from_array(np.ones((1, 4, 1, 1), np.float32), "weight")
    nodes = [
        helper.make_node("Mul", ["latents", "weight"], ["scaled"], name="scaling"),
        helper.make_node(kind, ["scaled"], ["images"], name="the_node", **attributes),
    ]
    made = helper.make_graph(nodes, "graph", tensors[:1], tensors[1:], [weight])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 10
    assert tensors[0].type.tensor_type.elem_type == TensorProto.FLOAT
    onnx.save_model(model, str(path), save_as_external_data=external, location="model.onnx.data", size_threshold=0)
    return path


def runtime(**options: Any) -> tensorrt.TensorRt:
    return tensorrt.TensorRt(Options(**options))


NEVER_BUILT = """
import os, runpy, sys, time
from pathlib import Path
_, building, *sys.argv = sys.argv
sys.path.insert(0, os.path.dirname(sys.argv[0]))
from darkroom.processes.progress import Line
Line.phase = lambda *_: (Path(building).touch(), time.sleep(3600))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""A script that hears of the first engine's progress, leaves a file, and then hears nothing more, for an hour."""


class TestWithoutGpu:
    @pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
    def test_engines_are_built_and_kept_and_one_line_says_for_what(self, empty_studio: Studio, precision: str) -> None:
        ended = build(empty_studio, precision=precision)
        assert ended.code == 1 and one_line(ended.err) and not ended.out
        assert "ready for a machine with an NVIDIA GPU of compute capability 8.0 and later" in ended.err
        assert WITHOUT_GPU and WITHOUT_GPU in ended.err
        made = engines(empty_studio)
        assert made.keys() == {"clip", "unet", "vae"}
        assert all(manifest["key"]["precision"] == precision for manifest in made.values())
        before = listing(empty_studio.onnx, empty_studio.engines)
        assert build(empty_studio, precision=precision) == ended
        assert listing(empty_studio.onnx, empty_studio.engines) == before

    @pytest.mark.parametrize("free", ["build_dynamic_batch", "build_dynamic_shape"])
    def test_free_sizes_have_bounds(self, studio: Studio, free: str) -> None:
        sizes = ["--dynamic-sizes", "64", "64", "128"] if free == "build_dynamic_shape" else []
        before = set(studio.engines.glob("unet*"))
        assert build(studio, "--dynamic-batches", "1", "2", "4", *sizes, **{free: True}).code == 1
        (folder,) = set(studio.engines.glob("unet*")) - before
        latents = json.loads((folder / MANIFEST).read_text())["made"]["engines"]["engine.plan"]["tensors"]["latents"]
        best, most = (8, 16) if sizes else (8, 8)
        assert latents["least"] == [1, 4, 8, 8] and latents["best"] == [2, 4, best, best]
        assert latents["most"] == [4, 4, most, most]

    def test_every_stage_of_sdxl_builds_and_its_vae_is_not_halved(
        self, xl_studio: Studio, empty_studio: Studio
    ) -> None:
        studio = Studio(empty_studio.root, xl_studio.model, script=xl_studio.script)
        assert build(studio, precision="fp16", guidance_scale=5.0).code == 1
        made = engines(studio)
        assert made.keys() == {"clip", "clip_2", "unet", "vae"}
        assert {stage: manifest["key"]["precision"] for stage, manifest in made.items()} == {
            "clip": "fp16",
            "clip_2": "fp16",
            "unet": "fp16",
            "vae": "fp32",  # it overflows in float16
        }

    def test_what_cannot_be_asked_of_an_engine_is_in_its_manifest(self, studio: Studio) -> None:
        assert build(studio, precision="bf16").code == 1
        (made,) = (
            json.loads(path.read_text())["made"]
            for path in studio.engines.glob(f"unet-*b1-64x64-tensorrt-bf16*/{MANIFEST}")
        )
        assert made["peak_bytes"] > 2**27
        network = made["engines"]["engine.plan"]
        assert network["layers"] > 50 and network["weights_bytes"] > 2**16
        tensors = network["tensors"]
        assert {name for name, tensor in tensors.items() if tensor["kind"] == "output"} == {"output"}
        assert tensors["guidance_scale"]["most"] == [1]
        assert all(tensor["dtype"] == "FLOAT" for tensor in tensors.values()), "casts are inside"

    def test_options_are_in_the_key(self, studio: Studio) -> None:
        asked = flags(optimization_level=1, workspace=2.0, ws=True)
        count = len(list(studio.engines.glob("unet*tensorrt*")))
        for more in ([], asked, ["--compute-capability", "8.9", "12.0"]):
            assert build(studio, *more, precision="fp16").code == 1
        assert len(list(studio.engines.glob("unet*tensorrt*"))) - count in (2, 3)  # the first may have been there

    def test_engines_for_several_gpus_are_found_on_one_of_them(
        self, studio: Studio, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ended = build(studio, "--compute-capability", "8.9", "8.0", precision="fp16")
        assert "compute capability 8.0 or 8.9" in ended.err
        before = listing(studio.engines)
        cuda = CudaStandIn(capability=(8, 9))
        trt = TensorRtStandIn(cuda, version=tensorrt_rtx.__version__, name=tensorrt_rtx.__name__)
        monkeypatch.setattr(tensorrt, "runtime_api", lambda: cuda)
        monkeypatch.setattr(tensorrt, "bindings", lambda: trt)
        ended = build(studio, precision="fp16")
        # The stand-in cannot load real engines: that it tries means that nothing had to be built.
        assert "cannot be loaded" in ended.err and listing(studio.engines) == before

    @pytest.mark.parametrize(
        "how,code,words",
        [
            pytest.param(signal.SIGINT, 130, "stopped", id="INT"),
            pytest.param(signal.SIGTERM, 143, "terminated", id="TERM", marks=pytest.mark.slow),
        ],
    )
    def test_stopping_a_build_leaves_nothing(
        self, how: signal.Signals, code: int, words: str, empty_studio: Studio
    ) -> None:
        building = empty_studio.root / "building"
        script = [sys.executable, "-c", NEVER_BUILT, building, ROOT / "demo" / "build_engines.py"]
        folders = flags(onnx_dir=empty_studio.onnx, engine_dir=empty_studio.engines)
        child = subprocess.Popen(
            [*script, "build", "--engine=tensorrt", *flags(model=empty_studio.model), *folders],
            env=empty_studio.environment(),
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        until(building.exists)
        assert list(empty_studio.engines.glob(".*.tmp"))
        os.killpg(child.pid, how)
        _, said = child.communicate(timeout=SOON)
        assert child.returncode == code and said.endswith(f"{words}; nothing half-made was kept.\n")
        assert not list(empty_studio.engines.glob(".*.tmp")) and not list(empty_studio.engines.glob("clip-*"))

    def test_a_build_that_is_not_wanted_any_more_is_cancelled(self, tmp_path: Path) -> None:
        news = []

        def progress(*told: Any) -> bool:
            news.append(told)
            return len(news) < 3

        with pytest.raises(Failed, match="cancelled"):
            runtime().build(JOB, graph(tmp_path / "model.onnx"), tmp_path, progress)
        assert not (tmp_path / tensorrt.PLAN).exists()
        assert all(isinstance(name, str) and 0 < done <= total for name, done, total in news)


class TestRefusals:
    @pytest.mark.parametrize(
        "asked,said",
        [
            (["--compute-capability=9.9"], "--compute-capability 9.9"),
            (["--optimization-level=6"], "--optimization-level must be from 0 to 5, not 6"),
            (["--workspace=0"], "--workspace"),
            (["--workspace=nan"], "--workspace"),
            (["--timing-cache=times"], "--timing-cache"),
            (["--build-enable-refit"], "--build-enable-refit has no effect"),
            (["--dynamic-batches", "4", "2", "8", "--build-dynamic-batch"], "--dynamic-batches"),
            (["--dynamic-batches", "1", "2", "8"], "--dynamic-batches has no effect without --build-dynamic"),
            (["--dynamic-sizes", "60", "64", "128", "--build-dynamic-shape"], "--dynamic-sizes are multiples of 16"),
            (["--batch-size=9", "--build-dynamic-batch"], "--batch-size 9 is outside of 1 to 8"),
            (["--height=512", "--build-dynamic-shape"], "--height 512 is outside of 64 to 96"),
            (["--use-cuda-graph", "--build-dynamic-batch"], "--use-cuda-graph needs engines of one batch"),
            (["--threads=2"], "--threads has no effect"),
            (["--vae="], "--vae"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_what_cannot_act_is_refused_by_name(self, empty_studio: Studio, asked: list[str], said: str) -> None:
        ended = build(empty_studio, *asked)
        assert_refused(ended, said)
        assert not list(empty_studio.engines.glob("*tensorrt*"))

    @pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "torch"])
    @pytest.mark.parametrize(
        "asked",
        [["--ws"], ["--workspace=1"], ["--nvtx-profile"], ["--compute-capability", "8.9"], ["--use-cuda-graph"]],
    )
    def test_other_engines_have_no_use_for_them(self, studio: Studio, engine: str, asked: list[str]) -> None:
        ended = studio.here(PROMPT, *asked, f"--engine={engine}", f"--model={studio.model}", *studio.folders())
        assert_refused(ended, asked[0].split("=")[0], engine)


class TestGraphs:
    def broken(self, path: Path, change: Callable[[Path], Any], **how: Any) -> str:
        change(graph(path / "model.onnx", **how))
        with pytest.raises(Failed) as caught:
            read_graph(path / "model.onnx", STAGE)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
        return str(caught.value)

    def test_an_empty_file(self, tmp_path: Path) -> None:
        assert "is empty" in self.broken(tmp_path, lambda path: path.write_bytes(b""))

    def test_a_file_that_is_cut_off_anywhere(self, tmp_path: Path) -> None:
        size = graph(tmp_path / "model.onnx").stat().st_size
        for length in range(1, size, 7):
            assert "cut off" in self.broken(tmp_path, lambda path, length=length: os.truncate(path, length))

    def test_garbage(self, tmp_path: Path) -> None:
        for seed in range(50):
            noise = np.random.default_rng(seed).bytes(500)
            self.broken(tmp_path, lambda path, noise=noise: path.write_bytes(noise))

    def test_an_opset_that_does_not_exist(self, tmp_path: Path) -> None:
        assert "opset 99" in self.broken(tmp_path, lambda path: None, opset=99)

    def test_weights_that_are_missing_or_short(self, tmp_path: Path) -> None:
        assert "model.onnx.data, with the weight weight, is missing" in self.broken(
            tmp_path, lambda path: (path.parent / "model.onnx.data").unlink(), external=True
        )
        (tmp_path / "model.onnx").unlink()
        assert "is cut off" in self.broken(
            tmp_path, lambda path: os.truncate(path.parent / "model.onnx.data", 9), external=True
        )

    def test_tidying_keeps_external_weights_external(self, tmp_path: Path) -> None:
        import onnxruntime

        source, target = tmp_path / "source", tmp_path / "target"
        source.mkdir(), target.mkdir()
        path = graph(source / "model.onnx", external=True)
        tidy(read_graph(path, STAGE), source, STAGE, target / "model.onnx")
        assert (target / "model.onnx.data").stat().st_size >= 16
        assert not read_graph(target / "model.onnx", STAGE).graph.initializer[0].raw_data
        latents = {"latents": np.full((1, 4, 8, 8), 3, np.float32)}
        (made,) = onnxruntime.InferenceSession(str(target / "model.onnx")).run(None, latents)
        assert (made == 3).all()

    def test_a_node_the_parser_cannot_take_is_named(self, tmp_path: Path) -> None:
        path = graph(tmp_path / "model.onnx", "Det")
        with pytest.raises(Failed, match=r"the node the_node \(Det\) of the vae: .+; try another --onnx-opset"):
            runtime().build(JOB, path, tmp_path, lambda *_: True)

    def test_memory_the_builder_lacks_is_told_with_what_to_try(self, studio: Studio) -> None:
        ended = build(studio, workspace=0.00001, precision="fp16")
        assert ended.code == 1 and one_line(ended.err)
        assert "TensorRT could not build the " in ended.err and "try a larger --workspace" in ended.err


@pytest.fixture(scope="module")
def flavours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[str]]]:
    """What the bindings of both hold: those of plain TensorRT import over libraries that are empty."""
    if not shutil.which("gcc"):
        pytest.skip("no compiler for the empty libraries")
    folder = tmp_path_factory.mktemp("libraries")
    functions = (
        "createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL "
        "createNvOnnxParserRefitter_INTERNAL createNvOnnxParser_INTERNAL getBuilderPluginRegistry "
        "getNvOnnxParserVersion getPluginRegistry initLibNvInferPlugins"
    )
    code = "".join(f"void {name}(void) {{}}\n" for name in functions.split())
    for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        target = str(folder / f"lib{library}.so.11")
        subprocess.run(["gcc", "-shared", "-fPIC", "-x", "c", "-o", target, "-"], input=code, text=True, check=True)
    listing = (
        "import importlib, json, sys; m = importlib.import_module(sys.argv[1]); "
        "print(json.dumps({'': dir(m)} | {n: dir(k) for n, k in vars(m).items() if isinstance(k, type)}))"
    )
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder)}
    said = {}
    for name in ("tensorrt_rtx", "tensorrt_bindings"):
        command = [sys.executable, "-c", listing, name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        said[name] = json.loads(done.stdout)
    return said


class TestBothFlavours:
    """Every attribute that the adapter touches exists in TensorRT-RTX and in TensorRT 11, or stands behind a check."""

    OBJECTS: ClassVar[dict[str, dict[str, str]]] = {
        "runtime": {"_trt": ""},
        "build": {
            "trt": "",
            "builder": "Builder",
            "network": "INetworkDefinition",
            "parser": "OnnxParser",
            "config": "IBuilderConfig",
            "error": "ParserError",
            "tensor": "ITensor",
        },
        "run": {
            "trt": "",
            "engine": "ICudaEngine",
            "context": "IExecutionContext",
            "runtime": "Runtime",
            "config": "IRuntimeConfig",
        },
    }
    """By module: the names that it gives to TensorRT's objects, and their classes."""

    OF_RTX_ALONE: ClassVar[set[str]] = {
        "DynamicShapesKernelSpecializationStrategy",
        "dynamic_shapes_kernel_specialization_strategy",
        "ComputeCapability",
        "num_compute_capabilities",
        "set_compute_capability",
    }
    """Touched where `rtx` holds: plain TensorRT is never asked for compute capabilities."""

    def touched(self) -> dict[str, set[str]]:
        """The attributes that are touched, by class."""
        found: dict[str, set[str]] = {}
        for name, objects in self.OBJECTS.items():
            tree = ast.parse((ROOT / "demo" / "darkroom" / "engines" / "tensorrt" / f"{name}.py").read_text())
            for node in ast.walk(tree):
                if not isinstance(node, ast.Attribute) or node.attr.startswith("__"):
                    continue
                holder = node.value
                called = holder.id if isinstance(holder, ast.Name) else getattr(holder, "attr", "")
                if called in objects:
                    found.setdefault(objects[called], set()).add(node.attr)
        return found

    def test_have_every_attribute_that_is_touched(self, flavours: dict[str, dict[str, list[str]]]) -> None:
        assert sysconfig.get_platform().startswith("linux")
        touched = self.touched()
        assert len(set().union(*touched.values())) > 40, "the adapter calls its objects something else by now"
        for flavour, held in flavours.items():
            for kind, attributes in touched.items():
                missing = attributes - set(held[kind])
                if flavour == "tensorrt_bindings":
                    missing -= self.OF_RTX_ALONE
                assert not missing, f"{flavour} has no {missing} of {kind}"

    @pytest.mark.parametrize("enumeration,names", [
        ("BuilderFlag", {"TF32", "REFIT", "WEIGHT_STREAMING"}),
        ("MemoryPoolType", {"WORKSPACE"}),
        ("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED"}),
        ("ExecutionContextAllocationStrategy", {"USER_MANAGED"}),
    ])  # fmt: skip
    def test_have_every_value_that_is_named(
        self, flavours: dict[str, dict[str, list[str]]], enumeration: str, names: set[str]
    ) -> None:
        for held in flavours.values():
            assert names <= set(held[enumeration])

    def test_of_cuda_python_too(self) -> None:
        from cuda.bindings import runtime as api

        source = (ROOT / "demo" / "darkroom" / "engines" / "cuda.py").read_text()
        attributes = {
            node.attr
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Attribute) and node.attr.startswith("cuda") and node.attr[4:5].isupper()
        }
        assert len(attributes) > 20
        names = {name for kind in ("cudaError_t", "cudaMemcpyKind", "cudaStreamCaptureMode", "cudaDeviceAttr")
                 for name in dir(getattr(api, kind))}  # fmt: skip
        assert not {name for name in attributes if not hasattr(api, name) and name not in names}


PLAIN = """
import json, sys
from pathlib import Path
from darkroom.engines.runtime import Options
from darkroom.engines.tensorrt.runtime import TensorRt
from tests.engines.stand_ins import CudaStandIn
from tests.engines.test_tensorrt_build import JOB, graph
folder = Path(sys.argv[1])
options = Options(ws=True, workspace=0.5, optimization_level=2, timing_cache=str(folder / "times"))
runtime = TensorRt(options, cuda_api=CudaStandIn(capability=(9, 0)))
made = runtime.build(JOB, graph(folder / "model.onnx"), folder, lambda *_: True)
print(json.dumps([runtime.version(), runtime.device(), runtime.is_meant_for_this_gpu(), made]))
"""
"""Builds by plain TensorRT, in a process of its own: Polygraphy knows one flavour alone."""


def test_plain_tensorrt_builds_for_the_gpu_at_hand(tmp_path: Path) -> None:
    path = os.pathsep.join(map(str, (ROOT / "tests" / "engines" / "plain", ROOT / "demo", ROOT)))
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    version, device, meant, made = json.loads(done.stdout.splitlines()[-1])
    assert (version, device, meant) == ("tensorrt 11.4.0", "Stand-In 9000 (9.0)", True)
    assert made["engines"]["engine.plan"]["tensors"]["latents"]["most"] == [1, 4, 8, 8]
    assert (tmp_path / "engine.plan").stat().st_size > 1000 and (tmp_path / "times").exists()


def test_every_option_that_changes_engines_changes_the_key() -> None:
    asked = [
        {},
        {"optimization_level": 0},
        {"optimization_level": 3},
        {"workspace": 1.0},
        {"ws": True},
        {"compute_capability": ("8.9",)},
    ]
    keys = [json.dumps([runtime(**each).facts(), runtime(**each).device()]) for each in asked]
    assert len(set(keys)) == len(asked)
    assert json.dumps([runtime(use_cuda_graph=True).facts(), runtime().device()]) == keys[0]


def test_gpus_that_are_named_are_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines for the GPU at hand are not those for another that was asked for."""
    cuda = CudaStandIn(capability=(8, 9))
    monkeypatch.setattr(tensorrt, "runtime_api", lambda: cuda)
    monkeypatch.setattr(tensorrt, "bindings", lambda: TensorRtStandIn(cuda))
    own, other = runtime(), runtime(compute_capability=("12.0",))
    assert own.device() == "8.9" and all(map(own.runs, ("8.9", "8.0+8.9", "8.0 and later"))) and not own.runs("12.0")
    assert other.device() == "12.0" and not other.runs("8.9") and "12.0" in (other.unusable() or "")


def test_an_option_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = tensorrt.importlib.util.find_spec
    monkeypatch.setattr(tensorrt.importlib.util, "find_spec", lambda name: None if name == "nvtx" else real(name))
    with pytest.raises(InvalidRequest, match="pip install nvtx"):
        find_runtime("tensorrt", Options(nvtx_profile=True))
