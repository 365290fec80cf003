"""What a server's environment is made of, and what a model repository refuses: no server is needed."""

import contextlib
import io
from pathlib import Path

import pytest

from darkroom.cli.triton_repository import run
from darkroom.errors import Failed
from darkroom.triton import environment
from tests.support import one_line


def test_onnxruntime_is_served_by_the_build_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    here = environment.requirements(("onnxruntime",))
    assert any(each.startswith("onnxruntime==") for each in here)
    monkeypatch.setattr(environment, "distribution_of", lambda module: "onnxruntime-gpu")
    monkeypatch.setattr(environment.metadata, "version", lambda name: "1.2.3")
    with_cuda = environment.requirements(("onnxruntime",))
    assert {"onnxruntime-gpu[cuda,cudnn]==1.2.3", "cuda-python==1.2.3"} < set(with_cuda)
    assert not any(each.startswith("onnxruntime==") for each in with_cuda)


def test_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(environment.RUNTIME_PACKAGES, "openvino", ("no-such-package",))
    with pytest.raises(Failed, match="pip install no-such-package"):
        environment.requirements(("openvino",))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--provider=cuda"], "--provider cuda is not in this ONNX Runtime"),
        (["--device=GPU"], "--device GPU: OpenVINO finds no GPU"),
        (["--device=CPU", "--provider=cpu"], "--device has no effect with --engine onnxruntime"),
        (["--device=CPU", "--gpus=0"], "--gpus are NVIDIA's"),
        (["--engine=openvino", "--gpus=0"], "--gpus are NVIDIA's"),
    ],
)
def test_place_that_cannot_serve_is_refused(arguments: list[str], said: str) -> None:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert run(["--model=emoji", *arguments]) == 2
    assert one_line(err.getvalue()) and said in err.getvalue() and not out.getvalue()


def test_more_at_a_time_than_memory_holds_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    folders = [f"--{name}-dir={tmp_path / name}" for name in ("onnx", "engine")]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert run(["--model=emoji", f"--model-repository={tmp_path}", "--batches=1000000000", *folders]) == 2
    assert one_line(err.getvalue()) and "1000000000 with 128x128 pixels" in err.getvalue() and not out.getvalue()
    assert list(tmp_path.iterdir()) == []
