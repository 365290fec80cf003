"""benchmark.py compare: the same work by others, in this interpreter instead of environments of their own."""

import contextlib
import io
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from darkroom.bench.peers import PEERS, Peer
from darkroom.cli.benchmark import run
from darkroom.errors import Failed
from tests.support import Ended, Studio, children_inline, flags, one_line, pixels

REFERENCE = PEERS["diffusers"].name


def compare(studio: Studio, *arguments: str) -> Ended:
    out, err = io.StringIO(), io.StringIO()
    folders = flags(onnx_dir=studio.onnx, engine_dir=studio.engines, output=studio.root / "comparison.jsonl")
    with children_inline(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(["compare", *arguments, *flags(model=studio.model, peer_dir=studio.root / "peers"), *folders])
    return Ended(code, out.getvalue(), err.getvalue())


def lines_of(studio: Studio) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (studio.root / "comparison.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("starts", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_same_work_makes_the_same_pictures(starts: int, studio: Studio) -> None:
    asked = ("--peers-here", "--peer", "diffusers", "--denoising-steps=3", "--batch-size=2", "--prompt=red apple")
    asked += ("--seed=7", f"--cold-starts={starts}", "--engine=openvino")
    ended = compare(studio, *asked)
    assert ended.code == 0, ended.err
    theirs, ours = lines_of(studio)
    assert (ours["contender"], theirs["contender"]) == ("Darkroom (openvino auto)", REFERENCE)
    assert ours["psnr"] > 45 and theirs.get("psnr") is None
    for line in (ours, theirs):
        assert line["stages"].keys() == {"CLIP", "UNet", "VAE-Dec", "Pipeline"} and line["unet_calls"] == 4  # PNDM
        assert line["stages"]["Pipeline"]["count"] == 5 and (line["cold_start"] or {}).get("count", 0) == starts
        assert len(line["pictures"]) == 2 and all(pixels(path).shape == (64, 64, 3) for path in line["pictures"])
    assert theirs["machine"]["packages"]["torch"] == version("torch") and "darkroom" in ours["machine"]["packages"]
    assert "darkroom" not in theirs["machine"]["packages"]
    drawn = studio.draw("red apple", engine="openvino", batch_size=2, denoising_steps=3, seed=7)
    for path, picture in zip(ours["pictures"], drawn.pictures, strict=True):
        np.testing.assert_array_equal(pixels(path), picture)
    again = compare(studio, *asked)
    assert again.code == 0 and "2 of 2 cells are in" in again.out and len(lines_of(studio)) == 2


def test_one_process_does_all_batch_sizes_and_steps(studio: Studio) -> None:
    asked = ("--keep-loaded", "--peers-here", "--peer", "diffusers-bf16", "--engine=torch", "--precision=bf16")
    ended = compare(studio, *asked, "--batch-size", "1", "2", "--denoising-steps=1", "--cold-starts=0")
    assert ended.code == 0, ended.err
    eager, ours, *others = found = lines_of(studio)
    assert [line["settings"]["batch_size"] for line in found] == [1, 1, 2, 2]
    assert [line["contender"] for line in found] == 2 * ["diffusers eager (bf16)", "Darkroom (torch bf16)"]
    assert [line["load_seconds"] for line in others] == [eager["load_seconds"], ours["load_seconds"]]
    assert all(line["psnr"] > 20 and len(line["pictures"]) == line["settings"]["batch_size"] for line in found[1::2])


def test_a_peer_that_cannot_be_there_is_named_and_the_rest_measured(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ensure(peer: Peer, *_: object) -> Path:
        raise Failed(f"no environment for {peer.name}: no network")

    monkeypatch.setattr("darkroom.bench.peers.ensure", ensure)
    ended = compare(studio, "--peer", "openvino-genai", "--engine=openvino", "--denoising-steps=1", "--cold-starts=0")
    assert ended.code == 1 and PEERS["openvino-genai"].name in ended.err.splitlines()[-1]
    assert "no pictures are checked" in ended.err
    assert {line["contender"]: line["error"] and line["error"][-10:] for line in lines_of(studio)} == {
        "Darkroom (openvino auto)": None,
        PEERS["openvino-genai"].name: "no network",
    }


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["--peer", "difusers"], "'diffusers'"),
        (["--full-size", "sd-1.6"], "'sd-1.5'"),
        (["--full-size", "xl-1.0"], "compared with diffusers alone"),
        (["--keep-loaded", "--engine", "openvino", "--peer", "diffusers", "--cold-starts", "0"], "--keep-loaded"),
        (["--keep-loaded", "--engine", "torch"], "--keep-loaded"),
        (["--keep-loaded", "--engine", "torch", "--peer", "diffusers"], "--cold-starts"),
        (["--streams", "2"], "--streams"),
        (["--output", "/"], "--output"),
        (["--repeat", "1"], "--repeat"),
        (["--threads", "1", "2"], "--threads"),
        (["--baseline", "tensorflow"], "'tensorflow'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_refused(arguments: list[str], said: str, tmp_path: Path) -> None:
    err = io.StringIO()
    more = [] if "--output" in arguments else [f"--output={tmp_path / 'x.jsonl'}"]
    with contextlib.redirect_stderr(err):
        code = run(["compare", *arguments, *more, f"--peer-dir={tmp_path / 'peers'}"])
    assert code == 2 and one_line(err.getvalue()) and said in err.getvalue()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_for_full_size_models_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "peers").write_text("no folder")
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        code = run(["compare", "--full-size=sd-turbo", "--engine=openvino", "--peer=diffusers",
                    f"--peer-dir={tmp_path / 'peers'}", f"--output={tmp_path / 'x.jsonl'}"])  # fmt: skip
    assert code == 1 and one_line(err.getvalue()) and "--peer-dir" in err.getvalue()


def test_full_size_models_have_the_published_number_of_weights() -> None:
    """859.5 M and 865.9 M in the UNets, as their model cards and papers count them."""
    import torch
    from diffusers import UNet2DConditionModel

    from darkroom.bench.architectures import MODELS

    for name, millions in {"sd-1.5": 859.5, "sd-turbo": 865.9, "xl-1.0": 2567.5, "xl-refiner-1.0": 2300.0}.items():
        with torch.device("meta"):
            unet = UNet2DConditionModel(**MODELS[name]["unet"])
        weights = sum(weight.numel() for weight in unet.parameters()) / 1e6
        assert weights == pytest.approx(millions, rel=0.02), name
