"""TensorRT's running half, over stand-ins for CUDA and TensorRT that fail on misuse: no GPU is at hand here."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from darkroom.contract import DECODER, TEXT, Job, Profile, Tensor
from darkroom.engines.cuda import Cuda
from darkroom.engines.runtime import Options
from darkroom.engines.tensorrt import runtime as tensorrt
from darkroom.engines.tensorrt.graph import read_graph, tidy
from darkroom.engines.tensorrt.run import HEADROOM, KEPT_GRAPHS, Session
from darkroom.errors import Failed
from darkroom.schedule import chosen
from darkroom.schedule.compile import compile_schedule
from darkroom.schedule.step import NEXT, step_stage
from darkroom.schedule.step_onnx import write_step
from darkroom.schedule.table import Table, Trajectory
from darkroom.store.store import MANIFEST
from tests.engines.stand_ins import CudaStandIn, Misuse, PlainTensorRtStandIn, Status, TensorRtStandIn
from tests.support import NOISE_SCHEDULERS, ROOT, SCHEDULER_CONFIG, Diffusers, Studio, psnr

PROMPT = "red apple"
LATENTS = Tensor("latents", ("B", 4, "h", "w"))


@pytest.fixture
def flavour() -> type[TensorRtStandIn]:
    """Which TensorRT is there; tests that are about plain TensorRT name it."""
    return TensorRtStandIn


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, flavour: type[TensorRtStandIn]) -> CudaStandIn:
    """A GPU of compute capability 8.9, and a TensorRT on it; "building" an engine tidies its graph."""
    cuda = CudaStandIn()

    def build_engine(trt: Any, options: Options, job: Any, graph: Path, plan: Path, *_: Any) -> dict:
        tidy(read_graph(graph, job.stage), graph.parent, job.stage, plan)
        return {}

    monkeypatch.setattr(tensorrt, "runtime_api", lambda: cuda)
    monkeypatch.setattr(tensorrt, "bindings", lambda: flavour(cuda))
    monkeypatch.setattr("darkroom.engines.tensorrt.build.build_engine", build_engine)
    return cuda


def table_of(scheduler: str, steps: int) -> Table:
    return compile_schedule(chosen(scheduler, "PNDMScheduler", SCHEDULER_CONFIG), steps)


class TestPictures:
    @pytest.mark.parametrize("scheduler", [None, "DDPM", "EulerA", "Heun", "LCM", "UniPC"])
    @pytest.mark.parametrize("graph", [False, True])
    def test_are_those_of_diffusers(
        self, studio: Studio, diffusers_tiny: Diffusers, gpu: CudaStandIn, scheduler: str | None, graph: bool
    ) -> None:
        drawn = studio.draw(PROMPT, engine="tensorrt", scheduler=scheduler, use_cuda_graph=graph)
        expected = diffusers_tiny.draw(PROMPT, scheduler=scheduler)
        assert psnr(drawn.pictures[0], expected[0]) >= 45
        assert bool(gpu.launched) == graph

    @pytest.mark.parametrize("flavour", [PlainTensorRtStandIn])
    @pytest.mark.parametrize("options", [{}, {"use_cuda_graph": True}, {"ws": True}], ids=["", "graph", "ws"])
    def test_by_plain_tensorrt_are_those_of_diffusers(
        self, studio: Studio, diffusers_tiny: Diffusers, gpu: CudaStandIn, options: dict[str, bool]
    ) -> None:
        drawn = studio.draw(PROMPT, PROMPT, engine="tensorrt", **options)
        for picture, expected in zip(drawn.pictures, diffusers_tiny.draw(PROMPT, PROMPT), strict=True):
            assert psnr(picture, expected) >= 45

    @pytest.mark.parametrize("build", ["static_batch", "dynamic_batch", "dynamic_shape"])
    def test_do_not_depend_on_what_engines_leave_free(
        self, studio: Studio, diffusers_tiny: Diffusers, gpu: CudaStandIn, build: str
    ) -> None:
        drawn = studio.draw(PROMPT, "blue cat", engine="tensorrt", batch_size=2, **{f"build_{build}": True})
        for picture, expected in zip(drawn.pictures[::2], diffusers_tiny.draw(PROMPT, seed=5), strict=False):
            assert psnr(picture, expected) >= 45

    def test_stay_the_same_when_the_whole_loop_is_replayed(self, studio: Studio, gpu: CudaStandIn) -> None:
        """The second batch is captured whole, the third replays it; with other seeds, prompts and noise."""
        prompts = (PROMPT, "blue cat", "green dog on the house", PROMPT)
        plain = studio.draw(*prompts, engine="tensorrt", scheduler="EulerA")
        replayed = studio.draw(*prompts, engine="tensorrt", scheduler="EulerA", use_cuda_graph=True)
        assert gpu.launched
        for one, other in zip(plain.pictures, replayed.pictures, strict=True):
            assert np.array_equal(one, other)

    def test_of_sdxl_are_those_of_diffusers(
        self, xl_studio: Studio, diffusers_tiny_xl: Diffusers, gpu: CudaStandIn
    ) -> None:
        drawn = xl_studio.draw(PROMPT, engine="tensorrt", guidance_scale=7.5, use_cuda_graph=True)
        assert psnr(drawn.pictures[0], diffusers_tiny_xl.draw(PROMPT)[0]) >= 45

    def test_from_a_picture_are_those_of_diffusers(
        self, studio: Studio, diffusers_tiny: Diffusers, gpu: CudaStandIn, tmp_path: Path
    ) -> None:
        from PIL import Image

        picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
        picture.save(tmp_path / "start.png")
        studio = replace(studio, script="demo_img2img.py")
        asked = {"image_strength": 0.7, "denoising_steps": 4, "batch_size": 2}
        drawn = studio.draw(PROMPT, engine="tensorrt", input_image=tmp_path / "start.png", **asked)
        expected = diffusers_tiny.draw(PROMPT, PROMPT, image=picture, strength=0.7, denoising_steps=4)
        for found, wanted in zip(drawn.pictures, expected, strict=True):
            assert psnr(found, wanted) >= 45

    def test_are_marked_for_the_profiler(
        self, studio: Studio, gpu: CudaStandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import nvtx

        marked, real = [], nvtx.annotate
        monkeypatch.setattr(nvtx, "annotate", lambda name, **more: marked.append(name) or real(name, **more))
        studio.draw(PROMPT, engine="tensorrt", nvtx_profile=True)
        assert marked == ["clip", "clip", "unet", "vae"]

    def test_come_from_tensorrt_where_there_is_a_gpu(
        self, studio: Studio, gpu: CudaStandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("darkroom.engines.NVIDIA_DEVICES", (__file__,))
        assert studio.draw(PROMPT, engine="auto", use_cuda_graph=True).result["request"]["engine"] == "tensorrt"
        gpu.capability = (9, 0)  # of which TensorRT-RTX knows nothing
        assert studio.draw(PROMPT, engine="auto").result["request"]["engine"] == "openvino"

    def test_are_timed_by_the_device(self, studio: Studio, gpu: CudaStandIn) -> None:
        drawn = studio.draw(PROMPT, engine="tensorrt")
        assert drawn.result["milliseconds"]["UNet"] == drawn.result["milliseconds"]["VAE-Dec"] == 1.5
        assert drawn.result["milliseconds"]["CLIP"] == 3.0  # the prompt, and the negative one


@pytest.fixture
def loop(tmp_path: Path) -> Callable[..., Any]:
    """A UNet that halves its input, with the schedule's step, in a session of its own."""
    from darkroom.contract import DENOISER, Stage

    def made(cuda: CudaStandIn | None = None, flavour: Any = TensorRtStandIn, **options: Any) -> tuple[Any, Any]:
        stage = Stage("unet", (LATENTS, Tensor("timestep", ("B",))), (Tensor("output", LATENTS.shape),), role=DENOISER)
        _write_halving(tmp_path / "engine.plan")
        write_step(LATENTS, tmp_path / "step.plan")
        cuda = cuda or CudaStandIn()
        session = Session(flavour(cuda), cuda, Options(**options))
        unet = session.load(Job(stage, Profile(2, 64, 64), "fp32"), tmp_path / "engine.plan", tmp_path / "step.plan")
        return cuda, unet

    return made


