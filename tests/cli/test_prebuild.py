"""build_engines.py: what it builds, what it lists, and what it refuses."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from darkroom.cli.prebuild import run
from tests.support import Ended, Studio, children_inline, flags, listing, one_line

PROMPT = "red apple"


def prebuild(studio: Studio, command: str, *arguments: str, **values: Any) -> Ended:
    """Runs build_engines.py in this process."""
    out, err = io.StringIO(), io.StringIO()
    folders = flags(onnx_dir=studio.onnx if command == "build" else None, engine_dir=studio.engines)
    with children_inline(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([command, *arguments, *flags(**values), *folders])
    return Ended(code, out.getvalue(), err.getvalue())


def rows(ended: Ended) -> list[dict[str, Any]]:
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


def test_what_was_built_is_all_that_a_run_needs(empty_studio: Studio) -> None:
    made = rows(prebuild(empty_studio, "build", "--json", model=empty_studio.model, engine="openvino"))
    assert {row["engine"].split("-")[0] for row in made} == {"clip", "unet", "vae", "vae_encoder"}
    assert all(row["made"] and row["unusable"] is None and row["bytes"] > 0 for row in made)
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 2**26 for row in made)
    drawn = empty_studio.draw(PROMPT, engine="openvino")
    assert "build_engine" not in drawn.children and "export_stage" not in drawn.children


def test_a_second_time_nothing_is_built(empty_studio: Studio) -> None:
    arguments = ("--json", f"--model={empty_studio.model}", "--engine=onnxruntime", "--batch-size", "1", "2")
    first = rows(prebuild(empty_studio, "build", *arguments))
    before = listing(empty_studio.engines, empty_studio.onnx)
    again = rows(prebuild(empty_studio, "build", *arguments))
    assert listing(empty_studio.engines, empty_studio.onnx) == before
    assert not any(row["made"] for row in again)
    assert [row["folder"] for row in again] == [row["folder"] for row in first]
    assert sum("b2-64x64" in row["engine"] for row in again) == 2


def test_several_engines_and_precisions_in_one_call(empty_studio: Studio) -> None:
    pytest.importorskip("tensorrt_rtx")
    ended = prebuild(
        empty_studio,
        "build",
        "--engine",
        "openvino",
        "tensorrt",
        "--verbose",
        model=empty_studio.model,
        precision="fp32",
    )
    assert ended.code == 0, "engines for another machine are a success here"
    assert "unet-" in ended.out and "openvino" in ended.out and "tensorrt_rtx" in ended.out
    listed = rows(prebuild(empty_studio, "list", "--json"))
    (unet,) = (row for row in listed if "unet" in row["engine"] and "tensorrt" in row["engine"])
    assert unet["layers"] > 50 and unet["device"] == "8.0 and later"
    assert unet["tensors"]["engine.plan"]["latents"]["most"] == [1, 4, 8, 8]
    shown = prebuild(empty_studio, "list", "--verbose")
    assert "input guidance_scale: FLOAT [1]" in shown.out
    assert "4 cannot be used here: there is no NVIDIA driver on this machine." in shown.out


def test_an_engine_of_another_version_or_machine_is_listed_as_such(studio: Studio) -> None:
    studio.draw(PROMPT, engine="openvino")
    manifest = next(Path(studio.engines).glob("unet*openvino*/manifest.json"))
    whole = manifest.read_text()
    try:
        for field, value, said in (("version", "1.0", "built with 1.0"), ("device", "CPU: Z80", "built for CPU: Z80")):
            facts = json.loads(whole)
            facts["key"][field] = value
            manifest.write_text(json.dumps(facts))
            row = next(r for r in rows(prebuild(studio, "list", "--json")) if r["folder"] == str(manifest.parent))
            assert row["unusable"].startswith(said)
    finally:
        manifest.write_text(whole)


def test_an_empty_store_is_said_to_be_empty(empty_studio: Studio) -> None:
    assert prebuild(empty_studio, "list").out == "no engines are there yet.\n"
    assert rows(prebuild(empty_studio, "list", "--json")) == []
    assert not empty_studio.engines.exists()


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["build", "--version", "emojy"], "'emoji'"),
        (["build", "--engine", "torch"], "--engine torch builds nothing"),
        (["build", "--engine", "opnvino"], "'openvino'"),
        (["build", "--precision", "fp12"], "fp12"),
        (["build", "--batch-size", "0"], "--batch-size"),
        (["build", "--engine", "openvino", "--ws"], "--ws"),
        (["build", "--engine", "openvino", "--dynamic-batches", "1", "2", "3"], "--dynamic-batches"),
        (["build", "--height", "100"], "--height"),
        (["build", "--height", "0"], "--height"),
        (["build", "--batch-size", "2", "--build-dynamic-batch"], "--batch-size has nothing to act on"),
        (["build", "--width", "128", "--build-dynamic-shape"], "--width has nothing to act on"),
        (["build", "--presicion", "fp16"], "'--precision'"),
        (["build", "--engine", "openvino", "--optimization-level", "0"], "--optimization-level"),
        (["list", "--onnx-dir", "x"], "--onnx-dir"),
        (["build", "--model", "/nowhere/model"], "/nowhere/model"),
        (["bild"], "bild"),
        ([], "COMMAND"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_refused(empty_studio: Studio, arguments: list[str], said: str) -> None:
    out, err = io.StringIO(), io.StringIO()
    folders = flags(onnx_dir=empty_studio.onnx, engine_dir=empty_studio.engines) if "build" in arguments else []
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([*arguments, *folders])
    assert code == 2 and one_line(err.getvalue()) and said in err.getvalue() and not out.getvalue()
    assert not empty_studio.engines.exists()


def test_a_reader_that_has_had_enough_is_no_error(studio: Studio) -> None:
    import subprocess
    import sys

    from tests.support import ROOT

    studio.draw(PROMPT, engine="openvino")
    command = [sys.executable, str(ROOT / "demo" / "build_engines.py"), "list", f"--engine-dir={studio.engines}"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=studio.environment())
    child.stdout.close()
    assert child.stderr.read() == b"" and child.wait() == 1
