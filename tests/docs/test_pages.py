"""What the pages point to is there: files, headings, flags; and the README stays short."""

import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

from tests.docs.pages import CODE, EVERY_PAGE, LINK, PAGES, README, anchors, blocks, prose
from tests.docs.scripts import run_here
from tests.support import ROOT

MOST_BYTES = 9_000
"""Of a README that is read to its end."""

PLACES = ("demo", "tests", "benchmarks", "docs", "scripts", "tools", "training")

MADE_LATER = {"training/runs/"}
"""Folders that a script makes."""

HELP = {
    "demo/demo_txt2img.py": ([],),
    "demo/demo_txt2img_xl.py": ([],),
    "demo/demo_turbo.py": ([],),
    "demo/demo_img2img.py": ([],),
    "demo/demo_txt2img_sd3.py": ([],),
    "demo/demo_txt2img_sd35.py": ([],),
    "demo/demo_inpaint.py": ([],),
    "demo/demo_controlnet.py": ([],),
    "demo/demo_txt2img_flux.py": ([],),
    "demo/demo_img2img_flux.py": ([],),
    "demo/build_engines.py": (["build"], ["list"], ["verify"], ["clean"], ["export"], ["import"], ["doctor"]),
    "demo/benchmark.py": (["run"], ["report"], ["compare"]),
    "demo/build_triton_repository.py": ([],),
    "demo/serve.py": ([],),
    "demo/serve_triton.py": ([],),
    "demo/client.py": ([],),
    "benchmarks/gpu_check.py": ([],),
}
"""The scripts that pages are about, and the commands of each."""

OF_OTHERS = {"--depth", "--extra-index-url"}
"""Flags of git and pip."""


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", EVERY_PAGE, ids=named)
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(prose(page)):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", EVERY_PAGE, ids=named)
def test_every_path_and_module_that_is_named_is_there(page: Path) -> None:
    code = CODE.findall(prose(page))
    paths = [text for text in code if re.fullmatch(rf"({'|'.join(PLACES)})/[\w./-]*", text)]
    assert [path for path in paths if path not in MADE_LATER and not (ROOT / path).exists()] == []
    modules = [text for text in code if re.fullmatch(r"darkroom(\.[a-z_]+)+", text)]
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []


def test_every_page_is_reached_from_the_readme() -> None:
    reached, to_read = set(), [README]
    while to_read:
        page = to_read.pop()
        if page in reached:
            continue
        reached.add(page)
        links = (link.partition("#")[0] for link in LINK.findall(prose(page)))
        to_read += [(page.parent / link).resolve() for link in links if link.endswith(".md") and "//" not in link]
    assert set(PAGES) <= reached


def test_readme_is_short() -> None:
    assert len(README.read_bytes()) <= MOST_BYTES


@cache
def known_flags() -> set[str]:
    """Every flag that a script says it has."""
    helps = [run_here(script, *command, "--help").out for script, commands in HELP.items() for command in commands]
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", "\n".join(helps)))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_flag_that_is_named_is_known(page: Path) -> None:
    code = "\n".join([*CODE.findall(prose(page)), *blocks(page)])
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*(?![\w-])", code))
    assert flags - OF_OTHERS - known_flags() == set()
