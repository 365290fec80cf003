"""The repository as a package: its folders, what it says it needs, and what Git leaves out."""

import ast
import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "demo").rglob("*.py"))

PROVIDED_BY = {
    "PIL": "pillow",
    "aiohttp": "tritonclient",
    "cuda": "cuda-python",
    "google": "protobuf",
    "grpc": "tritonclient",
    "onnx_graphsurgeon": "onnx-graphsurgeon",
    "tensorrt_rtx": "tensorrt-rtx",
}
"""The packages whose modules have another name, or come with a package's extras."""


@pytest.fixture(scope="module")
def pins() -> dict[str, Requirement]:
    lines = (line.split(" #")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def ranges(setup: configparser.ConfigParser, *extras: str) -> list[Requirement]:
    """What setup.cfg asks for: at run time, and in the extras named (all of them without a name)."""
    optional = setup["options.extras_require"]
    texts = [setup["options"]["install_requires"], *(optional[extra] for extra in extras or optional)]
    found = [Requirement(line) for text in texts for line in text.splitlines() if line]
    return [requirement for requirement in found if requirement.name != "darkroom"]


@pytest.mark.parametrize("name", ["demo", "engines", "onnx", "output", "tests"])
def test_folder_stands_at_the_top(name: str) -> None:
    assert (ROOT / name).is_dir()


@pytest.mark.parametrize("name", ["requirements.txt", "setup.cfg", "README.md", "LICENSE", "Makefile"])
def test_file_stands_at_the_top(name: str) -> None:
    assert (ROOT / name).is_file()


@pytest.mark.parametrize("folder", ["engines", "onnx", "output"])
def test_git_keeps_the_readme_of_an_artefact_folder_and_nothing_else(folder: str, tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    shutil.copy(ROOT / ".gitignore", tmp_path)
    for name in ("README.md", "picture.png", "deep/model.onnx", "deep/README.md"):
        file = tmp_path / folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert (ROOT / folder / "README.md").is_file()
    assert untracked(tmp_path, folder) == [f"{folder}/README.md"]


def test_git_ignores_no_source_that_shares_a_name_with_an_artefact_folder(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    shutil.copy(ROOT / ".gitignore", tmp_path)
    names = ["demo/darkroom/engines/openvino.py", "demo/darkroom/models/emoji/unet/model.safetensors"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert untracked(tmp_path, "demo") == names


def untracked(repository: Path, folder: str) -> list[str]:
    command = ["git", "-C", repository, "ls-files", "--others", "--exclude-standard", folder]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def test_every_pin_is_exact(pins: dict[str, Requirement]) -> None:
    assert [str(pin) for pin in pins.values() if [part.operator for part in pin.specifier] != ["=="]] == []


def test_requirements_hold_every_package_the_toolkit_is_built_on(pins: dict[str, Requirement]) -> None:
    models = {"torch", "diffusers", "transformers"}
    graphs = {"onnx", "onnx-graphsurgeon", "polygraphy"}
    assert models | graphs | {"tensorrt-rtx", "cuda-python", "pillow"} <= pins.keys()
    assert str(pins["torch"].specifier) == "==2.13.0"


def test_pins_lie_in_the_ranges_of_setup_cfg(pins: dict[str, Requirement], setup: configparser.ConfigParser) -> None:
    disagreeing = []
    for wanted in ranges(setup):
        pin = pins.get(canonicalize_name(wanted.name))
        if pin and not wanted.specifier.contains(next(iter(pin.specifier)).version):
            disagreeing.append(f"{pin} is outside {wanted}")
    assert disagreeing == []


def test_pins_and_ranges_name_the_same_packages(pins: dict[str, Requirement], setup: configparser.ConfigParser) -> None:
    extras = ("bench", "client", "export", "onnxruntime", "serve", "tensorrt-rtx")
    assert {canonicalize_name(wanted.name) for wanted in ranges(setup, *extras)} == pins.keys()


@pytest.mark.parametrize(
    ("system", "machine", "expected"),
    [
        ("linux", "x86_64", {"tensorrt-rtx", "cuda-python"}),
        ("linux", "aarch64", {"cuda-python"}),
        ("win32", "AMD64", {"tensorrt-rtx", "cuda-python"}),
        ("darwin", "arm64", set()),
    ],
)
def test_nvidia_packages_are_asked_for_only_where_they_exist(
    pins: dict[str, Requirement],
    setup: configparser.ConfigParser,
    system: str,
    machine: str,
    expected: set[str],
) -> None:
    there = {**default_environment(), "sys_platform": system, "platform_machine": machine, "extra": ""}
    for requirements in (pins.values(), ranges(setup, "tensorrt-rtx")):
        asked = {r.name for r in requirements if not r.marker or r.marker.evaluate(there)}
        assert asked & {"tensorrt-rtx", "cuda-python"} == expected


def test_every_import_is_of_a_package_that_is_asked_for(setup: configparser.ConfigParser) -> None:
    asked = {canonicalize_name(requirement.name) for requirement in ranges(setup)}
    # Triton's Python backend has a module for the models that it runs.
    ours = {"darkroom", "triton_python_backend_utils", *sys.stdlib_module_names}
    # Those run in environments of their own, which darkroom.bench.peers says what to install in.
    contenders = ROOT / "demo/darkroom/bench/contenders"
    missing = set()
    for path in SOURCES:
        if path.is_relative_to(contenders):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module or ""]
            else:
                continue
            tops = {module.split(".")[0] for module in modules} - ours
            missing |= {
                f"{path.relative_to(ROOT)}: {top}"
                for top in tops
                if canonicalize_name(PROVIDED_BY.get(top, top)) not in asked
            }
    assert missing == set()


def test_the_package_holds_every_module_and_every_file_of_the_embedded_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from setuptools import Distribution

    monkeypatch.chdir(ROOT)
    distribution = Distribution()
    distribution.parse_config_files(["setup.cfg"])
    build = distribution.get_command_obj("build_py")
    build.finalize_options()
    folders = {ROOT / "demo" / name.replace(".", "/") for name in distribution.packages}
    data = {Path(source) / name for _, source, _, names in build.data_files for name in names}

    modules = {path for path in SOURCES if path.is_relative_to(ROOT / "demo/darkroom")}
    assert {path for path in modules if path.parent not in folders} == set()
    models = {path.relative_to(ROOT) for path in (ROOT / "demo/darkroom/models").rglob("*") if path.is_file()}
    assert {path for path in models - data if path.suffix not in (".py", ".pyc")} == set()
