"""What a prompt leaves open is drawn from the image's seed."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from darkroom.errors import InvalidRequest
from darkroom.pipeline.pictures import read_recipe
from darkroom.text.drawing import Drawing
from tests.support import Studio, assert_refused, pixels, psnr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {
        "colour": "red\n\n# not these\n  blue \n{dark|light} green\n",
        "animal/pet": "\ufeffcat\ndog\n",
        "thing": "__colour__ apple\n",
        "circle": "a __circle__\n",
        "empty": "# nothing\n",
    }
    for name, text in files.items():
        path = tmp_path / "wildcards" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "wildcards"


@pytest.mark.parametrize(
    ("prompt", "made"),
    [
        ("a {red|blue} cat", {"a red cat", "a blue cat"}),
        ("{a|b}{c|d}", {"ac", "ad", "bc", "bd"}),
        ("{a|{b|c} d|}", {"a", "b d", "c d", ""}),
        ("a __colour__ __animal/pet__", {f"a {c} {p}" for c in ("red", "blue", "dark green", "light green")
                                         for p in ("cat", "dog")}),
        ("__thing__", {"red apple", "blue apple", "dark green apple", "light green apple"}),
        ("{__animal/pet__|a}", {"cat", "dog", "a"}),
        (r"\{a|b\} {c} __ __a", {"{a|b} {c} __ __a"}),
    ],
)  # fmt: skip
def test_every_choice_comes_and_none_else(prompt: str, made: set[str], folder: Path) -> None:
    drawing = Drawing(folder)
    found = Counter(drawing.draw(prompt, seed) for seed in range(300))
    assert found.keys() == made
    assert min(found.values()) > 300 / len(made) / 4
    assert [drawing.draw(prompt, seed) for seed in range(9)] == [
        Drawing(folder).draw(prompt, seed) for seed in range(9)
    ]


def test_without_a_folder_wildcards_are_words() -> None:
    assert Drawing().draw("__colour__ {a|a}", 1) == "__colour__ a"


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a __color__ cat", "has no color.txt. Did you mean 'colour'?"),
        ("__../secret__", "has no ../secret.txt"),
        ("__circle__", "without end"),
        ("__empty__", "holds no line"),
        ("{2$$a|b}", "$$ is not supported"),
        ("{0.5::a|b}", "0.5:: is not supported"),
    ],
)
def test_what_cannot_be_drawn_is_refused(prompt: str, said: str, folder: Path) -> None:
    (folder.parent / "secret.txt").write_text("secret")
    with pytest.raises(InvalidRequest) as refused:
        Drawing(folder).draw(prompt, 1)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_images_draw_by_their_seeds_and_recipes_say_what(studio: Studio, folder: Path) -> None:
    asked = {"wildcards": folder, "batch_size": 2, "batch_count": 3}
    drawn = studio.draw("a {red|blue|green} __animal/pet__", **asked)
    prompts = [read_recipe(path)["prompt"] for path in drawn.paths]
    assert len(set(prompts)) > 2 and not any(mark in prompt for prompt in prompts for mark in "{|_")
    alone = studio.draw(prompts[3], seed=8).pictures[0]
    assert psnr(drawn.pictures[3], alone) >= 50
    assert (
        studio.draw("a {red|blue|green} __animal/pet__", wildcards=folder, seed=8).result["images"][0]["prompt"]
        == prompts[3]
    )
    for file in folder.rglob("*.txt"):
        file.unlink()
    assert psnr(studio.draw(recipe=drawn.paths[3]).pictures[0], drawn.pictures[3]) == np.inf


def test_rows_draw_for_each_image(studio: Studio, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darkroom.serving.planning.run_in_child", lambda call, *arguments, verbose: call(*arguments))
    file = studio.root / "rows.jsonl"
    long = "the red cat " * 30
    file.write_text(json.dumps({"prompt": f"a {{red|blue {long}}} __animal/pet__", "num_images": 6}) + "\n")
    arguments = [f"--prompts={file}", f"--model={studio.model}", "--seed=5", "--denoising-steps=3", "--json",
                 "--prompt-syntax=a1111", "--batch-size=1", f"--wildcards={folder}", *studio.folders()]  # fmt: skip
    ended = studio.here(*arguments)
    assert ended.code == 0, ended.err
    images = json.loads(ended.out)["images"]
    prompts = [image["prompt"] for image in images]
    assert len(set(prompts)) > 2 and {len(prompt) > 100 for prompt in prompts} == {True, False}
    replayed = studio.draw(recipe=images[0]["path"]).pictures[0]
    assert psnr(pixels(images[0]["path"]), replayed) >= 50
    again = studio.here(*arguments)
    assert "6 of 6 pictures are there already" in again.err


def test_only_prompts_are_drawn(studio: Studio, folder: Path) -> None:
    asked = ["a cat", f"--model={studio.model}", *studio.folders()]
    assert_refused(
        studio.here(*asked, f"--wildcards={folder}", "--negative-prompt={a|b}"), "--negative-prompt", "{a|b}"
    )
    assert_refused(studio.here(*asked, "--wildcards=nowhere"), "--wildcards nowhere is not a folder")
    plain = studio.draw("a {red|blue} cat").result["images"][0]["prompt"]
    assert plain == "a {red|blue} cat"
