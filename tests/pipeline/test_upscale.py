"""`--upscale` is Pillow's Lanczos resampling of the finished picture."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support import SIZE, Studio, assert_refused, pixels, psnr


def larger(picture: np.ndarray, side: int) -> np.ndarray:
    return np.array(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS))


@pytest.mark.parametrize(("factor", "side"), [("2", 2 * SIZE), ("1.5", 96), ("1", SIZE)])
def test_picture_is_the_plain_one_enlarged(factor: str, side: int, studio: Studio) -> None:
    plain = studio.draw("a red cat").pictures[0]
    drawn = studio.draw("a red cat", upscale=factor)
    assert np.array_equal(drawn.pictures[0], larger(plain, side) if side != SIZE else plain)
    assert psnr(studio.draw(recipe=drawn.paths[0]).pictures[0], drawn.pictures[0]) == np.inf


def test_rows_are_enlarged_as_well(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darkroom.serving.planning.run_in_child", lambda call, *arguments, verbose: call(*arguments))
    file = studio.root / "rows.txt"
    file.write_text("a red cat\n")
    ended = studio.here(f"--prompts={file}", f"--model={studio.model}", "--seed=5", "--denoising-steps=3",
                        "--engine=openvino", "--batch-size=1", "--upscale=2", "--quiet", *studio.folders())  # fmt: skip
    assert ended.code == 0, ended.err
    made = pixels(Path(ended.out.strip()))
    assert psnr(made, larger(studio.draw("a red cat").pictures[0], 2 * SIZE)) >= 50


@pytest.mark.parametrize("factor", ["0.5", "9", "nan", "twice"])
def test_factors_that_make_no_picture_larger_are_refused(factor: str, studio: Studio) -> None:
    asked = ["a cat", f"--model={studio.model}", f"--upscale={factor}", *studio.folders()]
    assert_refused(studio.here(*asked), "--upscale")
