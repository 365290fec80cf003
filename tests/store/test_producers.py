"""Keys hold the versions of the packages that make an artefact: an upgrade makes it anew, and an absence does not."""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import pytest

from darkroom.checkpoint.folder import open_checkpoint
from darkroom.engines import find_runtime
from darkroom.prepare import Preparer
from darkroom.serving import planning
from darkroom.store import producers
from darkroom.store.producers import MADE_WITH, made_with
from darkroom.store.store import Key, Store
from tests.test_request import request

Install = Callable[[str, str], None]


@pytest.fixture
def upgrade(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Install:
    """Puts a package's metadata of another version in front of all others."""
    monkeypatch.syspath_prepend(tmp_path / "upgraded")

    def install(package: str, version: str) -> None:
        (tmp_path / "upgraded" / f"{package.replace('-', '_')}-{version}.dist-info").mkdir(parents=True)
        producers._installed.cache_clear()

    yield install
    producers._installed.cache_clear()


def keys(model: Path, stores: Path, engine: str) -> dict[str, str]:
    """The digests of a UNet's graph and engine, of a schedule and of a bundle of one."""
    store = Store(stores)
    preparer = Preparer(open_checkpoint(model, store.fingerprints), find_runtime(engine), store, store)
    asked = request(height=64, width=64, engine=engine)
    job = preparer._jobs(asked, {"unet"})["unet"]
    bundle = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparer.engines, "make", lambda key, build: bundle.append(key.digest))
        planning.compiled_schedules(preparer, asked, [planning.schedule_of(preparer, asked)])
    return {
        "graph": preparer._graph_key(job, asked).digest,
        "engine": preparer._engine_key(job, asked).digest,
        "schedule": preparer.schedule_key(asked)[1].digest,
        "bundle": bundle[0],
    }


@pytest.mark.parametrize(
    ("package", "engine", "anew"),
    [
        ("torch", "openvino", {"graph", "engine"}),
        ("diffusers", "openvino", {"graph", "engine", "schedule", "bundle"}),
        ("transformers", "openvino", {"graph", "engine"}),
        ("onnx", "openvino", {"graph", "engine"}),
        ("torch", "jax", {"graph", "engine"}),
        ("diffusers", "jax", {"graph", "engine", "schedule", "bundle"}),
        ("transformers", "jax", {"graph", "engine"}),
        ("onnx", "jax", {"graph"}),
        ("numpy", "openvino", set()),
    ],
)
def test_upgrade_makes_new_keys_of_what_the_package_makes(
    package: str, engine: str, anew: set[str], tiny_model: Path, tmp_path: Path, upgrade: Install
) -> None:
    pytest.importorskip(engine)
    before = keys(tiny_model, tmp_path, engine)
    upgrade(package, "99.1")
    after = keys(tiny_model, tmp_path, engine)
    assert {name for name in before if before[name] != after[name]} == anew


def test_versions_are_those_of_the_metadata() -> None:
    packages = ("torch", "diffusers", "transformers", "onnx", "onnx-graphsurgeon", "no-such-package")
    for package, version in made_with(*packages)[MADE_WITH].items():
        if version is None:
            with pytest.raises(importlib.metadata.PackageNotFoundError):
                importlib.metadata.version(package)
        else:
            assert importlib.metadata.version(package).partition("+")[0] == version


class TestMachineWithoutThem:
    """It finds what another has made: an engine, and the graph that it was built from."""

    @staticmethod
    def key(torch: str | None, onnx: str | None = "1.23.2", device: str = "CPU: here", steps: int = 20) -> Key:
        graph = {"kind": "graph", "fixed": None, MADE_WITH: {"torch": torch, "onnx": onnx}}
        return Key("unet", {"kind": "any", "device": device, "steps": steps, "graph": graph})

    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        store = Store(tmp_path)
        store.make(self.key("2.13.0"), lambda folder: {"size": (folder / "engine").write_bytes(b"engine")})
        return store

    def test_finds_what_any_version_made(self, store: Store) -> None:
        made = store.find(self.key("2.13.0"))
        assert made is not None
        assert store.find(self.key(None)) == made
        assert store.find(self.key(None, None)) == made
        assert store.digest_of(self.key(None), made) == self.key("2.13.0").digest
        assert store.make(self.key(None), lambda folder: pytest.fail("made again")) == made

    def test_finds_what_was_made_for_another_device_that_will_do(self, store: Store) -> None:
        elsewhere = self.key(None, device="CPU: there")
        assert store.find(elsewhere) is None
        assert store.find_for(elsewhere, lambda device: device == "CPU: here")

    def test_finds_nothing_that_differs_in_more(self, store: Store) -> None:
        assert store.find(self.key("2.14.0")) is None
        assert store.find(self.key(None, "1.24.0")) is None
        assert store.find(self.key(None, steps=21)) is None

    def test_finds_nothing_that_is_damaged(self, store: Store) -> None:
        (store.find(self.key("2.13.0")) / "engine").write_bytes(b"broken")
        assert store.find(self.key(None)) is None