def _write_halving(path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    latents = [helper.make_tensor_value_info(name, TensorProto.FLOAT, LATENTS.shape) for name in ("latents", "output")]
    timestep = helper.make_tensor_value_info("timestep", TensorProto.FLOAT, ("B",))
    half = numpy_helper.from_array(np.array(0.5, np.float32), "half")
    node = helper.make_node("Mul", ["latents", "half"], ["output"])
    graph = helper.make_graph([node], "halving", [latents[0], timestep], latents[1:], [half])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 10
    onnx.save_model(model, str(path))


def on_the_host(table: Table, sample: np.ndarray, noises: list[np.ndarray]) -> np.ndarray:
    """The same loop by `Trajectory`, which is tested against diffusers."""
    trajectory, left = Trajectory(table, sample / np.float32(table.initial_scale)), list(noises)
    for call in range(len(table)):
        output = trajectory.network_input(call) * np.float32(0.5)
        trajectory.advance(call, output, left.pop(0) if table.noise_drawn[call] else None)
    return trajectory.sample


def run(unet: Any, table: Table, seed: int = 0, batch: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """What the device makes of random samples, and what the host does."""
    random = np.random.default_rng(seed)
    sample = random.standard_normal((batch, 4, 8, 8), np.float32) * np.float32(table.initial_scale)
    noises = [random.standard_normal(sample.shape, np.float32) for _ in range(int(table.noise_drawn.sum()))]
    *before, made = unet.denoise(table, sample, noises, {})
    assert before == [None] * (len(table) - 1)
    return made, on_the_host(table, sample, noises)


class TestLoop:
    @pytest.mark.parametrize("scheduler", NOISE_SCHEDULERS)
    def test_follows_the_table(self, loop: Callable[..., Any], scheduler: str) -> None:
        _, unet = loop()
        made, expected = run(unet, table_of(scheduler, 6))
        np.testing.assert_allclose(made, expected, atol=1e-5 * np.abs(expected).max())

    @pytest.mark.parametrize("options", [{}, {"use_cuda_graph": True}])
    def test_waits_once_for_all_its_steps(self, loop: Callable[..., Any], options: dict) -> None:
        cuda, unet = loop(**options)
        run(unet, table_of("DDIM", 3))
        for steps in (3, 30):
            cuda.calls.clear()
            run(unet, table_of("DDIM", steps))
            # Only captures that have gone stale may be waited for, and nothing is allocated in a warm loop.
            assert cuda.calls.count("cudaStreamSynchronize") == 1
            assert not {"cudaMalloc", "cudaMallocHost", "cudaFree"} & set(cuda.calls)

    def test_is_one_launch_when_it_comes_again(self, loop: Callable[..., Any]) -> None:
        cuda, unet = loop(use_cuda_graph=True)
        table = table_of("DDIM", 5)
        launches = []
        for seed in range(4):
            cuda.launched = 0
            made, expected = run(unet, table, seed)
            np.testing.assert_allclose(made, expected, atol=1e-5)
            launches.append(cuda.launched)
        # The first call settles TensorRT, the others replay its capture; a loop that came twice is one graph.
        assert launches == [4, 5, 1, 1]

    def test_is_captured_without_what_another_thread_asks_for(self, loop: Callable[..., Any], tmp_path: Path) -> None:
        cuda, unet = loop(use_cuda_graph=True)
        stage, profile = replace(unet._network.stage, name="vae"), unet._network.profile
        decoder = unet._session.load(Job(stage, profile, "fp32"), tmp_path / "engine.plan", tmp_path / "step.plan")
        inputs = {"latents": np.ones((2, 4, 8, 8), np.float32), "timestep": np.zeros(2, np.float32)}
        begin, asked = cuda.cudaStreamBeginCapture, []

        def begun(*more: Any) -> tuple:
            answer = begin(*more)
            if not asked:
                asked.append(pool.submit(decoder, inputs))
                wait(asked, timeout=0.2)  # it has all the time to get into the capture
            return answer

        cuda.cudaStreamBeginCapture = begun
        with ThreadPoolExecutor(1) as pool:
            for seed in range(3):
                made, expected = run(unet, table_of("DDIM", 3), seed)
                np.testing.assert_allclose(made, expected, atol=1e-5)
        assert (asked[0].result()["output"] == 0.5).all()

    def test_captures_again_when_addresses_have_changed(self, loop: Callable[..., Any]) -> None:
        """More noises need another buffer: what was captured with the old one would read freed memory."""
        _, unet = loop(use_cuda_graph=True)
        for scheduler, steps in (("DDIM", 4), ("EulerA", 4), ("EulerA", 4), ("EulerA", 12), ("EulerA", 4), ("DDIM", 4)):
            for seed in (0, 1):
                made, expected = run(unet, table_of(scheduler, steps), seed)
                np.testing.assert_allclose(made, expected, atol=1e-4 * np.abs(expected).max())

    def test_begins_afresh_every_time(self, loop: Callable[..., Any]) -> None:
        """The windows of samples and outputs hold nothing of the run before, not even NaN."""
        _, unet = loop()
        table = table_of("UniPC", 5)
        poisoned = unet.denoise(table, np.full((2, 4, 8, 8), np.nan, np.float32), [], {})
        assert np.isnan(list(poisoned)[-1]).all()
        made, expected = run(unet, table)
        np.testing.assert_allclose(made, expected, atol=1e-5)

    def test_never_writes_an_output_over_an_input(self, loop: Callable[..., Any]) -> None:
        _, unet = loop()
        step = unet._step
        names = [tensor.name for tensor in step_stage(LATENTS).outputs]
        assert {name.removeprefix(NEXT) for name in names} == {"step", "samples", "outputs", "latents", "timestep"}
        addresses = [buffer.address for buffer in step.buffers.values()]
        assert len(set(addresses)) == len(addresses)

    def test_shares_one_scratch_memory_of_the_largest(self, loop: Callable[..., Any]) -> None:
        _, unet = loop()
        run(unet, table_of("DDIM", 2))
        contexts = unet._session.trt.contexts
        assert len(contexts) == 2
        assert {context.scratch for context in contexts} == {contexts[0].scratch}
        assert contexts[0].scratch[1] == max(context.engine.device_memory_size_v2 for context in contexts)

    def test_keeps_no_more_than_the_latest_graphs(self, loop: Callable[..., Any]) -> None:
        cuda, unet = loop(use_cuda_graph=True)
        for steps in range(2, 14):
            for seed in (0, 1):
                made, expected = run(unet, table_of("DDIM", steps), seed)
                np.testing.assert_allclose(made, expected, atol=1e-4 * np.abs(expected).max())
        assert cuda.graphs <= KEPT_GRAPHS

    @pytest.mark.parametrize("graph", [False, True])
    def test_gives_everything_back_when_nobody_has_it_any_more(self, loop: Callable[..., Any], graph: bool) -> None:
        cuda, unet = loop(use_cuda_graph=graph)
        for seed in range(3):
            run(unet, table_of("DDIM", 3), seed)
        lane = unet._lane
        assert cuda.blocks > 10 and cuda.graphs == 2 * graph
        del unet
        gc.collect()
        assert cuda.blocks == cuda.graphs == 0 and lane.networks == []

    def test_that_is_collected_within_a_capture_is_freed_after_it(
        self, loop: Callable[..., Any], tmp_path: Path
    ) -> None:
        cuda, unet = loop(use_cuda_graph=True)
        plans, profile = (tmp_path / "engine.plan", tmp_path / "step.plan"), unet._network.profile
        dropped = [unet._session.load(Job(unet._network.stage, profile, "fp32"), *plans)]
        begin = cuda.cudaStreamBeginCapture
        cuda.cudaStreamBeginCapture = lambda *more: (begin(*more), dropped.clear(), gc.collect())[0]
        for seed in range(3):
            made, expected = run(unet, table_of("DDIM", 3), seed)
            np.testing.assert_allclose(made, expected, atol=1e-5)
        assert not dropped and len(unet._lane.networks) == 2

    def test_leaves_nothing_of_a_graph_that_cannot_be_captured(self, loop: Callable[..., Any]) -> None:
        cuda, unet = loop(use_cuda_graph=True)
        run(unet, table_of("DDIM", 1))
        before = cuda.graphs
        cuda.cudaGraphInstantiate = lambda *_: (Status.cudaErrorMemoryAllocation, None)
        with pytest.raises(Failed, match=r"no CUDA graph could be captured .*: leave out --use-cuda-graph\."):
            run(unet, table_of("DDIM", 1))
        assert cuda.graphs == before


class TestStages:
    @pytest.fixture
    def three(self, loop: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
        """A text encoder, a UNet and a decoder, all of which halve, in one session."""

        def made(
            cuda: Any = None, trt: Any = None, names: tuple[str, str] = (TEXT, DECODER), **options: Any
        ) -> tuple[CudaStandIn, list[Any]]:
            cuda, unet = loop(*filter(None, (cuda, trt)), **options)
            stage, profile = unet._network.stage, unet._network.profile
            plans = tmp_path / "engine.plan", tmp_path / "step.plan"
            text, vae = (
                unet._session.load(Job(replace(stage, name=name, role=role), profile, "fp32"), *plans)
                for name, role in zip(names, (TEXT, DECODER), strict=True)
            )
            return cuda, [text, unet, vae]

        return made

    @pytest.mark.parametrize("options", [{}, {"use_cuda_graph": True}])
    def test_do_not_wait_for_one_another(self, three: Callable[..., Any], options: dict[str, bool]) -> None:
        """Text is encoded and latents are decoded while the steps of another batch are still to be done."""
        cuda, (text, unet, vae) = three(**options)
        inputs = {"latents": np.ones((2, 4, 8, 8), np.float32), "timestep": np.zeros(2, np.float32)}
        table, sample = table_of("DDIM", 3), np.ones((2, 4, 8, 8), np.float32)
        for _ in range(3):
            steps = unet.denoise(table, sample, [], {})
            next(steps)
            left = cuda.pending(unet._lane.cuda.stream)
            for stage in (text, vae):
                assert (stage(inputs)["output"] == 0.5).all()
            assert cuda.pending(unet._lane.cuda.stream) == left > 0
            *_, made = steps
            np.testing.assert_allclose(made, on_the_host(table, sample, []), atol=1e-5)

    GIB = 1 << 30

    @pytest.mark.parametrize("flavour", [TensorRtStandIn, PlainTensorRtStandIn])
    @pytest.mark.parametrize("memory,resident", [(16, True), (6, False)])
    def test_stream_what_has_no_room_beside_all_else(
        self, three: Callable[..., Any], flavour: type, memory: int, resident: bool
    ) -> None:
        cuda = CudaStandIn(memory=memory * self.GIB)
        trt = partial(flavour, weights=3 * self.GIB)
        _, (text, unet, vae) = three(cuda, trt, ws=True)
        made, expected = run(unet, table_of("DDIM", 3))
        np.testing.assert_allclose(made, expected, atol=1e-5)
        budgets = [engine._network.engine.weight_streaming_budget_v2 for engine in (text, unet, vae)]
        budgets.append(unet._step.engine.weight_streaming_budget_v2)
        if resident:
            assert budgets == [3 * self.GIB] * 4
        else:  # what is called at every step has all that there is, and others nothing
            assert budgets == [0, 3 * self.GIB, 0, 0]
        assert cuda.cudaMemGetInfo()[1] >= HEADROOM - self.GIB // 100

    def test_keep_as_much_of_their_weights_as_was_asked(self, three: Callable[..., Any]) -> None:
        asked = {"ws": True, "t5_ws_percentage": 0, "transformer_ws_percentage": 25}
        cuda = CudaStandIn(memory=16 * self.GIB)
        _, (text, _, vae) = three(cuda, partial(TensorRtStandIn, weights=3 * self.GIB), ("t5", "transformer"), **asked)
        for stage, kept in ((text, 0), (vae, 3 * self.GIB // 4)):
            stage({"latents": np.ones((2, 4, 8, 8), np.float32), "timestep": np.zeros(2, np.float32)})
            assert stage._network.engine.weight_streaming_budget_v2 == kept

    def test_stream_most_of_a_network_that_is_too_large(self, three: Callable[..., Any]) -> None:
        cuda = CudaStandIn(memory=2 * self.GIB)
        _, (text, unet, vae) = three(cuda, partial(TensorRtStandIn, weights=3 * self.GIB), ws=True)
        inputs = {"latents": np.ones((2, 4, 8, 8), np.float32), "timestep": np.zeros(2, np.float32)}
        assert all((stage(inputs)["output"] == 0.5).all() for stage in (text, vae))
        made, expected = run(unet, table_of("DDIM", 3))
        np.testing.assert_allclose(made, expected, atol=1e-5)
        assert self.GIB < unet._network.engine.weight_streaming_budget_v2 < 2 * self.GIB - HEADROOM


def test_running_needs_no_compiler() -> None:
    """The half that runs is what a server holds: neither torch nor ONNX come with it."""
    code = "import sys, darkroom.engines.tensorrt.run, darkroom.engines.tensorrt.runtime; print(*sys.modules)"
    environment = {"PYTHONPATH": str(ROOT / "demo"), "PATH": os.environ["PATH"]}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert not {"torch", "onnx", "diffusers", "polygraphy", "onnx_graphsurgeon"} & set(said.stdout.split())


class TestFailures:
    def test_memory_that_is_short_is_told_in_numbers(self) -> None:
        cuda = Cuda(CudaStandIn(memory=1 << 30))
        with pytest.raises(Failed, match=r"the unet's latents needs 2\.00 GiB, and 1\.00 of 1\.00 GiB are free; lower"):
            cuda.allocate(1 << 31, "the unet's latents")

    @pytest.mark.parametrize(
        "device,reason",
        [
            ({"devices": 0}, "there is no NVIDIA GPU on this machine"),
            ({"driver": 0}, "there is no NVIDIA driver on this machine"),
        ],
    )
    def test_without_a_device(self, device: dict, reason: str) -> None:
        api = CudaStandIn()
        vars(api).update(device)
        with pytest.raises(Failed, match=reason):
            Cuda(api)

    def test_any_other_status_is_named(self) -> None:
        api = CudaStandIn()
        cuda = Cuda(api)
        with (
            mock.patch.object(CudaStandIn, "cudaStreamSynchronize", lambda *_: (Status.cudaErrorInsufficientDriver,)),
            pytest.raises(Failed, match=r"CUDA: InsufficientDriver \(cudaErrorInsufficientDriver\)\."),
        ):
            cuda.wait()

    def test_an_engine_of_another_gpu_is_named(self, loop: Callable[..., Any], tmp_path: Path) -> None:
        _, unet = loop()
        (tmp_path / "other.plan").write_bytes(b"built elsewhere")
        (tmp_path / MANIFEST).write_text(json.dumps({"key": {"device": "12.0", "version": "tensorrt_rtx 1.6"}}))
        session = unet._session
        here = r"here is a GPU of 8\.9 with stand_in 1\.0 \(if they differ, delete"
        both = rf"it was built for 12\.0 with tensorrt_rtx 1\.6; {here}"
        with pytest.raises(Failed, match=both):
            session.network(
                unet._lane, replace(step_stage(LATENTS), name="vae"), Profile(1, 64, 64), tmp_path / "other.plan"
            )


class TestStandIn:
    """The stand-in itself: that it fails where the real thing would go wrong in silence."""

    def test_reading_before_waiting_gives_garbage(self) -> None:
        cuda = Cuda(CudaStandIn())
        address, source, target = cuda.allocate(4, "x"), cuda.pinned(4), cuda.pinned(4)
        source[...] = 7
        cuda.upload(address, source)
        cuda.download(target, address)
        assert not (target == 7).any()
        cuda.wait()
        assert (target == 7).all()

    def test_what_is_not_pinned_or_freed_is_refused(self) -> None:
        cuda = Cuda(CudaStandIn())
        address = cuda.allocate(4, "x")
        with pytest.raises(Misuse):
            cuda.upload(address, np.zeros(4, np.uint8))
        cuda.free(address)
        with pytest.raises(Misuse):
            cuda.clear(address, 4)

    def test_captured_work_does_not_run_and_stale_graphs_are_refused(self) -> None:
        api = CudaStandIn()
        cuda = Cuda(api)
        address = cuda.allocate(4, "x")
        graph = cuda.capture(lambda: cuda.clear(address, 4))
        with pytest.raises(Misuse, match="waited while"):
            cuda.capture(cuda.wait)
        cuda.wait()
        with pytest.raises(Misuse, match="not instantiated"):
            cuda.launch(123456)
        cuda.free(address)
        with pytest.raises(Misuse, match="freed"):
            cuda.launch(graph)
