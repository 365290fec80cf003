"""Fixtures: a tiny model, diffusers over it, and folders that tests share or have to themselves."""

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Two at a time, on all cores each, would be in each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Eight devices for JAX on one CPU; and what it compiles is to be there soon rather than fast.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")

import pytest

from tests.support import Diffusers, Studio, on_shelf, write_tiny_model, write_tiny_sd3_model, write_tiny_xl_model

# What a shell starts in the background ignores Ctrl-C, and so do its children; tests interrupt theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What interrupts a test is for that test, whatever one before it has left."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Tests stay on the CPU, where their references are computed, unless those that take a GPU are asked for."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session", autouse=True)
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is exported and built in the processes of the tests is, once for all of them: see `children_inline`."""
    own = tmp_path_factory.getbasetemp()
    shelf = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shelf"
    shelf.mkdir(exist_ok=True)
    with on_shelf(shelf):
        yield


@pytest.fixture(autouse=True)
def made_anew(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test may have changed the making of is made by itself."""
    with on_shelf(None) if "monkeypatch" in request.fixturenames else contextlib.nullcontext():
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Stable Diffusion of 64x64 pixels, in the hub's layout. To be read only."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def diffusers_tiny(tiny_model: Path) -> Diffusers:
    """The same model in diffusers' own pipeline."""
    return Diffusers(tiny_model)


@pytest.fixture(scope="session")
def tiny_xl_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SDXL of 64x64 pixels, in the hub's layout. To be read only."""
    return write_tiny_xl_model(tmp_path_factory.mktemp("models") / "tiny-xl")


@pytest.fixture(scope="session")
def tiny_refiner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random refiner for it. To be read only."""
    return write_tiny_xl_model(tmp_path_factory.mktemp("models") / "tiny-refiner", refiner=True)


@pytest.fixture(scope="session")
def diffusers_tiny_xl(tiny_xl_model: Path) -> Diffusers:
    """The same model in diffusers' own pipeline."""
    return Diffusers(tiny_xl_model)


@pytest.fixture(scope="session")
def tiny_sd3_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Stable Diffusion 3.5 of 64x64 pixels, in the hub's layout. To be read only."""
    return write_tiny_sd3_model(tmp_path_factory.mktemp("models") / "tiny-sd3", newer=True)


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose graphs and engines are built once for all tests that only use them."""
    return tmp_path_factory.mktemp("stores")


@pytest.fixture
def studio(stores: Path, tiny_model: Path, tmp_path: Path) -> Studio:
    """The tiny model with shared graphs and engines, and an output folder of this test's own."""
    for name in ("onnx", "engines"):
        (stores / name).mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(stores / name)
    return Studio(tmp_path, tiny_model)


@pytest.fixture
def xl_studio(studio: Studio, tiny_xl_model: Path) -> Studio:
    """The tiny SDXL and its script, in the same folders."""
    return replace(studio, model=tiny_xl_model, script="demo_txt2img_xl.py")


@pytest.fixture
def empty_studio(tiny_model: Path, tmp_path: Path) -> Studio:
    """The tiny model and folders where nothing was ever built."""
    root = tmp_path / "studio"
    root.mkdir()
    return Studio(root, tiny_model)
