"""OpenVINO's devices: AUTO and HETERO over the CPU for real, GPUs and NPUs over a stand-in that computes on the CPU."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openvino
import pytest

from darkroom.cli.doctor import findings
from darkroom.cli.prompt_file import _check_devices
from darkroom.contract import Profile
from darkroom.engines import find_runtime
from darkroom.engines.openvino.devices import members
from darkroom.engines.runtime import Options
from darkroom.errors import InvalidRequest
from darkroom.pipeline.pictures import read_recipe
from darkroom.serving.workers import Orders, Process, on_devices
from tests.support import Diffusers, Studio, assert_refused, psnr

PROMPT = "red apple"
HALF = ["FP32", "FP16", "EXPORT_IMPORT"]


DEVICES = {
    "CPU": ("A processor", ["FP32", "EXPORT_IMPORT"]),
    "GPU.0": ("Arc A770", HALF),
    "GPU.1": ("Arc A770", HALF),
    "GPU.2": ("Iris Xe", HALF),
    "NPU": ("AI Boost", ["FP16", "INT8", "EXPORT_IMPORT"]),
}


class CoreStandIn:
    """A machine with two GPUs of one kind, one of another, and an NPU; `compiled` is what each was asked, and how."""

    def __init__(self) -> None:
        self.core = openvino.Core()
        self.devices = dict(DEVICES)
        self.compiled: list[tuple[str, dict[str, Any]]] = []

    @property
    def available_devices(self) -> list[str]:
        return list(self.devices)

    def get_property(self, device: str, name: str) -> Any:
        full, capabilities = self.devices["GPU.0" if device == "GPU" else device]
        known = {"FULL_DEVICE_NAME": full, "OPTIMIZATION_CAPABILITIES": capabilities, "GPU_DRIVER_VERSION": "1.2.3"}
        return list(known) if name == "SUPPORTED_PROPERTIES" else known[name]

    def read_model(self, *arguments: Any) -> openvino.Model:
        return self.core.read_model(*arguments)

    def compile_model(self, model: openvino.Model, device: str, settings: dict[Any, Any]) -> Any:
        return self._asked("compile_model", model, device, settings)

    def import_model(self, blob: openvino.Tensor, device: str, settings: dict[Any, Any]) -> Any:
        return self._asked("import_model", blob, device, settings)

    def _asked(self, what: str, given: Any, device: str, settings: dict[Any, Any]) -> Any:
        self.compiled.append((device, {str(name): value for name, value in settings.items()}))
        return getattr(self.core, what)(given, "CPU", settings)


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> CoreStandIn:
    core = CoreStandIn()
    monkeypatch.setattr(
        "darkroom.engines.openvino.runtime.openvino", SimpleNamespace(**vars(openvino) | {"Core": lambda: core})
    )
    return core


class TestForReal:
    @pytest.mark.parametrize("device", ["AUTO:CPU", "HETERO:CPU"])
    def test_pictures_are_those_of_diffusers(self, device: str, studio: Studio, diffusers_tiny: Diffusers) -> None:
        drawn = studio.draw(PROMPT, engine="auto", device=device)
        assert drawn.result["request"]["engine"] == "openvino"
        assert psnr(drawn.pictures[0], diffusers_tiny.draw(PROMPT)[0]) >= 45

    def test_recipe_remakes_the_picture_where_it_was_made(self, studio: Studio) -> None:
        drawn = studio.draw(PROMPT, device="auto:cpu")
        again = studio.draw(recipe=drawn.paths[0], output_dir=studio.output / "again")
        assert again.result["device"] == drawn.result["device"] == "AUTO:CPU"
        assert again.result["artefacts"] == drawn.result["artefacts"]
        assert np.array_equal(drawn.pictures[0], again.pictures[0])
        ended = studio.here("--recipe", str(drawn.paths[0]), "--device=CPU", *studio.folders())
        assert_refused(ended, "--device cannot be given beside --recipe")

    def test_file_of_prompts_is_made_there_and_gone_on_with(self, studio: Studio, tmp_path: Path) -> None:
        (tmp_path / "two.txt").write_text("red apple\nblue cat\n")
        arguments = [f"--prompts={tmp_path / 'two.txt'}", f"--model={studio.model}", "--seed=5", "--denoising-steps=3"]
        arguments.append("--batch-size=1")
        for device, there in (("AUTO:CPU", 0), ("AUTO:CPU", 2), ("CPU", 0)):
            ended = studio.here(*arguments, f"--device={device}", "--json", *studio.folders())
            assert ended.code == 0, ended.err
            told = json.loads(ended.out)
            assert told["counts"]["there_already"] == there and told["counts"]["missing"] == 0
            assert read_recipe(Path(told["images"][0]["path"]))["device"] == device

    @pytest.mark.parametrize(
        ("device", "said"),
        [
            ("GPU", "OpenVINO finds no GPU on this machine; here are CPU; where the hardware is there"),
            ("NPU", "OpenVINO finds no NPU on this machine; here are CPU"),
            ("AUTO:GPU.1,CPU", "OpenVINO finds no GPU.1"),
            ("HETERO", "as HETERO:GPU,CPU"),
            ("GPPU", "Did you mean 'GPU'"),
            ("", "--device"),
        ],
    )
    def test_absent_device_is_refused(self, device: str, said: str, studio: Studio) -> None:
        ended = studio.here(PROMPT, f"--model={studio.model}", f"--device={device}", *studio.folders())
        assert_refused(ended, said)

    def test_threads_are_of_the_cpu_alone(self, studio: Studio) -> None:
        ended = studio.here(PROMPT, f"--model={studio.model}", "--device=AUTO", "--threads=1", *studio.folders())
        assert_refused(ended, "--threads has no effect with --engine openvino --device AUTO")

    def test_doctor_names_what_is_here_and_what_is_not(self) -> None:
        found = {each.engine: each for each in findings()}
        devices = {place.name: place for place in found["openvino"].places}
        assert devices["CPU"].why_not is None and "fp32" in devices["CPU"].about
        assert devices["GPU"].why_not and devices["GPU"].command == "apt-get install intel-opencl-icd"
        providers = {place.name: place for place in found["onnxruntime"].places}
        assert providers["cpu"].why_not is None
        assert "onnxruntime-gpu" in providers["cuda"].command


class TestNames:
    def test_stand_for_devices(self, core: CoreStandIn) -> None:
        assert members(core, "GPU") == ["GPU"]
        assert members(core, "AUTO") == core.available_devices
        assert members(core, "AUTO:GPU.1,CPU") == ["GPU.1", "CPU"]
        assert members(core, "AUTO:-CPU,-NPU") == ["GPU.0", "GPU.1", "GPU.2"]
        assert members(core, "BATCH:GPU(16)") == ["GPU"]
        core.devices = {"CPU": DEVICES["CPU"], "GPU": DEVICES["GPU.0"]}
        assert members(core, "GPU.0") == ["GPU.0"]  # the only one is called GPU

    def test_are_part_of_the_key_unless_they_mean_the_same(self, core: CoreStandIn) -> None:
        devices = {name: runtime(name).device() for name in ("CPU", "GPU", "GPU.1", "GPU.2", "NPU", "AUTO:GPU,CPU")}
        assert devices["GPU"] == devices["GPU.1"] == "GPU: Arc A770 (driver 1.2.3)"
        assert len(set(devices.values())) == 5
        assert runtime(None).device() == devices["CPU"]

    def test_offer_the_precisions_that_all_behind_them_have(self, core: CoreStandIn) -> None:
        assert runtime("GPU").precisions() == ("fp32", "fp16")
        assert runtime("NPU").precisions() == ("fp16",)
        assert runtime("AUTO:GPU,CPU").precisions() == ("fp32",)

    def test_of_an_npu_take_engines_of_one_size(self, core: CoreStandIn) -> None:
        runtime("NPU").check(Profile(1, 64, 64))
        with pytest.raises(InvalidRequest, match="--device NPU needs engines of one batch and size"):
            runtime("NPU").check(Profile(None, 64, 64))


class TestOnAGpu:
    def test_picture_is_made_there_and_told_nothing_about_threads(
        self, core: CoreStandIn, studio: Studio, diffusers_tiny: Diffusers
    ) -> None:
        drawn = studio.draw(PROMPT, device="GPU.1")
        assert psnr(drawn.pictures[0], diffusers_tiny.draw(PROMPT)[0]) >= 45
        assert {device for device, _ in core.compiled} == {"GPU.1"}
        for _, settings in core.compiled:
            assert settings.keys() == {"INFERENCE_PRECISION_HINT", "PERFORMANCE_HINT"}
        core.compiled.clear()
        again = studio.draw(PROMPT, device="GPU.0")  # of the same kind: nothing is built again
        assert again.children == [] and {device for device, _ in core.compiled} == {"GPU.0"}
        assert again.result["artefacts"] == drawn.result["artefacts"]

    def test_list_says_for_which_device_engines_are(self, core: CoreStandIn, studio: Studio, capsys: Any) -> None:
        from darkroom.cli.prebuild import run

        studio.draw(PROMPT, device="GPU.2")
        assert run(["list", f"--engine-dir={studio.engines}", f"--onnx-dir={studio.onnx}", "--json"]) == 0
        rows = [row for row in json.loads(capsys.readouterr().out) if row["device"] == "GPU: Iris Xe (driver 1.2.3)"]
        assert {row["name"].split("-")[0] for row in rows} == {"clip", "unet", "vae"}
        assert all(row["unusable"] is None for row in rows)

    def test_each_worker_has_its_own(self, core: CoreStandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        flags = SimpleNamespace(ray=None, devices=["0", "1"])
        _check_devices(flags, runtime("GPU"))
        for devices, said in ((["2"], "Iris Xe"), (["7"], "finds no GPU.7"), (["cpu"], "name its GPUs by number")):
            with pytest.raises(InvalidRequest, match=said):
                _check_devices(SimpleNamespace(ray=None, devices=devices), runtime("GPU"))
        monkeypatch.setattr("darkroom.serving.ray_workers.check_installed", lambda: None)
        with pytest.raises(InvalidRequest, match="--ray hands out cores and NVIDIA GPUs"):
            _check_devices(SimpleNamespace(ray="auto", devices=None), runtime("GPU"))
        with pytest.raises(InvalidRequest, match="--device is NPU"):
            _check_devices(flags, runtime("NPU"))
        started: list[tuple[str, Orders, dict[str, str]]] = []
        monkeypatch.setattr(Process, "__init__", lambda self, *arguments: started.append(arguments[:3]))
        orders = Orders(None, 1, tmp_path, "txt2img", device="GPU")
        for start in on_devices(["0", "1"], orders):
            start(print)
        assert [(name, each.device, variables) for name, each, variables in started] == [
            ("worker 1 (GPU 0)", "GPU.0", {}),
            ("worker 2 (GPU 1)", "GPU.1", {}),
        ]
        assert all(each == replace(orders, device=each.device) for _, each, _ in started)


def runtime(device: str | None) -> Any:
    return find_runtime("openvino", Options(device=device))
