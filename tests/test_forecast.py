"""What `--dry-run` says of disk and memory is what making and running engines then takes."""

import json
from pathlib import Path
from typing import Any

import pytest

import darkroom.forecast
from benchmarks.memory import measured
from darkroom.bench.architectures import write_model
from darkroom.checkpoint.catalog import EMBEDDED
from darkroom.errors import InvalidRequest
from darkroom.forecast import MARGIN, Planned, refuse_what_cannot_fit
from darkroom.processes import memory
from darkroom.request import Request
from tests.support import Studio, one_line

GB = 10**9


def request_of(pixels: int, batch: int = 1) -> Request:
    sizes: dict[str, Any] = {"height": pixels, "width": pixels, "batch_size": batch}
    return Request(
        model="a model",
        prompts=("an apple",),
        denoising_steps=2,
        guidance_scale=7.5,
        engine="openvino",
        precision="fp32",
        **sizes,
    )


def off(lines: list[dict[str, Any]]) -> list[str]:
    """What was measured further from its forecast than it may be."""
    pairs = [(f"{line['stage']} {line['work']}", line["forecast"], line["peak"]) for line in lines]
    pairs += [(f"{line['stage']} disk", line["disk_forecast"], line["disk"]) for line in lines if "disk" in line]
    wrong = [(what, said, found) for what, said, found in pairs if not abs(said - found) <= MARGIN * found]
    return [f"{what}: {said:,} forecast, {found:,} measured" for what, said, found in wrong]


def test_forecasts_hold_for_an_embedded_model(tmp_path: Path) -> None:
    lines = measured(EMBEDDED / "emoji", "openvino", request_of(128), ["vae"], tmp_path)
    assert len(lines) == 3 and not off(lines)


@pytest.mark.slow
@pytest.mark.parametrize("pixels, batch", [(128, 1), (256, 4)])
@pytest.mark.parametrize("model", ["emoji", "emoji-xl"])
def test_forecasts_hold_for_every_stage_of_embedded_models(model: str, pixels: int, batch: int, tmp_path: Path) -> None:
    assert not off(measured(EMBEDDED / model, "openvino", request_of(pixels, batch), [], tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, pixels, works", [("sd-1.5", 512, ("export", "build", "run")), ("xl-1.0", 1024, ("export", "run"))]
)
def test_forecasts_hold_for_full_size_networks(model: str, pixels: int, works: tuple[str, ...], tmp_path: Path) -> None:
    folder = write_model(model, tmp_path / "model", ["unet", "vae"])
    lines = measured(folder, "openvino", request_of(pixels), ["unet", "vae"], tmp_path)
    assert not off([line for line in lines if line["work"] in works])


@pytest.mark.parametrize("words, planned", [
    ("GB of memory", Planned("unet", None, make=30 * GB)),
    ("GB of memory", Planned("unet", None, run=30 * GB)),
    ("GB are free", Planned("unet", None, Path("engines"), disk=14 * GB)),
])  # fmt: skip
def test_what_clearly_cannot_fit_is_refused(words: str, planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("machine_memory", "free_space"):
        monkeypatch.setattr(darkroom.forecast, name, lambda *_: 10 * GB)
    with pytest.raises(InvalidRequest, match=words):
        refuse_what_cannot_fit([planned])
    for name in ("machine_memory", "free_space"):
        monkeypatch.setattr(darkroom.forecast, name, lambda *_: 11 * GB)
    refuse_what_cannot_fit([planned])


def test_where_memory_is_not_known_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(darkroom.forecast, "machine_memory", lambda: None)
    refuse_what_cannot_fit([Planned("unet", None, make=10**15), Planned("unet", None)])


def test_a_run_that_cannot_fit_makes_nothing(empty_studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(darkroom.forecast, "free_space", lambda _: 1000)
    ended = empty_studio.here("an apple", f"--model={empty_studio.model}", *empty_studio.folders())
    assert ended.code == 2 and one_line(ended.err) and "free" in ended.err
    assert not empty_studio.engines.exists() and not empty_studio.onnx.exists()


def test_a_dry_run_of_a_script_makes_nothing_and_tells_what_is_to_be_made(empty_studio: Studio) -> None:
    asked = ("an apple", f"--model={empty_studio.model}", "--engine=openvino", "--json", *empty_studio.folders())
    ended = empty_studio.here(*asked, "--dry-run")
    rows = json.loads(ended.out)
    assert ended.code == 0 and not any(row["folder"] for row in rows)
    assert all(row["make"] and row["disk"] for row in rows if row["place"])
    assert not empty_studio.engines.exists() and not empty_studio.onnx.exists()


def test_in_offline_mode_a_dry_run_says_that_a_model_is_missing(empty_studio: Studio) -> None:
    ended = empty_studio.here("an apple", "--model=nobody/nothing", "--dry-run", "--json", *empty_studio.folders())
    (row,) = json.loads(ended.out)
    assert ended.code == 0 and row["what"] == "nobody/nothing" and "HF_HUB_OFFLINE" in row["remark"]


@pytest.mark.parametrize("lines, files, limit", [
    ("0::/a/b\n", {"a/memory.max": "5000\n", "a/b/memory.max": "max\n"}, [5000]),
    ("4:memory:/gone\n1:cpu:/gone\n", {"memory/memory.limit_in_bytes": "7000\n"}, [7000]),
    ("0::/\n", {}, []),
])  # fmt: skip
def test_limits_of_cgroups_count(lines: str, files: dict[str, str], limit: list[int], tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "membership").write_text(lines)
    assert [*memory._limits(tmp_path, tmp_path / "membership")] == limit
