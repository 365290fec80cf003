"""Command lines and files of prompts that hypothesis makes: each ends in its pictures, which are those made alone, or
in one line and an exit code that says so; never in a traceback."""

import argparse
import json
import random
import shutil
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from darkroom.checkpoint.catalog import TXT2IMG
from darkroom.cli.flags import parser_of
from darkroom.flags import OF_ROW
from darkroom.schedule import SCHEDULERS
from tests.faults.scene import Scene
from tests.support import Ended, Studio, one_line, pixels

SAME_AS_ALONE = 1
"""Of 255: sums of a batch may be rounded another way."""

OWN = {"--help", "--model", "--precision", "--prompts", "--recipe", "--version", "--json", "--dry-run", "--onnx-dir",
       "--engine-dir", "--output-dir"}  # fmt: skip
"""What `common` writes itself, and what makes no pictures."""

SENSIBLE = {
    "height": ["64"], "width": ["64"], "denoising_steps": ["1", "2"], "batch_size": ["1", "2"], "engine": ["openvino"],
    "batch_count": ["1", "2"], "scheduler": ["DDIM", "EulerA"], "guidance_scale": ["0", "1", "7.5"], "seed": ["0", "5"],
    "prompt_syntax": ["plain", "a1111"], "num_warmup_runs": ["0", "1"], "threads": ["1"], "clip_skip": ["0"],
}  # fmt: skip
WILD = [
    "", " ", "0", "-1", "1e400", "nan", "inf", "1_0", "٣", "0x10", "9" * 400, "a", "\0", "\ud800", "é\u202e", "--", "-",
    "=", "None", "true", "[]", "{}", "64.0", "../..", "/", "/dev/null", "~", "a" * 5000, "b\nc", "fp32", "unet=fp8",
]  # fmt: skip
TEXT = st.text(st.characters(exclude_categories=()), max_size=30)


