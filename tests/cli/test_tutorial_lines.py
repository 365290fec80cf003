"""Command lines in the shape of NVIDIA's demo and of tutorials: each gets as far as the hub, or is refused by name."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support import Studio, assert_refused

TO_THE_HUB = [
    'demo_txt2img.py "a mountain in spring" --hf-token=hf_x --version 1.5',
    'demo_txt2img.py "a mountain in spring" --hf-token=hf_x --version 1.5 --int8',
    'demo_txt2img_xl.py "a rider on mars" --version xl-1.0 --fp8 --quantization-level 3',
    'demo_img2img.py "a dreamlike valley" --hf-token=hf_x --input-image=INPUT --version 1.5',
    'demo_inpaint.py "a robot on a bench" --hf-token=hf_x --input-image=INPUT --mask-image=INPUT --version 1.5',
    'demo_controlnet.py "a lecture in a bright hall" --controlnet-type depth --hf-token=hf_x --denoising-steps 20 '
    "--input-image INPUT",
    'demo_controlnet.py "a dancer" --controlnet-type openpose canny --controlnet-scale 1.0 0.8 --hf-token=hf_x '
    "--input-image INPUT INPUT",
    'demo_controlnet.py "a colourful bird" --controlnet-type canny --hf-token=hf_x --denoising-steps 20 '
    "--version xl-1.0 --input-image INPUT",
    'demo_txt2img_xl.py "a rider on mars" --hf-token=hf_x --version=xl-1.0',
    'demo_txt2img_xl.py "a rider on mars" --hf-token=hf_x --version=xl-1.0 --enable-refiner '
    "--onnx-refiner-dir=onnx-refiner --engine-refiner-dir=engine-refiner",
    'demo_txt2img_xl.py "a village" --version=xl-1.0 --lora-path "ostris/crayon_style_lora_sdxl" '
    '"ostris/watercolor_style_lora_sdxl" --lora-weight 0.3 0.7 --build-enable-refit',
    'demo_txt2img_xl.py "a physicist" --version xl-1.0 --lora-path "latent-consistency/lcm-lora-sdxl" '
    "--lora-weight 1.0 --denoising-steps 4 --scheduler LCM --guidance-scale 0.0",
    'demo_txt2img_xl.py "a physicist" --version xl-turbo --denoising-steps 1 --scheduler EulerA --guidance-scale 0.0 '
    "--width 512 --height 512",
    'demo_txt2img_xl.py "art deco, realistic" --hf-token=hf_x --version xl-1.0 --batch-size 1 --build-static-batch '
    "--num-warmup-runs 5 --seed 3 --verbose --use-cuda-graph",
    'demo_txt2img_sd3.py "graffiti on a wall" --version sd3 --hf-token=hf_x',
    'demo_txt2img_sd3.py "a dog in a sweater" --version sd3 --input-image INPUT --hf-token=hf_x',
    'demo_txt2img_sd35.py "a mountain in spring" --version=3.5-medium --denoising-steps=30 --guidance-scale 3.5 '
    "--hf-token=hf_x --bf16 --download-onnx-models",
    'demo_txt2img_sd35.py "a mountain in spring" --version=3.5-large --fp8 --download-onnx-models',
    'demo_txt2img_flux.py "a mountain in spring" --hf-token=hf_x',
    'demo_txt2img_flux.py "a mountain in spring" --hf-token=hf_x --bf16 --download-onnx-models',
    'demo_txt2img_flux.py "a mountain in spring" --quantization-level 4 --fp8 --download-onnx-models',
    'demo_txt2img_flux.py "a mountain in spring" --hf-token=hf_x --version="flux.1-schnell" --bf16',
    'demo_txt2img_flux.py "a mountain in spring" --low-vram --ws --t5-ws-percentage 50 '
    "--transformer-ws-percentage 50 --build-static-batch",
    'demo_txt2img_flux.py "a latte" --hf-token=hf_x --lora-path "SebastianBodza/flux_lora_aquarel_watercolor" '
    "--lora-weight 1.0",
    'demo_img2img_flux.py "a house with two floors" --hf-token=hf_x --input-image INPUT --image-strength 0.95',
]


def given(line: str, studio: Studio) -> tuple[Studio, list[str]]:
    """The script of a line, and its words, with a picture in the place of INPUT."""
    script, *words = shlex.split(line)
    picture = studio.root / "input.png"
    Image.new("RGB", (64, 64), "teal").save(picture)
    return replace(studio, script=script), [word.replace("INPUT", str(picture)) for word in words]


@pytest.fixture
def away(studio: Studio, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Studio:
    """No model is on disk, and no hub is in reach."""
    monkeypatch.setattr("darkroom.checkpoint.hub.on_disk", lambda *_: None)
    monkeypatch.setattr("darkroom.cli.opening.on_disk", lambda *_: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return studio


@pytest.mark.parametrize("line", TO_THE_HUB)
def test_line_gets_as_far_as_the_hub(line: str, away: Studio) -> None:
    its, words = given(line, away)
    ended = its.here(*words, f"--framework-model-dir={away.root / 'models'}", *away.folders()[-1:])
    said = [line for line in ended.err.splitlines() if not line.startswith(("warning: ", "fetching "))]
    assert ended.code == 1 and len(said) == 1 and "could not be fetched" in said[0], ended


@pytest.mark.parametrize("offered", [("fp32",), ("fp32", "bf16")])
def test_bf16_acts_where_the_machine_has_it(offered: tuple[str, ...], away: Studio, monkeypatch: Any) -> None:
    monkeypatch.setattr("darkroom.engines.openvino.runtime.OpenVino.precisions", lambda runtime: offered)
    monkeypatch.setattr("darkroom.cli.opening.automatic", lambda options: "openvino")
    asked: list[str] = []
    monkeypatch.setattr("darkroom.cli.main.check_precision", lambda runtime, precision: asked.append(precision))
    its, words = given('demo_txt2img_sd35.py "a mountain" --bf16', away)
    ended = its.here(*words, f"--framework-model-dir={away.root / 'models'}", *away.folders()[-1:])
    assert asked == (["bf16"] if "bf16" in offered else ["auto"])
    assert ("--bf16 does nothing here" in ended.err) == ("bf16" not in offered)


def test_eight_bits_are_a_warning_where_auto_takes_an_engine_without_and_refused_of_tensorrt(away: Studio) -> None:
    its, words = given('demo_txt2img.py "a mountain" --version 1.5 --int8 --fp8 --quantization-level 3', away)
    where = [f"--framework-model-dir={away.root / 'models'}", *away.folders()[-1:]]
    ended = its.here(*words, *where)
    assert ended.code == 1 and ended.err.count("does nothing here") == 3
    for flag in ("--int8", "--fp8", "--quantization-level=3"):
        ended = its.here("a mountain", "--version=1.5", flag, "--engine=tensorrt", *where)
        assert_refused(ended, flag.split("=")[0])
