"""`--grid`: every combination is the picture made alone, and stands in the sheet where its labels say."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from darkroom.pipeline.pictures import read_recipe
from tests.support import SIZE, Ended, Studio, assert_refused, pixels, psnr

SAME_AS_ALONE = 50
"""dB."""


@pytest.fixture(autouse=True)
def schedules_inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darkroom.serving.planning.run_in_child", lambda call, *arguments, verbose: call(*arguments))


def grid(studio: Studio, *arguments: str) -> Ended:
    return studio.here(*arguments, f"--model={studio.model}", "--engine=openvino", *studio.folders())


def place_of(picture: np.ndarray, sheet: np.ndarray) -> tuple[int, int]:
    """Where in the sheet the picture is, pixel by pixel: its row and column."""
    rows = sliding_window_view(sheet, (SIZE, SIZE, 3))[:, :, 0]
    (found,) = np.argwhere((rows == picture).all(axis=(2, 3, 4)))
    return found[0], found[1]


def test_sheet_has_every_combination_in_its_place(studio: Studio) -> None:
    arguments = ("a red cat", "the dog", "--grid", "steps=2,3", "guidance-scale=1,4,9", "--seed=5", "--json")
    result = json.loads(grid(studio, *arguments).out)
    images = result["images"]
    requests = [read_recipe(Path(image["path"]))["request"] for image in images]
    told = [(each["prompts"][0], each["denoising_steps"], each["guidance_scale"], each["seed"]) for each in requests]
    assert told == [(p, s, g, 5) for p in ("a red cat", "the dog") for s in (2, 3) for g in (1, 4, 9)]
    sheet = pixels(result["sheet"])
    places = [place_of(pixels(image["path"]), sheet) for image in images]
    lines, columns = (sorted({place[side] for place in places}) for side in (0, 1))
    assert places == [(line, column) for line in lines for column in columns]
    assert (len(lines), len(columns)) == (4, 3)
    for label in (sheet[: lines[0], columns[0] :], sheet[lines[0] :, : columns[0]]):
        assert (label == 0).any()  # letters
    alone = studio.draw("the dog", denoising_steps=3, guidance_scale=9, seed=5).pictures[0]
    assert psnr(pixels(images[11]["path"]), alone) >= SAME_AS_ALONE
    assert "12 of 12 pictures are there already" in grid(studio, *arguments).err
    assert Path(grid(studio, *arguments[:-1]).out.strip().splitlines()[-1]).name == "sheet.png"


def test_axes_are_any_fields_of_rows(studio: Studio) -> None:
    result = json.loads(
        grid(studio, "a cat", "--grid", "seed=1,2", "height=64,96", "--denoising-steps=2", "--json").out
    )
    assert [(image["seed"], pixels(image["path"]).shape[0]) for image in result["images"]] == [
        (1, 64),
        (1, 96),
        (2, 64),
        (2, 96),
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--grid", "steps"), "write a flag and its values"),
        (("--grid", "stepps=1,2"), "'steps'"),
        (("--grid", "steps=1,many"), "takes numbers"),
        (("--grid", "steps=1,0"), "--denoising-steps must be 1 or more"),
        (("--grid", "steps=2,2"), "2 stands there twice"),
        (("--grid", "steps=1,2", "denoising-steps=3"), "twice"),
        (("--grid", "scheduler=Euler,Eular"), "'Euler'"),
        (("--grid", "steps=1,2", "--denoising-steps=4"), "--denoising-steps cannot be given beside --grid"),
        (("--grid", "steps=1,2", "--prompts=file.txt"), "beside --prompts"),
        (("--grid", "steps=1,2", "--batch-count=4"), "--batch-count cannot be given beside --grid"),
        (("--grid", "steps=1,2", "--recipe=x.png"), "--recipe"),
    ],
)
def test_what_is_no_grid_is_refused(arguments: tuple[str, ...], said: str, studio: Studio) -> None:
    assert_refused(grid(studio, *(() if "--recipe=x.png" in arguments else ("a cat",)), *arguments), said)
    assert not studio.output.exists() or not any(studio.output.iterdir())


def test_grid_needs_a_prompt(studio: Studio) -> None:
    assert_refused(grid(studio, "--grid", "steps=1,2"), "needs a prompt")