def run(scene: Scene, work: Path, count: int, seed: int = 0) -> Counter[str]:
    """So many: two command lines for each file. Returns how often they ended how."""
    hit, chance = Counter[str](), random.Random(seed)
    studio = scene.copy(work / "fuzzed")

    def end(kind: str, arguments: list[str]) -> None:
        ended = scene.here(studio, *arguments)
        made = check(ended)
        if made and chance.random() < 0.3:
            check_alone(scene, studio, chance.choice(made))
        hit[f"{kind}: exit code {ended.code}"] += 1
        shutil.rmtree(studio.output, ignore_errors=True)
        hidden = [path for path in studio.root.rglob(".*.tmp")]
        assert hidden == []

    def tried(strategy: st.SearchStrategy[list[str]], kind: str, examples: int) -> None:
        if examples == 0:
            return

        @seeded(seed)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def each(arguments: list[str]) -> None:
            end(kind, arguments)

        each()

    tried(lines(studio), "command lines", count - count // 3)
    tried(files(studio), "files of prompts", count // 3)
    return hit


def check(ended: Ended) -> list[Path]:
    """The pictures of a run that ended well; of one that did not, that it says so."""
    assert ended.code in (0, 1, 2), ended
    assert "Traceback" not in ended.err
    if ended.code == 0:
        made = json.loads(ended.out)["images"]
        assert made and all(Path(each["path"]).is_file() for each in made), ended
        return [Path(each["path"]) for each in made]
    said = [line for line in ended.err.splitlines() if line.startswith("demo_txt2img.py: ")]
    assert said, ended
    if ended.code == 2:
        assert one_line(ended.err) or len(said) == 1, ended
    return []


def check_alone(scene: Scene, studio: Studio, path: Path) -> None:
    """The picture is the one that its recipe makes, which is made alone."""
    apart = Studio(studio.root / "alone", studio.model)
    asked = [f"--recipe={path}", f"--model={studio.model}", f"--output-dir={apart.output}", "--json"]
    ended = scene.here(studio, *asked, f"--onnx-dir={studio.onnx}", f"--engine-dir={studio.engines}")
    assert ended.code == 0, ended
    (image,) = json.loads(ended.out)["images"]
    difference = np.abs(pixels(image["path"]).astype(int) - pixels(path)).max()
    assert difference <= SAME_AS_ALONE, f"{path}: {difference}"
    shutil.rmtree(apart.root)


def common(studio: Studio) -> list[str]:
    return [f"--model={studio.model}", "--precision=fp32", "--json", *studio.folders()]


def lines(studio: Studio) -> st.SearchStrategy[list[str]]:
    """Prompts and flags of the script, most with a value that makes sense, and words that are none."""
    actions = [each for each in parser_of(TXT2IMG)._actions if OWN.isdisjoint(each.option_strings)]
    flags = [each for each in actions if each.option_strings]

    def values(action: argparse.Action) -> st.SearchStrategy[list[str]]:
        flag = action.option_strings[0]
        if action.nargs == 0:
            return st.just([flag])
        wild = st.one_of(st.sampled_from(WILD), TEXT, st.integers().map(str), st.floats().map(str))
        likely = SENSIBLE.get(action.dest)
        value = st.one_of(st.sampled_from(likely), st.sampled_from(likely), wild) if likely else wild
        return st.one_of(value.map(lambda each: [f"{flag}={each}"]), value.map(lambda each: [flag, each]))

    sensible = [each for each in flags if each.dest in SENSIBLE]
    usual = st.sampled_from(sensible).flatmap(values)
    odd = st.one_of(st.sampled_from(flags).flatmap(values), TEXT.map(lambda text: [text]))
    words = st.lists(usual, max_size=4).flatmap(
        lambda some: st.lists(odd, max_size=2).map(lambda others: [*chain(*some, *others)])
    )
    prompts = st.lists(st.one_of(st.just("a red apple"), TEXT), min_size=1, max_size=2)
    small = ["--denoising-steps=1", "--engine=openvino"]
    return st.tuples(prompts, words).map(lambda both: [*small, *both[1], *common(studio), "--", *both[0]])


def files(studio: Studio) -> st.SearchStrategy[list[str]]:
    """Files of prompts: rows that make sense, rows that do not, and bytes that are no rows."""
    sensible = {
        "prompt": st.one_of(st.just("a red apple"), TEXT),
        "seed": st.integers(0, 2**32 - 1),
        "steps": st.sampled_from([1, 2]),
        "guidance_scale": st.sampled_from([0, 1.0, 7.5]),
        "scheduler": st.sampled_from(["DDIM", "EulerA"]),
        "num_images": st.sampled_from([1, 2]),
        "height": st.just(64),
        "width": st.just(64),
    }
    junk = st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.sampled_from(list(SCHEDULERS)[:2])),
        lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(TEXT, inner, max_size=2)),
        max_leaves=4,
    )
    fields = st.sampled_from(list(OF_ROW))
    good = st.fixed_dictionaries(
        {"prompt": sensible["prompt"]}, optional={name: each for name, each in sensible.items() if name != "prompt"}
    )
    spoiled = st.tuples(good, st.one_of(fields, TEXT), junk).map(lambda parts: parts[0] | {parts[1]: parts[2]})
    rows = st.lists(good, min_size=1, max_size=3)
    wrong = st.one_of(
        st.lists(st.one_of(good, spoiled, junk), max_size=3).map(_text), st.binary(max_size=60), TEXT.map(_bytes)
    )
    content = st.one_of(rows.map(_text), rows.map(_text), wrong)

    def written(made: tuple[bytes, str]) -> list[str]:
        file = studio.root / f"fuzzed{made[1]}"
        file.write_bytes(made[0])
        return [f"--prompts={file}", "--denoising-steps=1", "--seed=5", "--batch-size=2", "--engine=openvino",
                *common(studio)]  # fmt: skip

    return st.tuples(content, st.sampled_from([".jsonl", ".jsonl", ".txt"])).map(written)


def _text(rows: list[object]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
