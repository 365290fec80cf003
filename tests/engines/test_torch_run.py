"""PyTorch as an engine: the loop on the device, compiled, captured and quantized, as far as that shows on a CPU."""

import errno
import gc
import importlib.util
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from darkroom.contract import DENOISER, Job, Profile, Stage
from darkroom.engines import find_runtime
from darkroom.engines.runtime import Denoiser, Options
from darkroom.engines.torch.cache import VARIABLE
from darkroom.engines.torch.run import Captures, TorchEngine
from darkroom.engines.torch.tuning import fuse_projections, least_rows
from darkroom.errors import Failed, InvalidRequest
from darkroom.networks.load import example_inputs, load_module
from darkroom.store.manifest import MANIFEST
from darkroom.store.store import Store
from tests.engines.allocator import AllocatorStandIn
from tests.engines.loops import SIZE, STAGE, Small, by_diffusers, denoised, engine_of, schedule
from tests.support import ROOT, Diffusers, Studio, assert_refused, psnr

PROMPT = "a red apple, noto style"
SAME_AS_DIFFUSERS = 45.0
ANCESTRAL = "EulerAncestralDiscreteScheduler"


@pytest.fixture(autouse=True)
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchax passes JAX off as one. It is imported in children that build, but by tests in this process."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """torch.compile without its last stage, in which a C++ compiler would work for minutes; and its counters."""
    from torch._dynamo.utils import counters

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, dynamic, options: real(module, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "UniPCMultistepScheduler"]
)
def test_loop_on_the_device_equals_the_scheduler(name: str) -> None:
    found = denoised(engine_of(Small()), schedule(name))
    expected = by_diffusers(name, 5)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_only_the_last_of_the_samples_comes_back_and_is_the_callers() -> None:
    engine = engine_of(Small())
    assert isinstance(engine, Denoiser)
    first = denoised(engine, schedule())
    kept = first.copy()
    assert not np.array_equal(denoised(engine, schedule(), seed=1), first)
    assert np.array_equal(first, kept)


def test_compiled_picture_equals_diffusers(traced: Any, studio: Studio, diffusers_tiny: Diffusers) -> None:
    drawn = studio.draw(PROMPT, engine="torch-compile", batch_size=2, scheduler="EulerA")
    expected = diffusers_tiny.draw(PROMPT, PROMPT, scheduler="EulerA")
    assert min(map(psnr, drawn.pictures, expected)) >= SAME_AS_DIFFUSERS
    # CLIP, the UNet with the schedule's step, and the VAE: a graph each, whole, and the same for other steps.
    assert (traced["stats"]["unique_graphs"], dict(traced["graph_break"])) == (3, {})


@pytest.mark.slow
def test_compiled_sdxl_picture_equals_diffusers(traced: Any, xl_studio: Studio, diffusers_tiny_xl: Diffusers) -> None:
    drawn = xl_studio.draw(PROMPT, engine="torch-compile")
    assert psnr(drawn.pictures[0], diffusers_tiny_xl.draw(PROMPT, guidance_scale=5.0)[0]) >= SAME_AS_DIFFUSERS


def test_schedules_and_step_counts_share_what_was_compiled(traced: Any) -> None:
    engine = engine_of(Small(), "torch-compile")
    for name, steps in (("EulerDiscreteScheduler", 3), ("EulerAncestralDiscreteScheduler", 9)):
        expected = by_diffusers(name, steps)
        assert np.abs(denoised(engine, schedule(name, steps)) - expected).max() <= 1e-5 * np.abs(expected).max()
    assert traced["stats"]["unique_graphs"] == 1


class TestCompiled:
    """What inductor compiled, for the next process."""

    @pytest.fixture(autouse=True)
    def _nobodys(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setenv(VARIABLE, "")  # so that what was there comes back, if that was nothing, too
        monkeypatch.delenv(VARIABLE)
        yield
        torch._dynamo.callback.callback_handler.clear()

    @staticmethod
    def begin(store: Store) -> None:
        """As a new process does, which knows nothing of what this one compiled."""
        os.environ.pop(VARIABLE, None)
        torch._dynamo.reset()
        find_runtime("torch-compile").keep_in(store)

    @staticmethod
    def work() -> str:
        """Compiles a loop, or finds it compiled."""
        from torch._dynamo.utils import counters

        counters.clear()
        found, expected = denoised(engine_of(Small(), "torch-compile"), schedule()), by_diffusers(ANCESTRAL, 5)
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
        assert counters["stats"]["unique_graphs"] == 1
        found = {which: counters["aot_autograd"][f"autograd_cache_{which}"] for which in ("hit", "miss")}
        assert sorted(found.values()) == [0, 1]
        return max(found, key=found.get)

    def test_is_kept_beside_the_engines_and_never_used_damaged(self, tmp_path: Path) -> None:
        told: list[str] = []
        store = Store(tmp_path, told.append)
        for expected in ("miss", "hit"):
            self.begin(store)
            assert self.work() == expected
            (folder,) = store.folders()
            assert store.damage(folder, anew=True) is None
        library = next(folder.rglob("*.so"))
        library.write_bytes(library.read_bytes()[:100])
        self.begin(store)
        assert len(told) == 1 and library.name in told[0] and "set aside" in told[0]
        assert self.work() == "miss" and store.damage(folder, anew=True) is None

    def test_of_several_processes_is_kept_together(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        self.begin(store)
        (Path(os.environ.pop(VARIABLE)) / "one").write_text("1")
        find_runtime("torch-compile").keep_in(store)  # before the first has ended
        (Path(os.environ[VARIABLE]) / "other").write_text("2")
        torch._dynamo.callback.callback_handler.run_end_callbacks(None)
        (folder,) = store.folders()
        assert {path.name for path in folder.iterdir()} == {"one", "other", MANIFEST}

    def test_is_kept_anew_where_it_was_changed(self, tmp_path: Path) -> None:
        """As what autotuning found is, in a file that grows; but for Triton's folder."""
        store = Store(tmp_path)
        self.begin(store)
        mine = Path(os.environ[VARIABLE])
        (mine / "triton").mkdir()
        for each in ("1", "12"):
            (mine / "found").write_text(each)
            (mine / "triton" / "kernel").write_text(each)
            torch._dynamo.callback.callback_handler.run_end_callbacks(None)
            (folder,) = store.folders()
            assert (folder / "found").read_text() == each and not (folder / "triton").exists()

    def test_that_was_given_up_is_no_reason_to_keep_nothing(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        self.begin(store)
        (Path(os.environ[VARIABLE]) / "graph").write_text("1")
        handler = torch._dynamo.callback.callback_handler
        with pytest.raises(torch._dynamo.exc.SkipFrame), handler.install_callbacks(None, ""):
            raise torch._dynamo.exc.SkipFrame("nothing to compile")
        assert [(folder / "graph").exists() for folder in store.folders()] == [True]

    def test_that_cannot_be_copied_whole_is_not_used(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        store = Store(tmp_path)
        self.begin(store)
        (Path(os.environ[VARIABLE]) / "library.so").write_text("whole")
        torch._dynamo.callback.callback_handler.run_end_callbacks(None)

        def full(_: Path, target: Path, **__: object) -> None:
            (target / "library.so").write_text("wh")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("shutil.copytree", full)
        self.begin(store)
        assert list(Path(os.environ[VARIABLE]).iterdir()) == []

    def test_by_half_is_not_kept(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        self.begin(store)
        (Path(os.environ[VARIABLE]) / "half.so").write_text("half")
        handler = torch._dynamo.callback.callback_handler
        with pytest.raises(KeyboardInterrupt), handler.install_callbacks(None, ""):
            raise KeyboardInterrupt
        handler.run_end_callbacks(None)
        assert store.folders() == []

    def test_and_killed_is_swept(self, tmp_path: Path) -> None:
        code = (
            "import os, sys, signal; from pathlib import Path; from darkroom.engines import find_runtime; "
            "from darkroom.store.store import Store; "
            "find_runtime('torch-compile').keep_in(Store(Path(sys.argv[1]))); os.kill(os.getpid(), signal.SIGKILL)"
        )
        environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
        environment["PYTHONPATH"] = str(ROOT / "demo")
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment)
        assert list(tmp_path.glob(".*.tmp"))
        self.begin(Store(tmp_path))
        Store(tmp_path).sweep()
        assert [path for path in tmp_path.glob(".*.tmp") if str(path) != os.environ[VARIABLE]] == []
        assert len(list(tmp_path.glob(".*.own.lock"))) == 1, "this process's"
        assert Path(os.environ[VARIABLE]).is_dir()

    def test_where_a_user_says_is_left_alone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(VARIABLE, "elsewhere")
        find_runtime("torch-compile").keep_in(Store(tmp_path))
        assert os.environ[VARIABLE] == "elsewhere" and list(tmp_path.iterdir()) == []

    def test_is_served_by_a_store_that_cannot_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        told: list[str] = []
        store = Store(tmp_path, told.append)
        self.begin(store)
        (Path(os.environ[VARIABLE]) / "graph").write_text("1")
        torch._dynamo.callback.callback_handler.run_end_callbacks(None)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

        def refused(*_: object) -> None:
            raise Failed(f"{tmp_path} cannot be written.")

        monkeypatch.setattr(Store, "scratch", refused)
        self.begin(store)
        assert (Path(os.environ[VARIABLE]) / "graph").read_text() == "1"
        monkeypatch.setattr(Store, "renew", refused)
        (Path(os.environ[VARIABLE]) / "another").write_text("2")
        torch._dynamo.callback.callback_handler.run_end_callbacks(None)
        assert len(told) == 1 and "not kept" in told[0] and "cannot be written" in told[0]

    def test_in_a_store_that_cannot_be_written_is_left_to_torch(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        find_runtime("torch-compile").keep_in(Store(tmp_path / "file" / "engines"))
        assert VARIABLE not in os.environ


class TestCaptures:
    """CUDA graphs, with replays that call what was captured in place of a GPU."""

    @pytest.fixture
    def allocator(self, monkeypatch: pytest.MonkeyPatch) -> AllocatorStandIn:
        """torch's own way of capturing, over stand-ins for what it calls."""
        allocator = AllocatorStandIn()
        allocator.install(monkeypatch)
        monkeypatch.setattr("darkroom.engines.torch.run.ABANDONED", [])
        return allocator

    @pytest.fixture
    def captured(self, monkeypatch: pytest.MonkeyPatch, allocator: AllocatorStandIn) -> list[Callable[[], Any]]:
        works: list[Callable[[], Any]] = []
        real = Captures._captured

        def capture(its: Captures, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
            launch, made = real(its, work)
            works.append(work)

            def replay() -> None:
                launch()
                again = work()
                if isinstance(made, torch.Tensor):
                    made.copy_(again)

            return replay, made

        monkeypatch.setattr(Captures, "_captured", capture)
        monkeypatch.setattr("darkroom.engines.torch.runtime.Torch._graphs", True)
        return works

    def test_loop_that_came_twice_is_one_launch(self, captured: list) -> None:
        engine, table = engine_of(Small()), schedule()
        for seed, graphs in ((0, 0), (1, 1), (2, 1), (0, 1)):
            expected = by_diffusers("EulerAncestralDiscreteScheduler", 5, seed)
            assert np.abs(denoised(engine, table, seed) - expected).max() <= 1e-5 * np.abs(expected).max()
            assert len(captured) == graphs

    def test_other_schedule_and_other_size_are_captured_anew(self, captured: list) -> None:
        engine = engine_of(Small())
        for name in ("EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler"):
            for turn in range(3):
                found, expected = denoised(engine, schedule(name), turn), by_diffusers(name, 5, turn)
                assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
        assert len(captured) == 2
        for turn in range(3):
            found, expected = (
                denoised(engine, schedule(), turn, 16),
                by_diffusers("EulerAncestralDiscreteScheduler", 5, turn, 16),
            )
            assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
        assert len(captured) == 3

    @pytest.mark.parametrize("broken", ["capture_begin", "work", "capture_end"])
    def test_what_cannot_be_captured_is_launched_and_told_once(
        self, captured: list, allocator: AllocatorStandIn, broken: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nothing of it is left: what is freed later would stay, and be asked of a graph that is gone."""
        allocator.refuses = broken
        engine = engine_of(Small())
        if broken == "work":
            step = engine._step

            def refused(*turn: torch.Tensor) -> None:
                step(*turn)
                if allocator.underway:
                    raise RuntimeError("operation not permitted\nwhen stream is capturing")

            monkeypatch.setattr(engine, "_step", refused)
        with pytest.warns(UserWarning, match="operation not permitted") as told:
            for seed in range(4):
                found = denoised(engine, schedule(), seed)
                expected = by_diffusers("EulerAncestralDiscreteScheduler", 5, seed)
                assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
        assert len([each for each in told if "captured" in str(each.message)]) == 1
        gc.collect()
        assert allocator.underway == {} and set(allocator.pools.values()) == {0}

    def test_sizes_that_come_by_turns_keep_a_graph_each(self, captured: list) -> None:
        """As images join and leave a batch between steps."""
        engine = engine_of(Small())
        for turn in range(5):
            for images in (1, 3, 2):
                inputs = example_inputs(STAGE, {"B": images, "h": 8, "w": 8}, turn)
                (found,) = engine({name: value.numpy() for name, value in inputs.items()}).values()
                assert np.allclose(found, Small()(*inputs.values()).numpy(), atol=1e-6)
        assert len(captured) == 3

    @pytest.mark.parametrize("most", [1, 3])
    def test_only_the_latest_loops_are_kept(
        self, captured: list, allocator: AllocatorStandIn, most: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A pool whose last graph is gone is one that torch takes nothing into any more."""
        monkeypatch.setattr("darkroom.engines.torch.run.KEPT_LOOPS", most)
        engine = engine_of(Small())
        for steps in (2, 3, 4, 5, 6):
            for seed in range(3):
                found = denoised(engine, schedule("EulerDiscreteScheduler", steps), seed)
                expected = by_diffusers("EulerDiscreteScheduler", steps, seed)
                assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
        captured.clear()  # which holds what they read
        gc.collect()
        assert sum(allocator.pools.values()) == most == allocator.graphs

    def test_only_one_thread_at_a_time_does_what_no_graph_does_yet(self, captured: list) -> None:
        beside: list[bool] = []
        inside = threading.Lock()

        class Exclusive(Small):
            def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
                beside.append(not inside.acquire(blocking=False))
                time.sleep(0.01)
                made = super().forward(*inputs)
                inside.release() if not beside[-1] else None
                return made

        table = schedule()
        engines = [engine_of(Exclusive()) for _ in range(3)]
        with ThreadPoolExecutor(3) as pool:
            made = list(pool.map(lambda engine: [denoised(engine, table, seed) for seed in range(2)], engines))
        assert len(captured) == 3
        assert beside and not any(beside)
        for seed in range(2):
            expected = by_diffusers(ANCESTRAL, 5, seed)
            assert max(np.abs(each[seed] - expected).max() for each in made) <= 1e-5 * np.abs(expected).max()

    def test_call_that_came_twice_is_replayed_on_new_inputs(self, captured: list) -> None:
        module = Small()
        engine = engine_of(module)
        for seed in range(4):
            inputs = example_inputs(STAGE, {"B": 2, "h": 8, "w": 8}, seed)
            (found,) = engine({name: value.numpy() for name, value in inputs.items()}).values()
            assert np.allclose(found, Small()(*inputs.values()).numpy(), atol=1e-6)
        assert len(captured) == 1


def test_every_engine_computes_in_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that stages of neighbouring batches overlap; behind what has loaded its weights, whichever thread calls it."""
    current = threading.local()

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.waited_for: list[str] = []
            self.wait_stream = self.waited_for.append

    @contextmanager
    def entered(stream: Stream) -> Iterator[None]:
        current.stream = stream
        yield
        current.stream = None

    class Telling(Small):
        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            met.append(current.stream)
            return super().forward(*inputs)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the default stream")
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr("darkroom.engines.torch.runtime.Torch._on_gpu", True)
    met: list[Stream] = []
    engines = [engine_of(Telling()) for _ in range(2)]
    assert [engine._stream.waited_for for engine in engines] == [["the default stream"]] * 2
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda engine: denoised(engine, schedule()), engines))
    assert len(met) == 10 and set(met) == {engine._stream for engine in engines}


def test_what_torch_refuses_is_a_line_and_what_a_compiler_says_keeps_its_trace() -> None:
    class BackendCompilerFailed(RuntimeError): ...

    def engine(error: RuntimeError) -> TorchEngine:
        return TorchEngine(
            mock.Mock(side_effect=error), Stage("unet", (), (), role=DENOISER), torch.device("cpu"), False
        )

    with pytest.raises(Failed, match=r"^torch cannot run the unet for this size and batch: sizes do not match\.$"):
        engine(RuntimeError("sizes do not match.\nand more"))({})
    with pytest.raises(BackendCompilerFailed, match="no compiler"):
        engine(BackendCompilerFailed("inductor raised:\nno compiler"))({})


def test_fused_projections_compute_the_same(tiny_model: Path, studio: Studio) -> None:
    from darkroom.checkpoint.folder import open_checkpoint
    from darkroom.store.store import Store

    checkpoint = open_checkpoint(tiny_model, Store(studio.engines).fingerprints)
    every = checkpoint.family.stages(checkpoint, True, 0)
    for name in ("unet", "vae", "clip"):
        inputs = example_inputs(every[name], Profile(2, SIZE, SIZE).sizes()).values()
        plain, fused = (load_module(every[name], tiny_model) for _ in range(2))
        fuse_projections(fused)
        with torch.no_grad():
            expected, found = plain(*inputs), fused(*inputs)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        names = [key for key, _ in fused.named_parameters()]
        assert any("to_qkv" in key for key in names) == (name != "clip")
        assert sum(map(torch.Tensor.numel, fused.parameters())) == sum(map(torch.Tensor.numel, plain.parameters()))


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        (["--quantization=int8"], "torchao"),
        (["--quantization=int7"], "int8"),
        (["--quantization=fp8"], "GPU"),
        (["--use-cuda-graph"], "GPU"),
    ],
)
def test_what_cannot_be_had_here_is_refused_in_one_line(
    asked: list[str], word: str, empty_studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    there = real("json") if word == "GPU" else None
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: there if name == "torchao" else real(name, *more)
    )
    ended = empty_studio.here(
        PROMPT, f"--model={empty_studio.model}", "--engine=torch", *asked, *empty_studio.folders()
    )
    assert_refused(ended, asked[0].split("=")[0], word)


@pytest.mark.parametrize("driver", [True, False])
def test_gpu_that_torch_cannot_use_is_told_of(driver: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path / "nvidiactl"
    if driver:
        device.touch()
    monkeypatch.setattr("darkroom.engines.torch.runtime.NVIDIA_DEVICES", (str(device),))
    monkeypatch.setattr(torch.version, "cuda", None)
    places = find_runtime("torch").places()
    assert [("without CUDA" in place.why_not, "torch==2.13.0" in place.command) for place in places] == [
        (True, True)
    ] * driver


def test_products_launched_one_by_one_are_captured_by_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darkroom.engines.torch.runtime.Torch._on_gpu", True)
    with pytest.raises(InvalidRequest, match=r"--use-cuda-graph .* int8 .* torch-compile"):
        find_runtime("torch", Options(quantization="int8", use_cuda_graph=True))


@pytest.mark.parametrize(
    ("guided", "batch", "size", "rows"),
    [(False, 1, 128, 16), (True, 1, 128, 32), (False, 2, 96, 18), (True, 1, 104, 32)],
)
def test_smallest_products_have_the_rows_of_the_lowest_level(guided: bool, batch: int, size: int, rows: int) -> None:
    job = Job(replace(STAGE, options={"guided": guided}), Profile(batch, size, size), "fp32")
    assert least_rows(job, 3) == rows


def test_product_of_too_few_rows_is_refused_before_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darkroom.engines.torch.runtime.Torch._on_gpu", True)
    monkeypatch.setattr("darkroom.engines.torch.runtime.Torch._check_options", lambda self: None)
    module = SimpleNamespace(levels=4)
    job = Job(STAGE, Profile(1, 256, 256), "fp32")
    with pytest.raises(InvalidRequest, match="17 rows or more on a GPU, and a part of this picture has 16"):
        find_runtime("torch-compile", Options(quantization="int8"))._check_rows(job, module)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_quantization_is_for_torch(engine: str) -> None:
    with pytest.raises(InvalidRequest, match=r"--quantization has no effect .* torch or torch-compile"):
        find_runtime(engine, Options(quantization="int8"))


def test_quantized_picture_tells_its_loss_and_is_remade(studio: Studio, diffusers_tiny: Diffusers) -> None:
    drawn = studio.draw(PROMPT, engine="torch", quantization="int8")
    plain = studio.draw(PROMPT, engine="torch")
    loss = psnr(drawn.pictures[0], plain.pictures[0])
    assert drawn.result["quantization_psnr"] == pytest.approx(loss)
    assert 20 < loss < 100
    assert f"int8: PSNR {loss:.1f} dB" in drawn.err
    again = studio.draw(recipe=drawn.paths[0])
    assert (again.pictures[0] == drawn.pictures[0]).all()


def test_weights_kept_in_half_precision_can_be_quantized(studio: Studio) -> None:
    with mock.patch("darkroom.checkpoint.folder.LARGE", 0), mock.patch("darkroom.networks.load.WORTH_HALVING", 500):
        drawn = studio.draw(PROMPT, engine="torch", quantization="int8")
    assert 20 < drawn.result["quantization_psnr"] < 100


def test_way_of_compiling_is_recorded_and_replayed(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str | None] = []

    def compiled(module: Any, **_: Any) -> Any:
        return module

    real = torch._inductor.list_mode_options
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(
        torch._inductor, "list_mode_options", lambda mode, *more: modes.append(mode) or real(mode, *more)
    )
    plain = studio.draw(PROMPT, engine="torch-compile", torch_inference="default")
    tuned = studio.draw(PROMPT, engine="torch-compile", torch_inference="max-autotune-no-cudagraphs")
    assert "torch_inference" not in plain.result
    assert tuned.result["torch_inference"] == "max-autotune-no-cudagraphs"
    assert tuned.paths[0] != plain.paths[0]
    modes.clear()
    studio.draw(recipe=tuned.paths[0])
    assert set(modes) == {"max-autotune-no-cudagraphs"}
